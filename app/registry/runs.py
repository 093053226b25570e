"""Runs: what training a model cost and brought, reported while it goes on, unchangeable once it has finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, paging, tables
from app.registry.callers import Caller
from app.registry.capability import better, envelope, window_ratio
from app.registry.plausibility import marks_of
from app.registry.threads import in_thread_unless
from gradient_blueprints.errors import (
    AlreadyExists,
    InvalidRequest,
    PayloadTooLarge,
    PermissionDenied,
    RunConflict,
    RunFinished,
    RunNotFound,
)
from gradient_blueprints.record_models import (
    MAX_POINTS,
    LastPair,
    NewRun,
    PointBatch,
    ReportedPoint,
    Run,
    RunEnd,
    RunPage,
    RunPointPage,
)
from gradient_blueprints.run_models import Resource, Tally

_BRIEF_POINTS = 1_000  # curves of more are made in a thread: 20,000 points of all resources take half a second

# --- writing


async def begin(session: AsyncSession, caller: Caller, new: NewRun) -> tuple[Run, bool]:
    """The run of that id, and whether it is new. AlreadyExists when the id was used for another."""
    created = await session.scalar(
        insert(tables.Run)
        .values(
            name=new.id,
            lab_id=caller.lab_id,
            key_id=caller.key_id,
            task=new.task,
            model_name=new.model_id,
            begun=new.model_dump(mode="json", exclude_none=True),
        )
        .on_conflict_do_nothing()
        .returning(tables.Run.id)
    )
    row = await session.scalar(select(tables.Run).where(tables.Run.name == new.id))
    assert row is not None, "runs are never deleted"
    if created is not None:
        await audit.record(session, caller, "run.begin", str(new.id), task=new.task, model_id=new.model_id)
    elif row.lab_id != caller.lab_id or NewRun.model_validate(row.begun) != new:
        raise AlreadyExists(f"There is another run with the id {new.id}; make a new id.")
    return await _described(session, row, caller.lab), created is not None


async def append(session: AsyncSession, caller: Caller, name: UUID, batch: PointBatch) -> Run:
    """Add points where the run stands. Points that it has already may be sent again, as long as they are the same."""
    row = await _own(session, caller, name)
    if batch.first > row.points:
        raise _go_on_at(name, row.points)
    stored = await _points(session, row, after=batch.first - 1, limit=len(batch.points))
    if tuple(stored) != batch.points[: len(stored)]:
        raise RunConflict(
            f"Run {name} has other points at {batch.first} and after; a point that was sent cannot be changed.",
            points=row.points,
        )
    fresh = batch.points[len(stored) :]
    if not fresh:
        return await _described(session, row, caller.lab)
    if row.finished_at is not None:
        raise RunFinished(f"Run {name} has finished with {row.points} points; it takes no more.")
    if row.points + len(fresh) > MAX_POINTS:
        raise PayloadTooLarge(f"A run has at most {MAX_POINTS:,} points; evaluate less often.")
    last = await _last(session, row)
    if last is not None and fresh[0].step <= last.step:
        detail = f"step {fresh[0].step} comes after step {last.step}, which is later or the same"
        place = f"/points/{len(stored)}/step"
        raise InvalidRequest(detail, errors=[{"pointer": place, "code": "steps_must_rise", "detail": detail}])
    await session.execute(
        insert(tables.RunPoint),
        [
            {"run_id": row.id, "number": number, **point.model_dump(mode="json")}
            for number, point in enumerate(fresh, row.points)
        ],
    )
    row.points += len(fresh)
    if batch.tally is not None:
        row.tally = _told(batch.tally)
    await audit.record(session, caller, "run.append", str(name), points=len(fresh))
    return await _described(session, row, caller.lab)


def _go_on_at(name: UUID, points: int) -> RunConflict:
    return RunConflict(f"Run {name} has {points} points; go on with first = {points}.", points=points)


async def finish(session: AsyncSession, caller: Caller, name: UUID, end: RunEnd) -> Run:
    """Close a run: its final pair, the ratio of its last window, and what in it cannot be right. Safe to repeat."""
    row = await _own(session, caller, name)
    told = _told(end.tally)
    if row.finished_at is not None:
        if Tally.model_validate(row.tally) == Tally.model_validate(told) and row.stopped == end.stopped:
            return await _described(session, row, caller.lab)
        raise RunFinished(f"Run {name} has finished with other figures, which cannot be changed.")
    points = await _points(session, row)
    outcome, curves = await in_thread_unless(
        len(points) <= _BRIEF_POINTS, _closed, NewRun.model_validate(row.begun), points, end.tally
    )
    row.tally, row.stopped, row.outcome, row.curves = told, end.stopped, outcome, curves
    row.finished_at = func.now()
    await session.flush()
    await session.refresh(row)
    marks = [mark["code"] for mark in outcome["marks"]]
    await audit.record(session, caller, "run.finish", str(name), points=row.points, marks=marks)
    return await _described(session, row, caller.lab)


def _closed(
    run: NewRun, points: Sequence[ReportedPoint], tally: Tally
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """What a finished run came to, and its curve of each resource that was counted."""
    marks, unchecked = marks_of(run, points, tally)
    outcome: dict[str, Any] = {
        "marks": [mark.model_dump(mode="json") for mark in marks],
        "unchecked": list(unchecked),
        "last_ratio": _last_ratio(run, points),
    }
    if points:
        best = points[0].psi
        for point in points:
            best = better(best, point.psi, run.goal)
        amounts = {**points[-1].gamma, **tally.amounts()}
        outcome["final"] = LastPair(psi=points[-1].psi, best_psi=best, gamma=amounts).model_dump(mode="json")
    return outcome, {resource.value: curve for resource in Resource if (curve := _curve(run, points, resource))}


def _curve(run: NewRun, points: Sequence[ReportedPoint], resource: Resource) -> list[tuple[float, float]]:
    return envelope([(point.gamma[resource], point.psi) for point in points if resource in point.gamma], run.goal)


def _last_ratio(run: NewRun, points: Sequence[ReportedPoint]) -> dict[str, float] | None:
    """As MarginalReturn has it: over `window` steps of the curve; None while there are fewer points."""
    if len(points) <= run.window:
        return None
    first, last = points[-1 - run.window], points[-1]
    ratios = {
        resource.value: window_ratio((first.gamma[resource], first.psi), (last.gamma[resource], last.psi), run.goal)
        for resource in Resource
        if resource in first.gamma and resource in last.gamma
    }
    return {resource: ratio for resource, ratio in ratios.items() if ratio is not None}


def _told(tally: Tally) -> dict[str, Any]:
    return tally.told().model_dump(mode="json", exclude_none=True)


async def _own(session: AsyncSession, caller: Caller, name: UUID) -> tables.Run:
    """The caller's run, locked."""
    row = await session.scalar(select(tables.Run).where(tables.Run.name == name).with_for_update())
    if row is None:
        raise _not_found(name)
    if row.lab_id != caller.lab_id:
        raise PermissionDenied(f"Run {name} belongs to another lab; each lab reports its own.")
    return row


