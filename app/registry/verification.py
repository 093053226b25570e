"""Whether everything that was promised to last is still there, to the byte: `python -m app verify`.

It may run beside a registry that serves: what it checks is only ever added, but for checkpoint files, which their lab
may delete, and no transaction is open while files are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import anyio
from sqlalchemy import func, select

from app.database import Sessions
from app.registry import tables
from app.registry.blobs import blob_path
from app.registry.file_store import READ_BYTES, FileStore, StoreFailed

_DOCUMENTS = 20  # at a time: each may have as many bytes as the largest body


@dataclass(frozen=True)
class Checked:
    """How much of one kind was looked at, and what is wrong with it, a line a fault."""

    kind: str
    count: int
    bytes: int
    faults: tuple[str, ...]


async def verify(sessions: Sessions, store: Path, checkpoint_store: FileStore) -> AsyncIterator[Checked]:
    """Hash every document, attachment and complete checkpoint file anew, and look for gaps in the version numbers."""
    yield await _documents(sessions)
    yield await _versions(sessions)
    yield await _attachments(sessions, store)
    yield await _checkpoint_files(sessions, checkpoint_store)


async def _documents(sessions: Sessions) -> Checked:
    """The bytes have the digest that names them, and the columns that SQL reads have a row for each layer."""
    table = tables.Document
    layers = select(func.count()).where(tables.Layer.document_id == table.id).correlate(table).scalar_subquery()
    columns = select(table.id, table.digest, table.body, table.layer_count, layers)
    last = count = size = 0
    faults: list[str] = []
    while True:
        async with sessions() as session:
            some = (await session.execute(columns.where(table.id > last).order_by(table.id).limit(_DOCUMENTS))).all()
        if not some:
            return Checked("documents", count, size, tuple(faults))
        for last, digest, body, layer_count, rows in some:  # noqa: B007 - where the next page begins
            count, size = count + 1, size + len(body)
            name = f"document sha256:{digest.hex()}"
            if (found := hashlib.sha256(body)).digest() != digest:
                faults.append(f"{name}: its bytes have the digest sha256:{found.hexdigest()}")
            elif rows != layer_count:
                faults.append(f"{name}: {rows} of {layer_count} layers")


async def _versions(sessions: Sessions) -> Checked:
    """Numbers run from 1 to the last one given out, without a gap."""
    version, checkpoint, model = tables.Version, tables.Checkpoint, tables.Model
    statement = (
        select(
            model.name, checkpoint.fraction, checkpoint.last_version, func.count(version.id), func.max(version.number)
        )
        .join(model, model.id == checkpoint.model_id)
        .outerjoin(version, version.checkpoint_id == checkpoint.id)
        .group_by(model.name, checkpoint.id)
    )
    async with sessions() as session:
        found = (await session.execute(statement)).all()
    faults = tuple(
        f"versions of {name} at {fraction.normalize():f}: {count} of them up to {highest or 0}, {last} were given out"
        for name, fraction, last, count, highest in found
        if not last == count == (highest or 0)
    )
    return Checked("versions", sum(row[3] for row in found), 0, faults)


async def _attachments(sessions: Sessions, store: Path) -> Checked:
    async with sessions() as session:
        found = (await session.execute(select(tables.Blob.digest, tables.Blob.size))).all()
    faults = []
    for digest, size in found:
        name = f"sha256:{digest.hex()}"
        fault = await anyio.to_thread.run_sync(_fault, _read(blob_path(store, name)), size, digest)
        if fault is not None:
            faults.append(f"attachment {name}: {fault}")
    return Checked("attachments", len(found), sum(size for _, size in found), tuple(faults))


async def _checkpoint_files(sessions: Sessions, store: FileStore) -> Checked:
    table = tables.CheckpointFile
    columns = select(table.id, table.model_name, table.fraction, table.path, table.place, table.size, table.digest)
    async with sessions() as session:
        found = (await session.execute(columns.where(table.completed_at.is_not(None)))).all()
    faults = []
    for identity, model, fraction, path, place, size, digest in found:
        stored = store.read(place, 0, size - 1) if size else ()
        fault = await anyio.to_thread.run_sync(_fault, stored, size, digest)
        if fault is not None:
            async with sessions() as session:
                if await session.get(table, identity) is None:
                    continue  # deleted since
            faults.append(f"{path} of {model} at {fraction.normalize():f}, {place} in the store: {fault}")
    return Checked("checkpoint files", len(found), sum(row[5] for row in found), tuple(faults))


def _read(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _fault(pieces: Iterable[bytes], size: int, digest: bytes) -> str | None:
    """What is wrong with a file whose size and digest were recorded."""
    hasher = hashlib.sha256()
    length = 0
    try:
        for piece in pieces:
            hasher.update(piece)
            length += len(piece)
    except FileNotFoundError:
        return "missing"
    except (OSError, StoreFailed) as error:
        return f"cannot be read: {error}"
    if length != size:
        return f"has {length} bytes, recorded as {size}"
    return None if hasher.digest() == digest else f"its bytes have the digest sha256:{hasher.hexdigest()}"
