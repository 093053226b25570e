"""Withdrawing a version from resolution, and bringing it back."""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, tables, webhooks
from app.registry.blueprints import VERSIONS, VersionRow, resolve, version_path, version_row
from app.registry.callers import Caller
from gradient_blueprints import models
from gradient_blueprints.errors import PermissionDenied
from gradient_blueprints.webhook_models import WebhookEvent


async def get_version(session: AsyncSession, model_id: str, checkpoint: Decimal, number: int) -> VersionRow:
    query = VERSIONS.where(
        tables.Model.name == model_id, tables.Checkpoint.fraction == checkpoint, tables.Version.number == number
    )
    row = (await session.execute(query)).first()
    if row is None:
        await resolve(session, model_id, checkpoint, version=number)  # raises the error that says what there is
        raise AssertionError("a version that resolves has a row")
    return version_row(row)


async def yank_version(
    session: AsyncSession, caller: Caller, model_id: str, checkpoint: Decimal, number: int, reason: str
) -> models.VersionSummary:
    """Skip this version in resolution; its bytes stay. Yanking again keeps the first reason."""
    version = await _own_version(session, caller, model_id, checkpoint, number)
    written = await session.scalar(
        insert(tables.Yank)
        .values(version_id=version.id, reason=reason)
        .on_conflict_do_nothing()
        .returning(tables.Yank.version_id)
    )
    if written is not None:
        await audit.record(session, caller, "version.yank", version_path(model_id, checkpoint, number), reason=reason)
        told = version.summary.model_dump(include={"training_checkpoint", "version", "digest", "lab"})
        await webhooks.announce(session, WebhookEvent.BLUEPRINT_YANKED, model_id, told | {"reason": reason})
    return (await get_version(session, model_id, checkpoint, number)).summary


async def unyank_version(
    session: AsyncSession, caller: Caller, model_id: str, checkpoint: Decimal, number: int
) -> models.VersionSummary:
    version = await _own_version(session, caller, model_id, checkpoint, number)
    removed = await session.scalar(
        delete(tables.Yank).where(tables.Yank.version_id == version.id).returning(tables.Yank.version_id)
    )
    if removed is not None:
        await audit.record(session, caller, "version.unyank", version_path(model_id, checkpoint, number))
    return (await get_version(session, model_id, checkpoint, number)).summary


async def _own_version(
    session: AsyncSession, caller: Caller, model_id: str, checkpoint: Decimal, number: int
) -> VersionRow:
    version = await get_version(session, model_id, checkpoint, number)
    if version.lab_id != caller.lab_id:
        raise PermissionDenied(f"Version {number} belongs to lab {version.summary.lab}; each lab yanks its own.")
    return version
