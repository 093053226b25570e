"""What there is: models, their checkpoints and versions."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Text, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import paging, tables
from app.registry.blueprints import VERSIONS, explain_miss, version_row
from gradient_blueprints import models
from gradient_blueprints.errors import ModelNotFound

_MANY = 1_000  # names that hold a short term: above, a page of them is found within the first few thousand names


def _like(text: str) -> str:
    """A pattern that matches `text` anywhere, its own % and _ taken literally."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


async def _holds(session: AsyncSession, q: str) -> ColumnElement[bool]:
    """That a model's name holds `q`.

    Trigrams find three letters or more. For shorter terms there is an index of letters and their pairs; but where many
    names hold them, a page is found sooner by going through the names in their order.
    """
    if len(q) <= tables.SHORT_TERM:
        short: ColumnElement[bool] = func.short_terms(tables.Model.name, type_=ARRAY(Text)).contains([q.lower()])
        some = select(tables.Model.id).where(short).limit(_MANY).subquery()
        if (await session.execute(select(func.count()).select_from(some))).scalar_one() < _MANY:
            return short
    return tables.Model.name.ilike(_like(q), escape="\\")


def _model_query() -> Any:
    """Counts come from a subquery per row shown, so that a page costs the same however many models there are."""
    counted = tables.Checkpoint.last_version > 0
    checkpoints = select(func.count()).where(tables.Checkpoint.model_id == tables.Model.id, counted).scalar_subquery()
    versions = (
        select(func.coalesce(func.sum(tables.Checkpoint.last_version), 0))
        .where(tables.Checkpoint.model_id == tables.Model.id)
        .scalar_subquery()
    )
    return select(
        tables.Model.name,
        tables.Lab.name.label("owner"),
        tables.Model.created_at,
        checkpoints.label("checkpoints"),
        versions.label("versions"),
    ).join(tables.Lab, tables.Lab.id == tables.Model.lab_id)


def _as_summary(row: Any) -> models.ModelSummary:
    return models.ModelSummary(
        model_id=row.name,
        owner=row.owner,
        created_at=row.created_at,
        checkpoints=row.checkpoints,
        versions=row.versions,
    )


async def list_models(session: AsyncSession, *, q: str | None, limit: int, cursor: str | None) -> models.ModelPage:
    """By name; `q` matches anywhere in it, whatever the case."""
    query = _model_query()
    if q:
        query = query.where(await _holds(session, q))
    if (after := paging.decode_cursor(cursor, str)) is not None:
        query = query.where(tables.Model.name > after[0])
    rows = (await session.execute(query.order_by(tables.Model.name).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row.name,))
    return models.ModelPage(models=tuple(map(_as_summary, page)), next=following)


async def get_model(session: AsyncSession, model_id: str) -> models.ModelSummary:
    row = (await session.execute(_model_query().where(tables.Model.name == model_id))).first()
    if row is None:
        raise ModelNotFound(f"There is no model {model_id!r}; search with GET /v1/models?q=.")
    return _as_summary(row)


async def list_checkpoints(
    session: AsyncSession, model_id: str, *, limit: int, cursor: str | None
) -> models.CheckpointPage:
    """In the order of training, each with the version that a fetch resolves to."""
    await get_model(session, model_id)
    newest = (
        select(tables.Version.number, tables.Document.digest)
        .join(tables.Document, tables.Document.id == tables.Version.document_id)
        .outerjoin(tables.Yank, tables.Yank.version_id == tables.Version.id)
        .where(
            tables.Version.checkpoint_id == tables.Checkpoint.id,
            tables.Version.lab_id == tables.Model.lab_id,
            tables.Yank.version_id.is_(None),
        )
        .order_by(tables.Version.number.desc())
        .limit(1)
        .lateral()
    )
    query = (
        select(tables.Checkpoint.fraction, tables.Checkpoint.last_version, newest.c.number, newest.c.digest)
        .select_from(tables.Checkpoint)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .outerjoin(newest, true())
        .where(tables.Model.name == model_id, tables.Checkpoint.last_version > 0)
    )
    if (after := paging.decode_cursor(cursor, str)) is not None:
        query = query.where(tables.Checkpoint.fraction > paging.decimal_of(after[0]))
    rows = (await session.execute(query.order_by(tables.Checkpoint.fraction).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (str(row.fraction),))
    checkpoints = tuple(
        models.CheckpointSummary(
            training_checkpoint=float(row.fraction),
            versions=row.last_version,
            newest=row.number,
            digest=f"sha256:{row.digest.hex()}" if row.digest is not None else None,
        )
        for row in page
    )
    return models.CheckpointPage(checkpoints=checkpoints, next=following)


async def list_versions(
    session: AsyncSession, model_id: str, checkpoint: Decimal, *, lab: str | None, limit: int, cursor: str | None
) -> models.VersionPage:
    """Newest first, yanked ones included and marked."""
    await get_model(session, model_id)
    exists = await session.scalar(
        select(tables.Checkpoint.id)
        .join(tables.Model)
        .where(tables.Model.name == model_id, tables.Checkpoint.fraction == checkpoint)
    )
    if exists is None:
        raise await explain_miss(session, model_id, checkpoint)
    query = VERSIONS.where(tables.Version.checkpoint_id == exists)
    if lab is not None:
        query = query.where(tables.Lab.name == lab)
    if (after := paging.decode_cursor(cursor, int, below=paging.INT4)) is not None:
        query = query.where(tables.Version.number < after[0])
    rows = (await session.execute(query.order_by(tables.Version.number.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row.number,))
    return models.VersionPage(versions=tuple(version_row(row).summary for row in page), next=following)
