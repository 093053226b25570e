"""Where the bytes of checkpoint files lie: a folder, or a bucket behind the S3 protocol.

A store knows files by their place, a random name; which lab's file lies there is the database's knowledge. An upload
is written by one request after another, each with a fencing token larger than the last one's. What a request wrote
counts as far as the database says; whatever an overtaken request still writes lies elsewhere and is never looked at
(a folder), or makes the completion fail its digest (a bucket). All functions block: call them from threads.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

MEBIBYTE = 1 << 20
READ_BYTES = MEBIBYTE
S3_SCHEME = "s3://"

Progress = dict[str, Any]  # JSON: what a store has to remember of an upload between requests


class StoreFailed(Exception):
    """The store cannot do this now; the text is for the operator's log."""


class FileStore(Protocol):
    """Places of complete files, and uploads on their way there."""

    keeps_rests: bool
    """Whether any number of bytes can be appended, or whole pieces only."""

    def begin(self) -> tuple[str, Progress]:
        """A new place, and what to remember of the upload to it."""

    def resume(self, place: str, progress: Progress, received: int, token: int) -> Progress | None:
        """What to remember from now on, when a request with `token` goes on after `received` bytes; None when they
        are no longer there."""

    def piece_bytes(self, size: int) -> int:
        """How many bytes of a file of `size` to append at a time."""

    def append(self, place: str, progress: Progress, offset: int, token: int, data: bytes, size: int) -> None:
        """Write `data` at `offset`, the place that the last call left off."""

    def finish(self, place: str, progress: Progress, size: int, *, hashed: bool) -> str | None:
        """Make the file whole, durable and readable, and answer its SHA-256 as stored; None when it was one request's
        work and the caller has hashed it (`hashed`). Safe to repeat."""

    def discard(self, place: str, progress: Progress) -> None:
        """Remove a file or what there is of it. Safe to repeat."""

    def read(self, place: str, first: int, last: int) -> Iterator[bytes]:
        """The bytes from `first` to `last`, both included."""

    def unfinished(self, older_than: float) -> set[str]:
        """Places of which there are parts, none written within so many seconds, as far as this store can tell."""

    def remove_parts(self, place: str) -> None:
        """Remove the parts of an upload, and not the file that stands at its place."""


def new_place() -> str:
    return secrets.token_hex(16)


def open_store(location: str) -> FileStore:
    """The store of a setting: a folder, or `s3://bucket/prefix`."""
    if location.startswith(S3_SCHEME):
        from app.registry.s3_store import BucketStore  # boto3 takes 0.3 s to load

        return BucketStore(location)
    return FolderStore(Path(location))


def file_path(folder: Path, place: str) -> Path:
    return folder / "files" / place[:2] / place


class FolderStore:
    """`files/ab/abcd…` are complete files, `incoming/abcd….TOKEN` what each request wrote of an unfinished one."""

    keeps_rests = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self) -> tuple[str, Progress]:
        return new_place(), {"segments": []}  # [token, offset] of each request that wrote

    def resume(self, place: str, progress: Progress, received: int, token: int) -> Progress | None:
        segments = [segment for segment in progress["segments"] if segment[1] < received]
        if not self._file(place).exists():  # a request may have died between finishing and saying so
            for writer, length in _lengths(segments, received):
                path = self._segment(place, writer)
                if not path.exists() or path.stat().st_size < length:
                    return None
        return {"segments": [*segments, [token, received]]}

    def piece_bytes(self, size: int) -> int:
        return 4 * MEBIBYTE

    def append(self, place: str, progress: Progress, offset: int, token: int, data: bytes, size: int) -> None:
        begun = progress["segments"][-1][1]
        path = self._segment(place, token)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "xb") as file:
                file.seek(offset - begun)
                file.write(data)
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error

    def finish(self, place: str, progress: Progress, size: int, *, hashed: bool) -> str | None:
        final = self._file(place)
        segments = [segment for segment in progress["segments"] if segment[1] < size]
        try:
            if final.exists():
                return _digest_of(final)
            final.parent.mkdir(parents=True, exist_ok=True)
            digest = None
            if len(segments) == 1:
                whole = self._segment(place, segments[0][0])
                if not hashed:
                    digest = _digest_of(whole)
            else:  # beside the parts and not into one of them, which an overtaken request may still have open
                whole = self._segment(place, progress["segments"][-1][0])
                whole = whole.with_name(f"{whole.name}.whole")
                digest = self._join(place, segments, size, whole)
            _make_durable(whole)
            whole.replace(final)
            _make_durable(final.parent)
            self.remove_parts(place)
        except OSError as error:
            raise StoreFailed(f"{final}: {error.strerror}") from error
        return digest

    def _join(self, place: str, segments: list[list[int]], size: int, whole: Path) -> str:
        hasher = hashlib.sha256()
        whole.parent.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as out:
            for writer, length in _lengths(segments, size):
                for chunk in _read(self._segment(place, writer), 0, length - 1):
                    hasher.update(chunk)
                    out.write(chunk)
        return hasher.hexdigest()

    def discard(self, place: str, progress: Progress) -> None:
        self.remove_parts(place)
        try:
            self._file(place).unlink(missing_ok=True)
        except OSError as error:
            raise StoreFailed(f"{place}: {error.strerror}") from error

    def remove_parts(self, place: str) -> None:
        try:
            for path in self._leftovers(place):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreFailed(f"{place}: {error.strerror}") from error

    def read(self, place: str, first: int, last: int) -> Iterator[bytes]:
        try:
            yield from _read(self._file(place), first, last)
        except OSError as error:
            raise StoreFailed(f"{self._file(place)}: {error.strerror}") from error

    def unfinished(self, older_than: float) -> set[str]:
        written: dict[str, float] = {}
        for path in (self._folder / "incoming").glob("*"):
            place = path.name.partition(".")[0]
            with suppress(FileNotFoundError):  # its upload has just been completed
                written[place] = max(written.get(place, 0.0), path.stat().st_mtime)
        return {place for place, moment in written.items() if time.time() - moment > older_than}

    def _file(self, place: str) -> Path:
        return file_path(self._folder, place)

    def _segment(self, place: str, token: int) -> Path:
        return self._folder / "incoming" / f"{place}.{token}"

    def _leftovers(self, place: str) -> list[Path]:
        return list((self._folder / "incoming").glob(f"{place}.*"))


def _lengths(segments: list[list[int]], size: int) -> Iterator[tuple[int, int]]:
    """The token of each request that wrote, and how many of its bytes count."""
    for index, (writer, offset) in enumerate(segments):
        end = segments[index + 1][1] if index + 1 < len(segments) else size
        yield writer, end - offset


def _read(path: Path, first: int, last: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        left = last - first + 1
        while left > 0 and (chunk := file.read(min(READ_BYTES, left))):
            left -= len(chunk)
            yield chunk


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
