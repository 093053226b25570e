"""Profiling jobs: submitted, claimed under a lease, ended once.

Postgres is the record. Each transition is one conditional UPDATE that takes the row's lock, followed in the same
transaction by its event, so that events are numbered in the order of the transitions they tell of.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, case, func, insert, null, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, blueprints, outbox, paging, tables
from app.registry.callers import Caller
from app.registry.documents import Document
from gradient_blueprints.errors import (
    Conflict,
    ErrorPlace,
    InvalidRequest,
    JobFinished,
    JobNotFound,
    LeaseLost,
    PermissionDenied,
)
from gradient_blueprints.models import (
    Claim,
    Heartbeat,
    HeartbeatAnswer,
    Job,
    JobEvent,
    JobOutcome,
    JobPage,
    JobState,
    NewJob,
    Progress,
    Publication,
    Scope,
    parse_checkpoint,
)

EVENTS_CHANNEL = "job_events"
HELD = (JobState.RUNNING, JobState.CANCELLING)
GIVEN_BACK_PER_ATTEMPT = 10  # giving a job back costs no attempt, but a job that gets every worker stopped must end
LONGEST_ANNOUNCE_FACTOR = 64  # of reannounce_seconds; a long queue is not doubled over and over
SWEEP_BATCH = 100


def new_job_id() -> UUID:
    """A UUID of version 7 (RFC 9562): ids sort by time, so that the newest jobs are a range of the primary key."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


# --- for laboratories


async def submit_job(session: AsyncSession, caller: Caller, new: NewJob, *, max_attempts: int) -> Job:
    """Queue a job; it is announced to the workers after the commit, however long the broker is away."""
    job_id = new_job_id()
    await session.execute(
        insert(tables.Job).values(
            id=job_id,
            lab_id=caller.lab_id,
            key_id=caller.key_id,
            request=new.model_dump(mode="json", exclude_none=True),
            state=JobState.QUEUED,
            max_attempts=max_attempts,
        )
    )
    await _record_event(session, job_id, JobState.QUEUED)
    await outbox.announce(session, job_id)
    await audit.record(session, caller, "job.submit", str(job_id), model_id=new.model_id)
    return await _describe(session, job_id)


async def get_job(session: AsyncSession, caller: Caller, job_id: UUID) -> Job:
    """JobNotFound also for a job of another lab: who has no part in a job does not learn that it exists."""
    job = await _describe(session, job_id)
    if job.lab != caller.lab and not caller.has(Scope.WORK):
        raise _not_found(job_id)
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
    return JobPage(jobs=tuple(_as_wire(*row) for row in page), next=following)


async def cancel_job(session: AsyncSession, caller: Caller, job_id: UUID) -> Job:
    """End a queued job at once; ask the worker of a running one to stop. Cancelling twice is the same as once."""
    job = await get_job(session, caller, job_id)
    if job.lab != caller.lab and not caller.has(Scope.ADMIN):
        raise PermissionDenied(f"Job {job_id} belongs to lab {job.lab}; each lab cancels its own.")
    reason = f"cancelled by {caller.lab}"
    changed = await _move(session, job_id, JobState.CANCELLED, _state_in(JobState.QUEUED), reason=reason)
    if changed is None:
        changed = await _move(session, job_id, JobState.CANCELLING, _state_in(JobState.RUNNING), reason=reason)
    if changed is not None:
        await audit.record(session, caller, "job.cancel", str(job_id))
    job = await _describe(session, job_id)
    if job.state not in (JobState.CANCELLING, JobState.CANCELLED):
        raise JobFinished(f"Job {job_id} has already ended as {job.state}; there is nothing to cancel.")
    return job


async def list_events(session: AsyncSession, job_id: UUID, *, after: int) -> list[JobEvent]:
    """The events of a job with ids above `after`, in their order."""
    rows = await session.scalars(
        select(tables.JobEvent)
        .where(tables.JobEvent.job_id == job_id, tables.JobEvent.id > after)
        .order_by(tables.JobEvent.id)
    )
    return [
        JobEvent(id=row.id, at=row.at, state=JobState(row.state), progress=_progress(row.progress), reason=row.reason)
        for row in rows
    ]


async def has_ended(session: AsyncSession, job_id: UUID) -> bool:
    state = await session.scalar(select(tables.Job.state).where(tables.Job.id == job_id))
    return state is None or JobState(state).terminal


