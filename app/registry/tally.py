"""How many jobs there are and how long they wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from gradient_blueprints.models import JobState


@dataclass(frozen=True)
class JobTally:
    by_state: Mapping[str, int]
    longest_wait: float
    """Seconds since the oldest queued job was submitted, 0 when none waits."""
    unsent: int
    """Messages that the relay has yet to send."""
    oldest_unsent: float
    """Seconds since the oldest of them was written, 0 when there is none."""


async def tally_jobs(session: AsyncSession) -> JobTally:
    """Jobs of all labs by state. One pass over the table, which holds a row a job and no documents."""
    counts = await session.execute(select(tables.Job.state, func.count().label("number")).group_by(tables.Job.state))
    waited = func.extract("epoch", func.clock_timestamp() - func.min(tables.Job.created_at))
    longest = await session.scalar(select(waited).where(tables.Job.state == JobState.QUEUED))
    age = func.extract("epoch", func.clock_timestamp() - func.min(tables.OutboxMessage.created_at))
    unsent, oldest = (await session.execute(select(func.count(), age).select_from(tables.OutboxMessage))).one()
    return JobTally({row.state: row.number for row in counts}, float(longest or 0), unsent, float(oldest or 0))
