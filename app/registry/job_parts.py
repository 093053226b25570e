"""The parts of a job as workers and the relay see them: claimed under a lease, renewed, ended once."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, blueprints, outbox, tables
from app.registry.callers import Caller
from app.registry.documents import Document
from app.registry.job_transitions import (
    HELD,
    LockedJob,
    follow_parts,
    lock,
    move_job,
    move_part,
    progress_of,
    queue_part,
    read_progress,
    record_event,
    stored,
    with_parts,
)
from app.registry.jobs import describe
from gradient_blueprints.errors import (
    Conflict,
    ErrorPlace,
    InvalidRequest,
    JobFinished,
    LeaseLost,
)
from gradient_blueprints.models import (
    Claim,
    Heartbeat,
    HeartbeatAnswer,
    Job,
    JobOutcome,
    JobState,
    Publication,
    Scope,
    parse_checkpoint,
)

GIVEN_BACK_PER_ATTEMPT = 10  # giving a part back costs no attempt, but a job that gets every worker stopped must end
LONGEST_ANNOUNCE_FACTOR = 64  # of reannounce_seconds; a long queue is not doubled over and over
SWEEP_BATCH = 100


# --- for workers


async def claim_job(session: AsyncSession, caller: Caller, job_id: UUID, *, lease_seconds: float) -> Claim:
    """Take a queued part of a job: one more attempt, a new lease, a larger fencing token. Two claimers get two parts.

    Which part a message was sent for does not matter: there are as many messages as parts to do.
    """
    job = await lock(session, job_id)
    if job.state.terminal:
        raise JobFinished(f"Job {job_id} has already ended as {job.state}; drop its message.")
    part = next((part for part in job.parts if part.state == JobState.QUEUED), None)
    if part is None:
        raise Conflict(f"Job {job_id} is {job.state} under another worker's lease; drop its message.")
    job.row.lease_token += 1
    job.row.started_at = func.coalesce(tables.Job.started_at, func.clock_timestamp())
    part.attempts += 1
    part.lease_token = token = job.row.lease_token
    part.lease_expires_at = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    move_part(part, JobState.RUNNING)
    number, attempt = part.number, part.attempts
    await follow_parts(session, job)
    await audit.record(session, caller, "job.claim", str(job_id), part=number, attempt=attempt)
    return Claim(job=await describe(session, job_id), part=number, lease_token=token, lease_seconds=lease_seconds)


async def renew_lease(
    session: AsyncSession, job_id: UUID, heartbeat: Heartbeat, *, lease_seconds: float
) -> HeartbeatAnswer:
    """Keep a lease alive. That of a job being cancelled is not prolonged: it ends with the lease at the latest."""
    job = await lock(session, job_id)
    part = job.part_of(heartbeat.lease_token)
    if part is None or part.state not in HELD:
        raise _refusal(job, part)
    if part.state == JobState.RUNNING:
        part.lease_expires_at = func.clock_timestamp() + timedelta(seconds=lease_seconds)
    if heartbeat.progress is not None and heartbeat.progress != read_progress(part.progress):
        part.progress = stored(heartbeat.progress)
        await record_event(session, job, progress=progress_of(job.parts, job.shards))
    await session.flush()
    return HeartbeatAnswer(state=job.state, lease_seconds=lease_seconds)


async def check_shard(session: AsyncSession, job_id: UUID, shard: int, lease_token: int) -> Job | None:
    """Whether the partial result of a shard may be handed in; the job, when this lease has done so before."""
    job = await lock(session, job_id)
    part = job.part_of(lease_token)
    if part is None or part.number != shard or part.state == JobState.QUEUED:
        raise _lease_lost(job_id)
    if shard >= job.shards or job.shards == 1:
        raise Conflict(f"Part {shard} of job {job_id} ends with a blueprint, not with a partial result.")
    if part.state == JobState.SUCCEEDED:
        return await describe(session, job_id)
    if job.state is JobState.CANCELLING:
        raise _being_cancelled(job_id)
    if part.state not in HELD:
        raise _refusal(job, part)
    return None


async def finish_shard(
    session: AsyncSession, caller: Caller, job_id: UUID, shard: int, lease_token: int, digest: str
) -> Job:
    """End a shard whose partial result is in the store; the last one queues the merge."""
    if (done := await check_shard(session, job_id, shard, lease_token)) is not None:
        return done
    job = await lock(session, job_id)
    part = job.parts[shard]
    if (progress := read_progress(part.progress)) is not None and progress.total is not None:
        part.progress = stored(progress.model_copy(update={"done": progress.total}))
    part.state_digest = blueprints.digest_bytes(digest)
    move_part(part, JobState.SUCCEEDED)
    if all(part.state == JobState.SUCCEEDED for part in job.parts):
        merge = tables.JobPart(job_id=job_id, number=job.shards, state=JobState.QUEUED)
        session.add(merge)
        job.parts.append(merge)
        await queue_part(session, merge)
    await follow_parts(session, job)
    await audit.record(session, caller, "job.finish_shard", str(job_id), shard=shard, digest=digest)
    return await describe(session, job_id)


async def stored_state_of(session: AsyncSession, job_id: UUID, shard: int) -> int:
    """The lease under which the partial result of a shard was handed in, which names its file."""
    part = await session.get(tables.JobPart, (job_id, shard))
    job = await session.get(tables.Job, job_id)
    if job is None or JobState(job.state).terminal or part is None or part.state != JobState.SUCCEEDED:
        raise Conflict(f"There is no partial result of shard {shard} of job {job_id}: it is not done, or the job is.")
    assert part.lease_token is not None
    return part.lease_token


async def finish_job(
    session: AsyncSession, caller: Caller, job_id: UUID, lease_token: int, document: Document
) -> tuple[Job, Publication | None]:
    """Publish a job's blueprint under the job's lab and end the job, both or neither.

    A worker that did not hear the answer may send the same result again: it gets the finished job, and nothing is
    published.
    """
    locked = await lock(session, job_id)
    part = locked.part_of(lease_token)
    if part is None or part.state == JobState.QUEUED:
        raise _lease_lost(job_id)
    job = await describe(session, job_id)
    if job.state == JobState.SUCCEEDED and job.digest == document.digest:
        return job, None
    if job.state.terminal:
        raise JobFinished(f"Job {job_id} has already ended as {job.state}; this result was not published.")
    if job.state == JobState.CANCELLING:
        raise _being_cancelled(job_id)
    if part.number < locked.shards and locked.shards > 1:
        raise Conflict(f"Shard {part.number} of job {job_id} is a part of the result; hand in its state.")
    _check_subject(job, document)
    publication = await blueprints.publish(session, await _submitter(session, locked.row, caller), document)
    locked.row.version_id = await _version_id(session, publication)
    move_part(part, JobState.SUCCEEDED)
    await move_job(session, locked, JobState.SUCCEEDED)
    await audit.record(session, caller, "job.finish", str(job_id), digest=publication.digest)
    return await describe(session, job_id), publication


async def end_job(session: AsyncSession, caller: Caller, job_id: UUID, outcome: JobOutcome) -> Job:
    """A worker's last word when it has no result; saying it twice is the same as once."""
    job = await lock(session, job_id)
    part = job.part_of(outcome.lease_token)
    if part is None:
        raise _lease_lost(job_id)
    if part.state not in HELD:
        if part.state == outcome.state or (outcome.state == "crashed" and part.state == JobState.QUEUED):
            return await describe(session, job_id)
        raise _refusal(job, part)
    if job.state is JobState.CANCELLING:
        await _stop_part(session, job, part)
    elif outcome.state == "cancelled":
        raise Conflict(f"Nobody asked for job {job_id} to be cancelled; report `failed`, `crashed` or `queued`.")
    elif outcome.state == "failed":
        move_part(part, JobState.FAILED, reason=outcome.reason)
        await move_job(session, job, JobState.FAILED, reason=outcome.reason)
    elif outcome.state == "queued" and job.row.lease_token < _most_claims(job):
        part.attempts -= 1
        await queue_part(session, part, reason=outcome.reason)
        await follow_parts(session, job, reason=outcome.reason)
    else:
        await _end_attempt(session, job, part, outcome.reason)
    await audit.record(session, caller, "job.end", str(job_id), outcome=outcome.state, reason=outcome.reason)
    return await describe(session, job_id)