def _not_found(name: UUID) -> RunNotFound:
    return RunNotFound(f"There is no run {name}; GET /v1/runs lists them.")


# --- reading


async def get_run(session: AsyncSession, name: UUID) -> Run:
    return _as_wire(*await _find(session, name))


async def get_model_card(session: AsyncSession, name: UUID) -> str:
    """The disclosure of a finished run, to paste into a model card.

    A run that names nothing it began from may still be a full fine-tuning: it says of no training type.
    """
    row, _, _ = await _find(session, name)
    if row.finished_at is None:
        raise RunNotFound(f"Run {name} has not finished; its disclosure is made then.")
    begun = NewRun.model_validate(row.begun)
    began_from = (begun.training_checkpoint, begun.blueprint, begun.selection)
    fine_tuning = any(given is not None for given in began_from)
    return Tally.model_validate(row.tally).model_card("fine-tuning" if fine_tuning else None)


async def list_points(session: AsyncSession, name: UUID, *, limit: int, cursor: str | None) -> RunPointPage:
    """In their order."""
    row, _, _ = await _find(session, name)
    after = paging.decode_cursor(cursor, int, below=paging.INT4)
    first = after[0] + 1 if after is not None else 0
    points = await _points(session, row, after=first - 1, limit=limit + 1)
    following = paging.encode_cursor(first + limit - 1) if len(points) > limit else None
    return RunPointPage(points=tuple(points[:limit]), next=following)


