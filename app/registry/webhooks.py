"""Webhooks: who wants to hear of which events, and the messages that a transaction leaves for them."""

from __future__ import annotations

import base64
import hmac
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, paging, tables
from app.registry.callers import Caller
from gradient_blueprints.addresses import AddressRefused, Network, check_address
from gradient_blueprints.errors import Conflict, InvalidRequest, WebhookNotFound
from gradient_blueprints.models import Scope
from gradient_blueprints.webhook_models import (
    TEST_EVENT,
    DeliveryState,
    IssuedWebhook,
    NewWebhook,
    Webhook,
    WebhookAttempt,
    WebhookDelivery,
    WebhookDeliveryPage,
    WebhookEvent,
    WebhookPage,
)

CHANNEL = "webhooks"
MOST_OF_A_LAB = 20
SECRET_PREFIX = "whsec_"  # noqa: S105 - how Standard Webhooks begins every secret

# A webhook lives as long as the key that made it: revoking a key ends what it has set up, at once.
KEY_IS_LIVE = tables.Key.revoked_at.is_(None) & (tables.Key.expires_at.is_(None) | (tables.Key.expires_at > func.now()))


def secret_of(webhook_id: UUID, pepper: SecretStr) -> str:
    """Derived, not stored: who reads the database cannot sign messages."""
    derived = hmac.digest(pepper.get_secret_value().encode(), b"webhook:" + webhook_id.bytes, "sha256")
    return SECRET_PREFIX + base64.b64encode(derived).decode()


# --- announcing

_ANNOUNCE = """
WITH written AS (
    INSERT INTO webhook_deliveries (webhook_id, message_id, event, body)
    SELECT w.id, CAST(:message_id AS uuid), CAST(:event AS text), CAST(:body AS text)
    FROM webhooks w JOIN keys k ON k.id = w.key_id
    WHERE CAST(:event AS text) = ANY (w.events) AND w.gone_at IS NULL
      AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now()) AND {}
    RETURNING id
)
SELECT pg_notify(CAST(:channel AS text), '') FROM written LIMIT 1
"""
_OF_MODEL = text(
    _ANNOUNCE.format(
        "(w.model_name = CAST(:model_id AS text)"
        " OR (w.model_name IS NULL AND w.lab_id = (SELECT lab_id FROM models WHERE name = CAST(:model_id AS text))))"
    )
)
_OF_LAB = text(
    _ANNOUNCE.format("w.lab_id = :lab_id AND (w.model_name IS NULL OR w.model_name = CAST(:model_id AS text))")
)


async def announce(
    session: AsyncSession, event: WebhookEvent, model_id: str, data: dict[str, Any], *, lab_id: int | None = None
) -> None:
    """Leave a message, in the transaction of what it tells of, for each webhook that wants it.

    Of what everybody may read, all hear who listen to the model; with `lab_id` that lab alone.
    """
    told = {
        "message_id": uuid.uuid4(),
        "event": event.value,
        "body": message(event.value, {"model_id": model_id} | data),
        "channel": CHANNEL,
        "model_id": model_id,
    }
    if lab_id is None:
        await session.execute(_OF_MODEL, told)
    else:
        await session.execute(_OF_LAB, told | {"lab_id": lab_id})


def message(event: str, data: dict[str, Any]) -> str:
    """The body of a message, as Standard Webhooks has it."""
    at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"type": event, "timestamp": at, "data": data}, ensure_ascii=False, separators=(",", ":"))


# --- for labs


