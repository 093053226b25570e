"""Sessions of browsers: opened with a key, kept as a row, so that logging out or revoking the key ends them at once."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import SecretStr
from sqlalchemy import ColumnElement, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, keys, tables
from app.registry.callers import Caller
from gradient_blueprints.errors import Unauthenticated


@dataclass(frozen=True)
class OpenSession:
    """A session that is valid now."""

    caller: Caller
    expires_at: datetime


async def begin(session: AsyncSession, caller: Caller, pepper: SecretStr, *, seconds: float) -> str:
    """The token of a new session of the caller's key: 256 random bits, stored as a keyed hash like a key."""
    await session.execute(delete(tables.WebSession).where(tables.WebSession.expires_at < func.now()))
    token = secrets.token_urlsafe(32)
    await session.execute(
        insert(tables.WebSession).values(
            token_hash=keys.hash_secret(token, pepper),
            key_id=caller.key_id,
            expires_at=func.now() + timedelta(seconds=seconds),
        )
    )
    await audit.record(session, caller, "session.begin", caller.key_prefix)
    return token


async def find(session: AsyncSession, token: str, pepper: SecretStr, *, request_id: str | None) -> OpenSession:
    """The session of this token. Unauthenticated once it ended, or its key was revoked or has expired."""
    row = (
        await session.execute(
            select(tables.WebSession.expires_at, tables.Key, tables.Lab.name)
            .join(tables.Key, tables.Key.id == tables.WebSession.key_id)
            .join(tables.Lab, tables.Lab.id == tables.Key.lab_id)
            .where(
                tables.WebSession.token_hash == keys.hash_secret(token, pepper),
                tables.WebSession.expires_at > func.now(),
            )
        )
    ).first()
    if row is None:
        raise Unauthenticated("This session has ended; log in again.")
    expires_at, key, lab = row
    return OpenSession(keys.caller_of(key, lab, request_id=request_id), expires_at)


async def count(session: AsyncSession, caller: Caller) -> int:
    """How many browsers are logged in with the caller's key."""
    query = select(func.count()).where(
        tables.WebSession.key_id == caller.key_id, tables.WebSession.expires_at > func.now()
    )
    return (await session.scalar(query)) or 0


async def end(session: AsyncSession, caller: Caller, token: str, pepper: SecretStr) -> None:
    """Ending twice is the same as once."""
    await _end(session, caller, tables.WebSession.token_hash == keys.hash_secret(token, pepper))


async def end_others(session: AsyncSession, caller: Caller, token: str, pepper: SecretStr) -> None:
    """Log out every browser of the caller's key but this one."""
    await _end(session, caller, tables.WebSession.token_hash != keys.hash_secret(token, pepper))


async def _end(session: AsyncSession, caller: Caller, which: ColumnElement[bool]) -> None:
    ended = await session.scalars(
        delete(tables.WebSession)
        .where(tables.WebSession.key_id == caller.key_id, which)
        .returning(tables.WebSession.key_id)
    )
    if number := len(ended.all()):
        await audit.record(session, caller, "session.end", caller.key_prefix, sessions=number)
