"""Partial results of a job's shards, streamed from worker to worker through the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any
from uuid import UUID

import anyio
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse
from sqlalchemy.exc import SQLAlchemyError

from app.api.blobs import BINARY, check_range
from app.api.dependencies import CurrentSettings, requires
from app.api.problems import documented
from app.registry import job_parts, shard_states
from app.registry.callers import Caller
from gradient_blueprints import models
from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.errors import ServiceUnavailable
from gradient_blueprints.models import MAX_SHARDS, Scope

CLEAN_SECONDS = 60.0

logger = logging.getLogger(__name__)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    cleaner = asyncio.create_task(_clean(app))
    try:
        yield
    finally:
        cleaner.cancel()
        with suppress(asyncio.CancelledError):
            await cleaner


async def _clean(app: FastAPI) -> None:
    """Here and not where jobs end, because many of them are ended by the relay, which has no store."""
    while True:
        try:
            await shard_states.remove_ended(app.state.sessions, app.state.settings.store)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("partial results of ended jobs are still there: %s", error)
        await asyncio.sleep(CLEAN_SECONDS)


router = APIRouter(tags=["jobs"], lifespan=_lifespan)

Worker = Annotated[Caller, Depends(requires(Scope.WORK))]
Shard = Annotated[int, Path(ge=0, lt=MAX_SHARDS)]

_STATE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The partial result", "content": BINARY},
    206: {"description": "The range asked for", "content": BINARY},
}


@router.put(
    "/v1/jobs/{job_id}/shards/{shard}/state",
    response_model_exclude_none=True,
    openapi_extra={"requestBody": {"required": True, "content": BINARY}},
    responses=documented(404, 409),
)
async def finish_shard(
    request: Request,
    settings: CurrentSettings,
    caller: Worker,
    job_id: UUID,
    shard: Shard,
    lease_token: Annotated[int, Query(ge=1, le=MAX_SAFE_INTEGER)],
) -> models.Job:
    """Hand in a shard's partial result, which ends the shard; safe to repeat. No session is held while it streams."""
    async with request.app.state.sessions() as session:
        done = await job_parts.check_shard(session, job_id, shard, lease_token)
    if done is not None:
        return done
    digest = await shard_states.receive(
        settings.store, job_id, shard, lease_token, request.stream(), max_bytes=settings.max_shard_bytes
    )
    async with request.app.state.sessions() as session:
        job: models.Job = await job_parts.finish_shard(session, caller, job_id, shard, lease_token, digest)
        await session.commit()
    return job


@router.get(
    "/v1/jobs/{job_id}/shards/{shard}/state", response_class=FileResponse, responses=_STATE | documented(404, 409, 416)
)
async def fetch_shard_state(
    request: Request, settings: CurrentSettings, _: Worker, job_id: UUID, shard: Shard
) -> Response:
    """A shard's partial result, whole or a range of it, for the worker that merges."""
    async with request.app.state.sessions() as session:
        token = await job_parts.stored_state_of(session, job_id, shard)
    path = shard_states.state_path(settings.store, job_id, shard, token)
    if not await anyio.Path(path).is_file():
        raise ServiceUnavailable(f"The store has lost the partial result of shard {shard} of job {job_id}.")
    check_range(request, (await anyio.Path(path).stat()).st_size)
    return FileResponse(path, media_type="application/octet-stream")
