"""API keys: 256 random bits behind a visible prefix, stored as a keyed hash, checked on every request."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import SecretStr
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, labs, paging, tables
from app.registry.callers import Caller
from app.registry.current import Row
from gradient_blueprints import models
from gradient_blueprints.errors import InvalidRequest, KeyNotFound, PermissionDenied, Unauthenticated
from gradient_blueprints.models import Scope

logger = logging.getLogger(__name__)

KEY_PREFIX = "gbr_"
_RANDOM_CHARACTERS = 43  # 256 bits in base64url
_CHECKSUM_CHARACTERS = 6
_SHOWN_CHARACTERS = 12
_LAST_YEAR = 9000  # time zones near year 9999 overflow


def generate_secret() -> str:
    """A new key. The checksum lets a mistyped one, or one in a leaked file, be recognised without the database."""
    body = KEY_PREFIX + secrets.token_urlsafe(32)
    return f"{body}_{_checksum(body)}"


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:_CHECKSUM_CHARACTERS]


def is_well_formed(secret: str) -> bool:
    body, _, checksum = secret.rpartition("_")
    return (
        secret.startswith(KEY_PREFIX)
        and len(body) == len(KEY_PREFIX) + _RANDOM_CHARACTERS
        and hmac.compare_digest(_checksum(body).encode(), checksum.encode())
    )


def hash_secret(secret: str, pepper: SecretStr) -> bytes:
    """HMAC-SHA256. A slow password hash would protect nothing: 256 random bits cannot be guessed."""
    return hmac.digest(pepper.get_secret_value().encode(), secret.encode(), "sha256")


async def authenticate(session: AsyncSession, secret: str, pepper: SecretStr, *, request_id: str | None) -> Caller:
    """Who presents this key. Read at every request, so that revocation takes effect at once."""
    row = (
        await session.execute(
            select(tables.Key, tables.Lab.name)
            .join(tables.Lab, tables.Lab.id == tables.Key.lab_id)
            .where(tables.Key.hash == hash_secret(secret, pepper))
        )
    ).first()
    if row is None:
        hint = "" if is_well_formed(secret) else " It does not even have a key's form; was it copied whole?"
        raise Unauthenticated(f"This key is not known to the registry.{hint}")
    return caller_of(*row, request_id=request_id)


def caller_of_row(row: Row, *, request_id: str | None) -> Caller:
    """Of app.registry.current.LIVE_KEYS."""
    return Caller(
        key_id=row["id"],
        lab_id=row["lab_id"],
        lab=row["lab"],
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        key_prefix=row["prefix"],
        request_id=request_id,
    )


def caller_of(key: tables.Key, lab: str, *, request_id: str | None) -> Caller:
    """Who holds this key. Unauthenticated once it was revoked or has expired."""
    if key.revoked_at is not None:
        raise Unauthenticated(f"The key {key.prefix}… was revoked; ask an administrator for a new one.")
    if key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        raise Unauthenticated(
            f"The key {key.prefix}… expired at {key.expires_at:%Y-%m-%d %H:%M} UTC; ask for a new one."
        )
    row = {"id": key.id, "lab_id": key.lab_id, "lab": lab, "scopes": key.scopes, "prefix": key.prefix}
    return caller_of_row(row, request_id=request_id)


async def is_valid(session: AsyncSession, caller: Caller) -> bool:
    """Whether the caller's key has been neither revoked nor expired since: for answers that go on for long."""
    live = tables.Key.revoked_at.is_(None) & (tables.Key.expires_at.is_(None) | (tables.Key.expires_at > func.now()))
    return await session.scalar(select(tables.Key.id).where(tables.Key.id == caller.key_id, live)) is not None


async def mark_used(session: AsyncSession, key_id: int) -> None:
    await session.execute(update(tables.Key).where(tables.Key.id == key_id).values(last_used_at=func.now()))


async def create_key(session: AsyncSession, caller: Caller, new: models.NewKey, pepper: SecretStr) -> models.IssuedKey:
    if new.expires_at is not None:
        if new.expires_at.tzinfo is None:
            raise InvalidRequest(
                "expires_at needs a time zone, such as 2027-01-01T00:00:00Z.",
                errors=[{"pointer": "/expires_at", "code": "timezone_missing", "detail": "no time zone"}],
            )
        if new.expires_at.year > _LAST_YEAR:
            raise InvalidRequest(
                f"expires_at lies beyond the year {_LAST_YEAR}; leave it out for a key without end.",
                errors=[{"pointer": "/expires_at", "code": "too_far", "detail": f"beyond the year {_LAST_YEAR}"}],
            )
        if new.expires_at <= datetime.now(UTC):
            raise InvalidRequest(
                "expires_at lies in the past.",
                errors=[{"pointer": "/expires_at", "code": "in_the_past", "detail": "must be in the future"}],
            )
    lab = await labs.get_lab(session, new.lab)
    secret = generate_secret()
    row = await _insert(session, lab.id, secret, pepper, new.scopes, name=new.name, expires_at=new.expires_at)
    await audit.record(
        session, caller, "key.create", row.prefix, lab=new.lab, scopes=[str(scope) for scope in new.scopes]
    )
    return models.IssuedKey(**_as_wire(row, new.lab).model_dump(), secret=secret)