# --- for the relay


async def end_lost_attempts(session: AsyncSession) -> int:
    """End every attempt whose lease has run out: queued again, crashed after the last one, or cancelled as asked."""
    lost = select(tables.JobPart.job_id).where(
        tables.JobPart.state.in_([state.value for state in HELD]),
        tables.JobPart.lease_expires_at < func.clock_timestamp(),
    )
    rows = (
        await session.scalars(
            select(tables.Job)
            .where(tables.Job.id.in_(lost.order_by(tables.JobPart.lease_expires_at).limit(SWEEP_BATCH)))
            .with_for_update(skip_locked=True, key_share=True)
            .execution_options(populate_existing=True)
        )
    ).all()
    ended = 0
    for row in rows:
        job = await with_parts(session, row)
        now = (await session.execute(select(func.clock_timestamp()))).scalar_one()
        for part in job.parts:
            if part.state in HELD and part.lease_expires_at is not None and part.lease_expires_at < now:
                ended += 1
                if part.state == JobState.CANCELLING:
                    await _stop_part(session, job, part)
                else:
                    await _end_attempt(session, job, part, "the worker stopped renewing its lease")
    return ended


async def announce_again(session: AsyncSession, *, reannounce_seconds: float) -> int:
    """Announce queued parts that nobody claimed for long: a broker that lost its data also lost their messages.

    The pause doubles with each announcement, because a long queue looks the same from here.
    """
    pause = reannounce_seconds * func.least(
        LONGEST_ANNOUNCE_FACTOR, func.power(2, func.least(tables.JobPart.announcements, 30) - 1)
    )
    due = tables.JobPart.announced_at + func.make_interval(0, 0, 0, 0, 0, 0, pause) < func.clock_timestamp()
    waiting = select(tables.OutboxMessage.id).where(
        tables.OutboxMessage.job_id == tables.JobPart.job_id, tables.OutboxMessage.part == tables.JobPart.number
    )
    unclaimed = (
        await session.execute(
            select(tables.JobPart.job_id, tables.JobPart.number)
            .where(tables.JobPart.state == JobState.QUEUED, due, ~waiting.exists())
            .order_by(tables.JobPart.announced_at)
            .limit(SWEEP_BATCH)
            .with_for_update(skip_locked=True)
        )
    ).all()
    for job_id, number in unclaimed:
        await outbox.announce(session, job_id, number)
    return len(unclaimed)


