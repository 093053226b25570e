"""Jobs through the SDK: the lab's side and the worker's side, and streams that break."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gradient_blueprints import (
    AsyncClient,
    Blueprint,
    Client,
    ConfigurationError,
    Conflict,
    JobOutcome,
    JobState,
    LeaseLost,
    Progress,
    Scope,
    UnexpectedAnswer,
)
from tests.conftest import Server
from tests.documents import blueprint_document
from tests.sdk.conftest import Connect
from tests.sdk.faulty_network import FaultyNetwork, answer, json_answer

DATA = {"general": "/data/general.txt"}
JOB = (
    '{"id": "7", "state": "STATE", "lab": "lab-a", "model_id": "tiny", "training_checkpoint": 0.8, "source": "/data", '
    '"data": {"general": {"source": "/data/general.txt"}}, "options": {}, "attempts": 1, "max_attempts": 3, '
    '"created_at": "2026-01-01T00:00:00Z"}'
)


def event(number: int, state: str) -> bytes:
    data = f'{{"id": {number}, "at": "2026-01-01T00:00:00Z", "state": "{state}"}}'
    return f"id: {number}\nevent: job\ndata: {data}\n\n".encode()


def stream(*events: bytes) -> bytes:
    """The beginning of a stream that breaks off: its announced end never comes."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in events
    )


@pytest.fixture
def worker(server: Server, connect: Connect) -> Any:
    return connect(server.url, api_key=server.key("worker", Scope.WORK))


async def test_a_job_is_submitted_claimed_renewed_and_finished(lab_a: Any, worker: Any) -> None:
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data/tiny", data=DATA, batches=2, seed=7)
    assert (job.state, job.options.batches, job.options.seed) == (JobState.QUEUED, 2, 7)
    claim = await worker.claim_job(job.id)
    with pytest.raises(Conflict):
        await worker.claim_job(job.id)
    beat = await worker.heartbeat_job(job.id, claim.lease_token, Progress(phase="profiling", done=1, total=2))
    assert beat.state is JobState.RUNNING
    with pytest.raises(LeaseLost):
        await worker.heartbeat_job(job.id, claim.lease_token + 1)
    blueprint = Blueprint.from_dict(blueprint_document())
    finished = await worker.finish_job(job.id, claim.lease_token, blueprint)
    assert (finished.state, finished.version, finished.digest) == (JobState.SUCCEEDED, 1, blueprint.digest)
    assert (await worker.finish_job(job.id, claim.lease_token, blueprint)).state is JobState.SUCCEEDED
    assert (await lab_a.fetch_blueprint("tiny", 0.8)).lab == "lab-a"
    states = [event.state for event in await lab_a.watch_job(job.id)]
    assert states[0] is JobState.QUEUED
    assert states[-1] is JobState.SUCCEEDED
    assert (await lab_a.wait_for_job(job.id, timeout=5)).version == 1
    assert [row.id for row in await lab_a.list_jobs("succeeded")] == [job.id]
    assert await lab_a.list_jobs(JobState.QUEUED) == []


async def test_states_of_shards_go_up_and_come_down_as_files(lab_a: Any, worker: Any, tmp_path: Path) -> None:
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data/tiny", data=DATA, shards=2)
    content = b"0123456789" * 100_000
    (tmp_path / "state").write_bytes(content)
    claims = [await worker.claim_job(job.id) for _ in range(2)]
    for claim in claims:
        told = await worker.finish_shard(job.id, claim.part, claim.lease_token, tmp_path / "state")
    assert [part.state for part in told.parts] == [JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.QUEUED]
    fetched = await worker.fetch_shard_state(job.id, 1, told.parts[1].digest, tmp_path / "fetched")
    assert fetched.read_bytes() == content
    with pytest.raises(UnexpectedAnswer, match="have another digest"):
        await worker.fetch_shard_state(job.id, 1, "sha256:" + "0" * 64, tmp_path / "other")
    assert not (tmp_path / "other").exists()


async def test_a_submission_repeated_under_its_key_is_one_job(lab_a: Any) -> None:
    jobs = [
        await lab_a.submit_checkpoint("tiny", 0.8, source="/data", data=DATA, idempotency_key="once") for _ in range(2)
    ]
    assert jobs[0].id == jobs[1].id


