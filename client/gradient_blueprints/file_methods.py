"""The methods of both clients on the files of checkpoints, each written once."""

from __future__ import annotations

import base64
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

from gradient_blueprints.cache import digest_of_file
from gradient_blueprints.calls import PAGE_SIZE, Checkpointish, checkpoint_path, listing, method, query_of_next, some
from gradient_blueprints.canonical import DIGEST_PREFIX
from gradient_blueprints.downloads import Downloading
from gradient_blueprints.errors import (
    ApiError,
    ConfigurationError,
    ConnectionFailed,
    InternalError,
    RateLimited,
    ServiceUnavailable,
    UnexpectedAnswer,
    UploadConflict,
)
from gradient_blueprints.file_models import (
    FILE_PATH_PATTERN,
    FILE_SUFFIXES,
    LONGEST_FILE_PATH,
    PICKLE_SUFFIXES,
    CheckpointFile,
    CheckpointFilePage,
)
from gradient_blueprints.transport import PASSING_STATUSES, FilePart, Pause, Request, Steps, Stream, Work, jitter

DEEPEST = 4  # names in a path
MOST_RESTARTS = 2
SETTLING = 0.5  # seconds in which the registry sees that a connection broke, and keeps what had arrived on it
CUT_SHORT = (ConnectionFailed, ServiceUnavailable, InternalError, UnexpectedAnswer)

logger = logging.getLogger("gradient_blueprints")

UploadProgress = Callable[[str, int, int], None]
"""Told the path of a file, how many of its bytes the registry has or is being sent, and how many there are."""


class FileMethods(Downloading):
    """Upload, list, fetch and delete."""

    @method
    def upload_checkpoint(
        self,
        folder: str | os.PathLike[str],
        model_id: str,
        checkpoint: Checkpointish,
        *,
        progress: UploadProgress | None = None,
    ) -> Steps[tuple[CheckpointFile, ...]]:
        """Put a folder as `save_pretrained` writes it into the registry's store, for its workers to profile.

        Weights (safetensors), configuration, tokenizer and texts (.txt, .jsonl, .parquet) are sent; anything else
        stays, as does a subfolder with weights, which is a checkpoint of its own. Weights that exist in a pickled
        format only are refused. A file whose upload broke off is gone on with, also by a later call; one that is
        there already is not sent again. Only your lab and the workers can read what you upload.

            client.upload_checkpoint("checkpoints/0.8", "foundation-7b", 0.8)
            client.submit_checkpoint("foundation-7b", 0.8, source="store", data={"bio": "store:texts/bio.jsonl"})
        """
        paths = yield Work(lambda: _uploadable(Path(folder)))
        there = {file.path: file for file in (yield from self._listed(model_id, checkpoint))}
        uploaded = []
        for path, source in paths.items():
            file = yield from self._upload(source, model_id, checkpoint, path, there.get(path), progress)
            uploaded.append(file)
        return tuple(uploaded)

    @method
    def upload_checkpoint_file(
        self,
        file: str | os.PathLike[str],
        model_id: str,
        checkpoint: Checkpointish,
        path: str | None = None,
        *,
        progress: UploadProgress | None = None,
    ) -> Steps[CheckpointFile]:
        """Put one file beside a checkpoint's others, a text say; `path` is its name there, its own unless given."""
        name = Path(file).name if path is None else path
        there = {known.path: known for known in (yield from self._listed(model_id, checkpoint))}
        return (yield from self._upload(Path(file), model_id, checkpoint, name, there.get(name), progress))

    @listing
    def list_checkpoint_files(
        self, model_id: str, checkpoint: Checkpointish, *, lab: str | None = None
    ) -> Stream[CheckpointFile]:
        """What your lab has uploaded of a checkpoint; `lab` is for workers and administrators."""
        path = checkpoint_path(model_id, checkpoint, "files")
        yield from self._pages(CheckpointFilePage, "files", path, some(lab=lab), None)

    @method
    def fetch_checkpoint_file(
        self,
        model_id: str,
        checkpoint: Checkpointish,
        file: CheckpointFile,
        path: str | os.PathLike[str] | None = None,
    ) -> Steps[Path]:
        """A listed file at `path`, or in the cache: streamed, resumed, and there only once its digest is verified."""
        address = f"{_address(model_id, checkpoint, file.path)}?{urlencode(some(lab=file.lab))}"
        return (yield from self._fetch_file(address, file.digest, None if path is None else Path(path)))

    @method
    def delete_checkpoint_file(self, model_id: str, checkpoint: Checkpointish, path: str) -> Steps[None]:
        """Remove a file of your lab from the registry's store."""
        yield from self._exchange(Request("DELETE", _address(model_id, checkpoint, path), repeatable=False))

    # --- steps

    def _listed(self, model_id: str, checkpoint: Checkpointish) -> Steps[list[CheckpointFile]]:
        found: list[CheckpointFile] = []
        path, query = checkpoint_path(model_id, checkpoint, "files"), {"limit": str(PAGE_SIZE)}
        while True:
            page = yield from self._read(CheckpointFilePage, path, query)
            found += page.files
            if page.next is None:
                return found
            query = query_of_next(page.next)

    def _upload(
        self,
        source: Path,
        model_id: str,
        checkpoint: Checkpointish,
        path: str,
        known: CheckpointFile | None,
        progress: UploadProgress | None,
    ) -> Steps[CheckpointFile]:
        if path.lower().endswith(PICKLE_SUFFIXES):
            raise ConfigurationError(_pickled([path]))
        digest, size = yield Work(lambda: (digest_of_file(source), source.stat().st_size))
        address = _address(model_id, checkpoint, path)
        same = known is not None and (known.digest, known.size) == (digest, size)
        offset = known.received if known is not None and same else 0
        if progress is not None:
            progress(path, offset, size)
        if known is not None and same and known.complete:
            return known
        headers = {
            "Content-Type": "application/octet-stream",
            "Upload-Length": str(size),
            "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest.removeprefix(DIGEST_PREFIX))).decode()}:",
        }
        failures = restarts = 0
        deadline = time.monotonic() + self.timeout
        while True:
            if (yield Work(lambda: source.stat().st_size)) != size:
                raise ConfigurationError(f"{source} changed while it was sent; call again once it is written.")
            sending = FilePart(source, offset, _counting(progress, path, offset, size))
            request = Request("PUT", address, {}, headers | {"Upload-Offset": str(offset)}, sending, repeatable=False)
            failure: Exception | None = None
            left = deadline - time.monotonic()
            try:
                answer = yield from self._exchange(request, silence=self.timeout)
            except UploadConflict as conflict:
                received = conflict.extensions.get("received")
                failure = conflict
                if not isinstance(received, int):  # overtaken by another request, our own perhaps that broke off
                    received = yield from self._received(address)
            except CUT_SHORT as cut:
                if isinstance(cut, UnexpectedAnswer) and cut.status not in PASSING_STATUSES:
                    raise
                wait = (cut.retry_after if isinstance(cut, ApiError) else None) or 0.0
                if wait > max(0.0, left):  # asked to come back later than there is time for
                    raise
                failure = cut
                yield Pause(max(SETTLING, wait))
                received = yield from self._received(address)
            else:
                file = answer.parse(CheckpointFile)
                if file.complete:
                    return file
                received = file.received
                if received == size:  # it is being verified, and that is progress too
                    deadline = time.monotonic() + self.timeout
            if received < offset:
                restarts += 1
                if restarts > MOST_RESTARTS:
                    raise ConnectionFailed(f"The registry does not keep what it is sent of {path}: {failure}.")
            failures = 0 if received > offset else failures + 1
            if received > offset:
                deadline = time.monotonic() + self.timeout
            elif failure is not None and time.monotonic() > deadline:
                raise ConnectionFailed(f"No progress with {path} for {self.timeout:g} s: {failure}") from failure
            logger.debug("%s goes on at byte %d: %s", path, received, failure or "it is not complete yet")
            offset = received
            if progress is not None:
                progress(path, offset, size)
            yield Pause(jitter(failures + 1))

    def _received(self, address: str) -> Steps[int]:
        """How much of a file the registry has."""
        try:
            answer = yield from self._exchange(Request("HEAD", address))
        except (RateLimited, ServiceUnavailable):
            raise
        except (ApiError, UnexpectedAnswer):  # the answer to a HEAD has no body that could tell why; the PUT's has
            return 0
        offset = answer.headers.get("upload-offset", "")
        return int(offset) if re.fullmatch(r"\d{1,18}", offset) else 0


