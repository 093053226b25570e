"""Movable names of versions, moved by the model's owner alone, with their history."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, paging, tables, webhooks
from app.registry.blueprints import Found, resolve
from app.registry.callers import Caller
from app.registry.catalog import get_model
from app.registry.versions import get_version
from gradient_blueprints import models
from gradient_blueprints.errors import AliasNotFound, ModelNotFound, PermissionDenied, PreconditionFailed
from gradient_blueprints.models import parse_checkpoint
from gradient_blueprints.webhook_models import WebhookEvent

_ALIASES = (
    select(
        tables.Alias.name,
        tables.Alias.revision,
        tables.Alias.updated_at,
        tables.Version.number,
        tables.Checkpoint.fraction,
        tables.Document.digest,
        tables.Model.name.label("model_id"),
    )
    .select_from(tables.Alias)
    .join(tables.Model, tables.Model.id == tables.Alias.model_id)
    .join(tables.Version, tables.Version.id == tables.Alias.version_id)
    .join(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
    .join(tables.Document, tables.Document.id == tables.Version.document_id)
)


def _as_wire(row: Any) -> models.Alias:
    return models.Alias(
        name=row.name,
        model_id=row.model_id,
        training_checkpoint=float(row.fraction),
        version=row.number,
        digest=f"sha256:{row.digest.hex()}",
        revision=row.revision,
        updated_at=row.updated_at,
    )


async def get_alias(session: AsyncSession, model_id: str, name: str) -> models.Alias:
    query = _ALIASES.where(tables.Model.name == model_id, tables.Alias.name == name)
    row = (await session.execute(query)).first()
    if row is None:
        await get_model(session, model_id)
        raise AliasNotFound(f"{model_id} has no alias {name!r}; GET /v1/models/{model_id}/aliases lists them.")
    return _as_wire(row)


async def resolve_alias(session: AsyncSession, model_id: str, name: str) -> Found:
    alias = await get_alias(session, model_id, name)
    return await resolve(session, model_id, parse_checkpoint(alias.training_checkpoint), version=alias.version)


async def list_aliases(session: AsyncSession, model_id: str, *, limit: int, cursor: str | None) -> models.AliasPage:
    await get_model(session, model_id)
    query = _ALIASES.where(tables.Model.name == model_id)
    if (after := paging.decode_cursor(cursor, str)) is not None:
        query = query.where(tables.Alias.name > after[0])
    rows = (await session.execute(query.order_by(tables.Alias.name).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda row: (row.name,))
    return models.AliasPage(aliases=tuple(map(_as_wire, page)), next=following)


async def move_alias(
    session: AsyncSession,
    caller: Caller,
    model_id: str,
    name: str,
    target: models.AliasTarget,
    *,
    expected: int | None = None,
    must_be_new: bool = False,
) -> models.Alias:
    """Point `name` at a version.

    `expected` is the revision that the caller last saw (If-Match), `must_be_new` If-None-Match: *.
    Moving it to where it is already changes nothing.
    """
    model = await _own_model(session, caller, model_id)
    version = await get_version(session, model_id, parse_checkpoint(target.training_checkpoint), target.version)
    current = await _current(session, model.id, name)
    _check_precondition(current, name, expected=expected, must_be_new=must_be_new)
    if current is None or current.version_id != version.id:
        revision = await _next_revision(session, model.id, name)
        await session.execute(
            insert(tables.Alias)
            .values(model_id=model.id, name=name, version_id=version.id, revision=revision)
            .on_conflict_do_update(
                index_elements=[tables.Alias.model_id, tables.Alias.name],
                set_={"version_id": version.id, "revision": revision, "updated_at": func.now()},
            )
        )
        await _record_move(session, caller, model.id, name, revision, version.id)
        where = f"{target.training_checkpoint:g}@{target.version}"
        await audit.record(session, caller, "alias.move", f"{model_id}:{name}", to=where, revision=revision)
        told = {"alias": name, "revision": revision, "digest": version.summary.digest}
        await webhooks.announce(session, WebhookEvent.ALIAS_MOVED, model_id, told | target.model_dump())
    return await get_alias(session, model_id, name)


async def delete_alias(
    session: AsyncSession, caller: Caller, model_id: str, name: str, *, expected: int | None = None
) -> None:
    """Remove the name; its history stays, and a later alias of that name goes on with its revisions."""
    model = await _own_model(session, caller, model_id)
    current = await _current(session, model.id, name)
    if current is None:
        raise AliasNotFound(f"{model_id} has no alias {name!r}.")
    _check_precondition(current, name, expected=expected, must_be_new=False)
    revision = await _next_revision(session, model.id, name)
    await session.execute(delete(tables.Alias).where(tables.Alias.model_id == model.id, tables.Alias.name == name))
    await _record_move(session, caller, model.id, name, revision, None)
    await audit.record(session, caller, "alias.delete", f"{model_id}:{name}", revision=revision)
    told = {"alias": name, "revision": revision, "digest": None}
    await webhooks.announce(session, WebhookEvent.ALIAS_MOVED, model_id, told)


async def list_moves(
    session: AsyncSession, model_id: str, name: str, *, limit: int, cursor: str | None
) -> models.AliasHistory:
    """Newest first; also of an alias that is no more."""
    await get_model(session, model_id)
    query = (
        select(
            tables.AliasMove.revision,
            tables.AliasMove.moved_at,
            tables.Lab.name.label("lab"),
            tables.Version.number,
            tables.Checkpoint.fraction,
        )
        .select_from(tables.AliasMove)
        .join(tables.Model, tables.Model.id == tables.AliasMove.model_id)
        .join(tables.Lab, tables.Lab.id == tables.AliasMove.lab_id)
        .outerjoin(tables.Version, tables.Version.id == tables.AliasMove.version_id)
        .outerjoin(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
        .where(tables.Model.name == model_id, tables.AliasMove.name == name)
    )
    if (after := paging.decode_cursor(cursor, int, below=paging.INT4)) is not None:
        query = query.where(tables.AliasMove.revision < after[0])
    rows = (await session.execute(query.order_by(tables.AliasMove.revision.desc()).limit(limit + 1))).all()
    if not rows and cursor is None:
        raise AliasNotFound(f"{model_id} never had an alias {name!r}.")
    page, following = paging.split_page(rows, limit, lambda row: (row.revision,))
    moves = tuple(
        models.AliasMove(
            revision=row.revision,
            training_checkpoint=None if row.fraction is None else float(row.fraction),
            version=row.number,
            lab=row.lab,
            moved_at=row.moved_at,
        )
        for row in page
    )
    return models.AliasHistory(moves=moves, next=following)


async def _own_model(session: AsyncSession, caller: Caller, model_id: str) -> tables.Model:
    """The model, its row locked: two moves of one alias follow each other."""
    model = await session.scalar(
        select(tables.Model).where(tables.Model.name == model_id).with_for_update(key_share=True)
    )
    if model is None:
        raise ModelNotFound(f"There is no model {model_id!r}.")
    if model.lab_id != caller.lab_id:
        raise PermissionDenied(f"Only the owner of {model_id} moves its aliases.")
    return model


async def _current(session: AsyncSession, model_id: int, name: str) -> tables.Alias | None:
    return await session.scalar(
        select(tables.Alias).where(tables.Alias.model_id == model_id, tables.Alias.name == name)
    )


def _check_precondition(current: tables.Alias | None, name: str, *, expected: int | None, must_be_new: bool) -> None:
    have = current.revision if current is not None else None
    if must_be_new and have is not None:
        raise PreconditionFailed(f"The alias {name!r} exists already, at revision {have}.")
    if expected is not None and expected != have:
        state = f"is at revision {have}" if have is not None else "does not exist"
        raise PreconditionFailed(f"The alias {name!r} {state}, not at {expected}; read it again and decide anew.")


async def _next_revision(session: AsyncSession, model_id: int, name: str) -> int:
    last = await session.scalar(
        select(func.max(tables.AliasMove.revision)).where(
            tables.AliasMove.model_id == model_id, tables.AliasMove.name == name
        )
    )
    return (last or 0) + 1


async def _record_move(
    session: AsyncSession, caller: Caller, model_id: int, name: str, revision: int, version_id: int | None
) -> None:
    await session.execute(
        insert(tables.AliasMove).values(
            model_id=model_id, name=name, revision=revision, version_id=version_id, lab_id=caller.lab_id
        )
    )