async def create_webhook(
    session: AsyncSession, caller: Caller, new: NewWebhook, pepper: SecretStr, *, networks: Sequence[Network]
) -> IssuedWebhook:
    """Listen from now on. The secret is in this answer and nowhere else."""
    _check_url(new.url, networks)
    await session.execute(  # two at once are counted one after the other
        select(tables.Lab.id).where(tables.Lab.id == caller.lab_id).with_for_update(key_share=True)
    )
    mine = select(func.count()).select_from(tables.Webhook).where(tables.Webhook.lab_id == caller.lab_id)
    if (await session.execute(mine)).scalar_one() >= MOST_OF_A_LAB:
        raise Conflict(f"Lab {caller.lab} has {MOST_OF_A_LAB} webhooks, the most there may be; delete one first.")
    row = tables.Webhook(
        id=uuid.uuid4(),
        lab_id=caller.lab_id,
        key_id=caller.key_id,
        url=new.url,
        events=sorted(set(new.events)),
        model_name=new.model_id,
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    host = urlsplit(new.url).hostname  # of the URL no more: paths and queries hold secrets
    await audit.record(session, caller, "webhook.create", str(row.id), host=host, events=row.events)
    shown = _as_wire(row, caller.lab, caller.key_prefix, key_is_live=True)
    return IssuedWebhook(**shown.model_dump(), secret=secret_of(row.id, pepper))


def _check_url(url: str, networks: Sequence[Network]) -> None:
    """What can be said before the first message; where a name leads is asked at each connection."""
    parts = urlsplit(url)
    fault = None
    if parts.scheme != "https" and not networks:
        fault = "use https: this registry sends no message unencrypted"
    elif (host := parts.hostname or "").replace(".", "").isdigit() or ":" in host:
        try:
            check_address(host, networks)
        except AddressRefused as refused:
            fault = str(refused)
    if fault is not None:
        raise InvalidRequest(
            "The registry sends nothing to this URL.",
            errors=[{"pointer": "/url", "code": "url_refused", "detail": fault}],
        )


async def list_webhooks(session: AsyncSession, caller: Caller, *, limit: int, cursor: str | None) -> WebhookPage:
    """Those of the caller's lab, or of all labs for an administrator."""
    query = _WEBHOOKS
    if not caller.has(Scope.ADMIN):
        query = query.where(tables.Webhook.lab_id == caller.lab_id)
    if (after := paging.decode_cursor(cursor, str)) is not None:
        try:
            last_seen = UUID(after[0])
        except ValueError:
            raise InvalidRequest("This cursor was not given out by this listing; start again without one.") from None
        query = query.where(tables.Webhook.id > last_seen)
    rows = (await session.execute(query.order_by(tables.Webhook.id).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (str(row[0].id),))
    shown = (_as_wire(row, lab, prefix, key_is_live=live) for row, lab, prefix, live in page)
    return WebhookPage(webhooks=tuple(shown), next=following)


async def delete_webhook(session: AsyncSession, caller: Caller, webhook_id: UUID) -> None:
    """End it, with the messages that wait for it and the record of those before."""
    await _own(session, caller, webhook_id)
    await session.execute(delete(tables.Webhook).where(tables.Webhook.id == webhook_id))
    await audit.record(session, caller, "webhook.delete", str(webhook_id))


async def send_test(session: AsyncSession, caller: Caller, webhook_id: UUID) -> WebhookDelivery:
    """Leave a message for this webhook alone."""
    await _own(session, caller, webhook_id)
    row = await session.scalar(
        insert(tables.WebhookDelivery)
        .values(
            webhook_id=webhook_id,
            message_id=uuid.uuid4(),
            event=TEST_EVENT,
            body=message(TEST_EVENT, {"webhook_id": str(webhook_id), "lab": caller.lab}),
        )
        .returning(tables.WebhookDelivery)
    )
    assert row is not None
    await session.execute(select(func.pg_notify(CHANNEL, "")))
    await audit.record(session, caller, "webhook.test", str(webhook_id))
    return _delivery(row, ())


async def list_deliveries(
    session: AsyncSession, caller: Caller, webhook_id: UUID, *, limit: int, cursor: str | None
) -> WebhookDeliveryPage:
    """Newest first, each with its attempts."""
    await _own(session, caller, webhook_id)
    query = select(tables.WebhookDelivery).where(tables.WebhookDelivery.webhook_id == webhook_id)
    if (after := paging.decode_cursor(cursor, int)) is not None:
        query = query.where(tables.WebhookDelivery.id < after[0])
    rows = (await session.scalars(query.order_by(tables.WebhookDelivery.id.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row.id,))
    attempts: dict[int, list[tables.WebhookAttempt]] = {row.id: [] for row in page}
    for attempt in await session.scalars(
        select(tables.WebhookAttempt)
        .where(tables.WebhookAttempt.delivery_id.in_(attempts))
        .order_by(tables.WebhookAttempt.number)
    ):
        attempts[attempt.delivery_id].append(attempt)
    return WebhookDeliveryPage(deliveries=tuple(_delivery(row, attempts[row.id]) for row in page), next=following)


# --- reading

_WEBHOOKS = (
    select(tables.Webhook, tables.Lab.name, tables.Key.prefix, KEY_IS_LIVE)
    .join(tables.Lab, tables.Lab.id == tables.Webhook.lab_id)
    .join(tables.Key, tables.Key.id == tables.Webhook.key_id)
)


async def _own(session: AsyncSession, caller: Caller, webhook_id: UUID) -> None:
    """WebhookNotFound also for one of another lab: who has no part in it does not learn that it exists."""
    lab_id = await session.scalar(select(tables.Webhook.lab_id).where(tables.Webhook.id == webhook_id))
    if lab_id is None or (lab_id != caller.lab_id and not caller.has(Scope.ADMIN)):
        raise WebhookNotFound(f"There is no webhook {webhook_id}, or it belongs to another lab.")


def _as_wire(row: tables.Webhook, lab: str, key_prefix: str, *, key_is_live: bool) -> Webhook:
    ended = None
    if not key_is_live:
        ended = f"the key {key_prefix}… that made it has ended"
    elif row.gone_at is not None:
        ended = "it answered 410 Gone"
    return Webhook(
        id=row.id,
        lab=lab,
        url=row.url,
        events=tuple(map(WebhookEvent, row.events)),
        model_id=row.model_name,
        key_prefix=key_prefix,
        created_at=row.created_at,
        ended=ended,
    )


def message_name(message_id: UUID) -> str:
    return f"msg_{message_id.hex}"


def _delivery(row: tables.WebhookDelivery, attempts: Sequence[tables.WebhookAttempt]) -> WebhookDelivery:
    state = DeliveryState(row.state)
    return WebhookDelivery(
        id=message_name(row.message_id),
        event=row.event,
        state=state,
        created_at=row.created_at,
        due_at=row.due_at if state is DeliveryState.WAITING else None,
        finished_at=row.finished_at,
        attempts=tuple(
            WebhookAttempt(
                number=attempt.number,
                began_at=attempt.began_at,
                ended_at=attempt.ended_at,
                status=attempt.status,
                fault=attempt.fault,
            )
            for attempt in attempts
        ),
    )
