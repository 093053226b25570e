"""Answering a repeated request with the answer of the first: `Idempotency-Key`."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.callers import Caller
from gradient_blueprints.errors import IdempotencyConflict

KEPT_DAYS = 7
FORGET_BATCH = 1_000


class IdempotentRequest:
    """One request under its key. `begin` gives the earlier answer, if there is one; `finish` keeps this one.

    The advisory lock makes a repetition that arrives while the first still runs wait for it.
    """

    def __init__(self, session: AsyncSession, caller: Caller, token: str | None, *parts: bytes) -> None:
        self._session = session
        self._caller = caller
        self._token = token
        self._digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).digest()

    async def begin(self) -> tuple[int, dict[str, Any]] | None:
        """Status and body of the first answer; IdempotencyConflict when the key came with another request."""
        if self._token is None:
            return None
        name = f"idempotency:{self._caller.key_id}:{self._token}"
        await self._session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
        earlier = await self._session.get(tables.IdempotentRequest, (self._caller.key_id, self._token))
        if earlier is None:
            return None
        if earlier.request_digest != self._digest:
            raise IdempotencyConflict(
                f"The idempotency key {self._token!r} was already used for a different request; use a new one."
            )
        return earlier.status, earlier.answer

    async def finish(self, status: int, answer: dict[str, Any]) -> None:
        if self._token is not None:
            await self._session.execute(
                insert(tables.IdempotentRequest).values(
                    key_id=self._caller.key_id,
                    token=self._token,
                    request_digest=self._digest,
                    status=status,
                    answer=answer,
                )
            )


async def forget_old(session: AsyncSession) -> int:
    """Remove answers older than KEPT_DAYS, so many of them; a request that is repeated later is a new one."""
    name = tuple_(tables.IdempotentRequest.key_id, tables.IdempotentRequest.token)
    old = (
        select(tables.IdempotentRequest.key_id, tables.IdempotentRequest.token)
        .where(tables.IdempotentRequest.created_at < func.now() - timedelta(days=KEPT_DAYS))
        .order_by(tables.IdempotentRequest.created_at)
        .limit(FORGET_BATCH)
        .with_for_update(skip_locked=True)
        .cte()
    )
    forgotten = await session.scalars(
        delete(tables.IdempotentRequest).where(name.in_(select(old))).returning(tables.IdempotentRequest.created_at)
    )
    return len(forgotten.all())
