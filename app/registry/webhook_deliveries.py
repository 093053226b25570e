"""The queue of webhook messages, as the relay that sends them works it off. Postgres is the record.

A webhook is held by one relay at a time and gets one message at a time, the longest due first. A relay that dies leaves
the hold to run out, and its attempt without an end; the message is sent again under the same id.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.webhooks import KEY_IS_LIVE, message_name
from gradient_blueprints.webhook_models import DeliveryState

HOLD_SECONDS = 60.0  # longer than any attempt takes
LONGEST_REST = 300.0  # seconds that a failing webhook rests before another message of its is tried
JITTER = 0.2
KEPT_DAYS = 30
FORGET_BATCH = 1_000
GONE = 410


@dataclass(frozen=True)
class Attempt:
    """A message that is to be sent now."""

    webhook_id: UUID
    delivery_id: int
    number: int
    message_id: str
    url: str
    body: str


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: with the status of an answer, or with what kept one from coming."""

    status: int | None = None
    fault: str | None = None

    @property
    def arrived(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


async def begin_attempt(session: AsyncSession) -> Attempt | None:
    """Hold the webhook that has rested longest of those with a due message, and begin an attempt; None if none is."""
    waiting = tables.WebhookDelivery
    is_due = (waiting.state == DeliveryState.WAITING) & (waiting.due_at <= func.now())
    longest_rested = (
        select(tables.Webhook)
        .join(tables.Key, tables.Key.id == tables.Webhook.key_id)
        .where(
            tables.Webhook.held_until <= func.now(),
            tables.Webhook.gone_at.is_(None),
            KEY_IS_LIVE,
            exists().where(waiting.webhook_id == tables.Webhook.id, is_due),
        )
        .order_by(tables.Webhook.held_until)
        .limit(1)
        .with_for_update(of=tables.Webhook, skip_locked=True, key_share=True)
    )
    while True:
        webhook = await session.scalar(longest_rested)
        if webhook is None:
            return None
        delivery = await session.scalar(
            select(waiting)
            .where(waiting.webhook_id == webhook.id, is_due)
            .order_by(waiting.due_at, waiting.id)
            .limit(1)
        )
        if delivery is not None:  # else it was sent between the two looks
            break
    delivery.attempts += 1
    webhook.held_until = func.now() + timedelta(seconds=HOLD_SECONDS)
    await session.execute(
        insert(tables.WebhookAttempt).values(delivery_id=delivery.id, number=delivery.attempts, began_at=func.now())
    )
    return Attempt(
        webhook_id=webhook.id,
        delivery_id=delivery.id,
        number=delivery.attempts,
        message_id=message_name(delivery.message_id),
        url=webhook.url,
        body=delivery.body,
    )


async def end_attempt(
    session: AsyncSession, attempt: Attempt, outcome: Outcome, *, retry_seconds: Sequence[float]
) -> float | None:
    """Write down how it ended, and when the message is tried again: in so many seconds, or not.

    Of a webhook that was deleted meanwhile there is nothing to write.
    """
    await session.execute(
        update(tables.WebhookAttempt)
        .where(tables.WebhookAttempt.delivery_id == attempt.delivery_id, tables.WebhookAttempt.number == attempt.number)
        .values(ended_at=func.clock_timestamp(), status=outcome.status, fault=outcome.fault)
    )
    webhook = await session.get(tables.Webhook, attempt.webhook_id, with_for_update={"key_share": True})
    if webhook is None:
        return None
    again: float | None = None
    if outcome.arrived:
        changes = {"state": DeliveryState.DELIVERED, "finished_at": func.clock_timestamp()}
        webhook.failures, webhook.held_until = 0, func.now()
    else:
        if attempt.number <= len(retry_seconds) and outcome.status != GONE:
            again = retry_seconds[attempt.number - 1] * random.uniform(1, 1 + JITTER)  # noqa: S311 - no secret
            changes = {"due_at": func.clock_timestamp() + timedelta(seconds=again)}
        else:
            changes = {"state": DeliveryState.GIVEN_UP, "finished_at": func.clock_timestamp()}
        rest = min(retry_seconds[min(webhook.failures, len(retry_seconds) - 1)], LONGEST_REST)
        webhook.failures += 1
        webhook.held_until = func.clock_timestamp() + timedelta(seconds=rest)
    waiting = tables.WebhookDelivery
    concerned = waiting.id == attempt.delivery_id
    if outcome.status == GONE:
        webhook.gone_at = func.clock_timestamp()
        concerned = waiting.webhook_id == webhook.id
    await session.execute(
        update(waiting)
        .where(concerned, waiting.state == DeliveryState.WAITING)
        .values(**changes)
        .execution_options(synchronize_session=False)
    )
    return again


async def give_up_ended(session: AsyncSession) -> int:
    """Give up messages that wait for a webhook that has ended, so many of them: nobody sends them any more.

    Not while the webhook is held: the message under way may still arrive.
    """
    waiting = tables.WebhookDelivery
    ended = (
        select(tables.Webhook.id)
        .join(tables.Key, tables.Key.id == tables.Webhook.key_id)
        .where(tables.Webhook.gone_at.is_not(None) | ~KEY_IS_LIVE, tables.Webhook.held_until <= func.now())
    )
    some = (
        select(waiting.id)
        .where(waiting.state == DeliveryState.WAITING, waiting.webhook_id.in_(ended))
        .limit(FORGET_BATCH)
        .with_for_update(skip_locked=True)
        .cte()
    )
    given_up = await session.scalars(
        update(waiting)
        .where(waiting.id.in_(select(some)))
        .values(state=DeliveryState.GIVEN_UP, finished_at=func.now())
        .returning(waiting.id)
        .execution_options(synchronize_session=False)
    )
    return len(given_up.all())


async def forget_old(session: AsyncSession) -> int:
    """Remove what was delivered or given up long ago, so many messages."""
    finished = tables.WebhookDelivery
    old = (
        select(finished.id)
        .where(finished.finished_at < func.now() - timedelta(days=KEPT_DAYS))
        .order_by(finished.finished_at)
        .limit(FORGET_BATCH)
        .with_for_update(skip_locked=True)
        .cte()
    )
    forgotten = await session.scalars(delete(finished).where(finished.id.in_(select(old))).returning(finished.id))
    return len(forgotten.all())
