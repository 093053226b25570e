"""The local cache: contents by digest, and what a registry last answered to a question.

    FOLDER/contents/ab/cdef...     bytes whose sha256 is abcdef...: blueprints and attachments
    FOLDER/answers/0123...json     one question to one registry -> digest, version, ETag
    FOLDER/unfinished/             files on their way in; renamed when complete

Processes and threads share a folder without locks: an entry appears by one rename and never
changes. Contents are checked against their digest, and answers against their question, whenever
they are read; what does not hold is removed and counts as absent. Losing an entry, or the whole
folder, at any moment costs a download and nothing else.

Who may read the folder may read everything in it, whatever key fetched it. A new folder is
therefore made for its owner alone (0700); give it wider rights only among people who may read the
same registries.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from gradient_blueprints.canonical import DIGEST_PREFIX, digest_of
from gradient_blueprints.errors import ConfigurationError, UnexpectedAnswer
from gradient_blueprints.models import DEFER_BUILD, Digest, Warning_

DEFAULT_MAX_BYTES = 20 * 1024**3
CHUNK = 1 << 20
KEPT = 0o444  # rights of an entry: whoever writes to a path that came from the cache is told
ABANDONED_AFTER = 24 * 3600.0  # seconds; an unfinished file this old has lost its process
RECENT = 3600.0  # seconds; what was used this recently is never trimmed, someone may hold its path

logger = logging.getLogger("gradient_blueprints")


class Question(BaseModel):
    """What was asked of which registry."""

    model_config = ConfigDict(frozen=True, defer_build=DEFER_BUILD)

    registry: str
    path: str
    query: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, registry: str, path: str, query: Mapping[str, str] | None = None) -> Question:
        return cls(registry=registry, path=path, query=tuple(sorted((query or {}).items())))


class Remembered(BaseModel):
    """What a registry answered to a question about a blueprint."""

    model_config = ConfigDict(frozen=True, defer_build=DEFER_BUILD)

    question: Question
    digest: Digest
    version: int
    lab: str
    etag: str | None = None
    warnings: tuple[Warning_, ...] = ()
    seen_at: datetime


class Partial:
    """A file on its way into place: hashed as it is written, taken only when its digest is right."""

    def __init__(self, file: BinaryIO, digest: str, place: Path) -> None:
        self.place = place
        self._file = file
        self._digest = digest
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._sha256.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._sha256 = hashlib.sha256()
        self.size = 0

    @property
    def complete(self) -> bool:
        return DIGEST_PREFIX + self._sha256.hexdigest() == self._digest

    def verify(self) -> None:
        """Raises UnexpectedAnswer when the bytes are not the ones that the digest names."""
        if not self.complete:
            raise UnexpectedAnswer(
                f"The {self.size} bytes that were received as {self._digest} have another digest; "
                "nothing was kept. Something between here and the registry alters what it sends."
            )


class NotKept(Exception):
    """The cache cannot take all of a file: its disk is full, say."""


class Cache:
    """The cache in `folder`; None keeps nothing.

    At most about `max_bytes` are kept: the longest unused entries go first, answers among them.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._untrimmed = max_bytes  # bytes stored since the last look at the whole folder; look at the first store
        self._warned = False

    def __repr__(self) -> str:
        return f"the cache {self.folder}" if self.folder else "the cache (which is off)"

    # --- contents

    def read(self, digest: str) -> bytes | None:
        """The content of that digest; None when it is absent or was damaged."""
        path = self._content_path(digest)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if digest_of(content) != digest:
            self._drop(path, f"its bytes are no longer those of {digest}")
            return None
        _touch(path)
        return content

    def locate(self, digest: str) -> Path | None:
        """The file that holds the content of that digest, verified now; None when it is absent or was damaged."""
        path = self._content_path(digest)
        if path is None:
            return None
        try:
            found = digest_of_file(path)
        except OSError:
            return None
        if found != digest:
            self._drop(path, f"its bytes are no longer those of {digest}")
            return None
        _touch(path)
        return path

    def store(self, digest: str, content: bytes) -> None:
        """Keep `content`, whose digest the caller has verified."""
        path = self._content_path(digest)
        if path is not None:
            self._put(path, content)

    @contextmanager
    def receive(self, digest: str, otherwise: Path | None = None, *, keep: bool = True) -> Iterator[Partial]:
        """A file to write the content of `digest` to; leaving the block verifies it and moves it to its `place`.

        The place is in the cache, or `otherwise` when the cache cannot take it, or is not to `keep` it. Raises
        UnexpectedAnswer when the bytes are others, ConfigurationError when there is no place for them, and
        NotKept when the cache turns out not to take them: receive them once more then, without `keep`.
        """
        place, unfinished, file = self._open(digest, otherwise, keep)
        try:
            with file:
                partial = Partial(file, digest, place)
                yield partial
                partial.verify()
            unfinished.replace(place)
        except BaseException as error:
            _forget(unfinished)
            if place == otherwise or not isinstance(error, OSError):
                raise
            self._warn(error)
            raise NotKept from error
        if place != otherwise:
            self._grown(partial.size)

    def _open(self, digest: str, otherwise: Path | None, keep: bool) -> tuple[Path, Path, BinaryIO]:
        place = self._content_path(digest)
        if place is not None and keep:
            try:
                folder = self._unfinished()
                folder.mkdir(parents=True, exist_ok=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                return place, *_unfinished_file(folder, KEPT)
            except OSError as error:
                self._warn(error)
        if otherwise is None:
            raise ConfigurationError(f"{self!r} cannot take a file: name one, path=...")
        otherwise.parent.mkdir(parents=True, exist_ok=True)
        return otherwise, *_unfinished_file(otherwise.parent, 0o666)

    # --- answers

    def recall(self, question: Question) -> Remembered | None:
        """What was last answered to that question."""
        path = self._answer_path(question)
        if path is None:
            return None
        try:
            text = path.read_bytes()
        except OSError:
            return None
        try:
            remembered = Remembered.model_validate_json(text)
        except ValidationError:
            self._drop(path, "it cannot be read")
            return None
        if remembered.question != question:
            self._drop(path, "it answers another question")
            return None
        _touch(path)
        return remembered

    def remember(self, remembered: Remembered) -> None:
        path = self._answer_path(remembered.question)
        if path is not None:
            self._put(path, remembered.model_dump_json().encode())

    # --- files

    def _content_path(self, digest: str) -> Path | None:
        if self.folder is None:
            return None
        name = digest.removeprefix(DIGEST_PREFIX)
        return self.folder.joinpath("contents", name[:2], name[2:])

    def _answer_path(self, question: Question) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(question.model_dump_json().encode()).hexdigest()
        return self.folder.joinpath("answers", f"{name}.json")

    def _unfinished(self) -> Path:
        assert self.folder is not None
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        return self.folder / "unfinished"

    def _put(self, path: Path, content: bytes) -> None:
        try:
            folder = self._unfinished()
            folder.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            name, file = _unfinished_file(folder, KEPT)
            try:
                with file:
                    file.write(content)
                name.replace(path)
            except BaseException:
                _forget(name)
                raise
        except OSError as error:
            self._warn(error)
        else:
            self._grown(len(content))

    def _drop(self, path: Path, why: str) -> None:
        logger.warning("Removing %s from the cache: %s. It will be fetched again.", path, why)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The cache %s cannot be written (%s); fetching goes on without it. BLUEPRINTS_CACHE names another.",
                self.folder,
                error.strerror or error,
            )

    # --- size

    def _grown(self, size: int) -> None:
        """Look at the whole folder at the first store, and again after each twentieth of the bound."""
        self._untrimmed += size
        if self._untrimmed >= self._max_bytes / 20:
            self._untrimmed = 0
            try:
                self.trim()
            except OSError as error:
                self._warn(error)

    def trim(self) -> None:
        """Remove abandoned files, and the longest unused entries until they fit the bound."""
        if self.folder is None:
            return
        now = time.time()
        for path, status in _files(self.folder / "unfinished"):
            if now - status.st_mtime > ABANDONED_AFTER:
                path.unlink(missing_ok=True)
        entries = [entry for kind in ("contents", "answers") for entry in _files(self.folder / kind)]
        excess = sum(status.st_size for _, status in entries) - self._max_bytes
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime):
            if excess <= 0 or now - status.st_mtime < RECENT:
                break
            path.unlink(missing_ok=True)
            excess -= status.st_size


