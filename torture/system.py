"""The whole service as real processes, which can be killed and are started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil

from app.database import migrate
from app.embedded import postgres, valkey
from app.registry.keys import generate_secret
from gradient_blueprints import Client
from gradient_blueprints.errors import BlueprintsError
from gradient_blueprints.models import Scope
from torture.limited_store import LimitedStore, limited_store
from torture.proxy import Proxy
from torture.schedule import Scale

REPOSITORY = Path(__file__).parents[1]
LOOK_SECONDS = 0.1
RESTART_SECONDS = 0.5  # pause before what ended by itself is started again, as a supervisor would
STORE_MEBIBYTES = 256  # far more than a run stores; the rest is filled up
QUOTA = 4 << 20  # bytes of one lab's files, where no store of limited size can be mounted
MOST_ATTEMPTS = 25  # at a job: faults come faster here than in any year, and a crashed job would hide what is lost


@dataclass
class Component:
    """One process that is to run, unless a fault holds it down."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    held_down: bool = False
    ended: list[int] = field(default_factory=list)  # statuses with which it ended by itself


class System:
    """Postgres, Valkey, API processes on one socket, relays, workers; a proxy before the API, one before Postgres."""

    def __init__(self, folder: Path, scale: Scale, store: LimitedStore, stack: ExitStack) -> None:
        self.scale = scale
        self.store = store
        self._folder = folder
        self._logs = folder / "logs"
        self._logs.mkdir()
        self.components: dict[str, Component] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        self.sources = folder / "sources"
        self.sources.mkdir()
        (folder / "tmp").mkdir()
        command = [sys.executable, "-m", "torture.sources", str(self.sources)]
        making_sources = subprocess.Popen(command, cwd=REPOSITORY)

        stack.callback(self._end)
        self._admin_key = generate_secret()
        self.database_url = self._start_postgres()
        broker_url = self._start_valkey()
        migrate(self.database_url)
        self.database_proxy = stack.enter_context(Proxy(urlsplit(self.database_url).port or 0))
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        self.proxy = stack.enter_context(Proxy(self._listener.getsockname()[1]))
        self.url = f"http://127.0.0.1:{self.proxy.port}"
        self._environment = self._service_environment(broker_url)
        for number in range(scale.api_processes):
            self._keep(f"api {number}", self._spawn_api)
        for number in range(scale.relays):
            self._keep(f"relay {number}", lambda: self._spawn("relay", ["app", "relay"]))
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()
        self._wait_until_ready()
        worker_key = self.new_key("workers", Scope.WORK)
        if making_sources.wait() != 0:
            raise RuntimeError("the checkpoint to profile could not be made; its error is above")
        for number in range(scale.workers):
            self._keep(f"worker {number}", lambda: self._spawn_worker(worker_key))

    # --- what faults do

    def kill(self, name: str) -> None:
        """kill -9, and keep it down until `bring_back`."""
        with self._lock:
            component = self.components[name]
            component.held_down = True
            component.process.kill()
            component.process.wait()

    def bring_back(self, name: str) -> None:
        with self._lock:
            component = self.components[name]
            if component.held_down:
                component.process = component.start()
                component.held_down = False

    def wipe_broker(self) -> None:
        """What Valkey wrote to its disk is lost; it must be down."""
        for path in (self._folder / "valkey").glob("appendonly*"):
            shutil.rmtree(path)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.components[name].process.send_signal(number)

    def kill_profiler(self, worker: str) -> bool:
        """kill -9 of the process that works for a worker; False when there is none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.components[worker].process.pid).children():
                child.kill()
                return True
        return False

    # --- what clients need

    def new_key(self, lab: str, *scopes: Scope) -> str:
        with Client(self.url, api_key=self._admin_key, cache=False, offline=False) as admin:
            with contextlib.suppress(BlueprintsError):
                admin.create_lab(lab)
            return admin.create_key(lab, scopes, name="torture").secret

    def ended_by_themselves(self) -> dict[str, list[int]]:
        return {name: component.ended for name, component in self.components.items() if component.ended}

    def log_lines(self) -> Iterator[tuple[str, str]]:
        for path in sorted(self._logs.glob("*.log")):
            for line in path.read_text("utf-8", "replace").splitlines():
                yield path.stem, line

    # --- starting and ending

    def _start_postgres(self) -> str:
        folder, log = self._folder / "postgres", self._logs / "postgres.log"
        server = postgres.start(folder, log=log)
        self.components["postgres"] = Component(
            "postgres", lambda: postgres.start(folder, log=log, port=server.port).process, server.process
        )
        return server.url

    def _start_valkey(self) -> str:
        folder, log = self._folder / "valkey", self._logs / "valkey.log"
        server = valkey.start(folder, log=log)
        self.components["valkey"] = Component(
            "valkey", lambda: valkey.start(folder, log=log, port=server.port).process, server.process
        )
        return server.url

    def _service_environment(self, broker_url: str) -> dict[str, str]:
        parts = urlsplit(self.database_url)
        through_proxy = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{self.database_proxy.port}")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BLUEPRINTS_")}
        return clean | {
            "BLUEPRINTS_DATABASE_URL": urlunsplit(through_proxy),
            "BLUEPRINTS_BROKER_URL": broker_url,
            "BLUEPRINTS_SECRET": generate_secret(),
            "BLUEPRINTS_ADMIN_KEY": self._admin_key,
            "BLUEPRINTS_STORE": str(self.store.path),
            "BLUEPRINTS_LAB_FILE_BYTES": str(1 << 30 if self.store.mounted else QUOTA),
            "BLUEPRINTS_LEASE_SECONDS": str(self.scale.lease),
            "BLUEPRINTS_SWEEP_SECONDS": "0.5",
            "BLUEPRINTS_REANNOUNCE_SECONDS": "2",
            "BLUEPRINTS_MAX_ATTEMPTS": str(MOST_ATTEMPTS),
            "BLUEPRINTS_STATEMENT_SECONDS": "10",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self._folder / "tmp"),
        }

    def _spawn_api(self) -> subprocess.Popen[bytes]:
        """All of them accept from one socket, which outlives each: while one is away its requests wait."""
        descriptor = self._listener.fileno()
        return self._spawn("api", ["app", "serve", "--fd", str(descriptor)], pass_fds=(descriptor,))

    def _spawn_worker(self, key: str) -> subprocess.Popen[bytes]:
        allowed = ("BLUEPRINTS_BROKER_URL",)
        environment = {
            name: value
            for name, value in self._environment.items()
            if name in allowed or not name.startswith("BLUEPRINTS_")
        }
        environment |= {
            "BLUEPRINTS_URL": self.url,
            "BLUEPRINTS_API_KEY": key,
            "BLUEPRINTS_ALLOWED_ROOTS": str(self.sources),
        }
        return self._spawn("worker", ["worker"], environment)

    def _spawn(
        self,
        log: str,
        module: list[str],
        environment: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        with (self._logs / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=REPOSITORY,
                env=environment or self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
            )

    def _keep(self, name: str, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.components[name] = Component(name, start, start())

    def _watch(self) -> None:
        """Start again what ended by itself, and remember that it did."""
        while not self._over.wait(LOOK_SECONDS):
            for component in list(self.components.values()):
                with self._lock:
                    ended = not component.held_down and component.process.poll() is not None
                if ended:
                    self._over.wait(RESTART_SECONDS)
                    with self._lock:
                        component.ended.append(component.process.returncode)
                        component.process = component.start()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with Client(self.url, api_key=self._admin_key, cache=False, offline=False, timeout=5) as admin:
                    admin.whoami()
                return
            except BlueprintsError:
                time.sleep(0.1)
        raise RuntimeError(f"the API does not answer; see {self._logs}")

    def _end(self) -> None:
        """End every process, workers first: nothing is left behind."""
        self._over.set()
        with self._lock:
            for component in reversed(self.components.values()):
                component.process.send_signal(signal.SIGCONT)
                if component.name == "postgres":
                    component.process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        component.process.wait(30)
                component.process.kill()
                component.process.wait()


@contextmanager
def running(folder: Path, scale: Scale) -> Iterator[System]:
    """The service of a run in `folder`, its processes gone afterwards."""
    with ExitStack() as stack:
        store = stack.enter_context(limited_store(folder / "store", STORE_MEBIBYTES))
        yield System(folder, scale, store, stack)
