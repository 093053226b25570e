"""A tiny real checkpoint, and the service as separate processes: broker, relay and workers that tests may kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.embedded import valkey
from app.embedded.processes import free_port
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.models import Job, Scope
from tests.conftest import Server, make_settings

REPOSITORY = Path(__file__).parents[2]
LEASE = 2.5  # seconds


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allowed root, with a checkpoint `tiny` and texts `general.txt` and `code.jsonl`."""
    from tests.worker.checkpoints import make_checkpoint, make_texts

    folder = tmp_path_factory.mktemp("sources")
    make_texts(folder)
    make_checkpoint(folder / "tiny", folder / "general.txt")
    return folder


class Broker:
    """A Valkey of one test, which may stop it, start it again at the same place, or wipe it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._server = valkey.start(folder, port=self._port, durable=False)
        self.url = self._server.url

    def stop(self) -> None:
        if self._server.process.poll() is None:
            valkey.stop(self._server)

    def start(self) -> None:
        self._server = valkey.start(self._folder, port=self._port, durable=False)

    def client(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path / "valkey")
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def settings(database_url: str, tmp_path: Path, broker: Broker) -> Settings:
    quick = {"broker_url": broker.url, "lease_seconds": LEASE, "sweep_seconds": 0.3, "reannounce_seconds": 2.0}
    return make_settings(database_url, tmp_path).model_copy(update=quick)


class Processes:
    """Starts the real commands, and ends what is left of them."""

    def __init__(self, server: Server, broker: Broker, roots: Path, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        self._worker_key = server.key("workers", Scope.WORK)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        self._environment = clean | {
            "BLUEPRINTS_BROKER_URL": broker.url,
            "BLUEPRINTS_ALLOWED_ROOTS": str(roots),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }

    def relay(self, **environment: str) -> subprocess.Popen[bytes]:
        settings = self._server.settings
        return self._start(
            ["app", "relay"],
            BLUEPRINTS_DATABASE_URL=settings.database_url,
            BLUEPRINTS_SECRET=settings.secret.get_secret_value(),
            BLUEPRINTS_LEASE_SECONDS=str(settings.lease_seconds),
            BLUEPRINTS_SWEEP_SECONDS=str(settings.sweep_seconds),
            BLUEPRINTS_REANNOUNCE_SECONDS=str(settings.reannounce_seconds),
            **environment,
        )

    def worker(self, **environment: str) -> subprocess.Popen[bytes]:
        return self._start(
            ["worker"], BLUEPRINTS_URL=self._server.url, BLUEPRINTS_API_KEY=self._worker_key, **environment
        )

    def _start(self, module: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with (self._folder / f"{len(self._running)}-{module[0]}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=REPOSITORY,
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self._folder.glob("*.log"))
        )

    def end(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@pytest.fixture
def processes(
    server: Server, broker: Broker, roots: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Processes]:
    folder = tmp_path / "processes"
    folder.mkdir()
    started = Processes(server, broker, roots, folder)
    try:
        yield started
    finally:
        started.end()
        print(started.logs())  # pytest shows it beside a failure


@pytest.fixture
def lab(make_client: Callable[..., Client]) -> Client:
    return make_client("lab-a", Scope.PROFILE, Scope.READ)


@pytest.fixture
def submit(lab: Client, roots: Path) -> Callable[..., Job]:
    """A job of one quick batch, unless told otherwise."""

    def run(model_id: str = "tiny", **changes: Any) -> Job:
        quick: dict[str, Any] = {"batches": 1, "batch_size": 2, "sequence_length": 16}
        named: dict[str, Any] = {"source": roots / "tiny", "data": {"general": roots / "general.txt"}}
        return lab.submit_checkpoint(model_id, 0.8, **(named | quick | changes))

    return run


LONG = {"batches": 3_000}  # a job that a test ends before it ends itself


def wait_until(condition: Callable[[], Any], *, seconds: float = 40.0, what: str = "") -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} seconds: {what or condition}")


def profiling_processes(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(worker.pid).children():
            with suppress(psutil.Error):
                if "worker.profile" in child.cmdline():
                    found.append(child)
    return found


def is_profiling(lab: Client, job: Job) -> bool:
    progress = lab.get_job(job.id).progress
    return progress is not None and progress.phase == "profiling"