# --- for workers


async def claim_job(session: AsyncSession, caller: Caller, job_id: UUID, *, lease_seconds: float) -> Claim:
    """Take a queued job: one more attempt, a new lease, a larger fencing token. Of two claimers one gets it."""
    token = await _move(
        session,
        job_id,
        JobState.RUNNING,
        _state_in(JobState.QUEUED),
        tables.Job.attempts < tables.Job.max_attempts,
        attempts=tables.Job.attempts + 1,
        lease_token=tables.Job.lease_token + 1,
        lease_expires_at=func.clock_timestamp() + timedelta(seconds=lease_seconds),
        started_at=func.coalesce(tables.Job.started_at, func.clock_timestamp()),
    )
    job = await _describe(session, job_id)
    if token is None:
        if job.state.terminal:
            raise JobFinished(f"Job {job_id} has already ended as {job.state}; drop its message.")
        raise Conflict(f"Job {job_id} is {job.state} under another worker's lease; drop its message.")
    await audit.record(session, caller, "job.claim", str(job_id), attempt=job.attempts)
    return Claim(job=job, lease_token=token, lease_seconds=lease_seconds)


async def renew_lease(
    session: AsyncSession, job_id: UUID, heartbeat: Heartbeat, *, lease_seconds: float
) -> HeartbeatAnswer:
    """Keep a lease alive. That of a job being cancelled is not prolonged: it ends with the lease at the latest."""
    expiry = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    row = (
        await session.execute(
            update(tables.Job)
            .where(tables.Job.id == job_id, tables.Job.lease_token == heartbeat.lease_token, _state_in(*HELD))
            .values(
                lease_expires_at=case((tables.Job.state == JobState.RUNNING, expiry), else_=tables.Job.lease_expires_at)
            )
            .returning(tables.Job.state, tables.Job.progress)
            .execution_options(synchronize_session=False)
        )
    ).first()
    if row is None:
        raise await _refusal(session, job_id, heartbeat.lease_token)
    state = JobState(row.state)
    if heartbeat.progress is not None and heartbeat.progress != _progress(row.progress):
        progress = heartbeat.progress.model_dump(mode="json", exclude_none=True)
        await session.execute(
            update(tables.Job)
            .where(tables.Job.id == job_id)
            .values(progress=progress)
            .execution_options(synchronize_session=False)
        )
        await _record_event(session, job_id, state, progress=progress)
    return HeartbeatAnswer(state=state, lease_seconds=lease_seconds)


async def finish_job(session: AsyncSession, caller: Caller, job_id: UUID, lease_token: int, document: Document) -> Job:
    """Publish a job's blueprint under the job's lab and end the job, both or neither.

    A worker that did not hear the answer may send the same result again: it gets the finished job.
    """
    row = await _lock(session, job_id)
    if row.lease_token != lease_token or row.state == JobState.QUEUED:
        raise _lease_lost(job_id)
    job = await _describe(session, job_id)
    if job.state == JobState.SUCCEEDED and job.digest == document.digest:
        return job
    if job.state.terminal:
        raise JobFinished(f"Job {job_id} has already ended as {job.state}; this result was not published.")
    if job.state == JobState.CANCELLING:
        raise Conflict(f"Job {job_id} is being cancelled; report the outcome `cancelled` instead of a result.")
    _check_subject(job, document)
    publication = await blueprints.publish(session, await _submitter(session, row, caller), document)
    version_id = await _version_id(session, publication)
    await _move(session, job_id, JobState.SUCCEEDED, _state_in(JobState.RUNNING), version_id=version_id)
    await audit.record(session, caller, "job.finish", str(job_id), digest=publication.digest)
    return await _describe(session, job_id)


