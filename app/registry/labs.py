"""Labs: who owns models and keys."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, paging, tables
from app.registry.callers import Caller
from gradient_blueprints import models
from gradient_blueprints.errors import AlreadyExists, LabNotFound


async def create_lab(session: AsyncSession, caller: Caller, new: models.NewLab) -> models.Lab:
    created = await session.scalar(
        insert(tables.Lab).values(name=new.name).on_conflict_do_nothing().returning(tables.Lab.created_at)
    )
    if created is None:
        raise AlreadyExists(f"There is a lab {new.name} already.")
    await audit.record(session, caller, "lab.create", new.name)
    return models.Lab(name=new.name, created_at=created)


async def get_lab(session: AsyncSession, name: str) -> tables.Lab:
    lab = await session.scalar(select(tables.Lab).where(tables.Lab.name == name))
    if lab is None:
        raise LabNotFound(f"There is no lab {name!r}; an administrator can create it with POST /v1/labs.")
    return lab


async def list_labs(session: AsyncSession, *, limit: int, cursor: str | None) -> models.LabPage:
    query = select(tables.Lab)
    if (after := paging.decode_cursor(cursor, str)) is not None:
        query = query.where(tables.Lab.name > after[0])
    rows = (await session.scalars(query.order_by(tables.Lab.name).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda lab: (lab.name,))
    return models.LabPage(
        labs=tuple(models.Lab(name=lab.name, created_at=lab.created_at) for lab in page), next=following
    )
