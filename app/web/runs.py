"""The pages of runs: the list, and one run with its curve and what it spent."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import Cursor, Session
from app.registry import runs
from app.web import leaderboard_pictures, pictures
from app.web.rendering import render
from app.web.session import Viewer
from gradient_blueprints.errors import NotFound
from gradient_blueprints.record_models import MAX_POINTS
from gradient_blueprints.run_models import Resource

router = APIRouter(include_in_schema=False)
_RUNS_ON_A_PAGE = 50

Filter = Annotated[str, Query(max_length=128)]


@router.get("/runs")
async def runs_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    task: Filter = "",
    model: Filter = "",
    lab: Filter = "",
    cursor: Cursor = None,
) -> Response:
    wanted = {"task": task.strip(), "model": model.strip(), "lab": lab.strip()}
    page = await runs.list_runs(
        session,
        task=wanted["task"] or None,
        model_id=wanted["model"] or None,
        lab=wanted["lab"] or None,
        limit=_RUNS_ON_A_PAGE,
        cursor=cursor,
    )
    return render(request, "runs.html", page=page, wanted=wanted, first=cursor is None)


@router.get("/runs/{run_id}")
async def run_page(
    request: Request, session: Session, viewer: Viewer, run_id: UUID, resource: Resource | None = None
) -> Response:
    run = await runs.get_run(session, run_id)
    told = [one for one in Resource if run.last is not None and one in run.last.gamma]
    return render(
        request,
        "run.html",
        run=run,
        told=told,
        resource=resource or (told[0] if told else None),
        public=request.app.state.settings.public_reads,
    )


@router.get("/runs/{run_id}/curve.svg")
async def run_curve(
    session: Session, viewer: Viewer, run_id: UUID, resource: Resource, narrow: bool = False
) -> Response:
    run = await runs.get_run(session, run_id)
    page = await runs.list_points(session, run_id, limit=MAX_POINTS, cursor=None)
    curve = [(point.gamma[resource], point.psi) for point in page.points if resource in point.gamma]
    if not curve:
        raise NotFound(f"Run {run_id} has told nothing of {resource}.")
    return await pictures.answer(
        session,
        lambda: leaderboard_pictures.draw_curve(curve, resource, run.metric, narrow=narrow),
        cache_control="no-cache" if run.finished_at is None else "private, max-age=3600",
    )
