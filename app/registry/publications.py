"""What has been published of a model: by which labs, and of late."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.blueprints import VERSIONS, version_row
from gradient_blueprints.models import VersionSummary


@dataclass(frozen=True)
class LabShare:
    """What one lab has published of a model."""

    lab: str
    versions: int
    checkpoints: int
    latest: datetime
    owner: bool


async def list_labs_of(session: AsyncSession, model_id: str, *, limit: int) -> list[LabShare]:
    """The owner first, then those that published last."""
    owner = tables.Version.lab_id == tables.Model.lab_id
    latest = func.max(tables.Version.created_at)
    query = (
        select(
            tables.Lab.name,
            func.count().label("versions"),
            func.count(tables.Version.checkpoint_id.distinct()).label("checkpoints"),
            latest.label("latest"),
            func.bool_or(owner).label("owner"),
        )
        .select_from(tables.Version)
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .join(tables.Lab, tables.Lab.id == tables.Version.lab_id)
        .where(tables.Model.name == model_id)
        .group_by(tables.Lab.name)
        .order_by(func.bool_or(owner).desc(), latest.desc())
        .limit(limit)
    )
    return [
        LabShare(row.name, row.versions, row.checkpoints, row.latest, row.owner) for row in await session.execute(query)
    ]


async def count_labs_of(session: AsyncSession, model_id: str) -> int:
    query = (
        select(func.count(tables.Version.lab_id.distinct()))
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .where(tables.Model.name == model_id)
    )
    return (await session.execute(query)).scalar_one()


async def list_latest_versions(session: AsyncSession, model_id: str, *, limit: int) -> list[VersionSummary]:
    """Of all checkpoints and labs, newest first, yanked ones included and marked."""
    query = VERSIONS.where(tables.Model.name == model_id).order_by(tables.Version.id.desc()).limit(limit)
    return [version_row(row).summary for row in await session.execute(query)]
