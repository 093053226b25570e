"""What every request passes: headers that every answer carries, HEAD, limits of time, the id of a request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import Iterator

import asyncpg
import httpx2
import pytest

from app.api.head_limit import HeadTimeLimit
from app.settings import Settings
from gradient_blueprints.models import Scope
from tests.api.test_metrics import scrape, value
from tests.conftest import Server, execute, fresh_database, make_settings, serving
from tests.documents import blueprint_document
from tests.worker.conftest import wait_until

SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.fixture(scope="module")
def settings(postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with fresh_database(postgres_url, template_database) as url:
        yield make_settings(url, tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    with serving(settings) as running:
        yield running


@pytest.fixture
def published(server: Server) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
    answer = httpx2.post(f"{server.url}/v1/blueprints", json=blueprint_document(layers=20), headers=headers)
    return dict(answer.raise_for_status().json())


def test_every_answer_carries_the_headers_that_protect_it(server: Server, published: dict[str, str]) -> None:
    found = f"{server.url}/v1/blueprints/{published['digest']}"
    answers = [
        httpx2.get(f"{server.url}/livez"),
        httpx2.get(f"{server.url}/v1/models"),
        httpx2.get(f"{server.url}/v1/nothing"),
        httpx2.get(f"{server.url}/v1/keys"),
        httpx2.post(f"{server.url}/v1/blueprints", content=b"x" * (server.settings.max_document_bytes + 1)),
        httpx2.get(found),
        httpx2.get(found, headers={"If-None-Match": f'"{published["digest"]}"'}),
        httpx2.get(f"{server.url}/"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 401, 413, 200, 304, 200]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in SAFE} == SAFE, answer.request.url
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"]
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert "strict-transport-security" not in answer.headers
        for name in ("x-request-id", "content-security-policy", "cache-control", "ratelimit"):
            assert len(answer.headers.get_list(name)) <= 1, name


def test_a_failure_of_the_server_is_answered_counted_and_logged_as_one(
    settings: Settings, published: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    execute(
        settings.database_url,
        "ALTER TABLE documents DISABLE TRIGGER USER",
        f"UPDATE documents SET body = 'damaged' WHERE digest = '\\x{published['digest'][7:]}'",
        "ALTER TABLE documents ENABLE TRIGGER USER",
    )
    with serving(settings) as server:  # without the document in its memory
        for accepted, kind in (("*/*", "application/problem+json"), ("text/html", "text/html; charset=utf-8")):
            caplog.clear()
            headers = {"X-Request-Id": "fails", "Accept": accepted}
            answer = httpx2.get(f"{server.url}/blueprints/{published['digest']}", headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (500, kind)
            assert {name: answer.headers.get(name) for name in SAFE} == SAFE
            assert answer.headers.get_list("x-request-id") == ["fails"]
            for name in ("content-security-policy", "cache-control", "ratelimit"):
                assert len(answer.headers.get_list(name)) == 1, name
            wait_until(lambda: any(record.name == "app.requests" for record in caplog.records))
            (line,) = (record for record in caplog.records if record.name == "app.requests")
            assert (line.levelname, line.getMessage()[-5:]) == ("WARNING", ": 500")
            (told,) = (record for record in caplog.records if record.exc_info)
            assert told.getMessage() == "request fails failed"
        counted = {"method": "GET", "route": "/blueprints/{digest}", "status": "500"}
        assert value(scrape(server), "blueprints_http_requests_total", **counted) == 2


def test_behind_a_proxy_that_speaks_https_browsers_are_told_to_stay_with_it(settings: Settings) -> None:
    with serving(settings.model_copy(update={"trusted_proxies": "127.0.0.1"})) as server:
        answer = httpx2.get(f"{server.url}/v1/models", headers={"X-Forwarded-Proto": "https"})
        assert answer.headers["strict-transport-security"] == "max-age=31536000"


def test_what_a_proxy_says_is_believed_of_trusted_ones_alone(server: Server) -> None:
    answer = httpx2.get(f"{server.url}/v1/models", headers={"X-Forwarded-Proto": "https"})
    assert "strict-transport-security" not in answer.headers


@pytest.mark.parametrize("given", ["abc-123.X_y", "a" * 64])
def test_the_id_that_a_caller_gives_its_request_is_kept(server: Server, given: str) -> None:
    assert httpx2.get(f"{server.url}/livez", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 65, "a b", 'a"b', "a,b"])
def test_an_id_that_could_not_stand_in_a_log_is_replaced(server: Server, given: str) -> None:
    assert httpx2.get(f"{server.url}/livez", headers={"X-Request-Id": given}).headers["x-request-id"] != given


def test_whatever_can_be_got_can_be_asked_for_its_head(server: Server, published: dict[str, str]) -> None:
    key = {"Authorization": f"Bearer {server.key('lab-a')}"}
    moved = {"training_checkpoint": published["training_checkpoint"], "version": published["version"]}
    httpx2.put(f"{server.url}/v1/models/tiny/aliases/events", json=moved, headers=key).raise_for_status()
    paths = (
        "/livez",
        "/v1/models",
        "/v1/openapi.json",
        f"/v1/blueprints/{published['digest']}",
        "/v1/models/tiny/checkpoints/0.8/blueprint",
        "/v1/models/nothing",
        "/v1/models/tiny/aliases/events",
        "/v1/keys",
        "/",
    )
    with httpx2.Client(base_url=server.url) as http:
        for path in paths:
            got, head = http.get(path), http.head(path)
            assert (head.status_code, head.content) == (got.status_code, b"")
            for name in ("content-type", "content-length", "etag", "blueprint-version"):
                assert head.headers.get(name) == got.headers.get(name), (path, name)


def test_the_head_of_a_stream_without_end_cannot_be_had(server: Server) -> None:
    job = "00000000-0000-7000-8000-000000000000"
    assert httpx2.head(f"{server.url}/v1/jobs/{job}/events").status_code == 405


def test_a_request_that_takes_too_long_is_answered_all_the_same(settings: Settings, server: Server) -> None:
    """A lock that somebody holds in the database keeps the publication waiting for longer than it may."""
    headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
    with serving(settings.model_copy(update={"request_seconds": 0.4})) as impatient:
        locked, release = threading.Event(), threading.Event()

        async def hold() -> None:
            connection = await asyncpg.connect(settings.database_url)
            async with connection.transaction():
                await connection.execute("LOCK TABLE models IN ACCESS EXCLUSIVE MODE")
                locked.set()
                await asyncio.to_thread(release.wait)
            await connection.close()

        holder = threading.Thread(target=asyncio.run, args=(hold(),))
        holder.start()
        try:
            assert locked.wait(20)
            late = httpx2.post(f"{impatient.url}/v1/blueprints", json=blueprint_document("slow"), headers=headers)
            assert (late.status_code, late.json()["code"]) == (503, "service_unavailable")
            assert "within 0.4 seconds" in late.json()["detail"]
            assert int(late.headers["retry-after"]) >= 1
        finally:
            release.set()
            holder.join()
    assert httpx2.get(f"{server.url}/v1/models/slow").status_code == 404  # nothing of it was done
    again = httpx2.post(f"{server.url}/v1/blueprints", json=blueprint_document("slow"), headers=headers)
    assert again.status_code == 201


def test_a_stream_of_events_outlives_the_time_for_an_answer(settings: Settings, server: Server) -> None:
    with serving(settings.model_copy(update={"request_seconds": 2.0})) as impatient:
        headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
        new = {"model_id": "m", "training_checkpoint": 0.8, "source": "/m", "data": {"general": {"source": "/t"}}}
        job = httpx2.post(f"{server.url}/v1/jobs", json=new, headers=headers).raise_for_status().json()
        with httpx2.stream("GET", f"{impatient.url}/v1/jobs/{job['id']}/events", headers=headers) as events:
            lines = events.iter_lines()
            while "queued" not in next(lines):
                pass
            notify = f"UPDATE jobs SET request = request WHERE id = '{job['id']}'"
            for _ in range(3):  # three more looks of the watcher
                execute(settings.database_url, "SELECT pg_sleep(0.8)", notify)
            httpx2.post(f"{server.url}/v1/jobs/{job['id']}/cancel", headers=headers).raise_for_status()
            assert any("cancelled" in line for line in lines)


def test_a_slow_body_has_its_own_time_and_not_that_of_the_answer(settings: Settings) -> None:
    impatient = settings.model_copy(update={"request_seconds": 1.0, "body_seconds": 30.0})
    with serving(impatient) as server, _connection(server) as connection:
        connection.sendall(b"POST /v1/aggregate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 4\r\n\r\n{")
        execute(settings.database_url, "SELECT pg_sleep(1.2)")
        connection.sendall(b"}  ")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 422")


def test_a_client_that_takes_nothing_of_its_answer_is_given_up(settings: Settings) -> None:
    with serving(settings.model_copy(update={"body_seconds": 0.3})) as server:
        content = bytes(24 << 20)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        headers = {"Authorization": f"Bearer {server.key('lab-a', *Scope)}"}
        httpx2.put(f"{server.url}/v1/blobs/{digest}", content=content, headers=headers).raise_for_status()
        with _connection(server) as connection:
            connection.sendall(f"GET /v1/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

            def is_over() -> bool:
                told = httpx2.get(f"{server.url}/metrics", headers=headers).text
                return 'blueprints_http_requests_total{method="GET",route="/v1/blobs/{digest}",status="200"}' in told

            wait_until(is_over, what="the request is over although nobody reads its answer")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\nHost:", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /l"]
)
def test_a_head_that_does_not_arrive_closes_the_connection(
    server: Server, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadTimeLimit, "head_seconds", 0.3)
    with _connection(server) as connection:
        connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(1 << 16):
                received += chunk
        assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_a_connection_may_rest_between_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadTimeLimit, "head_seconds", 0.2)
    with _connection(server) as connection:
        for _ in range(2):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            execute(server.settings.database_url, "SELECT pg_sleep(0.4)")
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def _connection(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)
