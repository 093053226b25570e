"""The pages of models: the list with search, and one model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import Cursor, Session
from app.registry import aliases, catalog, evidence, publications
from app.registry.paging import MAX_LIMIT
from app.web import drawings, pictures
from app.web.rendering import render
from app.web.session import Viewer
from gradient_blueprints.errors import NotFound
from gradient_blueprints.models import ModelId

router = APIRouter(include_in_schema=False)
_MODELS_ON_A_PAGE = 50
_VERSIONS_SHOWN = 12
_LABS_SHOWN = 50
_WEEKS_DRAWN = 26
_EVENTS_SHOWN = 10


@router.get("/")
async def models_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    q: Annotated[str, Query(max_length=200)] = "",
    cursor: Cursor = None,
) -> Response:
    page = await catalog.list_models(session, q=q.strip() or None, limit=_MODELS_ON_A_PAGE, cursor=cursor)
    return render(request, "models.html", q=q.strip(), page=page, first=cursor is None)


@router.get("/pictures/evidence.svg")
async def draw_evidence(
    session: Session, viewer: Viewer, model_id: Annotated[ModelId, Query()], narrow: bool = False
) -> Response:
    """Verdicts by week, and the alarms."""
    told = await evidence.summarize(session, model_id)
    weeks = tuple(await evidence.count_by_week(session, model_id, weeks=_WEEKS_DRAWN))
    if not weeks:
        raise NotFound(f"No adapter has let the registry keep a check of {model_id}.")
    alarms = tuple((event.at.date().toordinal(), event.kind) for event in told.events[:_EVENTS_SHOWN])
    return await pictures.answer(
        session, lambda: drawings.draw_evidence(weeks, alarms, narrow=narrow), cache_control="private, no-cache"
    )


@router.get("/models/{model_id:model}")
async def model_page(request: Request, session: Session, viewer: Viewer, model_id: str) -> Response:
    """Everything that is known of a model, a bounded number of each."""
    weeks = await evidence.count_by_week(session, model_id, weeks=_WEEKS_DRAWN)
    return render(
        request,
        "model.html",
        model=await catalog.get_model(session, model_id),
        page=await catalog.list_checkpoints(session, model_id, limit=MAX_LIMIT, cursor=None),
        aliases=await aliases.list_aliases(session, model_id, limit=MAX_LIMIT, cursor=None),
        labs=await publications.list_labs_of(session, model_id, limit=_LABS_SHOWN),
        lab_count=await publications.count_labs_of(session, model_id),
        versions=await publications.list_latest_versions(session, model_id, limit=_VERSIONS_SHOWN),
        told=await evidence.summarize(session, model_id),
        weeks=weeks,
        alarms=await evidence.count_events(session, model_id, since=weeks[0].monday) if weeks else 0,
        events_shown=_EVENTS_SHOWN,
    )