def _address(model_id: str, checkpoint: Checkpointish, path: str) -> str:
    _check_path(path)
    return f"{checkpoint_path(model_id, checkpoint, 'files')}/{quote(path)}"


def _check_path(path: str) -> None:
    if not re.fullmatch(FILE_PATH_PATTERN, path) or len(path) > LONGEST_FILE_PATH:
        raise ConfigurationError(
            f"{path!r} is no name for a file in the registry: give letters, digits and ._-, in at most {DEEPEST - 1} "
            f"folders and {LONGEST_FILE_PATH} characters."
        )


def _counting(progress: UploadProgress | None, path: str, offset: int, size: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    sent = offset

    def count(chunk: int) -> None:
        nonlocal sent
        sent += chunk
        progress(path, sent, size)

    return count


def _uploadable(folder: Path) -> dict[str, Path]:
    """The files of a folder that may be sent, by their path in it; a subfolder with weights is another checkpoint."""
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder; give one written by model.save_pretrained(folder).")
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder, DEEPEST)}
    others = {file.parent for path, file in found.items() if path.endswith(".safetensors")} - {folder}
    sent = {
        path: file
        for path, file in found.items()
        if path.lower().endswith(FILE_SUFFIXES) and others.isdisjoint(file.parents)
    }
    if not any(path.endswith(".safetensors") for path in sent):
        if others:
            raise ConfigurationError(f"{folder} itself holds no safetensors; give {min(others)}, say.")
        pickled = [path for path in found if path.lower().endswith(PICKLE_SUFFIXES)]
        if pickled:
            raise ConfigurationError(_pickled(pickled))
        raise ConfigurationError(f"{folder} holds no safetensors; give a folder written by model.save_pretrained.")
    for path in sent:
        _check_path(path)
    if left := sorted(found.keys() - sent.keys()):
        logger.info("not uploaded: %s", ", ".join(left))
    return dict(sorted(sent.items(), key=lambda item: (item[0].endswith(".safetensors"), item[0])))


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth > 1 and not path.is_symlink():
                yield from _files(path, depth - 1)
        elif path.is_file():
            yield path


def _pickled(paths: list[str]) -> str:
    return (
        f"{paths[0]} is in a format that can run code when it is read, and is not uploaded; "
        "save the weights as safetensors: model.save_pretrained(folder)."
    )