def default_folder(environment: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/gradient-blueprints`, in the home folder by default."""
    home = environment.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gradient-blueprints"


def digest_of_file(path: Path) -> str:
    """`sha256:...` of a file's bytes, in constant memory."""
    with path.open("rb") as file:
        return DIGEST_PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


def copy_into_place(source: Path, target: Path) -> None:
    """A copy of its own at `target`, complete or not there at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name, file = _unfinished_file(target.parent, 0o666)
    try:
        with file, source.open("rb") as original:
            shutil.copyfileobj(original, file, CHUNK)
        name.replace(target)
    except BaseException:
        _forget(name)
        raise


def _unfinished_file(folder: Path, mode: int) -> tuple[Path, BinaryIO]:
    """A new file of its own name, with the rights that the umask leaves of `mode` (tempfile would give 0600)."""
    path = folder / f".unfinished-{uuid.uuid4().hex}"
    return path, os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode), "w+b")


def _forget(unfinished: Path) -> None:
    with suppress(OSError):
        unfinished.unlink()


def _touch(path: Path) -> None:
    """Note that an entry was used; in a folder that cannot be written it simply goes unnoted."""
    with suppress(OSError):
        os.utime(path)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files below `folder`; what another process removes meanwhile is left out."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            with suppress(OSError):
                yield Path(entry.path), entry.stat(follow_symlinks=False)
