"""Messages that must reach the broker: written in the transaction of what they announce, sent after its commit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from gradient_blueprints.models import PROFILE_TASK, JobState

OUTBOX_CHANNEL = "outbox"
BATCH = 20  # few enough that a slow broker does not hold the rows for longer than a transaction may idle


async def announce(session: AsyncSession, job_id: UUID, part: int) -> None:
    """Have a part of the job announced to the workers once this transaction has committed."""
    await session.execute(insert(tables.OutboxMessage).values(task=PROFILE_TASK, job_id=job_id, part=part))
    await session.execute(select(func.pg_notify(OUTBOX_CHANNEL, "")))


@dataclass(frozen=True)
class Announcement:
    """What a message says, and where the job comes from."""

    task: str
    job_id: UUID
    request_id: str | None
    trace_parent: str | None


async def send_waiting(
    session: AsyncSession, send: Callable[[Announcement], Awaitable[None]]
) -> tuple[int, Exception | None]:
    """Send a batch of waiting messages, oldest first: how many the broker took, and what stopped it, if anything.

    Relays beside each other skip each other's rows. A relay that dies between sending and committing leaves a message
    to be sent twice; the second claim is refused, so that does no harm.
    """
    oldest = (
        select(tables.OutboxMessage, tables.Job.request_id, tables.Job.trace_parent)
        .join(tables.Job, tables.Job.id == tables.OutboxMessage.job_id)
        .order_by(tables.OutboxMessage.id)
        .limit(BATCH)
    )
    waiting = (await session.execute(oldest.with_for_update(of=tables.OutboxMessage, skip_locked=True))).all()
    sent: list[tables.OutboxMessage] = []
    failure: Exception | None = None
    for message, request_id, trace_parent in waiting:
        try:
            await send(Announcement(message.task, message.job_id, request_id, trace_parent))
        except Exception as error:  # noqa: BLE001, RUF100 - the broker's client raises what it likes; the caller reports it
            failure = error
            break
        sent.append(message)
    if sent:
        await session.execute(
            delete(tables.OutboxMessage).where(tables.OutboxMessage.id.in_([message.id for message in sent]))
        )
        part = tuple_(tables.JobPart.job_id, tables.JobPart.number)
        announced = part.in_([(message.job_id, message.part) for message in sent])
        await session.execute(  # in the order in which the others that change several parts take them
            select(tables.JobPart.number)
            .where(announced)
            .order_by(tables.JobPart.job_id, tables.JobPart.number)
            .with_for_update(key_share=True)
        )
        await session.execute(
            update(tables.JobPart)
            .where(announced, tables.JobPart.state == JobState.QUEUED)
            .values(announced_at=func.clock_timestamp(), announcements=tables.JobPart.announcements + 1)
            .execution_options(synchronize_session=False)
        )
    return len(sent), failure
