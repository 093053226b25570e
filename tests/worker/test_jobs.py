"""Jobs with real processes: what happens when all goes well, and when a part is killed, stopped or wiped."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gradient_blueprints import Client
from gradient_blueprints.models import PROFILE_QUEUE, DataSource, Job, JobState
from tests.conftest import Server
from tests.worker.conftest import LEASE, LONG, Broker, Processes, is_profiling, profiling_processes, wait_until
from worker.sources import file_digest, resolve_checkpoint

Submit = Callable[..., Job]


def test_a_refused_source_fails_its_job_and_the_next_one_is_profiled_and_published(
    lab: Client, submit: Submit, processes: Processes, roots: Path, tmp_path: Path
) -> None:
    (tmp_path / "processes" / "blueprint-job-left").mkdir()  # as a killed worker leaves one
    refused = submit(source="/etc")
    data = {"general": roots / "general.txt", "code": DataSource(source=str(roots / "code.jsonl"))}
    job = submit(data=data, batches=2, notes="weights of a test")
    processes.relay()
    processes.worker()

    ended = lab.wait_for_job(refused.id, 60)
    assert ended.state is JobState.FAILED
    assert "does not lie under an allowed root" in (ended.reason or "")

    ended = lab.wait_for_job(job.id, 60)
    assert (ended.state, ended.version, ended.attempts) == (JobState.SUCCEEDED, 1, 1)
    blueprint = lab.fetch_blueprint("tiny", 0.8)
    assert (blueprint.lab, blueprint.digest) == ("lab-a", ended.digest)
    assert any(layer.gradient_norm > 0 for layer in blueprint.layers)
    provenance = blueprint.provenance
    assert provenance is not None
    checkpoint = resolve_checkpoint(str(roots / "tiny"), [roots], max_model_bytes=1 << 30)
    assert provenance.weights_digest == checkpoint.digest()
    assert provenance.data is not None
    assert provenance.data["code"]["digest"] == file_digest(roots / "code.jsonl")  # type: ignore[index, call-overload]
    assert str(roots) not in blueprint.to_json()
    assert (provenance.batches, provenance.dtype) == (4, "float32")
    assert provenance.tokens == 4 * 2 * 15  # a sequence of 16 tokens predicts 15
    assert provenance.notes == "weights of a test"
    assert (provenance.device or "").startswith("cpu")
    factors = lab.fetch_factors(blueprint)
    assert factors is not None
    wait_until(lambda: not list((tmp_path / "processes").glob("blueprint-job-*")), what="no folder of a job is left")


def test_an_uploaded_checkpoint_is_profiled_and_published(
    lab: Client, processes: Processes, roots: Path, tmp_path: Path
) -> None:
    """The worker sees no folder of the lab: it has a URL, a key and a cache of its own."""
    lab.upload_checkpoint(roots / "tiny", "tiny", 0.8)
    lab.upload_checkpoint_file(roots / "code.jsonl", "tiny", 0.8)
    job = lab.submit_checkpoint(
        "tiny", 0.8, data={"code": "store:code.jsonl"}, batches=1, batch_size=2, sequence_length=16
    )
    processes.relay()
    processes.worker(BLUEPRINTS_ALLOWED_ROOTS="", BLUEPRINTS_CACHE=str(tmp_path / "worker-cache"))
    ended = lab.wait_for_job(job.id, 60)
    assert (ended.state, ended.version) == (JobState.SUCCEEDED, 1), ended.reason
    provenance = lab.fetch_blueprint("tiny", 0.8).provenance
    assert provenance is not None
    checkpoint = resolve_checkpoint(str(roots / "tiny"), [roots], max_model_bytes=1 << 30)
    assert provenance.weights_digest == checkpoint.digest()


def test_a_job_whose_worker_is_killed_is_done_by_another_once_within_two_leases(
    lab: Client, submit: Submit, processes: Processes
) -> None:
    processes.relay()
    workers = [processes.worker(), processes.worker()]
    wait_until(lambda: processes.logs().count(" ready.") == 2, what="both workers are up")
    job = submit(batches=500)
    wait_until(lambda: is_profiling(lab, job), what="one of them profiles")
    ((busy, orphan),) = [(worker, child) for worker in workers for child in profiling_processes(worker)]

    busy.kill()
    killed = time.monotonic()
    assert (lab.get_job(job.id).state, lab.get_job(job.id).attempts) == (JobState.RUNNING, 1)
    wait_until(lambda: lab.get_job(job.id).attempts == 2, seconds=2 * LEASE, what="another worker claims")
    assert time.monotonic() - killed < 2 * LEASE
    ended = lab.wait_for_job(job.id, 90)

    assert (ended.state, ended.attempts, ended.version) == (JobState.SUCCEEDED, 2, 1)
    assert len(list(lab.list_versions("tiny", 0.8))) == 1
    states = [event.state.value for event in lab.watch_job(job.id) if event.progress is None]
    assert states == ["queued", "running", "queued", "running", "succeeded"]
    assert not orphan.is_running(), "the killed worker's process goes on"


def test_a_job_submitted_while_the_broker_is_down_runs_when_it_is_back_and_heartbeats_tell_so(
    lab: Client, submit: Submit, processes: Processes, broker: Broker, tmp_path: Path
) -> None:
    of_relay, of_worker = tmp_path / "relay-heartbeat", tmp_path / "worker-heartbeat"
    processes.relay(BLUEPRINTS_HEARTBEAT=str(of_relay))
    processes.worker(BLUEPRINTS_HEARTBEAT=str(of_worker))
    for file in (of_relay, of_worker):
        wait_until(file.exists, what=f"{file.name} begins")
        file.unlink()
        wait_until(file.exists, what=f"{file.name} goes on")

    broker.stop()
    wait_until(lambda: "Trying again in 2.00 seconds" in processes.logs(), what="the worker misses the broker")
    for file in (of_relay, of_worker):
        file.unlink()
    job = submit()
    assert job.state is JobState.QUEUED
    wait_until(of_relay.exists, what="the relay, which tries again, is well")
    wait_until(lambda: "Trying again in 4.00 seconds" in processes.logs(), what="a heartbeat's time is over")
    assert not of_worker.exists()
    assert lab.get_job(job.id).state is JobState.QUEUED

    broker.start()
    assert lab.wait_for_job(job.id, 60).state is JobState.SUCCEEDED
    assert of_worker.exists()


def test_a_job_whose_message_the_broker_lost_runs_all_the_same(
    lab: Client, submit: Submit, processes: Processes, broker: Broker
) -> None:
    processes.relay()
    job = submit()
    with broker.client() as client:
        wait_until(lambda: client.llen(PROFILE_QUEUE) == 1, what="the job is announced")
        client.flushall()
        processes.worker()
        assert lab.wait_for_job(job.id, 60).state is JobState.SUCCEEDED


def test_a_job_that_kills_its_worker_every_time_crashes_and_the_next_one_runs(
    lab: Client, submit: Submit, processes: Processes
) -> None:
    processes.relay()
    deadly = submit(**LONG)
    for attempt in (1, 2, 3):
        worker = processes.worker()
        wait_until(lambda: lab.get_job(deadly.id).attempts == attempt, what=f"attempt {attempt}")  # noqa: B023
        wait_until(lambda: profiling_processes(worker))  # noqa: B023
        worker.kill()
    harmless = submit("harmless")
    processes.worker()
    ended = lab.wait_for_job(deadly.id, 30)
    assert (ended.state, ended.attempts) == (JobState.CRASHED, 3)
    assert ended.reason == "attempt 3 of 3: the worker stopped renewing its lease"
    assert lab.wait_for_job(harmless.id, 60).state is JobState.SUCCEEDED


def test_a_job_whose_process_is_killed_every_time_crashes_and_the_worker_goes_on(
    lab: Client, submit: Submit, processes: Processes
) -> None:
    processes.relay()
    worker = processes.worker()
    deadly, harmless = submit(**LONG), submit("harmless")
    killed: set[int] = set()

    def kill_each() -> bool:
        for child in profiling_processes(worker) if lab.get_job(deadly.id).state is JobState.RUNNING else []:
            if child.pid not in killed:
                child.send_signal(signal.SIGKILL)
                killed.add(child.pid)
        return lab.get_job(deadly.id).state.terminal

    wait_until(kill_each, what="the job is given up")
    ended = lab.get_job(deadly.id)
    assert ended.state is JobState.CRASHED
    assert (ended.reason or "").startswith("attempt 3 of 3: the profiling process was killed (SIGKILL)")
    assert lab.wait_for_job(harmless.id, 90).state is JobState.SUCCEEDED
    assert worker.poll() is None


def test_cancelling_stops_a_running_job_within_seconds(lab: Client, submit: Submit, processes: Processes) -> None:
    processes.relay()
    worker = processes.worker()
    job = submit(**LONG)
    wait_until(lambda: is_profiling(lab, job))
    (child,) = profiling_processes(worker)
    asked = time.monotonic()
    lab.cancel_job(job.id)
    ended = lab.wait_for_job(job.id, 10)
    assert (ended.state, ended.reason) == (JobState.CANCELLED, "cancelled by lab-a")
    assert time.monotonic() - asked < 5
    assert not child.is_running()


def test_a_job_beyond_its_time_limit_or_the_memory_of_the_worker_fails_with_that_reason(
    lab: Client, submit: Submit, processes: Processes
) -> None:
    processes.relay()
    worker = processes.worker()
    slow = submit(**LONG, time_limit=1.5)
    ended = lab.wait_for_job(slow.id, 30)
    assert (ended.state, ended.reason) == (JobState.FAILED, "not done within its time limit of 1.5 seconds")
    worker.terminate()
    worker.wait(15)
    processes.worker(BLUEPRINTS_MAX_MEMORY_BYTES=str(50 << 20))
    greedy = lab.wait_for_job(submit().id, 30)
    assert greedy.state is JobState.FAILED
    assert "this worker allows 52,428,800" in (greedy.reason or "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_stop_gives_its_job_back_at_once(
    number: signal.Signals, lab: Client, submit: Submit, processes: Processes
) -> None:
    processes.relay()
    worker = processes.worker()
    job = submit(**LONG)
    wait_until(lambda: profiling_processes(worker))
    (child,) = profiling_processes(worker)
    asked = time.monotonic()
    os.kill(worker.pid, number)
    assert worker.wait(15) == 0
    assert time.monotonic() - asked < LEASE + 2.5
    given_back = lab.get_job(job.id)
    assert (given_back.state, given_back.attempts) == (JobState.QUEUED, 0)
    assert given_back.reason == "given back by a worker that shuts down"
    assert not child.is_running()


def test_the_profiling_process_knows_neither_key_nor_broker(lab: Client, submit: Submit, processes: Processes) -> None:
    processes.relay()
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "the operator's",
        "HF_TOKEN": "the operator's",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer the-operator's",
        "HTTPS_PROXY": "http://user:password@127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "WANDB_API_KEY": "the operator's",
        "PIP_INDEX_URL": "https://user:password@127.0.0.1:9/simple",
    }
    worker = processes.worker(**secrets, NCCL_DEBUG="WARN", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    submit(**LONG)
    (child,) = wait_until(lambda: profiling_processes(worker))
    wait_until(lambda: "worker.profile" in " ".join(child.cmdline()))
    environment = psutil.Process(child.pid).environ()
    assert environment["HF_HUB_OFFLINE"] == "1", "this is the environment that it was given"
    assert environment["TMPDIR"] == child.cwd(), "the job's folder"
    assert environment.keys() >= {"NCCL_DEBUG", "CUDA_DEVICE_ORDER", "PATH"}
    assert [name for name in environment if name.startswith("BLUEPRINTS_") or name in secrets] == []


# --- the relay


def test_relays_beside_each_other_announce_each_job_once(
    lab: Client, submit: Submit, processes: Processes, broker: Broker, server: Server
) -> None:
    relays = [processes.relay(), processes.relay()]
    wait_until(lambda: processes.logs().count("relay: running") == 2, what="both relays are up")
    submitted = {submit().id for _ in range(40)}
    with broker.client() as client:
        wait_until(lambda: client.llen(PROFILE_QUEUE) >= 40)
        for relay in relays:
            relay.terminate()
        assert [relay.wait(10) for relay in relays] == [0, 0]
        messages = client.lrange(PROFILE_QUEUE, 0, -1)
    assert len(messages) == 40
    bodies = [json.loads(base64.b64decode(json.loads(message)["body"])) for message in messages]
    assert {body[0][0] for body in bodies} == submitted
    assert all(len(body[0]) == 1 and body[1] == {} for body in bodies)
