"""Partial results of shards: files beside the blobs, of a job's workers alone, and gone once the job has ended."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import anyio

from app.database import Sessions
from app.registry import blobs, jobs


def state_path(store: Path, job_id: UUID, shard: int, lease_token: int) -> Path:
    """Named by the lease too, so that a worker which lost its lease writes over nobody's file."""
    return store / "shards" / str(job_id) / f"{shard}-{lease_token}"


async def receive(
    store: Path, job_id: UUID, shard: int, lease_token: int, chunks: AsyncIterator[bytes], *, max_bytes: int
) -> str:
    """Write a body into the store, in place and durable only when it is complete; returns its digest."""
    async with blobs.receiving(store, chunks, max_bytes=max_bytes) as received:
        await blobs.put_in_place(received.path, state_path(store, job_id, shard, lease_token))
    return received.digest


async def remove_ended(sessions: Sessions, store: Path) -> int:
    """Remove what jobs that have ended left; how many those were. What is named otherwise is not ours and stays."""
    removed = 0
    for folder in await anyio.to_thread.run_sync(lambda: sorted((store / "shards").glob("*"))):
        try:
            job_id = UUID(folder.name)
        except ValueError:
            continue
        async with sessions() as session:
            ended = await jobs.has_ended(session, job_id)
        if ended:
            await anyio.to_thread.run_sync(lambda path: shutil.rmtree(path, ignore_errors=True), folder)
            removed += 1
    return removed
