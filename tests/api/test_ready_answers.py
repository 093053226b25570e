"""Answers sent again from memory are those of the whole way, and as current as those."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.conftest import Server, execute, serving
from tests.documents import blueprint_document

NEWEST = "/v1/models/tiny/checkpoints/0.8/blueprint"
VERSIONS = "/v1/models/tiny/checkpoints/0.8/versions"
ALIAS = "/v1/models/tiny/aliases/stable"
OF_ONE_ANSWER = {"x-request-id", "date", "ratelimit", "ratelimit-policy"}


def publish(publisher: httpx2.Client, norm: float = 0.1) -> str:
    """Its digest."""
    answer = publisher.post("/v1/blueprints", json=blueprint_document(layers=30, norm=norm)).raise_for_status()
    return str(answer.json()["digest"])


@pytest.fixture
def reader(server: Server) -> Iterator[httpx2.Client]:
    """Without a key, whose presence leads the whole way."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@contextmanager
def statements_by_the_orm() -> Iterator[list[str]]:
    """What the application, which runs in this process, executes; the current version is asked of the driver itself."""
    seen: list[str] = []

    def note(*call: object) -> None:
        seen.append(str(call[2]))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("encoding", ["identity", "gzip", "zstd"])
@pytest.mark.parametrize("accept", ["application/json", "text/csv", "*/*"])
def test_the_second_answer_is_the_first_word_for_word_and_asks_nothing_more_than_whether_it_stands(
    publisher: httpx2.Client, reader: httpx2.Client, accept: str, encoding: str
) -> None:
    digest = publish(publisher)
    publisher.put(ALIAS, json={"training_checkpoint": 0.8, "version": 1}).raise_for_status()
    for path in (NEWEST, f"/v1/blueprints/{digest}", f"{ALIAS}/blueprint"):
        headers = {"Accept": accept, "Accept-Encoding": encoding}
        first = reader.get(path, headers=headers)
        with statements_by_the_orm() as statements:
            second = reader.get(path, headers=headers)
        assert statements == []
        assert (second.status_code, second.content) == (200, first.content)
        assert said(second) == said(first)
        tag = first.headers["etag"]
        unchanged = [
            reader.get(path, headers={**headers, "If-None-Match": wanted})
            for wanted in (tag, f"W/{tag}", f'"other", {tag}', "*")
        ]
        assert [answer.status_code for answer in unchanged] == [304] * 4
        assert said(unchanged[0]) == said(unchanged[2])  # from memory, and by the whole way
        assert reader.get(path, headers={**headers, "If-None-Match": '"other"'}).content == first.content


def said(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in OF_ONE_ANSWER}


def test_every_process_answers_the_newest_version_as_soon_as_it_is_published(
    server: Server, publisher: httpx2.Client
) -> None:
    publish(publisher)
    with serving(server.settings) as another, httpx2.Client(base_url=another.url, timeout=60) as elsewhere:
        for number in range(1, 30):
            assert elsewhere.get(NEWEST).headers["blueprint-version"] == str(number)
            publish(publisher, norm=1 + number)


def test_every_process_follows_a_yank_and_an_alias_at_once(server: Server, publisher: httpx2.Client) -> None:
    publish(publisher, norm=1)
    publish(publisher, norm=2)
    publisher.put(ALIAS, json={"training_checkpoint": 0.8, "version": 1}).raise_for_status()
    with serving(server.settings) as another, httpx2.Client(base_url=another.url, timeout=60) as elsewhere:

        def versions() -> list[str]:
            return [elsewhere.get(path).headers["blueprint-version"] for path in (NEWEST, f"{ALIAS}/blueprint")]

        assert versions() == versions() == ["2", "1"]
        publisher.put(ALIAS, json={"training_checkpoint": 0.8, "version": 2}).raise_for_status()
        assert versions() == ["2", "2"]
        publisher.post(f"{VERSIONS}/2/yank", json={"reason": "wrong data"}).raise_for_status()
        assert versions() == ["1", "2"]
        assert "wrong data" in elsewhere.get(f"{ALIAS}/blueprint").headers["blueprint-warning"]
        publisher.post(f"{VERSIONS}/2/unyank").raise_for_status()
        assert versions() == versions() == ["2", "2"]
        assert "blueprint-warning" not in elsewhere.get(f"{ALIAS}/blueprint").headers
        publisher.post(f"{VERSIONS}/1/yank", json={"reason": "wrong too"}).raise_for_status()
        publisher.post(f"{VERSIONS}/2/yank", json={"reason": "wrong data"}).raise_for_status()
        assert elsewhere.get(NEWEST).json()["code"] == "blueprint_not_found"


