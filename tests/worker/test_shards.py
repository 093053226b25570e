"""Jobs in shards: one document however many there are, and only what was lost is done again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gradient_blueprints import Client
from gradient_blueprints.models import DataSource, Job, JobState, NewJob, Progress, Scope
from tests.conftest import fresh_database, make_settings, serving
from tests.worker.conftest import LONG, Broker, Processes, profiling_processes, wait_until
from worker.child import Fetched, Specification
from worker.sources import SourceRefused

# --- the work, called in this process


@pytest.fixture
def specify(roots: Path, tmp_path: Path) -> Callable[..., Specification]:
    """Five batches of one domain and as many as there are, three, of another."""
    (tmp_path / "short.txt").write_text("\n".join((roots / "general.txt").read_text().splitlines()[:8]))
    numbers = iter(range(100))

    def make(shards: int, part: int = 0, states: tuple[Path, ...] = (), **changes: Any) -> Specification:
        folder = tmp_path / f"job-{next(numbers)}"
        folder.mkdir()
        return Specification(
            job=NewJob.model_validate(
                {
                    "model_id": "tiny",
                    "training_checkpoint": 0.8,
                    "source": str(roots / "tiny"),
                    "data": {
                        "bio": {"source": str(roots / "general.txt")},
                        "general": {"source": str(tmp_path / "short.txt")},
                    },
                    "options": {"batches": 5, "batch_size": 2, "sequence_length": 16, "shards": shards},
                }
                | changes
            ),
            folder=folder,
            allowed_roots=(tmp_path, roots),
            device="cpu",
            max_model_bytes=1 << 30,
            max_text_bytes=1 << 30,
            part=part,
            fetched=Fetched(states=states),
        )

    return make


def test_one_two_and_five_shards_give_the_same_document(specify: Callable[..., Specification]) -> None:
    """The same bytes, attachment included: on this model every rounded number comes out alike."""
    from worker.profile import merge_shards, profile, profile_shard

    whole = profile(specify(1), lambda _: None)
    assert whole.provenance is not None
    assert whole.provenance.batches == 8
    for shards in (2, 5):
        reports: list[Progress] = []
        parts = tuple(profile_shard(specify(shards, part), reports.append) for part in range(shards))
        assert sum(report.total or 0 for report in reports if report.phase == "saving") == 8
        merged = merge_shards(specify(shards, shards, parts), lambda _: None)
        assert merged.to_dict() == whole.to_dict()


def test_shards_that_saw_other_weights_are_not_merged(
    specify: Callable[..., Specification], roots: Path, tmp_path: Path
) -> None:
    from tests.worker.checkpoints import make_checkpoint
    from worker.profile import merge_shards, profile_shard

    make_checkpoint(tmp_path / "other", roots / "general.txt", seed=1)
    states = (
        profile_shard(specify(2, 0), lambda _: None),
        profile_shard(specify(2, 1, source=str(tmp_path / "other")), lambda _: None),
    )
    with pytest.raises(SourceRefused, match="shard 1 saw other weights_digest than shard 0"):
        merge_shards(specify(2, 2, states), lambda _: None)


# --- with real processes


@dataclass(frozen=True)
class Service:
    """The API, a broker, a relay and two workers, which every test here shares."""

    lab: Client
    roots: Path
    processes: Processes
    workers: list[subprocess.Popen[bytes]]

    def submit(self, **changes: Any) -> Job:
        given: dict[str, Any] = {"batches": 5, "batch_size": 2, "sequence_length": 16} | changes
        code = DataSource(source=str(self.roots / "code.jsonl"))
        data: dict[str, Path | DataSource] = {"general": self.roots / "general.txt", "code": code}
        return self.lab.submit_checkpoint("tiny", 0.8, source=self.roots / "tiny", data=data, **given)

    def busy(self) -> list[psutil.Process]:
        """The processes that profile or merge."""
        return [child for worker in self.workers for child in profiling_processes(worker)]

    def measures(self, job: Job, parts: int) -> bool:
        """Whether so many shards run their batches."""
        told = [part.progress for part in self.lab.get_job(job.id).parts if part.state is JobState.RUNNING]
        return sum(progress is not None and progress.phase == "profiling" for progress in told) == parts


@pytest.fixture(scope="module")
def service(
    postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory, roots: Path
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("shards")
    with ExitStack() as stack:
        url = stack.enter_context(fresh_database(postgres_url, template_database))
        broker = Broker(folder / "valkey")
        stack.callback(broker.stop)
        quick = {"broker_url": broker.url, "lease_seconds": 4.0, "sweep_seconds": 0.3}
        server = stack.enter_context(serving(make_settings(url, folder).model_copy(update=quick)))
        (folder / "processes").mkdir()
        processes = Processes(server, broker, roots, folder / "processes")
        stack.callback(lambda: print(processes.logs()))
        stack.callback(processes.end)
        processes.relay()
        workers = [processes.worker(), processes.worker()]
        lab = Client(server.url, api_key=server.key("lab-a", Scope.PROFILE, Scope.READ), cache=False, timeout=120)
        yield Service(stack.enter_context(lab), roots, processes, workers)


def attempts(job: Job) -> list[int]:
    return [part.attempts for part in job.parts]


def test_killing_a_worker_and_a_merge_repeats_those_alone_and_the_document_is_that_of_one_worker(
    service: Service,
) -> None:
    whole = service.submit()
    ended = service.lab.wait_for_job(whole.id, 120)
    assert (ended.state, ended.version) == (JobState.SUCCEEDED, 1)
    split = service.submit(shards=2)
    wait_until(lambda: attempts(service.lab.get_job(split.id)) == [1, 1], seconds=120, what="each worker has a shard")
    service.workers.pop(0).kill()
    service.workers.append(service.processes.worker())

    def merging() -> psutil.Process | None:
        parts = service.lab.get_job(split.id).parts
        if len(parts) < 3 or parts[2].state is not JobState.RUNNING:
            return None
        return next(iter(service.busy()), None)

    wait_until(merging, seconds=120, what="a worker merges").kill()
    again = service.lab.wait_for_job(split.id, 120)
    assert (again.state, again.digest, again.version) == (JobState.SUCCEEDED, ended.digest, 1)
    assert sorted(attempts(again)[:2]) == [1, 2]
    assert attempts(again)[2] == 2
    lost, killed = [event.reason for event in service.lab.watch_job(split.id) if event.reason]
    assert lost.endswith(", attempt 1 of 3: the worker stopped renewing its lease")
    assert killed.startswith("merge, attempt 1 of 3: the profiling process was killed")


def test_cancelling_stops_every_worker_of_a_job(service: Service) -> None:
    job = service.submit(shards=2, **LONG)
    wait_until(lambda: service.measures(job, 2), seconds=120, what="both workers profile")
    children = service.busy()
    assert len(children) == 2
    service.lab.cancel_job(job.id)
    ended = service.lab.wait_for_job(job.id, 30)
    assert (ended.state, {part.state for part in ended.parts}) == (JobState.CANCELLED, {JobState.CANCELLED})
    assert not any(child.is_running() for child in children)


def test_a_shard_beyond_its_time_limit_fails_the_job_and_stops_the_other(service: Service) -> None:
    job = service.submit(shards=2, time_limit=3, **LONG)
    ended = service.lab.wait_for_job(job.id, 120)
    assert (ended.state, ended.reason) == (JobState.FAILED, "not done within its time limit of 3 seconds")
    wait_until(lambda: not service.busy(), what="no worker goes on with it")
