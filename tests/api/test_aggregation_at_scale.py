"""A thousand blueprints of 300 layers: in one piece, in time, and in the memory of a hundred."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest

from app.api import aggregation
from app.settings import Settings
from tests.conftest import Server, execute, serving

# Straight into the tables: publishing 1,000 documents over HTTP would take longer than what is tested.
_FILL = """
INSERT INTO labs (name) SELECT 'lab-' || lpad(g::text, 4, '0') FROM generate_series(1, {labs}) g;
INSERT INTO keys (lab_id, name, prefix, hash, scopes) SELECT id, 'x', 'x', name::bytea, '{{}}' FROM labs
    WHERE name LIKE 'lab-%';
INSERT INTO models (name, lab_id) SELECT '{model}', min(id) FROM labs;
INSERT INTO checkpoints (model_id, fraction, last_version) SELECT id, 0.8, {labs} FROM models WHERE name = '{model}';
INSERT INTO documents (digest, checkpoint_id, body, size, layer_count, warnings)
    SELECT sha256(body), c.id, body, length(body), 300, '[]' FROM checkpoints c CROSS JOIN LATERAL (
        SELECT convert_to(jsonb_build_object('model_id', '{model}', 'lab', g, 'layers', jsonb_agg(jsonb_build_object(
            'id', 'block.' || i, 'gradient_norm', g * (1 + (i * 7 + g * i * i) % 50 + 10 * i),
            'domain_tags', jsonb_build_object('code', 1.5)
        )))::text, 'UTF8') AS body
        FROM generate_series(1, {labs}) g CROSS JOIN generate_series(1, 300) i GROUP BY g
    ) bodies;
INSERT INTO layers (document_id, position, layer_id, gradient_norm, domain_tags)
    SELECT d.id, entry.position, entry.layer ->> 'id', (entry.layer ->> 'gradient_norm')::float,
           entry.layer -> 'domain_tags'
    FROM documents d CROSS JOIN LATERAL jsonb_array_elements(convert_from(d.body, 'UTF8')::jsonb -> 'layers')
        WITH ORDINALITY AS entry (layer, position);
INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id)
    SELECT d.checkpoint_id, n.lab, l.id, k.id, d.id
    FROM documents d CROSS JOIN LATERAL (SELECT (convert_from(d.body, 'UTF8')::jsonb ->> 'lab')::int AS lab) n
    JOIN labs l ON l.name = 'lab-' || lpad(n.lab::text, 4, '0') JOIN keys k ON k.lab_id = l.id;
ANALYZE;
"""


class PeakMemory:
    """The most memory that this process, which serves, held within the block, above what it held before."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self.grown = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.grown = max(self.grown, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_thousand_blueprints_aggregate_in_flat_memory(server: Server, http: httpx2.Client, database_url: str) -> None:
    execute(database_url, _FILL.format(labs=1_000, model="big"))
    everything: dict[str, object] = {"models": ["big"]}
    few = everything | {"labs": [f"lab-{number:04}" for number in range(1, 101)]}

    def stream(accept: str, body: dict[str, object]) -> tuple[int, int]:
        """Lines, and bytes of memory."""
        lines = 0
        with (
            PeakMemory() as memory,
            http.stream("POST", "/v1/aggregate", json=body, headers={"Accept": accept}) as answer,
        ):
            assert answer.status_code == 200
            for chunk in answer.iter_bytes():
                lines += chunk.count(b"\n")
        return lines, memory.grown

    stream("application/x-ndjson", few)  # what is loaded once is not counted
    small, large = (stream("application/x-ndjson", body) for body in (few, everything))
    assert (small[0], large[0]) == (30_000, 300_000)
    assert large[1] - small[1] < 32 << 20  # the table itself is 60 MB
    began = time.monotonic()
    with PeakMemory() as memory:
        answer = http.post("/v1/aggregate", json=everything | {"result": "consensus"}).raise_for_status()
    assert time.monotonic() - began < 30
    assert memory.grown < 64 << 20
    (consensus,) = json.loads(answer.content)["consensuses"]
    assert len(consensus["sources"]) == 1_000
    assert consensus["complete_layers"] == len(consensus["layers"]) == 300
    assert 0.9 < consensus["kendall_w"] <= 1


@contextmanager
def slow_reader(server: Server) -> Iterator[socket.socket]:
    """A client that has asked for the table of `big`, 6 MB, and takes no more of it than its head."""
    body = b'{"models":["big"]}'
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", urlsplit(server.url).port))
        connection.sendall(
            b"POST /v1/aggregate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/x-ndjson\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def test_a_reader_that_pauses_gets_the_whole_and_holds_up_other_aggregations_alone(
    settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "_WAIT_SECONDS", 0.2)
    execute(database_url, _FILL.format(labs=100, model="big"))
    few = {"pool_size": 1, "pool_overflow": 0, "aggregations": 1, "statement_seconds": 2.0}
    with serving(settings.model_copy(update=few)) as server, httpx2.Client(base_url=server.url, timeout=20) as http:
        with slow_reader(server) as connection:
            assert http.get("/v1/models").status_code == 200
            assert http.get("/models/big/checkpoints/0.8/consensus").status_code == 200
            refused = http.post("/v1/aggregate", json={"models": ["big"]})
            assert (refused.status_code, refused.json()["code"]) == (503, "service_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            time.sleep(2.5)  # longer than a transaction of another kind may rest
            whole = rest_of(connection)
        assert whole.endswith(b"0\r\n\r\n")
        assert whole.count(b'"collision"') == 30_000
        assert http.post("/v1/aggregate", json={"models": ["big"], "labs": ["lab-0001"]}).status_code == 200


def test_an_aggregation_that_is_not_taken_in_time_is_broken_off(settings: Settings, database_url: str) -> None:
    execute(database_url, _FILL.format(labs=100, model="big"))
    hasty = settings.model_copy(update={"aggregation_seconds": 0.5})
    with serving(hasty) as server, slow_reader(server) as connection:
        time.sleep(0.6)
        assert not rest_of(connection).endswith(b"0\r\n\r\n")
