"""Profiling jobs: what laboratories ask for, what workers report, and the stream of what happens."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, Any
from uuid import UUID

import anyio
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.datastructures import State

from app.api.dependencies import (
    AnyKey,
    CurrentSettings,
    Cursor,
    IdempotencyKey,
    Limit,
    Session,
    requires,
)
from app.api.pages import with_links
from app.api.problems import documented
from app.notifications import listen
from app.registry import documents, job_parts, job_transitions, jobs, keys
from app.registry.callers import Caller
from app.registry.idempotency import IdempotentRequest
from app.registry.paging import DEFAULT_LIMIT
from gradient_blueprints import models
from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.models import Scope

EVENTS_AT_ONCE = 1_000
POLL_SECONDS = 5.0  # how late a stream learns of an event whose notification got lost


class EventStreams:
    """Wakes the streams of a job when it changes. One connection listens for all of them."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    def wake(self, job_id: str) -> None:
        """The streams of that job, or every stream for "": notifications may have been missed."""
        for woken in [self._waiting.get(job_id, set())] if job_id else list(self._waiting.values()):
            for event in woken:
                event.set()

    @asynccontextmanager
    async def waiting(self, job_id: UUID) -> AsyncIterator[asyncio.Event]:
        key, event = str(job_id), asyncio.Event()
        self._waiting[key].add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.event_streams = EventStreams()
    listener = asyncio.create_task(
        listen(app.state.settings.database_url, job_transitions.EVENTS_CHANNEL, app.state.event_streams.wake)
    )
    try:
        yield
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener


router = APIRouter(tags=["jobs"], lifespan=_lifespan)

Submitter = Annotated[Caller, Depends(requires(Scope.PROFILE))]
Worker = Annotated[Caller, Depends(requires(Scope.WORK))]

_BLUEPRINT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Blueprint"}}},
    }
}


# --- for laboratories


@router.post("/v1/jobs", status_code=202, response_model=models.Job, responses=documented(409))
async def submit_job(
    session: Session,
    caller: Submitter,
    settings: CurrentSettings,
    new: models.NewJob,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Have a checkpoint profiled; the blueprint becomes the next version of that checkpoint."""
    repetition = IdempotentRequest(session, caller, idempotency_key, b"job", new.model_dump_json().encode())
    if (answered := await repetition.begin()) is not None:
        status, answer = answered
    else:
        job = await jobs.submit_job(session, caller, new, max_attempts=settings.max_attempts)
        status, answer = 202, job.model_dump(mode="json", exclude_none=True)
        await repetition.finish(status, answer)
    return JSONResponse(answer, status, headers={"Location": f"/v1/jobs/{answer['id']}"})


@router.get("/v1/jobs", response_model_exclude_none=True, responses=documented())
async def list_jobs(
    request: Request,
    response: Response,
    session: Session,
    caller: AnyKey,
    state: models.JobState | None = None,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> models.JobPage:
    """Your lab's jobs, newest first; everybody's with scope admin or work."""
    page = await jobs.list_jobs(session, caller, state=state, limit=limit, cursor=cursor)
    return with_links(request, response, page)


@router.get("/v1/jobs/{job_id}", response_model_exclude_none=True, responses=documented(404))
async def get_job(session: Session, caller: AnyKey, job_id: UUID) -> models.Job:
    return await jobs.get_job(session, caller, job_id)


@router.post("/v1/jobs/{job_id}/cancel", response_model_exclude_none=True, responses=documented(404, 409))
async def cancel_job(session: Session, caller: Submitter, job_id: UUID) -> models.Job:
    """End a queued job at once; a running one is `cancelling` until its worker has stopped."""
    return await jobs.cancel_job(session, caller, job_id)


async def _visible(session: Session, caller: AnyKey, job_id: UUID) -> UUID:
    """Checked before the stream begins, in a session that is closed by then."""
    await jobs.get_job(session, caller, job_id)
    return job_id


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events named `job`, each a JobEvent; comments keep the connection alive",
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "event": {"const": "job"},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"$ref": "#/components/schemas/JobEvent"},
                        },
                    },
                }
            }
        },
    }
}


@router.get("/v1/jobs/{job_id}/events", response_class=EventSourceResponse, responses=_EVENTS | documented(404))
async def watch_job(
    request: Request,
    caller: AnyKey,
    visible: Annotated[UUID, Depends(_visible)],
    last_event_id: Annotated[int, Header(alias="Last-Event-ID", ge=0, le=MAX_SAFE_INTEGER)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """What happened to a job and what happens, from its first event or the one after Last-Event-ID, to its end."""
    async with aclosing(follow_job(request.app.state, caller, visible, last_event_id)) as told:
        async for events in told:
            for event in events:
                yield ServerSentEvent(id=str(event.id), event="job", raw_data=event.model_dump_json(exclude_none=True))


async def follow_job(state: State, caller: Caller, job_id: UUID, after: int) -> AsyncGenerator[list[models.JobEvent]]:
    """The events of a job with ids above `after`, and further ones as they happen, until it or the key has ended."""
    async with state.event_streams.waiting(job_id) as changed:
        while True:
            changed.clear()  # before reading, so that what happens while reading is read next
            async with state.sessions() as session:
                ended = await jobs.has_ended(session, job_id)  # before reading: no event comes after it
                events = await jobs.list_events(session, job_id, after=after, limit=EVENTS_AT_ONCE)
                if not await keys.is_valid(session, caller):
                    return
            if events:
                after = events[-1].id
                yield events
            if len(events) == EVENTS_AT_ONCE:  # there may be more
                continue
            if ended or (events and events[-1].state.terminal):
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), POLL_SECONDS)


# --- for workers


@router.post("/v1/jobs/{job_id}/claim", response_model_exclude_none=True, responses=documented(404, 409))
async def claim_job(session: Session, caller: Worker, settings: CurrentSettings, job_id: UUID) -> models.Claim:
    """Take a queued job under a lease."""
    return await job_parts.claim_job(session, caller, job_id, lease_seconds=settings.lease_seconds)


@router.post("/v1/jobs/{job_id}/heartbeat", response_model_exclude_none=True, responses=documented(404, 409))
async def renew_lease(
    session: Session, caller: Worker, settings: CurrentSettings, job_id: UUID, heartbeat: models.Heartbeat
) -> models.HeartbeatAnswer:
    """Keep the lease and tell the progress; the answer says whether to stop."""
    return await job_parts.renew_lease(session, job_id, heartbeat, lease_seconds=settings.lease_seconds)


@router.post(
    "/v1/jobs/{job_id}/result",
    response_model_exclude_none=True,
    openapi_extra=_BLUEPRINT_BODY,
    responses=documented(404, 409),
)
async def finish_job(
    request: Request, session: Session, caller: Worker, job_id: UUID, lease_token: Annotated[int, Query(ge=1)]
) -> models.Job:
    """Publish the blueprint under the job's lab and end the job, both or neither; safe to repeat."""
    document = await anyio.to_thread.run_sync(documents.parse_json, await request.body())
    finished, publication = await job_parts.finish_job(session, caller, job_id, lease_token, document)
    if publication is not None:
        request.app.state.metrics.publications.labels("worker", "yes" if publication.created else "no").inc()
    return finished


@router.post("/v1/jobs/{job_id}/outcome", response_model_exclude_none=True, responses=documented(404, 409))
async def end_job(session: Session, caller: Worker, job_id: UUID, outcome: models.JobOutcome) -> models.Job:
    """A worker's last word when it has no blueprint; safe to repeat."""
    return await job_parts.end_job(session, caller, job_id, outcome)
