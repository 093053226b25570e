"""Attachments: streamed, verified, immutable, in ranges."""

from __future__ import annotations

import os
import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.registry.blobs import remove_unfinished
from app.registry.file_store import FolderStore
from app.settings import Settings
from gradient_blueprints.canonical import digest_of
from tests.conftest import Server, serving
from tests.documents import paper_example

CONTENT = random.Random(0).randbytes(200_000)
DIGEST = digest_of(CONTENT)
PATH = f"/v1/blobs/{DIGEST}"
HUGE = "bytes=0-" + 5_000 * "9"  # Python reads no number of so many digits


def files_of(settings: Settings) -> list[Path]:
    return [path for path in settings.store.rglob("*") if path.is_file()]


def test_a_blob_comes_back_as_it_was(server: Server, publisher: httpx2.Client) -> None:
    uploaded = publisher.put(PATH, content=CONTENT)
    assert (uploaded.status_code, uploaded.json()) == (201, {"digest": DIGEST, "size": len(CONTENT), "created": True})
    assert publisher.put(PATH, content=CONTENT).status_code == 200
    fetched = publisher.get(PATH)
    assert fetched.content == CONTENT
    assert fetched.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert publisher.get(PATH, headers={"If-None-Match": fetched.headers["etag"]}).status_code == 304
    head = publisher.head(PATH)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(CONTENT)))
    assert len(files_of(server.settings)) == 1


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("bytes=0-9", CONTENT[:10]), ("bytes=199990-", CONTENT[-10:]), ("bytes=-5", CONTENT[-5:])],
    ids=["first", "from", "last"],
)
def test_a_range_of_a_blob(publisher: httpx2.Client, wanted: str, expected: bytes) -> None:
    publisher.put(PATH, content=CONTENT)
    answer = publisher.get(PATH, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (206, expected)


@pytest.mark.parametrize("wanted", ["bytes=900000-", "bytes=200000-", "bytes=-0"])
def test_a_range_outside_the_blob_is_a_problem(publisher: httpx2.Client, wanted: str) -> None:
    publisher.put(PATH, content=CONTENT)
    answer = publisher.get(PATH, headers={"Range": wanted})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize("wanted", ["bytes=5-2", "bytes=abc", "lines=0-1", "bytes=-", "bytes=0-1,5-6", HUGE])
def test_a_range_that_need_not_be_understood_is_ignored(publisher: httpx2.Client, wanted: str) -> None:
    publisher.put(PATH, content=CONTENT)
    answer = publisher.get(PATH, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (200, CONTENT)


def test_a_blob_whose_file_is_lost_is_a_problem(server: Server, publisher: httpx2.Client) -> None:
    publisher.put(PATH, content=CONTENT)
    files_of(server.settings)[0].unlink()
    assert publisher.get(PATH).json()["code"] == "service_unavailable"


def test_what_a_killed_upload_left_is_removed_after_a_day(settings: Settings) -> None:
    old, new = settings.store / "incoming" / "old", settings.store / "incoming" / "new"
    old.parent.mkdir(parents=True)
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with serving(settings):
        assert files_of(settings) == [new]


def test_where_reads_are_closed_shared_caches_keep_nothing(settings: Settings) -> None:
    with serving(settings.model_copy(update={"public_reads": False})) as server:
        headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
        with httpx2.Client(base_url=server.url, headers=headers) as http:
            http.put(PATH, content=CONTENT)
            digest = http.post("/v1/blueprints", json=paper_example()).json()["digest"]
            for path in (PATH, f"/v1/blueprints/{digest}"):
                assert http.get(path).headers["cache-control"] == "private, max-age=31536000, immutable"


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server: Server, publisher: httpx2.Client) -> None:
    answer = publisher.put(PATH, content=CONTENT + b"x")
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert files_of(server.settings) == []
    assert publisher.get(PATH).json()["code"] == "blob_not_found"


def test_an_upload_cut_off_leaves_nothing(server: Server, publisher: httpx2.Client) -> None:
    def cut() -> Iterator[bytes]:
        yield CONTENT[:1000]
        raise ConnectionError("the client dies")

    with pytest.raises(ConnectionError):
        publisher.put(PATH, content=cut())
    assert publisher.put(PATH, content=CONTENT).status_code == 201
    deadline = threading.Event()
    for _ in range(50):
        if len(files_of(server.settings)) == 1:
            break
        deadline.wait(0.1)
    assert len(files_of(server.settings)) == 1


def test_a_blob_beyond_the_limit_is_refused(settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_blob_bytes": 1000})) as server:
        headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
        with httpx2.Client(base_url=server.url, headers=headers) as http:
            assert http.put(PATH, content=CONTENT).status_code == 413
    assert files_of(settings) == []


def test_a_large_blob_is_never_held_in_memory(publisher: httpx2.Client) -> None:
    size, chunk = 96 << 20, os.urandom(1 << 20)
    digest = digest_of(chunk * 96)
    tracemalloc.start()  # the server runs in this process
    try:
        publisher.put(f"/v1/blobs/{digest}", content=(chunk for _ in range(96))).raise_for_status()
        with publisher.stream("GET", f"/v1/blobs/{digest}") as answer:
            received = sum(len(piece) for piece in answer.iter_bytes())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert received == size
    assert peak < size / 4


def test_a_blueprint_names_attachments_that_are_there(publisher: httpx2.Client) -> None:
    attachment = {
        "name": "factors.safetensors",
        "media_type": "application/octet-stream",
        "digest": DIGEST,
        "size": len(CONTENT),
    }
    document = paper_example(attachments=[attachment])
    missing = publisher.post("/v1/blueprints", json=document)
    assert (missing.status_code, missing.json()["code"]) == (422, "missing_blob")
    publisher.put(PATH, content=CONTENT)
    wrong = publisher.post("/v1/blueprints", json=paper_example(attachments=[attachment | {"size": 1}]))
    assert wrong.json()["errors"][0]["pointer"] == "/attachments/0/size"
    assert publisher.post("/v1/blueprints", json=document).status_code == 201


def test_a_store_that_takes_nothing_says_so_and_takes_the_blob_once_it_can(
    server: Server, publisher: httpx2.Client
) -> None:
    server.settings.store.mkdir(exist_ok=True)
    in_the_way = server.settings.store / "incoming"
    in_the_way.touch()
    refused = publisher.put(PATH, content=CONTENT)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert "store of attachments" in refused.json()["detail"]
    in_the_way.unlink()
    assert publisher.put(PATH, content=CONTENT).status_code == 201


def test_files_that_vanish_while_a_process_starts_do_not_keep_it_from_starting(tmp_path: Path) -> None:
    """Another process puts an upload in place between the listing and the look; a link to nothing looks the same."""
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / "gone").symlink_to(tmp_path / "nowhere")
    remove_unfinished(tmp_path)
    assert FolderStore(tmp_path).unfinished(0) == set()
