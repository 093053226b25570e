"""The append-only record of every write: who did what to what."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import paging, tables
from app.registry.callers import Caller
from gradient_blueprints import models

# Made once, and of the table itself: the ORM's takes longer to be put together than the database to execute it.
_RECORD = insert(tables.table_of(tables.AuditEntry))


async def record(session: AsyncSession, caller: Caller | None, action: str, subject: str, **details: Any) -> None:
    """Add an entry in the transaction of the write itself, so that neither exists without the other."""
    await session.execute(
        _RECORD,
        {
            "key_id": caller.key_id if caller else None,
            "lab_id": caller.lab_id if caller else None,
            "action": action,
            "subject": subject,
            "details": details,
            "request_id": caller.request_id if caller else None,
        },
    )


async def list_entries(session: AsyncSession, *, limit: int, cursor: str | None) -> models.AuditPage:
    """Newest first."""
    query = (
        select(tables.AuditEntry, tables.Lab.name, tables.Key.prefix)
        .outerjoin(tables.Lab, tables.Lab.id == tables.AuditEntry.lab_id)
        .outerjoin(tables.Key, tables.Key.id == tables.AuditEntry.key_id)
    )
    if (after := paging.decode_cursor(cursor, int)) is not None:
        query = query.where(tables.AuditEntry.id < after[0])
    rows = (await session.execute(query.order_by(tables.AuditEntry.id.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row[0].id,))
    entries = tuple(
        models.AuditEntry(
            id=entry.id,
            at=entry.at,
            lab=lab,
            key_prefix=prefix,
            action=entry.action,
            subject=entry.subject,
            details=entry.details,
            request_id=entry.request_id,
        )
        for entry, lab, prefix in page
    )
    return models.AuditPage(entries=entries, next=following)
