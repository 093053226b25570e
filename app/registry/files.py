"""Checkpoint files of labs: uploaded in any number of requests, verified, then unchangeable; nobody else's to read.

The database knows how much of a file is there; the store (file_store.py) has the bytes. Of several requests that
write the same file the last to begin goes on: it has the largest token, and whoever has a smaller one is refused at its
next piece.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import anyio
from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from app.registry import audit, paging, tables
from app.registry.blueprints import digest_bytes
from app.registry.callers import Caller
from app.registry.file_store import FileStore, Progress, StoreFailed
from gradient_blueprints.errors import (
    AlreadyExists,
    CheckpointFileNotFound,
    DigestMismatch,
    InvalidRequest,
    LabNotFound,
    PayloadTooLarge,
    ServiceUnavailable,
    UploadConflict,
)
from gradient_blueprints.file_models import CheckpointFile, CheckpointFilePage
from gradient_blueprints.models import Scope, format_checkpoint

Sessions = async_sessionmaker[AsyncSession]

MOST_FILES = 2_000  # of one checkpoint; the largest published ones have a few hundred shards
TOUCH_SECONDS = 5.0  # how often a verification says that it goes on
VERIFYING_SECONDS = 20.0  # after so long without a sign it has died
SWEEP_BATCH = 100
ORPHAN_SECONDS = 86_400.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """A file's name: whose, of which checkpoint, which path."""

    lab_id: int
    lab: str
    model_id: str
    checkpoint: Decimal
    path: str

    def __str__(self) -> str:
        return f"{self.model_id}@{format_checkpoint(self.checkpoint)}/{self.path}"

    @property
    def condition(self) -> ColumnElement[bool]:
        return _of_checkpoint(self.lab_id, self.model_id, self.checkpoint) & (tables.CheckpointFile.path == self.path)


@dataclass(frozen=True)
class Limits:
    file_bytes: int
    lab_bytes: int


@dataclass(frozen=True)
class Upload:
    """What a request that writes knows of its file."""

    id: int
    token: int
    place: str
    progress: Progress
    offset: int
    size: int
    digest: str


# --- whose


async def lab_of(session: AsyncSession, caller: Caller, lab: str | None) -> tuple[int, str]:
    """The lab whose files a caller means: its own; another for a worker or an administrator only."""
    if lab is None or lab == caller.lab:
        return caller.lab_id, caller.lab
    lab_id = None
    if caller.has(Scope.WORK):
        lab_id = await session.scalar(select(tables.Lab.id).where(tables.Lab.name == lab))
    if lab_id is None:  # in the same words, whether there is such a lab or not
        raise LabNotFound(f"There are no files of a lab {lab!r} that this key may read; each lab reads its own.")
    return lab_id, lab


def _of_checkpoint(lab_id: int, model_id: str, checkpoint: Decimal) -> ColumnElement[bool]:
    return (
        (tables.CheckpointFile.lab_id == lab_id)
        & (tables.CheckpointFile.model_name == model_id)
        & (tables.CheckpointFile.fraction == checkpoint)
    )


# --- reading


async def find(session: AsyncSession, address: Address) -> tables.CheckpointFile:
    row = await session.scalar(select(tables.CheckpointFile).where(address.condition))
    if row is None:
        raise CheckpointFileNotFound(f"Lab {address.lab} has no file {address}.")
    return row


async def list_files(
    session: AsyncSession, lab_id: int, lab: str, model_id: str, checkpoint: Decimal, *, limit: int, cursor: str | None
) -> CheckpointFilePage:
    """By path, the unfinished ones among them."""
    query = select(tables.CheckpointFile).where(_of_checkpoint(lab_id, model_id, checkpoint))
    if (after := paging.decode_cursor(cursor, str)) is not None:
        query = query.where(tables.CheckpointFile.path > after[0])
    rows = (await session.scalars(query.order_by(tables.CheckpointFile.path).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row.path,))
    return CheckpointFilePage(files=tuple(as_wire(row, lab) for row in page), next=following)


