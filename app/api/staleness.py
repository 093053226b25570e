"""Whether a blueprint still holds, the evidence that adapters leave, and profiling anew."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from app.api.dependencies import (
    CheckpointPath,
    CurrentSettings,
    Cursor,
    Limit,
    Reader,
    Session,
    requires,
)
from app.api.pages import with_links
from app.api.problems import documented
from app.registry import evidence, staleness
from app.registry.callers import Caller
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints.models import Digest, Job, Scope, Tag
from gradient_blueprints.statistics_models import EvidencePage, EvidenceSummary, Staleness, StalenessRequest

router = APIRouter(tags=["staleness"])

Profiler = Annotated[Caller, Depends(requires(Scope.PROFILE))]


@router.post(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/staleness",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def check_staleness(
    session: Session, reader: Reader, model_id: str, checkpoint: CheckpointPath, request: StalenessRequest
) -> Staleness:
    """Judge whether the blueprint holds on a local sample; kept as evidence only with consent, which needs a key."""
    return await staleness.check(session, reader, model_id, checkpoint, request)


@router.get(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/evidence",
    response_model_exclude_none=True,
    responses=documented(404),
)
async def list_evidence(
    request: Request,
    response: Response,
    session: Session,
    reader: Reader,
    model_id: str,
    checkpoint: CheckpointPath,
    digest: Annotated[Digest | None, Query()] = None,
    domain: Annotated[Tag | None, Query()] = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> EvidencePage:
    """Kept checks, newest first: coarse numbers, nobody's name."""
    page = await evidence.list_evidence(
        session, model_id, checkpoint, digest=digest, domain=domain, limit=limit, cursor=cursor
    )
    return with_links(request, response, page)


@router.get("/v1/models/{model_id:model}/evidence", response_model_exclude_none=True, responses=documented(404))
async def summarize_evidence(session: Session, reader: Reader, model_id: str) -> EvidenceSummary:
    """Per blueprint and domain how many users found it fresh or stale, and when the share crossed the limit."""
    return await evidence.summarize(session, model_id)


@router.post(
    "/v1/models/{model_id:model}/checkpoints/{checkpoint}/refresh",
    status_code=202,
    response_model_exclude_none=True,
    responses=documented(404),
)
async def refresh_blueprint(
    response: Response,
    session: Session,
    caller: Profiler,
    settings: CurrentSettings,
    model_id: str,
    checkpoint: CheckpointPath,
) -> Job:
    """Repeat your lab's last successful profiling job of this checkpoint, as the next version."""
    job = await evidence.refresh(session, caller, model_id, checkpoint, max_attempts=settings.max_attempts)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job
