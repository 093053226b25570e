"""The page of the leaderboard: what a task's runs scored for what they spent, with its plot."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BeforeValidator
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.dependencies import Session
from app.registry import leaderboard, runs
from app.web import leaderboard_pictures, pictures
from app.web.rendering import render
from app.web.session import Viewer
from gradient_blueprints.errors import NotFound
from gradient_blueprints.models import Tag
from gradient_blueprints.record_models import LARGEST, At, Leaderboard, Task
from gradient_blueprints.run_models import Resource

router = APIRouter(include_in_schema=False)
_MOST_TASKS = 200

# Forms send empty fields too, so "" means that nothing was chosen.
TaskField = Annotated[Literal[""] | Task, BeforeValidator(str.strip), Query()]
AxisField = Annotated[Literal["", "gamma", "psi"], Query()]
ValueField = Annotated[str, Query(pattern=r"^\s*(-?[0-9]{1,30}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?)?\s*$")]
MetricField = Annotated[Literal[""] | Tag, BeforeValidator(str.strip), Query()]


@router.get("/leaderboard")
async def leaderboard_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    task: TaskField = "",
    resource: Resource = Resource.TOKENS,
    axis: AxisField = "",
    value: ValueField = "",
    metric: MetricField = "",
) -> Response:
    board = await _rank(session, task, resource, axis, value, metric) if task else None
    tasks = await runs.list_tasks(session, limit=_MOST_TASKS)
    chosen = {"task": task, "resource": resource, "axis": axis, "value": value.strip(), "metric": metric}
    return render(request, "leaderboard.html", board=board, tasks=tasks, chosen=chosen, resources=list(Resource))


@router.get("/leaderboard/plots/{number}.svg")
async def leaderboard_plot(
    session: Session,
    viewer: Viewer,
    number: Annotated[int, Path(ge=0, le=100)],
    task: Annotated[Task, Query()],
    resource: Resource = Resource.TOKENS,
    axis: AxisField = "",
    value: ValueField = "",
    metric: MetricField = "",
    narrow: bool = False,
) -> Response:
    """The plot of one group of the page with the same query."""
    board = await _rank(session, task, resource, axis, value, metric)
    if number >= len(board.groups):
        raise NotFound("The leaderboard has no such group.")
    return await pictures.answer(
        session,
        lambda: leaderboard_pictures.draw_group(board, board.groups[number], narrow=narrow),
        cache_control="private, max-age=60",
    )


async def _rank(
    session: AsyncSession, task: str, resource: Resource, axis: str, value: str, metric: str
) -> Leaderboard:
    at = None
    if axis and value.strip():
        at = At.model_validate({"axis": axis, "value": max(-LARGEST, min(LARGEST, float(value)))})
    return await leaderboard.rank(session, task, resource, at=at, metric=metric or None)
