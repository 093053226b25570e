"""Profiling jobs as laboratories see them: submitted, watched, cancelled. Postgres is the record."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, outbox, paging, tables
from app.registry.callers import Caller
from app.registry.job_transitions import (
    HELD,
    follow_parts,
    lock,
    move_part,
    not_found,
    progress_of,
    read_progress,
    record_event,
    shards_of,
    with_parts,
)
from gradient_blueprints.errors import InvalidRequest, JobFinished, PermissionDenied
from gradient_blueprints.log_lines import add_ids
from gradient_blueprints.models import Job, JobEvent, JobPage, JobPart, JobState, NewJob, Scope
from gradient_blueprints.tracing import current_traceparent


def new_job_id() -> UUID:
    """A UUID of version 7 (RFC 9562): ids sort by time, so that the newest jobs are a range of the primary key."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


async def submit_job(session: AsyncSession, caller: Caller, new: NewJob, *, max_attempts: int) -> Job:
    """Queue a job; each shard is announced to the workers after the commit, however long the broker is away."""
    job_id = new_job_id()
    row = tables.Job(
        id=job_id,
        lab_id=caller.lab_id,
        key_id=caller.key_id,
        request=new.model_dump(mode="json", exclude_none=True),
        state=JobState.QUEUED,
        max_attempts=max_attempts,
        request_id=caller.request_id,
        trace_parent=current_traceparent(),
    )
    add_ids(job_id=str(job_id))
    session.add(row)
    await session.flush()
    await session.execute(
        insert(tables.JobPart),
        [{"job_id": job_id, "number": number, "state": JobState.QUEUED} for number in range(new.options.shards)],
    )
    await record_event(session, await with_parts(session, row))
    for number in range(new.options.shards):
        await outbox.announce(session, job_id, number)
    await audit.record(session, caller, "job.submit", str(job_id), model_id=new.model_id)
    return await describe(session, job_id)


async def get_job(session: AsyncSession, caller: Caller, job_id: UUID) -> Job:
    """JobNotFound also for a job of another lab: who has no part in a job does not learn that it exists."""
    job = await describe(session, job_id)
    if job.lab != caller.lab and not caller.has(Scope.WORK):
        raise not_found(job_id)
    return job