def as_wire(row: tables.CheckpointFile, lab: str) -> CheckpointFile:
    return CheckpointFile(
        path=row.path,
        lab=lab,
        size=row.size,
        digest=f"sha256:{row.digest.hex()}",
        received=row.received,
        complete=row.completed_at is not None,
    )


# --- writing


async def begin(
    session: AsyncSession,
    store: FileStore,
    caller: Caller,
    address: Address,
    *,
    size: int,
    digest: str,
    offset: int,
    limits: Limits,
) -> Upload | CheckpointFile:
    """Take the file for a request that goes on at `offset`; the file itself when there is nothing left to do.

    Raises UploadConflict with the offset at which to go on, and AlreadyExists when another file has the path.
    """
    row = await _lock(session, address)
    if row is None and offset == 0:
        await _create(session, store, caller, address, size=size, digest=digest, limits=limits)
        row = await _lock(session, address)
    if row is None:
        raise _go_on_at(0)
    if row.completed_at is not None:
        if row.digest == digest_bytes(digest):
            return as_wire(row, address.lab)
        raise AlreadyExists(f"{address} is complete and has other content; delete it first to put another there.")
    if offset == 0 and (row.received > 0 or (row.size, row.digest) != (size, digest_bytes(digest))):
        await _start_again(session, store, row, size=size, digest=digest, limits=limits)
    elif (row.size, row.digest) != (size, digest_bytes(digest)):
        raise UploadConflict(f"{address} was begun with other content; begin again at offset 0.", received=0)
    elif offset != row.received:
        raise _go_on_at(row.received)
    elif offset == size > 0 and await _is_fresh(session, row):
        return as_wire(row, address.lab)  # being verified by a request before this one
    token = row.token + 1
    progress = await _in_store(store.resume, row.place, row.upload, offset, token)
    if progress is None:
        await _in_store(store.discard, row.place, row.upload)
        await session.delete(row)
        await session.commit()
        logger.error("the store has lost what was uploaded of %s", address)
        raise _go_on_at(0)
    row.token, row.upload, row.key_id, row.touched_at = token, progress, caller.key_id, func.now()
    await session.flush()
    return Upload(row.id, token, row.place, progress, offset, size, digest)


def _go_on_at(received: int) -> UploadConflict:
    return UploadConflict(
        f"There are {received} bytes of this file; go on from there.",
        received=received,
        headers={"Upload-Offset": str(received)},
    )


async def _lock(session: AsyncSession, address: Address) -> tables.CheckpointFile | None:
    return await session.scalar(select(tables.CheckpointFile).where(address.condition).with_for_update())


async def _create(
    session: AsyncSession,
    store: FileStore,
    caller: Caller,
    address: Address,
    *,
    size: int,
    digest: str,
    limits: Limits,
) -> None:
    """Begin the file, unless a request that had the lab's lock before has begun it."""
    await _check_room(session, address.lab_id, size, limits)
    here = _of_checkpoint(address.lab_id, address.model_id, address.checkpoint)
    count = await session.scalar(select(func.count()).select_from(tables.CheckpointFile).where(here))
    if (count or 0) >= MOST_FILES:
        raise PayloadTooLarge(f"A checkpoint has at most {MOST_FILES:,} files here.")
    place, progress = await _in_store(store.begin)
    created = await session.scalar(
        insert(tables.CheckpointFile)
        .values(
            lab_id=address.lab_id,
            key_id=caller.key_id,
            model_name=address.model_id,
            fraction=address.checkpoint,
            path=address.path,
            size=size,
            digest=digest_bytes(digest),
            place=place,
            upload=progress,
        )
        .on_conflict_do_nothing()
        .returning(tables.CheckpointFile.id)
    )
    if created is None:
        await session.commit()  # who has locked that row may be waiting for the lab's lock
        await _in_store(store.discard, place, progress)


