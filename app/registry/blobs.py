"""Attachments: files kept under their digest, streamed in and out, never held in memory."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, tables
from app.registry.blueprints import digest_bytes
from app.registry.callers import Caller
from gradient_blueprints import models
from gradient_blueprints.errors import BlobNotFound, DigestMismatch, PayloadTooLarge, ServiceUnavailable

_LONGEST_UPLOAD = 86_400  # seconds

logger = logging.getLogger(__name__)


def blob_path(store: Path, digest: str) -> Path:
    hexadecimal = digest.removeprefix("sha256:")
    return store / "blobs" / hexadecimal[:2] / hexadecimal


async def receive(store: Path, digest: str, chunks: AsyncIterator[bytes], *, max_bytes: int) -> int:
    """Write a body into the store under its digest; returns its size in bytes.

    It is written beside its place, verified, made durable, and only then renamed: what stands under
    a digest always has it. A body of another digest leaves nothing behind.
    """
    async with receiving(store, chunks, max_bytes=max_bytes) as received:
        if received.digest != digest:
            raise DigestMismatch(
                f"The body has {received.size} bytes and the digest {received.digest}, not {digest}; nothing was kept."
            )
        await put_in_place(received.path, blob_path(store, digest))
    return received.size


@dataclass(frozen=True)
class Received:
    """A body that arrived whole, as a durable file of the store."""

    path: Path
    size: int
    digest: str


@asynccontextmanager
async def receiving(store: Path, chunks: AsyncIterator[bytes], *, max_bytes: int) -> AsyncIterator[Received]:
    """Write a body beside its place; the file is gone afterwards unless it was put there."""
    incoming = store / "incoming" / secrets.token_hex(16)
    hasher = hashlib.sha256()
    size = 0
    try:
        with _storing():
            await anyio.Path(incoming.parent).mkdir(parents=True, exist_ok=True)
            async with await anyio.open_file(incoming, "xb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > max_bytes:
                        raise PayloadTooLarge(f"A file has at most {max_bytes} bytes here.")
                    hasher.update(chunk)
                    await file.write(chunk)
                await file.flush()
                await anyio.to_thread.run_sync(os.fsync, file.wrapped.fileno())
        yield Received(incoming, size, f"sha256:{hasher.hexdigest()}")
    finally:
        with suppress(OSError):  # what stays is dropped by remove_unfinished; the answer is about something else
            await anyio.Path(incoming).unlink(missing_ok=True)


async def put_in_place(incoming: Path, place: Path) -> None:
    with _storing():
        await anyio.Path(place.parent).mkdir(parents=True, exist_ok=True)
        await anyio.to_thread.run_sync(_place, incoming, place)


@contextmanager
def _storing() -> Iterator[None]:
    """A store that is full or away is the operator's matter, and may be well again when the request is repeated."""
    try:
        yield
    except OSError as error:
        logger.error("store: %s", error)
        raise ServiceUnavailable(
            "The store of attachments cannot take this now; try again later.", retry_after=5
        ) from error


def _place(incoming: Path, place: Path) -> None:
    """Rename, and make the rename durable."""
    incoming.replace(place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


async def record(session: AsyncSession, caller: Caller, digest: str, size: int) -> models.BlobSummary:
    """Make a received blob known; a digest that is known already stays as it was."""
    written = await session.scalar(
        insert(tables.Blob)
        .values(digest=digest_bytes(digest), size=size, lab_id=caller.lab_id)
        .on_conflict_do_nothing()
        .returning(tables.Blob.size)
    )
    if written is not None:
        await audit.record(session, caller, "blob.upload", digest, size=size)
    return models.BlobSummary(digest=digest, size=size, created=written is not None)


async def find(session: AsyncSession, digest: str) -> int | None:
    """The size of a known blob."""
    return await session.scalar(select(tables.Blob.size).where(tables.Blob.digest == digest_bytes(digest)))


async def get_size(session: AsyncSession, digest: str) -> int:
    size = await find(session, digest)
    if size is None:
        raise BlobNotFound(f"No blob has the digest {digest}.")
    return size


def remove_unfinished(store: Path) -> None:
    """Drop what uploads of a killed process left behind; a day is longer than any upload lasts."""
    for path in (store / "incoming").glob("*"):
        with suppress(FileNotFoundError):  # another process has just put it in place
            if time.time() - path.stat().st_mtime > _LONGEST_UPLOAD:
                path.unlink()