def test_an_answer_by_digest_tells_of_a_yank_elsewhere_within_seconds(server: Server, publisher: httpx2.Client) -> None:
    path = f"/v1/blueprints/{publish(publisher)}"
    with serving(server.settings) as another, httpx2.Client(base_url=another.url, timeout=60) as elsewhere:
        assert "blueprint-warning" not in elsewhere.get(path).headers
        publisher.post(f"{VERSIONS}/1/yank", json={"reason": "wrong data"}).raise_for_status()
        deadline = time.monotonic() + 30
        while "blueprint-warning" not in elsewhere.get(path).headers:
            assert time.monotonic() < deadline


def test_where_reading_needs_a_key_memory_gives_nothing_away(server: Server, publisher: httpx2.Client) -> None:
    digest = publish(publisher)
    closed = server.settings.model_copy(update={"public_reads": False})
    with serving(closed) as private, httpx2.Client(base_url=private.url, timeout=60) as stranger:
        for path in (NEWEST, f"/v1/blueprints/{digest}"):
            key = {"Authorization": publisher.headers["Authorization"]}
            assert [stranger.get(path, headers=key).status_code for _ in range(2)] == [200, 200]
            assert [stranger.get(path).status_code for _ in range(2)] == [401, 401]


def test_many_readers_at_once_all_get_what_was_published_before_they_asked(
    server: Server, publisher: httpx2.Client
) -> None:
    publish(publisher)
    acknowledged = 1
    over = threading.Event()
    stale: list[tuple[int, int]] = []

    def read() -> None:
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set():
                known = acknowledged
                version = int(client.get(NEWEST).headers["blueprint-version"])
                if version < known:
                    stale.append((known, version))

    readers = [threading.Thread(target=read) for _ in range(6)]
    for thread in readers:
        thread.start()
    for number in range(2, 40):
        publish(publisher, norm=number)
        acknowledged = number
    over.set()
    for thread in readers:
        thread.join()
    assert stale == []


def test_a_lost_connection_costs_no_answer(
    server: Server, publisher: httpx2.Client, reader: httpx2.Client, database_url: str
) -> None:
    publish(publisher)
    for _ in range(3):
        reader.get(NEWEST).raise_for_status()
        execute(
            database_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND application_name = 'gradient-blueprints'",
        )
        assert reader.get(NEWEST).headers["blueprint-version"] == "1"


def test_an_answer_from_memory_passes_what_every_answer_passes(
    server: Server, publisher: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the gate, which it never reaches: the quota, the headers, the metrics, the line of the log."""
    caplog.set_level(logging.INFO, logger="app.requests")
    path = f"/v1/blueprints/{publish(publisher)}"
    behind_proxy = server.settings.model_copy(update={"address_requests_per_minute": 3, "trusted_proxies": "127.0.0.1"})
    given = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
    with serving(behind_proxy) as guarded, httpx2.Client(base_url=guarded.url, timeout=60) as http:
        first, second, third, refused = (
            http.get(path, headers=given | {"X-Request-Id": f"fetch-{index}"}) for index in range(4)
        )
        assert [first.status_code, second.status_code, third.status_code, refused.status_code] == [200, 200, 200, 429]
        assert [answer.headers["ratelimit"].split(";")[1] for answer in (first, second, third)] == ["r=2", "r=1", "r=0"]
        assert second.headers["strict-transport-security"] == first.headers["strict-transport-security"]
        assert second.headers["x-request-id"] == "fetch-1"
        another = given | {"X-Forwarded-For": "192.0.2.8"}
        answers = []
        for norm in (1, 2):  # the second is not in memory any more: it is the gate's, and counts once
            publish(publisher, norm=norm)
            answers.append(http.get(NEWEST, headers=another))
        assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == ["r=2", "r=1"]
        shown = http.get("/metrics", headers={"Authorization": publisher.headers["Authorization"]}).text
    counted = 'blueprints_http_requests_total{method="GET",route="/v1/blueprints/{digest}",status="200"} 3.0'
    assert counted in shown.splitlines()
    lines = [record for record in caplog.records if getattr(record, "fields", {}).get("request_id") == "fetch-1"]
    assert [(line.fields["path"], line.fields["status"], line.fields["address"]) for line in lines] == [  # type: ignore[attr-defined]
        (path, 200, "192.0.2.7")
    ]