async def _check_room(session: AsyncSession, lab_id: int, size: int, limits: Limits, *, replaced: int = 0) -> None:
    """Under a lock of the lab, so that files that begin at once are counted together."""
    if size > limits.file_bytes:
        raise PayloadTooLarge(f"A checkpoint file has at most {limits.file_bytes:,} bytes here, and this one {size:,}.")
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"files:{lab_id}", 0))))
    total = select(func.coalesce(func.sum(tables.CheckpointFile.size), 0)).where(tables.CheckpointFile.lab_id == lab_id)
    used = int(await session.scalar(total) or 0) - replaced
    if used + size > limits.lab_bytes:
        raise PayloadTooLarge(
            f"Your lab's files take {used:,} of {limits.lab_bytes:,} bytes, and this one has {size:,}: "
            "delete files of checkpoints that are profiled."
        )


async def _start_again(
    session: AsyncSession, store: FileStore, row: tables.CheckpointFile, *, size: int, digest: str, limits: Limits
) -> None:
    await _check_room(session, row.lab_id, size, limits, replaced=row.size)
    await _in_store(store.discard, row.place, row.upload)
    row.place, row.upload = await _in_store(store.begin)
    row.size, row.digest, row.received = size, digest_bytes(digest), 0


async def _is_fresh(session: AsyncSession, row: tables.CheckpointFile) -> bool:
    age = func.clock_timestamp() - tables.CheckpointFile.touched_at
    fresh = select(age < timedelta(seconds=VERIFYING_SECONDS)).where(tables.CheckpointFile.id == row.id)
    return row.token > 0 and bool(await session.scalar(fresh))


async def receive(
    sessions: Sessions, store: FileStore, upload: Upload, chunks: AsyncIterator[bytes]
) -> tuple[int, str]:
    """Append a body; how many bytes there are now, and the digest of this request's own ("" unless it sent all).

    A body cut short leaves what arrived of it, as far as the store can append it.
    """
    writing = _Writing(sessions, store, upload)
    try:
        async for chunk in chunks:
            await writing.take(chunk)
        await writing.keep_rest()
    except (UploadConflict, PayloadTooLarge, InvalidRequest, ServiceUnavailable):
        raise
    except BaseException:  # the connection broke, or the server stops: what arrived is not sent again
        with anyio.CancelScope(shield=True):
            await writing.keep_rest()
        raise
    return writing.offset, writing.hasher.hexdigest() if upload.offset == 0 else ""


class _Writing:
    """One request's appending: pieces of the store's size, each counted in the database once it is written."""

    def __init__(self, sessions: Sessions, store: FileStore, upload: Upload) -> None:
        self._sessions = sessions
        self._store = store
        self._upload = upload
        self._piece = store.piece_bytes(upload.size)
        self._waiting = bytearray()
        self.offset = upload.offset
        self.hasher = hashlib.sha256()

    async def take(self, chunk: bytes) -> None:
        if self.offset + len(self._waiting) + len(chunk) > self._upload.size:
            raise InvalidRequest(f"The body goes beyond the {self._upload.size} bytes that Upload-Length promised.")
        self._waiting += chunk
        while len(self._waiting) >= self._piece:
            await self._keep_piece()

    async def keep_rest(self) -> None:
        """After a failure this begins with the piece that was being kept."""
        any_length = self._store.keeps_rests or self.offset + len(self._waiting) == self._upload.size
        while len(self._waiting) >= (1 if any_length else self._piece):
            await self._keep_piece()

    async def _keep_piece(self) -> None:
        upload, piece = self._upload, bytes(self._waiting[: self._piece])
        where = (upload.place, upload.progress, self.offset, upload.token)
        await _in_store(self._store.append, *where, piece, upload.size)
        if upload.offset == 0:
            await anyio.to_thread.run_sync(self.hasher.update, piece)
        async with self._sessions.begin() as session:
            taken = await _still_ours(session, upload, received=self.offset + len(piece))
        if not taken:
            raise UploadConflict("Another request has gone on with this file; ask for its offset (HEAD).")
        del self._waiting[: len(piece)]  # only now: whatever broke off before this leaves it to keep_rest
        self.offset += len(piece)


