"""Listing models, checkpoints and versions; yanking; comparing."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request, Response

from app.api.dependencies import (
    CheckpointPath,
    Cursor,
    LabQuery,
    Limit,
    Publisher,
    Reader,
    Session,
    VersionNumber,
    checkpoint_of,
)
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import catalog, comparison, versions
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints import models

router = APIRouter(tags=["models"])

SIDE = Query(pattern=r"^[0-9.eE+-]{1,20}(@[1-9][0-9]{0,8})?$", description="CHECKPOINT or CHECKPOINT@VERSION")


@router.get("/v1/models", response_model_exclude_none=True, responses=documented())
async def list_models(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    q: Annotated[str | None, Query(max_length=200, description="text anywhere in the model id")] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.ModelPage:
    """Models by name."""
    return with_links(request, response, await catalog.list_models(session, q=q, limit=limit, cursor=cursor))


@router.get("/v1/models/{model_id:model}/checkpoints", response_model_exclude_none=True, responses=documented(404))
async def list_checkpoints(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    model_id: str,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.CheckpointPage:
    """Checkpoints in the order of training."""
    page = await catalog.list_checkpoints(session, model_id, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.get(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/versions",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def list_versions(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    model_id: str,
    checkpoint: CheckpointPath,
    lab: LabQuery = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.VersionPage:
    """Versions, newest first, yanked ones included."""
    page = await catalog.list_versions(
        session, model_id, checkpoint, lab=None if lab == "*" else lab, limit=limit, cursor=cursor
    )
    return with_links(request, response, page)


@router.post(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/versions/{version}/yank",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def yank_version(
    session: Session,
    caller: Publisher,
    model_id: str,
    checkpoint: CheckpointPath,
    version: VersionNumber,
    why: models.YankReason,
) -> models.VersionSummary:
    """Withdraw one of your versions from resolution; its bytes stay and answer by digest."""
    return await versions.yank_version(session, caller, model_id, checkpoint, version, why.reason)


@router.post(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/versions/{version}/unyank",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def unyank_version(
    session: Session, caller: Publisher, model_id: str, checkpoint: CheckpointPath, version: VersionNumber
) -> models.VersionSummary:
    """Bring a yanked version back."""
    return await versions.unyank_version(session, caller, model_id, checkpoint, version)


@router.get(
    "/v1/models/{model_id:model}/compare",
    response_model=models.Comparison,
    responses=documented(404),
)
async def compare_blueprints(
    session: Session,
    reader: Reader,
    model_id: str,
    base: Annotated[str, SIDE],
    other: Annotated[str, SIDE],
    lab: LabQuery = None,
    top: Annotated[int | None, Query(ge=1, le=models.MAX_LAYERS)] = None,
) -> Response:
    """What changed from `base` to `other`."""
    sides = (side_of(base, "/query/base"), side_of(other, "/query/other"))
    found = await comparison.compare(session, model_id, *sides, lab=lab, top=top)
    body = await anyio.to_thread.run_sync(lambda: found.model_dump_json(exclude_none=True))
    return Response(body, media_type="application/json")


def side_of(text: str, pointer: str) -> tuple[Decimal, int | None]:
    """The checkpoint and version that `0.8@3` names; without a version the newest."""
    checkpoint, _, number = text.partition("@")
    return checkpoint_of(checkpoint, pointer), int(number) if number else None


# Last: without its own suffix it would otherwise be tried before the others.
@router.get("/v1/models/{model_id:model}", response_model_exclude_none=True, responses=documented(404))
async def get_model(session: Session, reader: Reader, model_id: str) -> models.ModelSummary:
    """One model."""
    return await catalog.get_model(session, model_id)