# --- endings


async def _end_attempt(session: AsyncSession, job: LockedJob, part: tables.JobPart, reason: str) -> None:
    """One attempt at a running part died: queue it again, or give the job up when that was the last."""
    reason = f"{job.name(part)}attempt {part.attempts} of {job.row.max_attempts}: {reason}"
    if part.attempts < job.row.max_attempts:
        await queue_part(session, part, reason=reason)
        await follow_parts(session, job, reason=reason)
    else:
        move_part(part, JobState.CRASHED, reason=reason)
        await move_job(session, job, JobState.CRASHED, reason=reason)


async def _stop_part(session: AsyncSession, job: LockedJob, part: tables.JobPart) -> None:
    """The worker of a part has stopped as asked, or is gone; the last one ends the job."""
    move_part(part, JobState.CANCELLED)
    await follow_parts(session, job, reason=job.row.reason)


def _most_claims(job: LockedJob) -> int:
    return GIVEN_BACK_PER_ATTEMPT * job.row.max_attempts * len(job.parts)


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


def _refusal(job: LockedJob, part: tables.JobPart | None) -> Conflict:
    """Why a lease that once was given out counts no more."""
    if part is not None and JobState(part.state).terminal:
        return JobFinished(f"Job {job.row.id} is {job.state}, and this part of it {part.state}; stop working on it.")
    return _lease_lost(job.row.id)


def _lease_lost(job_id: UUID) -> LeaseLost:
    return LeaseLost(f"The lease on job {job_id} has passed to another worker or has run out; stop working on it.")


def _being_cancelled(job_id: UUID) -> Conflict:
    return Conflict(f"Job {job_id} is being cancelled; report the outcome `cancelled` instead of a result.")
