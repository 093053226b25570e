"""How a job and its parts change state: under the lock of the job's row, each change with its event.

A job has one part for each shard and, once the last of several shards is done, one for their merge. Each part has a
lease of its own; the state of the job follows from those of its parts. Who changes a part holds the job's row first,
so that events are numbered in the order of the transitions they tell of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import func, insert, null, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import outbox, tables, webhooks
from gradient_blueprints.errors import JobNotFound
from gradient_blueprints.models import JobState, Progress
from gradient_blueprints.webhook_models import WebhookEvent

EVENTS_CHANNEL = "job_events"
HELD = (JobState.RUNNING, JobState.CANCELLING)


@dataclass(frozen=True)
class LockedJob:
    """A job whose row this transaction holds, and its parts by number."""

    row: tables.Job
    parts: list[tables.JobPart]

    @property
    def state(self) -> JobState:
        return JobState(self.row.state)

    @property
    def shards(self) -> int:
        return shards_of(self.row)

    def part_of(self, lease_token: int) -> tables.JobPart | None:
        """The part that this token was given out for, unless it was claimed again since."""
        return next((part for part in self.parts if part.lease_token == lease_token), None)

    def name(self, part: tables.JobPart) -> str:
        """What a reason calls the part, before a comma; nothing when there is only one."""
        if self.shards == 1:
            return ""
        return "merge, " if part.number == self.shards else f"shard {part.number}, "


def shards_of(job: tables.Job) -> int:
    return int(job.request.get("options", {}).get("shards", 1))


async def lock(session: AsyncSession, job_id: UUID) -> LockedJob:
    job = await session.scalar(
        select(tables.Job)
        .where(tables.Job.id == job_id)
        .with_for_update(key_share=True)  # messages of the outbox may refer to it meanwhile; its id never changes
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise not_found(job_id)
    return await with_parts(session, job)


async def with_parts(session: AsyncSession, job: tables.Job) -> LockedJob:
    """The job whose row the caller holds."""
    query = select(tables.JobPart).where(tables.JobPart.job_id == job.id).order_by(tables.JobPart.number)
    return LockedJob(job, list(await session.scalars(query.execution_options(populate_existing=True))))


def not_found(job_id: UUID) -> JobNotFound:
    return JobNotFound(f"There is no job {job_id}, or it belongs to another lab.")


# --- parts


def move_part(part: tables.JobPart, state: JobState, *, reason: str | None = None) -> None:
    part.state, part.reason = state, reason
    if state not in HELD:
        part.lease_expires_at = None
    if state in (JobState.QUEUED, JobState.RUNNING):
        part.progress = None


async def queue_part(session: AsyncSession, part: tables.JobPart, *, reason: str | None = None) -> None:
    """Offer a part to the workers, for the first time or again."""
    move_part(part, JobState.QUEUED, reason=reason)
    part.announced_at, part.announcements = None, 0
    await session.flush()
    await outbox.announce(session, part.job_id, part.number)


# --- the job


async def follow_parts(session: AsyncSession, job: LockedJob, *, reason: str | None = None) -> None:
    """Bring an open job into the state of its changed parts, and tell."""
    held = any(part.state in HELD for part in job.parts)
    begun = held or any(part.state == JobState.SUCCEEDED for part in job.parts)
    if job.state is JobState.CANCELLING:
        state = JobState.CANCELLING if held else JobState.CANCELLED
    else:
        state = JobState.RUNNING if begun else JobState.QUEUED
    await move_job(session, job, state, reason=reason)


async def move_job(session: AsyncSession, job: LockedJob, state: JobState, *, reason: str | None = None) -> None:
    """Bring a job into `state` and tell. When it ends, so do its open parts."""
    job.row.state, job.row.reason = state, reason
    if state.terminal:
        job.row.finished_at = func.clock_timestamp()
        for part in job.parts:
            if not JobState(part.state).terminal:
                move_part(part, JobState.CANCELLED)
    await session.flush()
    await record_event(session, job, reason=reason)
    if state.terminal:
        await _announce_end(session, job.row)


async def _announce_end(session: AsyncSession, job: tables.Job) -> None:
    """To the job's lab alone; a job is nobody else's business."""
    published = (
        select(tables.Version.number, tables.Document.digest)
        .join(tables.Document, tables.Document.id == tables.Version.document_id)
        .where(tables.Version.id == job.version_id)
    )
    version = (await session.execute(published)).first()
    told = {
        "training_checkpoint": job.request["training_checkpoint"],
        "job_id": str(job.id),
        "state": job.state,
        "reason": job.reason,
        "version": None if version is None else version.number,
        "digest": None if version is None else f"sha256:{version.digest.hex()}",
    }
    await webhooks.announce(session, WebhookEvent.JOB_FINISHED, job.request["model_id"], told, lab_id=job.lab_id)


async def record_event(
    session: AsyncSession, job: LockedJob, *, reason: str | None = None, progress: Progress | None = None
) -> None:
    # clock_timestamp: now() is the start of the transaction, which may have waited for the row
    await session.execute(
        insert(tables.JobEvent).values(
            job_id=job.row.id,
            at=func.clock_timestamp(),
            state=job.row.state,
            progress=null() if progress is None else stored(progress),
            reason=reason,
            parts=null() if job.shards == 1 else dict(Counter(part.state for part in job.parts)),
        )
    )
    await session.execute(select(func.pg_notify(EVENTS_CHANNEL, str(job.row.id))))


# --- progress


def stored(progress: Progress) -> dict[str, Any]:
    return progress.model_dump(mode="json", exclude_none=True)


def read_progress(value: dict[str, Any] | None) -> Progress | None:
    return None if value is None else Progress.model_validate(value)


def progress_of(parts: Sequence[tables.JobPart], shards: int) -> Progress | None:
    """Of one part its own. Of several the batches of all shards, in the phase of the first that is at work."""
    told = {part.number: progress for part in parts if (progress := read_progress(part.progress)) is not None}
    if shards == 1 or not told:
        return told.get(0)
    busy = [part.number for part in parts if part.state in HELD and part.number in told]
    of_shards = [told[number] for number in range(shards) if number in told]
    totals = [progress.total for progress in of_shards if progress.total is not None]
    return Progress(
        phase=told[min(busy, default=max(told))].phase,
        done=sum(progress.done for progress in of_shards),
        total=sum(totals) if len(totals) == shards else None,
    )
