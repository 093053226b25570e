"""Runs, reported in batches while training goes on, and the leaderboard of a task."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from app.api.dependencies import Cursor, Limit, Publisher, Reader, Session
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import leaderboard, runs
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints.models import LabName, ModelId, Tag
from gradient_blueprints.record_models import (
    LARGEST,
    At,
    Leaderboard,
    NewRun,
    PointBatch,
    Run,
    RunEnd,
    RunPage,
    RunPointPage,
    Task,
)
from gradient_blueprints.run_models import Resource

router = APIRouter(tags=["runs"])


class MarkdownResponse(PlainTextResponse):
    media_type = "text/markdown"


AtQuery = Annotated[
    str | None,
    Query(
        pattern=r"^(psi:-?|gamma:)[0-9]{1,30}(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,2})?$",
        description="`gamma:VALUE` ranks by the score reached with so much, `psi:VALUE` by what that score cost; "
        "without it where the median curve of a group ends: the lower median of what had been spent at each run's "
        "last score",
        examples=["gamma:0.5", "psi:3.2"],
    ),
]

_BEGUN_BEFORE: dict[int | str, dict[str, Any]] = {
    200: {"model": Run, "description": "The run of that id, begun before"}
}


@router.post(
    "/v1/runs",
    status_code=201,
    response_model=Run,
    responses=_BEGUN_BEFORE | documented(409),
)
async def begin_run(session: Session, caller: Publisher, new: NewRun) -> Response:
    """Begin a run, or find the one of that id, with how many points it has."""
    run, created = await runs.begin(session, caller, new)
    headers = {"Location": f"/v1/runs/{run.id}"}
    return JSONResponse(run.model_dump(mode="json", exclude_none=True), 201 if created else 200, headers=headers)


@router.post("/v1/runs/{run_id}/points", response_model_exclude_none=True, responses=documented(404, 409))
async def append_points(session: Session, caller: Publisher, run_id: UUID, batch: PointBatch) -> Run:
    """Add points `first`, `first` + 1, ... Points that are there already may be sent again."""
    return await runs.append(session, caller, run_id, batch)


@router.post("/v1/runs/{run_id}/finish", response_model_exclude_none=True, responses=documented(404, 409))
async def finish_run(session: Session, caller: Publisher, run_id: UUID, end: RunEnd) -> Run:
    """Close a run for ever; may be repeated with the same figures."""
    return await runs.finish(session, caller, run_id, end)


@router.get("/v1/runs", response_model_exclude_none=True, responses=documented())
async def list_runs(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    task: Annotated[Task | None, Query()] = None,
    model: Annotated[ModelId | None, Query()] = None,
    lab: Annotated[LabName | None, Query()] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> RunPage:
    """Newest first, unfinished ones among them."""
    page = await runs.list_runs(session, task=task, model_id=model, lab=lab, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.get("/v1/runs/{run_id}", response_model_exclude_none=True, responses=documented(404))
async def get_run(session: Session, reader: Reader, run_id: UUID) -> Run:
    return await runs.get_run(session, run_id)


@router.get("/v1/runs/{run_id}/points", response_model_exclude_none=True, responses=documented(404))
async def list_points(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    run_id: UUID,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> RunPointPage:
    """The curve of a run, from its first point."""
    page = await runs.list_points(session, run_id, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.get("/v1/runs/{run_id}/model-card", response_class=MarkdownResponse, responses=documented(404))
async def get_model_card(session: Session, reader: Reader, run_id: UUID) -> MarkdownResponse:
    """What a finished run spent, with `co2_eq_emissions`, to paste into a Hugging Face model card."""
    return MarkdownResponse(await runs.get_model_card(session, run_id))


@router.get("/v1/leaderboard", response_model_exclude_none=True, responses=documented())
async def rank_runs(
    session: Session,
    reader: Reader,
    task: Annotated[Task, Query()],
    resource: Annotated[Resource, Query()],
    at: AtQuery = None,
    metric: Annotated[Tag | None, Query()] = None,
) -> Leaderboard:
    """Rank the runs of a task by capability per resource, within groups that measured the resource alike."""
    return await leaderboard.rank(session, task, resource, at=_at(at), metric=metric)


def _at(text: str | None) -> At | None:
    if text is None:
        return None
    axis, _, value = text.partition(":")
    return At.model_validate({"axis": axis, "value": max(-LARGEST, min(LARGEST, float(value)))})