async def end_job(session: AsyncSession, caller: Caller, job_id: UUID, outcome: JobOutcome) -> Job:
    """A worker's last word when it has no blueprint; saying it twice is the same as once."""
    job = await _lock(session, job_id)
    if job.lease_token != outcome.lease_token:
        raise _lease_lost(job_id)
    if job.state not in HELD:
        if job.state == outcome.state or (outcome.state == "crashed" and job.state == JobState.QUEUED):
            return await _describe(session, job_id)
        raise await _refusal(session, job_id, outcome.lease_token)
    if job.state == JobState.CANCELLING:
        await _move(session, job_id, JobState.CANCELLED, _state_in(JobState.CANCELLING), reason=job.reason)
    elif outcome.state == "cancelled":
        raise Conflict(f"Nobody asked for job {job_id} to be cancelled; report `failed`, `crashed` or `queued`.")
    elif outcome.state == "failed":
        await _move(session, job_id, JobState.FAILED, _state_in(JobState.RUNNING), reason=outcome.reason)
    elif outcome.state == "queued" and job.lease_token < GIVEN_BACK_PER_ATTEMPT * job.max_attempts:
        await _requeue(session, job_id, outcome.reason, attempts=tables.Job.attempts - 1)
    else:
        await _end_attempt(session, job, outcome.reason)
    await audit.record(session, caller, "job.end", str(job_id), outcome=outcome.state, reason=outcome.reason)
    return await _describe(session, job_id)


# --- for the relay


async def end_lost_attempts(session: AsyncSession) -> int:
    """End every attempt whose lease has run out: queued again, crashed after the last one, or cancelled as asked."""
    lost = (
        await session.scalars(
            select(tables.Job)
            .where(_state_in(*HELD), tables.Job.lease_expires_at < func.clock_timestamp())
            .order_by(tables.Job.lease_expires_at)
            .limit(SWEEP_BATCH)
            .with_for_update(skip_locked=True)
        )
    ).all()
    for job in lost:
        if job.state == JobState.CANCELLING:
            await _move(session, job.id, JobState.CANCELLED, _state_in(JobState.CANCELLING), reason=job.reason)
        else:
            await _end_attempt(session, job, "the worker stopped renewing its lease")
    return len(lost)


async def announce_again(session: AsyncSession, *, reannounce_seconds: float) -> int:
    """Announce queued jobs that nobody claimed for long: a broker that lost its data also lost their messages.

    The pause doubles with each announcement, because a long queue looks the same from here.
    """
    pause = reannounce_seconds * func.least(
        LONGEST_ANNOUNCE_FACTOR, func.power(2, func.least(tables.Job.announcements, 30) - 1)
    )
    due = tables.Job.announced_at + func.make_interval(0, 0, 0, 0, 0, 0, pause) < func.clock_timestamp()
    waiting = select(tables.OutboxMessage.id).where(tables.OutboxMessage.job_id == tables.Job.id).exists()
    unclaimed = (
        await session.scalars(
            select(tables.Job.id)
            .where(tables.Job.state == JobState.QUEUED, due, ~waiting)
            .order_by(tables.Job.announced_at)
            .limit(SWEEP_BATCH)
            .with_for_update(skip_locked=True)
        )
    ).all()
    for job_id in unclaimed:
        await outbox.announce(session, job_id)
    return len(unclaimed)


# --- transitions


def _state_in(*states: JobState) -> ColumnElement[bool]:
    return tables.Job.state.in_([state.value for state in states])


async def _move(
    session: AsyncSession,
    job_id: UUID,
    state: JobState,
    *conditions: ColumnElement[bool],
    reason: str | None = None,
    **changes: Any,
) -> int | None:
    """Bring a job into `state` and record the event; its lease token, or None when `conditions` do not hold."""
    if state not in HELD:
        changes |= {"lease_expires_at": None}
    if state.terminal:
        changes |= {"finished_at": func.clock_timestamp()}
    elif state != JobState.CANCELLING:
        changes |= {"progress": null()}  # not None, which JSONB would keep as JSON's null
    token: int | None = await session.scalar(
        update(tables.Job)
        .where(tables.Job.id == job_id, *conditions)
        .values(state=state, reason=reason, **changes)
        .returning(tables.Job.lease_token)
        .execution_options(synchronize_session=False)  # rows are read again where they are needed
    )
    if token is not None:
        await _record_event(session, job_id, state, reason=reason)
    return token


async def _end_attempt(session: AsyncSession, job: tables.Job, reason: str) -> None:
    """One attempt at a running job died: queue it again, or give it up when that was the last."""
    reason = f"attempt {job.attempts} of {job.max_attempts}: {reason}"
    if job.attempts < job.max_attempts:
        await _requeue(session, job.id, reason)
    else:
        await _move(session, job.id, JobState.CRASHED, _state_in(JobState.RUNNING), reason=reason)


