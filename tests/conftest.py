"""Real servers for every test: a PostgreSQL and a Valkey per test process, a fresh migrated database per test."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import asyncpg
import httpx2
import pytest
import uvicorn
from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.application import create_app
from app.api.head_limit import HeadTimeLimit
from app.database import create_engine, create_sessions, migrate
from app.embedded import postgres, valkey
from app.registry.keys import generate_secret
from app.settings import Settings
from gradient_blueprints import Client
from gradient_blueprints.models import Scope
from tests.object_storage import ObjectStorage, object_storage

T = TypeVar("T")

NO_BROWSER = "NO BROWSER"
"""How the reason of a test begins that was left out for want of a browser (tests/web/browser.py)."""
_TEMPLATE = "registry_template"
_numbers = itertools.count(1)


def execute(url: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    # In a thread of its own: in tests/web Playwright has a loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, run()).result()


def _database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@contextmanager
def _server_folder() -> Iterator[Path]:
    """Not below pytest's own folder, which another pytest that starts closes to the account that a server runs as."""
    with tempfile.TemporaryDirectory(prefix="blueprints-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Without a browser a part of the tests is left out: nobody shall take that for a pass."""
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(report.longrepr)]
    if left_out:
        terminalreporter.write_sep("=", f"{NO_BROWSER}: {len(left_out)} TESTS OF THE PAGES WERE LEFT OUT", red=True)


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A folder for a database server of the test's own."""
    with _server_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server whose user may create databases: the one of BLUEPRINTS_TEST_DATABASE_URL, else an embedded one."""
    if given := os.environ.get("BLUEPRINTS_TEST_DATABASE_URL"):
        yield given
        return
    with _server_folder() as folder:
        server = postgres.start(folder / "postgres", durable=False)
        try:
            yield server.url
        finally:
            postgres.stop(server)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A broker: the one of BLUEPRINTS_TEST_BROKER_URL, else an embedded one."""
    if given := os.environ.get("BLUEPRINTS_TEST_BROKER_URL"):
        yield given
        return
    with _server_folder() as folder:
        server = valkey.start(folder / "valkey", durable=False)
        try:
            yield server.url
        finally:
            valkey.stop(server)


@pytest.fixture(scope="session")
def storage() -> Iterator[ObjectStorage]:
    """A real S3 server with the bucket `checkpoints`."""
    with _server_folder() as folder, object_storage(folder / "seaweedfs") as running:
        yield running


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> str:
    """A migrated database to copy; its name is this process's own, since processes may share one server."""
    name = f"{_TEMPLATE}_{os.getpid()}"
    execute(postgres_url, f'CREATE DATABASE "{name}"')
    migrate(_database(postgres_url, name))
    return name


@contextmanager
def fresh_database(postgres_url: str, template: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    execute(postgres_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield _database(postgres_url, name)
    finally:
        execute(postgres_url, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def database_url(postgres_url: str, template_database: str) -> Iterator[str]:
    with fresh_database(postgres_url, template_database) as url:
        yield url


@pytest.fixture
def empty_database_url(postgres_url: str) -> Iterator[str]:
    """A database without a schema."""
    with fresh_database(postgres_url, "template0") as url:
        yield url


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return make_settings(database_url, tmp_path)


@pytest.fixture
def in_session(settings: Settings) -> Callable[[Callable[[AsyncSession], Awaitable[T]]], T]:
    """Calls a domain function in a transaction of its own."""

    def run(function: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async def call() -> T:
            engine = create_engine(settings)
            try:
                async with create_sessions(engine).begin() as session:
                    return await function(session)
            finally:
                await engine.dispose()

        return asyncio.run(call())

    return run


def make_settings(database_url: str, folder: Path) -> Settings:
    return Settings(
        database_url=database_url,
        secret=SecretStr("a secret of tests, thirty-two characters or more"),
        admin_key=SecretStr(generate_secret()),
        store=folder / "store",
        # Far beyond what a test sends, so that the limits are there and strike nowhere.
        key_requests_per_minute=10**7,
        address_requests_per_minute=10**7,
    )


@dataclass(frozen=True)
class Server:
    """A uvicorn that serves the application on a real socket."""

    url: str
    settings: Settings
    admin_key: str

    def key(self, lab: str, *scopes: Scope) -> str:
        """A new key of that lab, which is created if need be."""
        authorization = {"Authorization": f"Bearer {self.admin_key}"}
        with httpx2.Client(base_url=self.url, headers=authorization, timeout=60) as admin:
            admin.post("/v1/labs", json={"name": lab})  # 409 when it is there already
            wanted = scopes or (Scope.READ, Scope.PUBLISH, Scope.PROFILE)
            answer = admin.post("/v1/keys", json={"lab": lab, "scopes": wanted}).raise_for_status()
            return str(answer.json()["secret"])


@contextmanager
def serving(settings: Settings) -> Iterator[Server]:
    """Run the application in a thread of this process, over a real socket."""
    config = uvicorn.Config(
        create_app(settings),
        host="127.0.0.1",
        port=0,
        http=HeadTimeLimit,
        log_level="warning",
        lifespan="on",
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start; its error is above"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        assert settings.admin_key is not None
        yield Server(f"http://127.0.0.1:{port}", settings, settings.admin_key.get_secret_value())
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    with serving(settings) as running:
        yield running


@pytest.fixture
def make_client(server: Server, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """SDK clients of a lab: `make_client("lab-a", Scope.PUBLISH)`; without a lab, one without a key."""
    with ExitStack() as stack:

        def make(lab: str | None = None, *scopes: Scope) -> Client:
            key = server.key(lab, *scopes) if lab else None
            cache = tmp_path / f"cache-{next(_numbers)}"
            return stack.enter_context(Client(server.url, api_key=key, cache=cache))

        yield make


@pytest.fixture
def admin(server: Server, tmp_path: Path) -> Iterator[Client]:
    with Client(server.url, api_key=server.admin_key, cache=tmp_path / "admin-cache") as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    """Plain HTTP, for what the SDK would never send."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def publisher(server: Server, http: httpx2.Client) -> httpx2.Client:
    """Plain HTTP with the key of lab-a, which may read, publish and profile."""
    http.headers["Authorization"] = f"Bearer {server.key('lab-a')}"
    return http