async def _still_ours(session: AsyncSession, upload: Upload, **changes: Any) -> bool:
    """Note the changes, and that somebody is at work, unless another request has the file now."""
    noted = await session.scalar(
        update(tables.CheckpointFile)
        .where(
            tables.CheckpointFile.id == upload.id,
            tables.CheckpointFile.token == upload.token,
            tables.CheckpointFile.completed_at.is_(None),
        )
        .values(touched_at=func.clock_timestamp(), **changes)
        .returning(tables.CheckpointFile.id)
    )
    return noted is not None


async def finish(
    sessions: Sessions, store: FileStore, caller: Caller, address: Address, upload: Upload, hashed: str
) -> CheckpointFile:
    """Verify a file whose bytes are all there, and close it to changes. One of another digest is removed."""
    finishing = asyncio.ensure_future(
        _in_store(lambda: store.finish(upload.place, upload.progress, upload.size, hashed=bool(hashed)))
    )
    while not (await asyncio.wait({finishing}, timeout=TOUCH_SECONDS))[0]:
        async with sessions.begin() as session:
            await _still_ours(session, upload)
    stored = finishing.result() or hashed
    async with sessions.begin() as session:
        if f"sha256:{stored}" != upload.digest:
            await _in_store(store.discard, upload.place, upload.progress)
            ours = (tables.CheckpointFile.id == upload.id) & (tables.CheckpointFile.token == upload.token)
            await session.execute(delete(tables.CheckpointFile).where(ours))
        elif not await _still_ours(session, upload, completed_at=func.now()):
            raise UploadConflict("Another request has gone on with this file; ask for its state (HEAD).")
        else:
            await audit.record(session, caller, "file.upload", str(address), size=upload.size, digest=upload.digest)
            row = await session.get_one(tables.CheckpointFile, upload.id, populate_existing=True)
            return as_wire(row, address.lab)
    raise DigestMismatch(
        f"The {upload.size} bytes of {address} have the digest sha256:{stored}, not {upload.digest}; nothing was kept."
    )


async def delete_file(session: AsyncSession, store: FileStore, caller: Caller, address: Address) -> None:
    """Remove a file, complete or not; who still writes it is refused from now on.

    Its bytes go once the commit is certain: what is left of a death in between takes room, but no file that the
    database knows is ever without its bytes.
    """
    row = await _lock(session, address)
    if row is None:
        raise CheckpointFileNotFound(f"Lab {address.lab} has no file {address}.")
    await session.delete(row)
    await audit.record(session, caller, "file.delete", str(address))
    await session.commit()
    with suppress(ServiceUnavailable):  # logged by then, and the file is gone for everybody
        await _in_store(store.discard, row.place, row.upload)


# --- clearing up


async def remove_abandoned(sessions: Sessions, store: FileStore, *, upload_seconds: float) -> int:
    """Remove unfinished uploads that nobody went on with for so long, and parts that belong to no upload."""
    removed = 0
    async with sessions.begin() as session:
        age = func.clock_timestamp() - tables.CheckpointFile.touched_at
        abandoned = (
            select(tables.CheckpointFile)
            .where(tables.CheckpointFile.completed_at.is_(None), age > timedelta(seconds=upload_seconds))
            .limit(SWEEP_BATCH)
            .with_for_update(skip_locked=True)
        )
        for row in (await session.scalars(abandoned)).all():
            await _in_store(store.discard, row.place, row.upload)
            await session.delete(row)
            removed += 1
    parts: set[str] = await _in_store(store.unfinished, ORPHAN_SECONDS)
    if parts:
        async with sessions() as session:
            known = await session.scalars(
                select(tables.CheckpointFile.place).where(
                    tables.CheckpointFile.place.in_(parts), tables.CheckpointFile.completed_at.is_(None)
                )
            )
        for place in parts - set(known):
            await _in_store(store.remove_parts, place)
            removed += 1
    return removed


async def _in_store(function: Any, *arguments: Any) -> Any:
    """Call a store from a thread; its failures are no fault of the request."""
    try:
        return await anyio.to_thread.run_sync(lambda: function(*arguments))
    except StoreFailed as failed:
        logger.error("checkpoint store: %s", failed)
        raise ServiceUnavailable(
            "The store of checkpoint files cannot do this now; try again later.", retry_after=5
        ) from failed