async def list_jobs(
    session: AsyncSession, caller: Caller, *, state: JobState | None, limit: int, cursor: str | None
) -> JobPage:
    """Newest first; those of the caller's lab, or of all labs for a worker or an administrator."""
    query = _DESCRIPTION
    if not caller.has(Scope.WORK):
        query = query.where(tables.Job.lab_id == caller.lab_id)
    if state is not None:
        query = query.where(tables.Job.state == state)
    if (after := paging.decode_cursor(cursor, str)) is not None:
        try:
            last_seen = UUID(after[0])
        except ValueError:
            raise InvalidRequest("This cursor was not given out by this listing; start again without one.") from None
        query = query.where(tables.Job.id < last_seen)
    rows = (await session.execute(query.order_by(tables.Job.id.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (str(row[0].id),))
    parts = await _parts_of(session, [row[0].id for row in page])
    return JobPage(jobs=tuple(_as_wire(*row, parts[row[0].id]) for row in page), next=following)


async def cancel_job(session: AsyncSession, caller: Caller, job_id: UUID) -> Job:
    """End a queued job at once; ask the workers of a running one to stop. Cancelling twice is the same as once."""
    job = await get_job(session, caller, job_id)
    if job.lab != caller.lab and not caller.has(Scope.ADMIN):
        raise PermissionDenied(f"Job {job_id} belongs to lab {job.lab}; each lab cancels its own.")
    locked = await lock(session, job_id)
    if not locked.state.terminal and locked.state is not JobState.CANCELLING:
        for part in locked.parts:
            if part.state == JobState.QUEUED:
                move_part(part, JobState.CANCELLED)
            elif part.state in HELD:
                move_part(part, JobState.CANCELLING)
        locked.row.state = JobState.CANCELLING
        await follow_parts(session, locked, reason=f"cancelled by {caller.lab}")
        await audit.record(session, caller, "job.cancel", str(job_id))
    job = await describe(session, job_id)
    if job.state not in (JobState.CANCELLING, JobState.CANCELLED):
        raise JobFinished(f"Job {job_id} has already ended as {job.state}; there is nothing to cancel.")
    return job


async def list_events(session: AsyncSession, job_id: UUID, *, after: int, limit: int) -> list[JobEvent]:
    """The events of a job with ids above `after`, in their order, the first `limit` of them."""
    rows = await session.scalars(
        select(tables.JobEvent)
        .where(tables.JobEvent.job_id == job_id, tables.JobEvent.id > after)
        .order_by(tables.JobEvent.id)
        .limit(limit)
    )
    return [_event(row) for row in rows]


async def list_latest_events(session: AsyncSession, job_id: UUID, *, limit: int) -> list[JobEvent]:
    """The newest first."""
    rows = await session.scalars(
        select(tables.JobEvent).where(tables.JobEvent.job_id == job_id).order_by(tables.JobEvent.id.desc()).limit(limit)
    )
    return [_event(row) for row in rows]


def _event(row: tables.JobEvent) -> JobEvent:
    return JobEvent(
        id=row.id,
        at=row.at,
        state=JobState(row.state),
        progress=read_progress(row.progress),
        reason=row.reason,
        parts=None if row.parts is None else {JobState(state): number for state, number in row.parts.items()},
    )


async def has_ended(session: AsyncSession, job_id: UUID) -> bool:
    state = await session.scalar(select(tables.Job.state).where(tables.Job.id == job_id))
    return state is None or JobState(state).terminal


# --- reading

_DESCRIPTION = (
    select(tables.Job, tables.Lab.name, tables.Version.number, tables.Document.digest)
    .join(tables.Lab, tables.Lab.id == tables.Job.lab_id)
    .outerjoin(tables.Version, tables.Version.id == tables.Job.version_id)
    .outerjoin(tables.Document, tables.Document.id == tables.Version.document_id)
)


async def describe(session: AsyncSession, job_id: UUID) -> Job:
    query = _DESCRIPTION.where(tables.Job.id == job_id).execution_options(populate_existing=True)
    row = (await session.execute(query)).first()
    if row is None:
        raise not_found(job_id)
    parts = await _parts_of(session, [job_id])
    return _as_wire(*row, parts[job_id])


async def _parts_of(session: AsyncSession, job_ids: Sequence[UUID]) -> dict[UUID, list[tables.JobPart]]:
    query = select(tables.JobPart).where(tables.JobPart.job_id.in_(job_ids)).order_by(tables.JobPart.number)
    found: dict[UUID, list[tables.JobPart]] = {job_id: [] for job_id in job_ids}
    for part in await session.scalars(query.execution_options(populate_existing=True)):
        found[part.job_id].append(part)
    return found


def _as_wire(
    job: tables.Job, lab: str, version: int | None, digest: bytes | None, parts: Sequence[tables.JobPart]
) -> Job:
    new = NewJob.model_validate(job.request)
    return Job(
        id=str(job.id),
        state=JobState(job.state),
        lab=lab,
        model_id=new.model_id,
        training_checkpoint=new.training_checkpoint,
        source=new.source,
        data=new.data,
        options=new.options,
        provenance_notes=new.provenance_notes,
        attempts=max(part.attempts for part in parts),
        max_attempts=job.max_attempts,
        parts=tuple(
            JobPart(
                number=part.number,
                state=JobState(part.state),
                attempts=part.attempts,
                progress=read_progress(part.progress),
                reason=part.reason,
                digest=_digest(part.state_digest),
            )
            for part in parts
        ),
        progress=progress_of(parts, shards_of(job)),
        reason=job.reason,
        version=version,
        digest=_digest(digest),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _digest(stored: bytes | None) -> str | None:
    return None if stored is None else f"sha256:{stored.hex()}"
