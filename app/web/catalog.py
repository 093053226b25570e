"""The pages of models: the list with search, and one model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import Cursor, Reader, Session
from app.registry import catalog
from app.web.rendering import render

router = APIRouter(include_in_schema=False)
_MODELS_ON_A_PAGE = 50


@router.get("/")
async def models_page(
    request: Request,
    session: Session,
    reader: Reader,
    q: Annotated[str, Query(max_length=200)] = "",
    cursor: Cursor = None,
) -> Response:
    page = await catalog.list_models(session, q=q.strip() or None, limit=_MODELS_ON_A_PAGE, cursor=cursor)
    return render(request, "models.html", q=q, page=page, first=cursor is None)