async def list_runs(
    session: AsyncSession,
    *,
    task: str | None,
    model_id: str | None,
    lab: str | None,
    limit: int,
    cursor: str | None,
) -> RunPage:
    """Newest first."""
    query = _DESCRIPTION
    if task is not None:
        query = query.where(tables.Run.task == task)
    if model_id is not None:
        query = query.where(tables.Run.model_name == model_id)
    if lab is not None:
        query = query.where(tables.Lab.name == lab)
    if (after := paging.decode_cursor(cursor, int)) is not None:
        query = query.where(tables.Run.id < after[0])
    rows = (await session.execute(query.order_by(tables.Run.id.desc()).limit(limit + 1))).all()
    page, following = paging.split_page(rows, limit, lambda found: (found[0].id,))
    return RunPage(runs=tuple(_as_wire(*found) for found in page), next=following)


@dataclass(frozen=True)
class TaskSummary:
    task: str
    runs: int
    finished: int
    newest: datetime


async def list_tasks(session: AsyncSession, *, limit: int) -> list[TaskSummary]:
    """What there are runs of, the task of the newest run first."""
    newest = func.max(tables.Run.created_at)
    rows = await session.execute(
        select(tables.Run.task, func.count(), func.count(tables.Run.finished_at), newest)
        .group_by(tables.Run.task)
        .order_by(newest.desc(), tables.Run.task)
        .limit(limit)
    )
    return [TaskSummary(*row) for row in rows]


_DESCRIPTION = (
    select(tables.Run, tables.Lab.name, tables.RunPoint)
    .join(tables.Lab, tables.Lab.id == tables.Run.lab_id)
    .outerjoin(
        tables.RunPoint,
        (tables.RunPoint.run_id == tables.Run.id) & (tables.RunPoint.number == tables.Run.points - 1),
    )
)


async def _find(session: AsyncSession, name: UUID) -> tuple[tables.Run, str, tables.RunPoint | None]:
    found = (await session.execute(_DESCRIPTION.where(tables.Run.name == name))).one_or_none()
    if found is None:
        raise _not_found(name)
    return found[0], found[1], found[2]


async def _points(
    session: AsyncSession, row: tables.Run, *, after: int = -1, limit: int = MAX_POINTS
) -> list[ReportedPoint]:
    found = await session.scalars(
        select(tables.RunPoint)
        .where(tables.RunPoint.run_id == row.id, tables.RunPoint.number > after)
        .order_by(tables.RunPoint.number)
        .limit(limit)
    )
    return [_point(point) for point in found]


async def _last(session: AsyncSession, row: tables.Run) -> tables.RunPoint | None:
    return await session.get(tables.RunPoint, (row.id, row.points - 1))


async def _described(session: AsyncSession, row: tables.Run, lab: str) -> Run:
    return _as_wire(row, lab, await _last(session, row))


def _point(row: tables.RunPoint) -> ReportedPoint:
    return ReportedPoint.model_validate({"step": row.step, "psi": row.psi, "gamma": row.gamma})


def _as_wire(row: tables.Run, lab: str, last: tables.RunPoint | None) -> Run:
    return Run.model_validate(
        {
            **row.begun,
            **(row.outcome or {}),
            "lab": lab,
            "created_at": row.created_at,
            "finished_at": row.finished_at,
            "points": row.points,
            "last": None if last is None else _point(last),
            "tally": row.tally,
            "stopped": row.stopped,
            "model_card": f"/v1/runs/{row.name}/model-card" if row.finished_at is not None else None,
        }
    )
