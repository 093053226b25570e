"""The pages of profiling jobs: the list, and one job that shows its progress as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.dependencies import CurrentSettings, Cursor, Session
from app.api.jobs import follow_job
from app.registry import jobs
from app.registry.callers import Caller
from app.web.rendering import render
from app.web.session import Form, Member, Submitter, Visiting, is_open
from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.errors import JobFinished
from gradient_blueprints.models import Job, JobState, Scope

router = APIRouter(include_in_schema=False)
_JOBS_ON_A_PAGE = 50
_EVENTS_SHOWN = 12

EventId = Annotated[int, Query(ge=0, le=MAX_SAFE_INTEGER)]


@router.get("/jobs")
async def jobs_page(
    request: Request, session: Session, caller: Member, state: JobState | None = None, cursor: Cursor = None
) -> Response:
    """Those of the lab; everybody's with scope admin or work."""
    page = await jobs.list_jobs(session, caller, state=state, limit=_JOBS_ON_A_PAGE, cursor=cursor)
    return render(request, "jobs.html", page=page, state=state, states=list(JobState), first=cursor is None)


@router.get("/jobs/{job_id}")
async def job_page(request: Request, session: Session, caller: Member, job_id: UUID) -> Response:
    events = await jobs.list_latest_events(session, job_id, limit=_EVENTS_SHOWN)
    job = await jobs.get_job(session, caller, job_id)  # after its events: the stream goes on where they end
    return render(request, "job.html", job=job, events=events, cancellable=_may_cancel(caller, job))


def _may_cancel(caller: Caller, job: Job) -> bool:
    own = job.lab == caller.lab or caller.has(Scope.ADMIN)
    return own and caller.has(Scope.PROFILE) and not job.state.terminal and job.state is not JobState.CANCELLING


@router.post("/jobs/{job_id}/cancel")
async def cancel_job(session: Session, caller: Submitter, form: Form, job_id: UUID) -> Response:
    with suppress(JobFinished):  # it ended while the page was looked at, which now says how
        await jobs.cancel_job(session, caller, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


async def _visible(session: Session, caller: Member, job_id: UUID) -> UUID:
    """Checked before the stream begins, in a session that is closed by then."""
    await jobs.get_job(session, caller, job_id)
    return job_id


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def watch_job(
    request: Request,
    settings: CurrentSettings,
    visitor: Visiting,
    caller: Member,
    visible: Annotated[UUID, Depends(_visible)],
    after: EventId = 0,
    last_event_id: Annotated[int, Header(alias="Last-Event-ID", ge=0, le=MAX_SAFE_INTEGER)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """The part of the page that changes, rendered anew whenever something happened, as long as the session is open."""
    async with request.app.state.sessions() as session:
        (newest,) = await jobs.list_latest_events(session, visible, limit=1)
    seen = max(after, last_event_id, newest.id - 1)  # however much was missed, it is rendered once
    async with aclosing(follow_job(request.app.state, caller, visible, seen)) as told:
        async for events in told:
            if not await is_open(request, settings, visitor):
                return
            async with request.app.state.sessions() as session:
                part = await _render_progress(request, session, visible)
            yield ServerSentEvent(id=str(events[-1].id), event="progress", raw_data=part)


async def _render_progress(request: Request, session: AsyncSession, job_id: UUID) -> str:
    job = await jobs.describe(session, job_id)
    events = await jobs.list_latest_events(session, job_id, limit=_EVENTS_SHOWN)
    return bytes(render(request, "job_progress.html", job=job, events=events).body).decode()
