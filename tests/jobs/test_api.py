"""Submitting, reading, listing and watching jobs over HTTP: who may, page by page, event by event."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import fastapi.routing
import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

import app.api.jobs
from app.registry import idempotency, jobs
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.errors import IdempotencyConflict, JobNotFound, PermissionDenied
from gradient_blueprints.models import JobState, NewJob, Progress, Scope
from tests.conftest import Server
from tests.jobs.conftest import blueprint, submit

Sql = Callable[..., list[asyncpg.Record]]
NEW_JOB = NewJob.model_validate(
    {
        "model_id": "tiny",
        "training_checkpoint": 0.8,
        "source": "/models/tiny",
        "data": {"general": {"source": "/d.txt"}},
    }
).model_dump(mode="json")


def test_a_submit_is_answered_202_with_its_location(publisher: httpx2.Client) -> None:
    answer = publisher.post("/v1/jobs", json=NEW_JOB)
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['id']}"
    assert publisher.get(answer.headers["Location"]).json() == answer.json()


def test_a_submit_repeated_under_its_idempotency_key_makes_one_job(lab: Client) -> None:
    first = submit(lab, idempotency_key="release-7")
    assert submit(lab, idempotency_key="release-7") == first
    assert len(list(lab.list_jobs())) == 1
    with pytest.raises(IdempotencyConflict):
        submit(lab, model_id="other", idempotency_key="release-7")


def test_answers_of_idempotency_keys_are_forgotten_by_age_some_at_a_time(
    lab: Client, sql: Sql, in_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        submit(lab, idempotency_key=f"key-{number}")
    sql("UPDATE idempotent_requests SET created_at = now() - interval '8 days' WHERE token < 'key-3'")
    monkeypatch.setattr(idempotency, "FORGET_BATCH", 2)

    async def forget(session: AsyncSession) -> tuple[int, int]:
        await session.execute(text("SET LOCAL enable_seqscan = off"))  # the table is small here
        forgotten = await idempotency.forget_old(session)
        looks = text("SELECT pg_stat_get_xact_numscans('ix_idempotent_requests_created_at'::regclass)")
        return forgotten, (await session.execute(looks)).scalar_one()

    assert [in_session(forget) for _ in range(3)] == [(2, 1), (1, 1), (0, 1)]
    assert [row["token"] for row in sql("SELECT token FROM idempotent_requests")] == ["key-3"]


def test_a_refused_submit_leaves_nothing_behind(publisher: httpx2.Client, sql: Sql) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"training_checkpoint": 1.5},
        {"data": {}},
        {"options": {"batches": 0}},
        {"source": "a\0b"},
    )
    for change in changes:
        answer = publisher.post("/v1/jobs", json=NEW_JOB | change)
        assert answer.status_code == 422, change
        assert answer.json()["errors"], change
    nul = {"general": {"source": "/d.txt", "field": "te\0xt"}}
    assert publisher.post("/v1/jobs", json=NEW_JOB | {"data": nul}).status_code == 422
    assert sql("SELECT 1 FROM jobs UNION ALL SELECT 1 FROM outbox UNION ALL SELECT 1 FROM job_events") == []


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("POST", "/v1/jobs", {Scope.PROFILE, Scope.ADMIN}),
        ("GET", "/v1/jobs", set(Scope)),
        ("GET", "/v1/jobs/{id}", set(Scope)),
        ("POST", "/v1/jobs/{id}/cancel", {Scope.PROFILE, Scope.ADMIN}),
        ("POST", "/v1/jobs/{id}/claim", {Scope.WORK, Scope.ADMIN}),
        ("POST", "/v1/jobs/{id}/heartbeat", {Scope.WORK, Scope.ADMIN}),
        ("POST", "/v1/jobs/{id}/result", {Scope.WORK, Scope.ADMIN}),
        ("POST", "/v1/jobs/{id}/outcome", {Scope.WORK, Scope.ADMIN}),
    ],
)
def test_each_route_needs_a_key_of_its_scope(
    method: str, path: str, scopes: set[Scope], server: Server, http: httpx2.Client, lab: Client
) -> None:
    path = path.format(id=submit(lab).id)
    bodies = {
        "jobs": NEW_JOB,
        "heartbeat": {"lease_token": 1},
        "result": blueprint().to_dict(),
        "outcome": {"lease_token": 1, "state": "failed", "reason": "r"},
    }
    query = {"lease_token": 1} if path.endswith("result") else {}
    body = bodies.get(path.rsplit("/", 1)[-1]) if method == "POST" else None
    assert http.request(method, path, json=body, params=query).status_code == 401
    for scope in Scope:
        headers = {"Authorization": f"Bearer {server.key('lab-a', scope)}"}
        status = http.request(method, path, json=body, params=query, headers=headers).status_code
        assert (status == 403) == (scope not in scopes), (scope, status)
        assert status < 500


def test_another_lab_neither_sees_nor_cancels_a_job(make_client: Callable[..., Client], lab: Client) -> None:
    job = submit(lab)
    stranger = make_client("lab-b", Scope.PROFILE, Scope.READ, Scope.PUBLISH)
    with pytest.raises(JobNotFound):
        stranger.get_job(job.id)
    with pytest.raises(JobNotFound):
        stranger.cancel_job(job.id)
    with pytest.raises(JobNotFound):
        list(stranger.watch_job(job.id))
    assert list(stranger.list_jobs()) == []
    assert lab.get_job(job.id).state is JobState.QUEUED


def test_a_worker_and_an_administrator_see_the_jobs_of_all_labs(
    lab: Client, worker: Client, admin: Client, make_client: Callable[..., Client]
) -> None:
    ours, theirs = submit(lab), submit(make_client("lab-b", Scope.PROFILE))
    assert [job.id for job in admin.list_jobs()] == [theirs.id, ours.id]
    assert [job.id for job in worker.list_jobs()] == [theirs.id, ours.id]
    assert admin.cancel_job(ours.id).state is JobState.CANCELLED
    with pytest.raises(PermissionDenied):
        worker.cancel_job(theirs.id)


def test_the_list_pages_through_every_job_once_and_filters_by_state(lab: Client, publisher: httpx2.Client) -> None:
    submitted = [submit(lab).id for _ in range(7)]
    for job_id in submitted[:2]:
        lab.cancel_job(job_id)
    seen: list[str] = []
    path: str | None = "/v1/jobs?limit=3"
    while path:
        answer = publisher.get(path)
        page = answer.json()
        seen += [job["id"] for job in page["jobs"]]
        path = page.get("next")
        assert ("next" in answer.links) == (path is not None)
    assert seen == submitted[::-1]
    assert [job.id for job in lab.list_jobs("cancelled")] == submitted[:2][::-1]
    assert publisher.get("/v1/jobs?state=nonsense").status_code == 422
    assert publisher.get("/v1/jobs?cursor=WyJub25zZW5zZSJd").status_code == 422


def test_an_unknown_job_is_not_found(lab: Client) -> None:
    with pytest.raises(JobNotFound):
        lab.get_job(str(uuid4()))


def test_job_ids_sort_by_time() -> None:
    ids = []
    for _ in range(5):
        ids.append(jobs.new_job_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert {(one.version, one.variant) for one in ids} == {(7, UUID(int=0x8 << 60).variant)}


# --- the stream


def test_the_stream_tells_each_event_as_it_happens_and_ends_with_the_job(lab: Client, worker: Client) -> None:
    job = submit(lab)
    told: list[tuple[str, float]] = []

    def watch() -> None:
        told.extend((event.state.value, time.monotonic()) for event in lab.watch_job(job.id))

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.5)
    claimed = time.monotonic()
    token = worker.claim_job(job.id).lease_token
    time.sleep(0.5)
    worker.heartbeat_job(job.id, token, Progress(phase="profiling", done=1, total=2))
    worker.finish_job(job.id, token, blueprint())
    watcher.join(10)
    assert not watcher.is_alive()
    assert [state for state, _ in told] == ["queued", "running", "running", "succeeded"]
    assert told[1][1] - claimed < 0.45, "the event came late: the notification was not heard"


def test_the_stream_resumes_after_the_last_event_seen(lab: Client, worker: Client, publisher: httpx2.Client) -> None:
    job = submit(lab)
    worker.finish_job(job.id, worker.claim_job(job.id).lease_token, blueprint())
    whole = publisher.get(f"/v1/jobs/{job.id}/events")
    assert whole.headers["content-type"].startswith("text/event-stream")
    ids = [line.removeprefix("id: ") for line in whole.text.splitlines() if line.startswith("id: ")]
    assert len(ids) == 3
    assert whole.text.count("event: job") == 3
    rest = publisher.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": ids[1]}).text
    assert [line for line in rest.splitlines() if line.startswith("id: ")] == [f"id: {ids[2]}"]
    assert publisher.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": ids[2]}).text == ""
    assert publisher.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "x"}).status_code == 422


def test_many_events_are_read_some_at_a_time_and_the_page_is_rendered_once(
    lab: Client, worker: Client, publisher: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(lab)
    token = worker.claim_job(job.id).lease_token
    for done in range(3):
        worker.heartbeat_job(job.id, token, Progress(phase="profiling", done=done, total=8))
    worker.finish_job(job.id, token, blueprint())
    monkeypatch.setattr(app.api.jobs, "EVENTS_AT_ONCE", 2)
    told, shown = (
        [line for line in publisher.get(path).text.splitlines() if line.startswith("id: ")]
        for path in (f"/v1/jobs/{job.id}/events", f"/jobs/{job.id}/events")
    )
    assert len(told) == 6
    assert shown == told[-1:]


def test_a_quiet_stream_is_kept_alive_by_comments(
    lab: Client, publisher: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.2)
    job = submit(lab)
    with publisher.stream("GET", f"/v1/jobs/{job.id}/events") as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith(":"):
            pass
        lab.cancel_job(job.id)
        assert any('"state":"cancelled"' in line for line in lines)


class TestManyStreams:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"pool_size": 2, "pool_overflow": 0})

    def test_more_idle_streams_than_database_connections_leave_the_service_working(
        self, lab: Client, worker: Client
    ) -> None:
        job = submit(lab)
        ended: list[JobState] = []

        def watch() -> None:
            ended.append([event.state for event in lab.watch_job(job.id)][-1])

        watchers = [threading.Thread(target=watch) for _ in range(12)]
        for watcher in watchers:
            watcher.start()
        time.sleep(1)
        worker.finish_job(job.id, worker.claim_job(job.id).lease_token, blueprint())
        for watcher in watchers:
            watcher.join(20)
        assert ended == [JobState.SUCCEEDED] * 12


@pytest.mark.parametrize("path", ["/v1/jobs/{}/events", "/jobs/{}/events"])
def test_a_stream_tells_nothing_more_once_its_key_was_revoked(
    server: Server, lab: Client, worker: Client, admin: Client, path: str
) -> None:
    job = submit(lab)
    key = {"Authorization": f"Bearer {server.key('lab-a', Scope.READ)}"}
    with httpx2.stream("GET", server.url + path.format(job.id), headers=key, timeout=60) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("id:"):
            pass
        admin.revoke_key(max(one.id for one in admin.list_keys()))
        worker.claim_job(job.id)
        assert not any("running" in line for line in lines)
