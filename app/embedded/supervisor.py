"""`up`: the whole service on one machine out of one data directory, watched until it is told to stop."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

import httpx2

from app.embedded import data_directory, postgres, valkey
from app.embedded.children import Child
from app.embedded.processes import MARK, CannotStart, end_left_behind, last_lines

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT = 90.0
LOOK_EVERY = 0.25

# What a worker, which runs the jobs of every lab, has no business knowing.
NOT_FOR_WORKERS = (
    "BLUEPRINTS_DATABASE_URL",
    "BLUEPRINTS_DATABASE_PASSWORD",
    "BLUEPRINTS_SECRET",
    "BLUEPRINTS_SECRETS_DIR",
    "BLUEPRINTS_ADMIN_KEY",
    "BLUEPRINTS_WORKER_KEY",
)


class StopRequested(BaseException):
    """Raised in the main thread by the first SIGINT, SIGTERM or SIGHUP; not an error, hence no Exception."""


def up(data_dir: Path, *, host: str, port: int, with_worker: bool, environment: Mapping[str, str]) -> int:
    """Serve until told to stop; the exit status is 0 after a clean stop, 1 when something did not start.

    `environment` is the operator's: its BLUEPRINTS_ settings win over what is made up here, and children inherit it.
    """
    signals = _StopSignals()
    try:
        data_dir = data_directory.make(data_dir)
        with data_directory.held(data_dir) as announce, _listen(host, port) as listener:
            url = _url_of(listener)
            announce(url)
            stack = _Stack(data_dir, url, listener, environment)
            try:
                stack.start(with_worker=with_worker)
                while True:
                    stack.keep_running()
                    time.sleep(LOOK_EVERY)
            finally:
                signals.ignore()
                stack.stop()
    except StopRequested:
        print("stopped", flush=True)
        return 0
    except CannotStart as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


class _StopSignals:
    """Turns the first stop signal into StopRequested; a further one does not disturb the orderly stop."""

    def __init__(self) -> None:
        self._stopping = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping = True
            raise StopRequested

    def ignore(self) -> None:
        self._stopping = True


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else starts. The socket outlives the API: while that restarts, requests wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotStart(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


def _url_of(listener: socket.socket) -> str:
    """Where processes on this machine reach the API; `0.0.0.0` means every address, so also this one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound to
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Stack:
    """The processes of one data directory."""

    def __init__(self, data_dir: Path, url: str, listener: socket.socket, given: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        self.url = url
        self.listener = listener
        search_path = os.pathsep.join(filter(None, (str(REPOSITORY), given.get("PYTHONPATH"))))
        self.environment = {**given, MARK: str(data_dir), "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1"}
        self.children: list[Child] = []
        self.guard: subprocess.Popen[bytes] | None = None

    def start(self, *, with_worker: bool) -> None:
        if ended := end_left_behind(self.data_dir):
            log.warning("ended %d processes that an earlier `up`, killed without warning, had left running", ended)
        os.environ[MARK] = str(self.data_dir)  # the servers get little of our environment, but this
        self.guard = self._spawn("guard", ["app.embedded.guard", str(self.data_dir)], self.environment, subprocess.PIPE)
        service = self._configure()
        self._migrate(service)
        descriptor = self.listener.fileno()
        self._keep("api", ["app", "serve", "--fd", str(descriptor)], service, pass_fds=(descriptor,))
        self._wait_until_ready()
        self._keep("relay", ["app", "relay"], service)
        if with_worker:
            worker = {name: value for name, value in service.items() if name not in NOT_FOR_WORKERS}
            worker["BLUEPRINTS_URL"] = self.url
            worker["BLUEPRINTS_API_KEY"] = self._worker_key(service["BLUEPRINTS_ADMIN_KEY"])
            self._keep("worker", ["worker"], worker)
        self._greet(service)

    def keep_running(self) -> None:
        for child in self.children:
            child.keep_running()

    def stop(self) -> None:
        """Stop everything, last started first: the worker hands its job back over the API, the API needs Postgres."""
        for child in reversed(self.children):
            child.stop()
        # Ends what escaped: grandchildren, what a signal kept us from noting down, and the guard, now without a task.
        end_left_behind(self.data_dir)
        if self.guard is not None:
            self.guard.wait()

    def _configure(self) -> dict[str, str]:
        """The environment of API and relay: the operator's settings, and ours where they gave none."""
        settings = dict(self.environment)
        if not settings.get("BLUEPRINTS_DATABASE_URL"):
            settings["BLUEPRINTS_DATABASE_URL"] = self._keep_server("postgres", postgres.start, signal.SIGINT)
        if not settings.get("BLUEPRINTS_BROKER_URL"):
            settings["BLUEPRINTS_BROKER_URL"] = self._keep_server("valkey", valkey.start, signal.SIGTERM)
        if not settings.get("BLUEPRINTS_SECRET"):
            settings["BLUEPRINTS_SECRET"] = data_directory.hashing_secret(self.data_dir)
        if not settings.get("BLUEPRINTS_STORE"):
            settings["BLUEPRINTS_STORE"] = str(self.data_dir / "store")
        if not settings.get("BLUEPRINTS_CACHE"):
            settings["BLUEPRINTS_CACHE"] = str(self.data_dir / "cache")
        if not settings.get("BLUEPRINTS_ALLOWED_ROOTS"):
            settings["BLUEPRINTS_ALLOWED_ROOTS"] = str(self.data_dir / "sources")
        if not settings.get("BLUEPRINTS_ADMIN_KEY"):
            settings["BLUEPRINTS_ADMIN_KEY"] = self._admin_key()
        return settings

    def _keep_server(
        self, name: str, start: Callable[..., postgres.Postgres | valkey.Valkey], stop_signal: signal.Signals
    ) -> str:
        """Start a server and, should it die, start it again on the same port, for the others know its URL."""
        file = data_directory.log_file(self.data_dir, name)
        server = start(self.data_dir / name, log=file)
        again = partial(start, self.data_dir / name, log=file, port=server.port)
        self.children.append(
            Child(name, file, server.process, lambda: again().process, stop_signal, patience=postgres.STOP_TIMEOUT)
        )
        return server.url

    def _keep(
        self, name: str, module: list[str], environment: Mapping[str, str], pass_fds: tuple[int, ...] = ()
    ) -> None:
        start = partial(self._spawn, name, module, environment, subprocess.DEVNULL, pass_fds)
        self.children.append(Child(name, self.data_dir / "logs" / f"{name}.log", start(), start))

    def _spawn(
        self,
        name: str,
        module: list[str],
        environment: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        with data_directory.log_file(self.data_dir, name).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C in the terminal is for us, who stop things in order
            )

    def _migrate(self, environment: Mapping[str, str]) -> None:
        if self._spawn("migrate", ["app", "migrate"], environment).wait() != 0:
            file = self.data_dir / "logs" / "migrate.log"
            raise CannotStart(f"the database could not be brought up to date; the end of {file}:\n{last_lines(file)}")

    def _wait_until_ready(self) -> None:
        api = self.children[-1]
        deadline = time.monotonic() + READY_TIMEOUT
        answer = "no answer"
        while time.monotonic() < deadline and api.process.poll() is None:
            try:
                response = httpx2.get(f"{self.url}/readyz", timeout=3, trust_env=False)
            except httpx2.TransportError as error:
                answer = str(error)
            else:
                if response.status_code == httpx2.codes.OK:
                    return
                answer = f"{response.status_code} {response.text}"
            time.sleep(0.05)
        raise CannotStart(f"the API did not become ready ({answer}); the end of {api.log}:\n{last_lines(api.log)}")

    def _admin_key(self) -> str:
        """The key in DIR/admin.key, made and shown at the first start."""

        def generate() -> str:
            # Loads SQLAlchemy, which a supervisor that makes no key can do without.
            from app.registry.keys import generate_secret

            return generate_secret()

        key, made = data_directory.read_or_make_secret(self.data_dir / "admin.key", generate)
        if made:
            print(f"admin key, shown only now and kept in {self.data_dir / 'admin.key'}:\n\n    {key}\n", flush=True)
        return key

    def _worker_key(self, admin_key: str) -> str:
        """The key in DIR/worker.key, made over the API like anybody's; a new one when the database does not know it."""
        file = self.data_dir / "worker.key"
        with httpx2.Client(base_url=self.url, timeout=30, trust_env=False) as api:
            if file.exists():
                key = file.read_text().strip()
                if api.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"}).is_success:
                    return key
            administrator = {"Authorization": f"Bearer {admin_key}"}
            who = api.get("/v1/whoami", headers=administrator)
            if not who.is_success:
                raise CannotStart(f"the admin key is refused: {who.text}")
            new_key = {"lab": who.json()["lab"], "scopes": ["work"], "name": "worker of this machine"}
            issued = api.post("/v1/keys", headers=administrator, json=new_key)
            if not issued.is_success:
                raise CannotStart(f"the worker gets no key: {issued.text}")
        key = str(issued.json()["secret"])
        data_directory.write_secret(file, key)
        return key

    def _greet(self, settings: Mapping[str, str]) -> None:
        own_key = self.environment.get("BLUEPRINTS_ADMIN_KEY")
        key = "$BLUEPRINTS_ADMIN_KEY" if own_key else f'"$(cat {self.data_dir / "admin.key"})"'
        print(
            f"""The registry serves {self.url}, its documentation {self.url}/docs
    export BLUEPRINTS_URL={self.url}
    export BLUEPRINTS_API_KEY={key}
data in {self.data_dir}, logs in {self.data_dir / "logs"}
checkpoints and texts for jobs are read from {settings["BLUEPRINTS_ALLOWED_ROOTS"]}
Ctrl-C stops everything.""",
            flush=True,
        )