async def _requeue(session: AsyncSession, job_id: UUID, reason: str, **changes: Any) -> None:
    await _move(
        session,
        job_id,
        JobState.QUEUED,
        _state_in(JobState.RUNNING),
        reason=reason,
        announced_at=None,
        announcements=0,
        **changes,
    )
    await outbox.announce(session, job_id)


async def _record_event(
    session: AsyncSession,
    job_id: UUID,
    state: JobState,
    *,
    reason: str | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    # clock_timestamp: now() is the start of the transaction, which may have waited for the row
    await session.execute(
        insert(tables.JobEvent).values(
            job_id=job_id,
            at=func.clock_timestamp(),
            state=state,
            progress=null() if progress is None else progress,
            reason=reason,
        )
    )
    await session.execute(select(func.pg_notify(EVENTS_CHANNEL, str(job_id))))


async def _lock(session: AsyncSession, job_id: UUID) -> tables.Job:
    job = await session.scalar(
        select(tables.Job).where(tables.Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    )
    if job is None:
        raise _not_found(job_id)
    return job


# --- reading

_DESCRIPTION = (
    select(tables.Job, tables.Lab.name, tables.Version.number, tables.Document.digest)
    .join(tables.Lab, tables.Lab.id == tables.Job.lab_id)
    .outerjoin(tables.Version, tables.Version.id == tables.Job.version_id)
    .outerjoin(tables.Document, tables.Document.id == tables.Version.document_id)
)


async def _describe(session: AsyncSession, job_id: UUID) -> Job:
    query = _DESCRIPTION.where(tables.Job.id == job_id).execution_options(populate_existing=True)
    row = (await session.execute(query)).first()
    if row is None:
        raise _not_found(job_id)
    return _as_wire(*row)


def _as_wire(job: tables.Job, lab: str, version: int | None, digest: bytes | None) -> Job:
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
        attempts=job.attempts,
        max_attempts=job.max_attempts,
        progress=_progress(job.progress),
        reason=job.reason,
        version=version,
        digest=None if digest is None else f"sha256:{digest.hex()}",
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _progress(stored: dict[str, Any] | None) -> Progress | None:
    return None if stored is None else Progress.model_validate(stored)


async def _submitter(session: AsyncSession, job: tables.Job, worker: Caller) -> Caller:
    """The lab that asked for the job, in whose name its blueprint is published."""
    lab, prefix = (
        await session.execute(
            select(tables.Lab.name, tables.Key.prefix)
            .join(tables.Key, tables.Key.id == job.key_id)
            .where(tables.Lab.id == job.lab_id)
        )
    ).one()
    return Caller(
        key_id=job.key_id,
        lab_id=job.lab_id,
        lab=lab,
        scopes=frozenset({Scope.PUBLISH}),
        key_prefix=prefix,
        request_id=worker.request_id,
    )


async def _version_id(session: AsyncSession, publication: Publication) -> int:
    return (
        await session.execute(
            select(tables.Version.id)
            .join(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
            .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
            .where(
                tables.Model.name == publication.model_id,
                tables.Checkpoint.fraction == parse_checkpoint(publication.training_checkpoint),
                tables.Version.number == publication.version,
            )
        )
    ).scalar_one()


# --- refusals


def _check_subject(job: Job, document: Document) -> None:
    """A worker may only publish what it was asked for."""
    faults: list[ErrorPlace] = [
        {"pointer": f"/{name}", "code": "not_the_job", "detail": f"the job is about {wanted}"}
        for name, wanted in (("model_id", job.model_id), ("training_checkpoint", job.training_checkpoint))
        if getattr(document.blueprint, name) != wanted
    ]
    if faults:
        raise InvalidRequest(f"This blueprint is not the one that job {job.id} asks for.", errors=faults)


async def _refusal(session: AsyncSession, job_id: UUID, lease_token: int) -> Conflict:
    """Why a write under a lease changed nothing."""
    job = await _lock(session, job_id)
    if JobState(job.state).terminal and job.lease_token == lease_token:
        return JobFinished(f"Job {job_id} has already ended as {job.state}; stop working on it.")
    return _lease_lost(job_id)


def _lease_lost(job_id: UUID) -> LeaseLost:
    return LeaseLost(f"The lease on job {job_id} has passed to another worker or has run out; stop working on it.")


def _not_found(job_id: UUID) -> JobNotFound:
    return JobNotFound(f"There is no job {job_id}, or it belongs to another lab.")