async def test_a_job_is_cancelled_and_another_fails_with_its_reason(lab_a: Any, worker: Any) -> None:
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data", data=DATA)
    assert (await lab_a.cancel_job(job.id)).state is JobState.CANCELLED
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data", data=DATA)
    claim = await worker.claim_job(job.id)
    await worker.end_job(job.id, JobOutcome(lease_token=claim.lease_token, state="failed", reason="no config.json"))
    ended = await lab_a.wait_for_job(job.id, timeout=5)
    assert (ended.state, ended.reason) == (JobState.FAILED, "no config.json")


async def test_waiting_ends_when_the_job_ends(server: Server, lab_a: Any, worker: Any) -> None:
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data", data=DATA)
    waiting = asyncio.create_task(lab_a.wait_for_job(job.id, timeout=30))
    await asyncio.sleep(0.3)
    claim = await worker.claim_job(job.id)
    await worker.finish_job(job.id, claim.lease_token, Blueprint.from_dict(blueprint_document()))
    began = time.monotonic()
    assert (await waiting).state is JobState.SUCCEEDED
    assert time.monotonic() - began < 10


async def test_waiting_for_longer_than_allowed_is_a_timeout_and_the_job_goes_on(lab_a: Any) -> None:
    job = await lab_a.submit_checkpoint("tiny", 0.8, source="/data", data=DATA)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="goes on"):
        await lab_a.wait_for_job(job.id, timeout=0.5)
    assert time.monotonic() - began < 3
    assert (await lab_a.get_job(job.id)).state is JobState.QUEUED


async def test_comments_of_a_stream_do_not_put_the_timeout_off(connect: Connect) -> None:
    def comment(connection: socket.socket) -> None:
        connection.sendall(stream(event(1, "running")))
        for _ in range(3):
            time.sleep(0.7)
            connection.sendall(b"4\r\n: \n\n\r\n")
        time.sleep(10)

    with FaultyNetwork(comment) as network:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="goes on"):
            await connect(network.url).wait_for_job("7", timeout=2.5)
        assert 2.5 <= time.monotonic() - began < 3.5
        assert network.connections == 1


async def test_a_stream_that_breaks_is_resumed_after_the_last_event(connect: Connect) -> None:
    acts = (
        stream(event(1, "queued"), b": keep-alive\n\n", event(2, "running")[:-5]),
        answer(503),
        stream(event(2, "running")),
        stream(event(3, "succeeded")),
    )
    with FaultyNetwork(*acts) as network:
        events = await connect(network.url).watch_job("7")
        assert [(told.id, told.state) for told in events] == [(1, "queued"), (2, "running"), (3, "succeeded")]
        assert b"last-event-id" not in network.requests[0].lower()
        assert b"last-event-id: 1\r" in network.requests[2].lower()
        assert b"last-event-id: 2\r" in network.requests[3].lower()


async def test_watching_from_the_last_event_of_a_finished_job_ends(connect: Connect) -> None:
    nothing, job = answer(200, b"", Content_Type="text/event-stream"), json_answer(JOB.replace("STATE", "failed"))
    with FaultyNetwork(nothing, job, nothing, job) as network:
        assert await connect(network.url).watch_job("7", after=3) == []
        assert b"last-event-id: 3\r" in network.requests[0].lower()


def test_leaving_a_watch_closes_its_connection() -> None:
    closed = threading.Event()

    def go_on(connection: Any) -> None:
        connection.sendall(stream(event(1, "queued")))
        if connection.recv(1) == b"":
            closed.set()

    with FaultyNetwork(go_on) as network, Client(network.url, cache=False) as client:
        for _ in client.watch_job("7"):
            break
        assert closed.wait(5)


async def test_leaving_an_awaited_watch_closes_its_connection() -> None:
    closed = threading.Event()

    def go_on(connection: Any) -> None:
        connection.sendall(stream(event(1, "queued")))
        if connection.recv(1) == b"":
            closed.set()

    with FaultyNetwork(go_on) as network:
        async with AsyncClient(network.url, cache=False) as client:
            events = client.watch_job("7")
            async for _ in events:
                break
            await events.aclose()
            assert await asyncio.to_thread(closed.wait, 5)


async def test_options_that_no_job_has_are_refused_before_anything_is_sent(connect: Connect) -> None:
    with pytest.raises(ConfigurationError, match="batches"):
        await connect("http://127.0.0.1:9").submit_checkpoint("tiny", 0.8, source="/data", data=DATA, batches=0)
    with pytest.raises(ConfigurationError, match="colour"):
        await connect("http://127.0.0.1:9").submit_checkpoint("tiny", 0.8, source="/data", data=DATA, colour="red")
