"""The whole service as processes of its own: logs in JSON, traces sent to a receiver of ours, every secret known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from sqlalchemy import make_url

from app.embedded.processes import free_port
from app.registry.keys import generate_secret
from gradient_blueprints import Client
from gradient_blueprints.models import Scope
from tests.conftest import execute, fresh_database
from tests.http_server import QuietHandler, serving_http
from tests.worker.checkpoints import make_checkpoint, make_texts
from tests.worker.conftest import Broker, wait_until

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Span:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]


class Receiver:
    """Takes spans by OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Its URL."""
        receiver = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

        with serving_http(Handler) as url:
            yield url

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            named = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.extend(
                    Span(
                        named["service.name"],
                        one.name,
                        one.trace_id.hex(),
                        one.span_id.hex(),
                        one.parent_span_id.hex(),
                        {item.key: item.value.string_value or item.value.int_value for item in one.attributes},
                    )
                    for one in scope.spans
                )


@dataclass
class Service:
    """API, relay and one worker, each a process of its own that logs into a file."""

    url: str
    folder: Path
    receiver: Receiver
    broker: Broker
    owner_url: str
    """Of the database, for one who may lock out the service's role."""
    role: str
    admin_key: str
    relay_metrics: str
    worker_metrics: str
    secrets: dict[str, str]
    """Whatever must never be logged, by what it is."""
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def logs(self, name: str) -> list[dict[str, Any]]:
        """The lines of one process; a line that is not JSON is an error of this service."""
        return [json.loads(line) for line in (self.folder / f"{name}.log").read_text().splitlines()]

    def everything_logged(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def key(self, lab: str, *scopes: Scope) -> str:
        with Client(self.url, api_key=self.admin_key, cache=False) as admin:
            if lab not in {known.name for known in admin.list_labs()}:
                admin.create_lab(lab)
            key = admin.create_key(lab, list(scopes)).secret
        self.secrets[f"a key of {lab}"] = key
        return key

    def client(self, key: str) -> Client:
        return Client(self.url, api_key=key, cache=False)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An allowed root with the checkpoint `tiny` and the text `general.txt`."""
    folder = tmp_path_factory.mktemp("observed-sources")
    make_texts(folder)
    make_checkpoint(folder / "tiny", folder / "general.txt")
    return folder


@pytest.fixture(scope="module")
def service(
    postgres_url: str, template_database: str, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("observed")
    with ExitStack() as stack:
        given = stack.enter_context(fresh_database(postgres_url, template_database))
        role, password = f"observed_{os.getpid()}", "database-" + generate_secret()[4:30]
        execute(postgres_url, f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'")
        stack.callback(execute, postgres_url, f"DROP ROLE {role}")
        broker = Broker(folder / "valkey")
        stack.callback(broker.stop)
        receiver = Receiver()
        collector = stack.enter_context(receiver.listening())
        secrets = {
            "the password of the database": password,
            "the password of the broker": str(make_url(broker.url).password),
            "the secret of the hashes": "the-secret-of-the-hashes-" + generate_secret(),
            "the bootstrap key": "operators-own-bootstrap-key-" + generate_secret()[4:],
            "the key of the worker": "operators-own-worker-key-" + generate_secret()[4:],
            "the token of the hub": "hf_" + generate_secret()[4:],
        }
        ports = [free_port() for _ in range(3)]
        running = Service(
            url=f"http://127.0.0.1:{ports[0]}",
            folder=folder,
            receiver=receiver,
            broker=broker,
            owner_url=given,
            role=role,
            admin_key=secrets["the bootstrap key"],
            relay_metrics=f"127.0.0.1:{ports[1]}",
            worker_metrics=f"127.0.0.1:{ports[2]}",
            secrets=secrets,
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("BLUEPRINTS_", "OTEL_"))}
        everyone = clean | {
            "BLUEPRINTS_BROKER_URL": broker.url,
            "BLUEPRINTS_LOG_FORMAT": "json",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OMP_NUM_THREADS": "1",
        }
        server = everyone | {
            "BLUEPRINTS_DATABASE_URL": make_url(given)
            .set(username=role, password=password)
            .render_as_string(hide_password=False),
            "BLUEPRINTS_SECRET": secrets["the secret of the hashes"],
            "BLUEPRINTS_ADMIN_KEY": secrets["the bootstrap key"],
            "BLUEPRINTS_WORKER_KEY": secrets["the key of the worker"],
            "BLUEPRINTS_STORE": str(folder / "store"),
            "BLUEPRINTS_RELAY_METRICS": running.relay_metrics,
            "BLUEPRINTS_SWEEP_SECONDS": "0.3",
        }
        worker = everyone | {
            "BLUEPRINTS_URL": running.url,
            "BLUEPRINTS_API_KEY": secrets["the key of the worker"],
            "BLUEPRINTS_HUB_TOKEN": secrets["the token of the hub"],
            "BLUEPRINTS_ALLOWED_ROOTS": str(sources),
            "BLUEPRINTS_CACHE": str(folder / "cache"),
            "BLUEPRINTS_WORKER_METRICS": running.worker_metrics,
        }
        stack.callback(_end, running.running)
        for name, module, environment in (
            ("api", ["app", "serve", "--port", str(ports[0])], server),
            ("relay", ["app", "relay"], server),
            ("worker", ["worker"], worker),
        ):
            with (folder / f"{name}.log").open("wb") as log:
                running.running[name] = subprocess.Popen(
                    [sys.executable, "-m", *module],
                    cwd=REPOSITORY,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        wait_until(lambda: _answers(f"{running.url}/readyz"), what="the API is ready")
        yield running


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def _end(running: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.kill()
        process.wait()