async def _insert(
    session: AsyncSession,
    lab_id: int,
    secret: str,
    pepper: SecretStr,
    scopes: Iterable[Scope],
    *,
    name: str,
    expires_at: datetime | None = None,
    bootstrap: bool = False,
) -> tables.Key:
    row = tables.Key(
        lab_id=lab_id,
        name=name,
        prefix=secret[:_SHOWN_CHARACTERS],
        hash=hash_secret(secret, pepper),
        scopes=sorted({str(scope) for scope in scopes}),
        expires_at=expires_at,
        bootstrap=bootstrap,
    )
    session.add(row)
    await session.flush()
    await session.refresh(row)
    return row


async def ensure_bootstrap_key(
    session: AsyncSession, secret: str, pepper: SecretStr, scope: Scope, *, lab_name: str
) -> None:
    """Make `secret` the one bootstrap key with `scope`. Safe to repeat and to race.

    An earlier one expires, and returns when the operator goes back to it. One that was revoked stays so.
    """
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("bootstrap-key", 0))))
    await session.execute(insert(tables.Lab).values(name=lab_name).on_conflict_do_nothing())
    lab = await labs.get_lab(session, lab_name)
    name = f"bootstrap-{scope}"
    wanted = hash_secret(secret, pepper)
    others = tables.Key.bootstrap & (tables.Key.name == name) & (tables.Key.hash != wanted)
    replaced = await session.scalars(
        update(tables.Key)
        .where(others, tables.Key.revoked_at.is_(None), tables.Key.expires_at.is_(None))
        .values(expires_at=func.now())
        .returning(tables.Key.prefix)
    )
    for prefix in replaced:
        await audit.record(session, None, "key.replace", prefix, lab=lab_name)
    existing = await session.scalar(select(tables.Key).where(tables.Key.hash == wanted))
    if existing is None:
        created = await _insert(session, lab.id, secret, pepper, (scope,), name=name, bootstrap=True)
        await audit.record(session, None, "key.create", created.prefix, lab=lab_name, scopes=[str(scope)])
    elif existing.revoked_at is not None:
        logger.warning("the bootstrap key %s… was revoked over the API and stays so; set another", existing.prefix)
    elif existing.bootstrap and existing.expires_at is not None:
        existing.expires_at = None
        await audit.record(session, None, "key.restore", existing.prefix, lab=lab_name)


async def list_keys(session: AsyncSession, *, limit: int, cursor: str | None) -> models.KeyPage:
    query = select(tables.Key, tables.Lab.name).join(tables.Lab, tables.Lab.id == tables.Key.lab_id)
    if (after := paging.decode_cursor(cursor, int)) is not None:
        query = query.where(tables.Key.id > after[0])
    rows = (await session.execute(query.order_by(tables.Key.id).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row[0].id,))
    return models.KeyPage(keys=tuple(_as_wire(key, lab) for key, lab in page), next=following)


async def revoke_key(session: AsyncSession, caller: Caller, key_id: int) -> models.Key:
    """Revoking twice is the same as once. A key cannot revoke itself, or an operator could lock everybody out."""
    row = (
        await session.execute(
            select(tables.Key, tables.Lab.name)
            .join(tables.Lab, tables.Lab.id == tables.Key.lab_id)
            .where(tables.Key.id == key_id)
            .with_for_update(of=tables.Key)
        )
    ).first()
    if row is None:
        raise KeyNotFound(f"There is no key {key_id}; GET /v1/keys lists them.")
    key, lab = row
    if key.id == caller.key_id:
        raise PermissionDenied("A key cannot revoke itself; use another admin key.")
    if key.revoked_at is None:
        key.revoked_at = datetime.now(UTC)
        await audit.record(session, caller, "key.revoke", key.prefix, lab=lab)
    return _as_wire(key, lab)


def _as_wire(key: tables.Key, lab: str) -> models.Key:
    return models.Key(
        id=key.id,
        lab=lab,
        name=key.name,
        prefix=key.prefix,
        scopes=tuple(Scope(scope) for scope in key.scopes),
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
    )
