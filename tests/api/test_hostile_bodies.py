"""Bad input: each a 4xx problem that points to the place, nothing stored, and the server as quick afterwards."""

from __future__ import annotations

import gc
import json
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from app.registry.documents import parse_csv
from app.settings import Settings
from gradient_blueprints.errors import ApiError
from tests.conftest import Server, fresh_database, make_settings, serving
from tests.documents import PAPER_EXAMPLE, blueprint_document, paper_example

GOOD = json.dumps(PAPER_EXAMPLE)
ABSENT = {"name": "f", "media_type": "a/b", "digest": "sha256:" + "0" * 64, "size": 1}


def with_layer(**fields: Any) -> str:
    document = blueprint_document(layers=2)
    document["layers"][1] |= fields
    return json.dumps(document)


HOSTILE_JSON: list[tuple[str, str | bytes, int, str | None]] = [
    ("empty body", b"", 400, None),
    ("truncated", GOOD[: len(GOOD) // 2], 400, None),
    ("not UTF-8", GOOD.replace("foundation", "f\xf6undation").encode("latin-1"), 400, None),
    ("UTF-16", GOOD.encode("utf-16"), 400, None),
    ("NaN", GOOD.replace("0.052", "NaN"), 400, None),
    ("Infinity", GOOD.replace("0.052", "-Infinity"), 400, None),
    ("beyond float64", GOOD.replace("0.052", "1e400"), 422, "/layers/0/gradient_norm"),
    ("beyond float64 in extra", GOOD[:-1] + ', "extra": {"a": [1e999]}}', 422, "/extra/a/0"),
    ("huge integer in extra", json.dumps(paper_example(extra={"a": 2**60})), 422, "/extra/a"),
    ("10,000 digits", GOOD.replace("0.052", "9" * 10_000), 400, None),
    ("NUL in an id", with_layer(id="a\0b"), 422, "/layers/1/id"),
    ("NUL in extra", json.dumps(paper_example(extra={"a": "b\0"})), 422, "/extra/a"),
    ("unpaired surrogate", GOOD.replace("attn.0", "\\ud800"), 400, None),
    ("repeated member", GOOD.replace('"model_id"', '"model_id": "x", "model_id"', 1), 400, None),
    ("nesting 10,000 deep", '{"extra": ' + "[" * 10_000 + "]" * 10_000 + "}", 400, None),
    ("duplicate layer ids", with_layer(id="block.0.attn"), 422, "/layers/1/id"),
    ("empty list", json.dumps(blueprint_document(layers=0)), 422, "/layers"),
    ("negative norm", with_layer(gradient_norm=-1), 422, "/layers/1/gradient_norm"),
    ("norm as text", with_layer(gradient_norm="0.1"), 422, "/layers/1/gradient_norm"),
    ("norm as boolean", with_layer(gradient_norm=True), 422, "/layers/1/gradient_norm"),
    ("unknown field", with_layer(gradient_nrom=1), 422, "/layers/1/gradient_nrom"),
    ("unknown kind", with_layer(kind="mystery"), 422, "/layers/1/kind"),
    ("formula as id", with_layer(id="=cmd()"), 422, "/layers/1/id"),
    ("interval upside down", with_layer(gradient_norm_ci=[2, 1]), 422, "/layers/1/gradient_norm_ci"),
    ("checkpoint 0", json.dumps(blueprint_document(checkpoint=0)), 422, "/training_checkpoint"),
    ("checkpoint 1.5", json.dumps(blueprint_document(checkpoint=1.5)), 422, "/training_checkpoint"),
    ("checkpoint of 5 places", json.dumps(blueprint_document(checkpoint=0.12345)), 422, "/training_checkpoint"),
    ("model id with two slashes", json.dumps(blueprint_document("a/b/c")), 422, "/model_id"),
    ("model id that climbs", json.dumps(blueprint_document("../etc")), 422, "/model_id"),
    ("model id of a sub-resource", json.dumps(blueprint_document("org/checkpoints")), 422, "/model_id"),
    ("a list", "[]", 422, ""),
    ("null", "null", 422, ""),
    ("100,000 layers", json.dumps(blueprint_document(layers=100_000)), 422, "/layers"),
    ("two attachments of one name", json.dumps(paper_example(attachments=[ABSENT] * 2)), 422, "/attachments/1/name"),
    ("empty tags", with_layer(domain_tags={}), 422, "/layers/1/domain_tags"),
    ("an attachment that is not there", json.dumps(paper_example(attachments=[ABSENT])), 422, "/attachments/0/digest"),
]  # fmt: skip

HEADER = "model_id,training_checkpoint,id,gradient_norm"
HOSTILE_CSV: list[tuple[str, str | bytes, int, str | None]] = [
    ("empty", "", 422, "/0/model_id"),
    ("header alone", HEADER + "\n", 400, None),
    ("missing column", "model_id,training_checkpoint,id\nm,0.8,a\n", 422, "/0/gradient_norm"),
    ("foreign column", HEADER + ",password\nm,0.8,a,1,x\n", 422, "/0/password"),
    ("repeated column", HEADER + ",id\nm,0.8,a,1,b\n", 422, "/0/id"),
    ("ragged row", HEADER + "\nm,0.8,a\n", 400, None),
    ("not a number", HEADER + "\nm,0.8,a,much\n", 422, "/1/gradient_norm"),
    ("underscored number", HEADER + "\nm,0.8,a,1_000\n", 422, "/1/gradient_norm"),
    ("number with blanks", HEADER + "\nm,0.8,a, 5 \n", 422, "/1/gradient_norm"),
    ("foreign digits", HEADER + "\nm,0.8,a,٣\n", 422, "/1/gradient_norm"),
    ("underscored count", HEADER + ",parameters\nm,0.8,a,1,1_0\n", 422, "/1/parameters"),
    ("nan", HEADER + "\nm,0.8,a,nan\n", 422, "/1/gradient_norm"),
    ("negative norm in the second row", HEADER + "\nm,0.8,a,1\nm,0.8,b,-1\n", 422, "/2/gradient_norm"),
    ("two models in one table", HEADER + "\nm,0.8,a,1\nn,0.8,b,1\n", 422, "/2/model_id"),
    ("duplicate ids", HEADER + "\nm,0.8,a,1\nm,0.8,a,2\n", 422, None),
    ("open quote", HEADER + '\nm,0.8,"a,1\n', 400, None),
    ("half an interval", HEADER + ",gradient_norm_ci.low\nm,0.8,a,1,1\n", 422, "/1/gradient_norm_ci"),
    ("not UTF-8", (HEADER + "\nm,0.8,\xff,1\n").encode("latin-1"), 400, None),
    ("NUL", HEADER + "\nm,0.8,a\0,1\n", 422, "/1/id"),
    ("repeated member in a cell", HEADER + ',extra\nm,0.8,a,1,"{""a"":1,""a"":2}"\n', 422, "/1/extra"),
    ("deep JSON in a cell", HEADER + ",extra\nm,0.8,a,1," + "[" * 10_000 + "\n", 422, "/1/extra"),
]


def assert_refused(answer: httpx2.Response, status: int, pointer: str | None) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    if pointer is not None:
        assert pointer in {place["pointer"] for place in problem["errors"]}, problem


@pytest.fixture(scope="module")
def empty_server(
    postgres_url: str, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for all that must leave nothing behind."""
    folder = tmp_path_factory.mktemp("hostile")
    with fresh_database(postgres_url, template_database) as url, serving(make_settings(url, folder)) as server:
        yield server


@pytest.fixture(scope="module")
def module_publisher(empty_server: Server) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {empty_server.key('lab-a')}"}
    with httpx2.Client(base_url=empty_server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def counted(module_publisher: httpx2.Client) -> Iterator[httpx2.Client]:
    """Afterwards nothing is there."""
    yield module_publisher
    assert module_publisher.get("/v1/models").json()["models"] == []


@pytest.mark.parametrize(
    ("body", "status", "pointer"), [case[1:] for case in HOSTILE_JSON], ids=[case[0] for case in HOSTILE_JSON]
)
def test_hostile_json_is_refused_at_its_place(
    counted: httpx2.Client, body: str | bytes, status: int, pointer: str | None
) -> None:
    answer = counted.post("/v1/blueprints", content=body, headers={"Content-Type": "application/json"})
    assert_refused(answer, status, pointer)


@pytest.mark.parametrize(
    ("body", "status", "pointer"), [case[1:] for case in HOSTILE_CSV], ids=[case[0] for case in HOSTILE_CSV]
)
def test_hostile_csv_is_refused_at_its_row_and_column(
    counted: httpx2.Client, body: str | bytes, status: int, pointer: str | None
) -> None:
    answer = counted.post("/v1/blueprints", content=body, headers={"Content-Type": "text/csv"})
    assert_refused(answer, status, pointer)


def long_table(name: str, columns: int) -> tuple[str, str]:
    """And the place of its fault."""
    shares = [f"retained_mass.0.{number:06d}" for number in range(columns)]
    return {
        "shares": (f"{HEADER},{','.join(shares)}\nm,0.8,a,1{',1' * columns}\n", "/1/retained_mass"),
        "repeated columns": (f"{HEADER}{',alpha' * 3 * columns}\nx\n", "/0/alpha"),
        "bad cells": (f"{HEADER},{','.join(shares)}\nm,0.8,a,1{',x' * columns}\n", f"/1/{shares[0]}"),
    }[name]


LONG_TABLES = ["shares", "repeated columns", "bad cells"]


@pytest.mark.parametrize("name", LONG_TABLES)
def test_a_table_of_many_columns_is_refused(counted: httpx2.Client, name: str) -> None:
    body, pointer = long_table(name, 30_000)
    answer = counted.post("/v1/blueprints", content=body, headers={"Content-Type": "text/csv"})
    assert_refused(answer, 422, pointer)
    assert len(answer.json()["errors"]) <= 100


@pytest.mark.parametrize("name", LONG_TABLES)
def test_the_work_on_a_refused_table_does_not_grow_with_the_square_of_its_columns(name: str) -> None:
    def work(columns: int) -> float:
        body = long_table(name, columns)[0].encode()
        gc.disable()  # its work grows with what else is held
        try:
            began = time.process_time()
            with pytest.raises(ApiError):
                parse_csv(body)
            return time.process_time() - began
        finally:
            gc.enable()

    assert work(40_000) < 8 * min(work(10_000) for _ in range(3))  # 16 times when it does


def test_more_faults_than_can_be_named_are_counted(counted: httpx2.Client) -> None:
    answer = counted.post("/v1/blueprints", json=paper_example() | {f"a{number}": 0 for number in range(100_001)})
    assert_refused(answer, 422, "")
    assert [place["code"] for place in answer.json()["errors"]] == ["too_many_faults"]
    assert "100,001" in answer.json()["errors"][0]["detail"]


def test_one_bad_layer_is_one_fault(counted: httpx2.Client) -> None:
    answer = counted.post("/v1/blueprints", json=blueprint_document(layers=1, norm=-1))
    assert [place["pointer"] for place in answer.json()["errors"]] == ["/layers/0/gradient_norm"]


def test_other_routes_name_the_place_too(counted: httpx2.Client) -> None:
    """Names with a slash are escaped (RFC 6901), and a list that is too short only for its faults is not named."""
    job = {"model_id": "m", "training_checkpoint": 0.8, "source": "/x", "data": {"a/b": {"source": 5}}}
    compared = {"local": {"layers": [{"id": "a", "value": -1}]}}
    staleness = "/v1/models/tiny/checkpoints/0.8/staleness"
    for path, body, pointer in (
        ("/v1/jobs", job, "/data/a~1b/source"),
        (staleness, compared, "/local/layers/0/value"),
        (staleness, {"local": {"layers": []}}, "/local/layers"),
    ):
        answer = counted.post(path, json=body)
        assert_refused(answer, 422, None)
        assert [place["pointer"] for place in answer.json()["errors"]] == [pointer]


@pytest.mark.parametrize("path", ["/v1/blueprints", "/v1/runs", "/v1/models/tiny/checkpoints/0.8/staleness"])
def test_what_is_not_json_is_malformed_on_every_route(counted: httpx2.Client, path: str) -> None:
    answer = counted.post(path, content=b'{"local": {"layers": [', headers={"Content-Type": "application/json"})
    assert_refused(answer, 400, None)
    assert answer.json()["detail"].startswith("The body is not JSON that can be read: ")
    assert "errors" not in answer.json()


def test_a_compressed_body_is_refused(counted: httpx2.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert_refused(counted.post("/v1/blueprints", content=GOOD, headers=headers), 415, None)


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/xml", "application/jsonx"])
def test_a_wrong_media_type_is_refused(counted: httpx2.Client, media_type: str | None) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    assert_refused(counted.post("/v1/blueprints", content=GOOD, headers=headers), 415, None)


def test_64_mib_are_refused_whether_announced_or_in_chunks(counted: httpx2.Client) -> None:
    body = b" " * (64 << 20)
    headers = {"Content-Type": "application/json"}
    assert_refused(counted.post("/v1/blueprints", content=body, headers=headers), 413, None)
    chunks = (body[:65_536] for _ in range(1_024))
    assert_refused(counted.post("/v1/blueprints", content=chunks, headers=headers), 413, None)


def test_other_routes_take_small_bodies_only(counted: httpx2.Client) -> None:
    answer = counted.post("/v1/labs", content=b" " * (2 << 20), headers={"Content-Type": "application/json"})
    assert_refused(answer, 413, None)


def _send(server: Server, request: bytes, then: Iterator[bytes]) -> bytes:
    """Write a request by hand and read what comes back until the server closes or falls silent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        received = b""
        for piece in then:
            try:
                connection.sendall(piece)
            except OSError:
                break
        while chunk := connection.recv(65_536):
            received += chunk
        return received


def test_a_chunked_body_without_end_is_refused(server: Server, publisher: httpx2.Client) -> None:
    head = (
        f"POST /v1/blueprints HTTP/1.1\r\nHost: x\r\nAuthorization: {publisher.headers['authorization']}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = _send(server, head, (chunk for _ in range(10_000)))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_is_refused_after_its_time(settings: Settings) -> None:
    with serving(settings.model_copy(update={"body_seconds": 0.5})) as server:
        head = b"POST /v1/labs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        head += f"Authorization: Bearer {server.admin_key}\r\n\r\n".encode()
        answer = _send(server, head, iter([b"{"]))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_a_nul_in_the_address_is_refused(publisher: httpx2.Client) -> None:
    for path in ("/v1/models/a%00b", "/v1/models?q=a%00b", "/v1/models/%00/checkpoints/0.8/blueprint"):
        assert publisher.get(path).status_code in {400, 404}


def test_the_server_is_as_quick_after_hostile_bodies_as_before(publisher: httpx2.Client) -> None:
    publisher.post("/v1/blueprints", json=PAPER_EXAMPLE)

    def median_fetch() -> float:
        times = []
        for _ in range(60):
            start = time.perf_counter()
            publisher.get("/v1/models/foundation-7b/checkpoints/0.8/blueprint")
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    before = median_fetch()
    for _, body, _, _ in HOSTILE_JSON:
        publisher.post("/v1/blueprints", content=body, headers={"Content-Type": "application/json"})
    assert median_fetch() < 3 * before + 0.005
