"""The same promises as test_files.py, where the store is a bucket of a real S3 server."""

from __future__ import annotations

import time
from typing import Any

import httpx2
import pytest

from app.settings import Settings
from tests.api.test_files import CONTENT, PATH, cut, offset_of, put
from tests.conftest import Server, execute, serving
from tests.object_storage import ObjectStorage

PIECE = 8 << 20


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"tests/{request.node.name}"


@pytest.fixture
def settings(settings: Settings, storage: ObjectStorage, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    return settings.model_copy(update={"checkpoint_store": f"s3://checkpoints/{prefix}"})


def stored(storage: ObjectStorage, prefix: str) -> tuple[int, int]:
    """How many objects and how many unfinished uploads lie under the prefix."""
    client = storage.client()
    objects = client.list_objects_v2(Bucket="checkpoints", Prefix=prefix).get("Contents", ())
    uploads: Any = client.list_multipart_uploads(Bucket="checkpoints").get("Uploads", ())
    return len(objects), sum(upload["Key"].startswith(prefix) for upload in uploads)


def test_a_file_comes_back_as_it_was_whole_and_in_ranges(
    publisher: httpx2.Client, storage: ObjectStorage, prefix: str
) -> None:
    assert put(publisher, CONTENT).status_code == 201
    assert put(publisher, CONTENT).status_code == 200
    assert publisher.get(PATH).content == CONTENT
    assert publisher.get(PATH, headers={"Range": "bytes=8388600-8388619"}).content == CONTENT[8388600:8388620]
    assert stored(storage, prefix) == (1, 0)
    empty = PATH.replace("model.", "empty.")
    assert put(publisher, b"", of=b"", path=empty).status_code == 201
    assert publisher.get(empty).content == b""
    for path in (PATH, empty):
        assert publisher.delete(path).status_code == 204
    assert stored(storage, prefix) == (0, 0)


def test_an_upload_that_is_cut_goes_on_at_the_last_whole_part(
    publisher: httpx2.Client, storage: ObjectStorage, prefix: str
) -> None:
    with pytest.raises(ConnectionError):
        put(publisher, cut(CONTENT[: PIECE + 1_000_000]))
    deadline = time.monotonic() + 10
    while offset_of(publisher) != PIECE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert put(publisher, CONTENT[PIECE:], offset=PIECE).status_code == 201
    assert publisher.get(PATH).content == CONTENT
    assert stored(storage, prefix) == (1, 0)


def test_a_wrong_digest_is_refused_and_nothing_is_kept(
    publisher: httpx2.Client, storage: ObjectStorage, prefix: str
) -> None:
    answer = put(publisher, CONTENT[:-1] + b"x")
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert stored(storage, prefix) == (0, 0)


def test_an_unfinished_upload_leaves_nothing_when_it_is_removed(
    publisher: httpx2.Client, storage: ObjectStorage, prefix: str
) -> None:
    put(publisher, CONTENT[:PIECE])
    assert stored(storage, prefix) == (0, 1)
    assert publisher.delete(PATH).status_code == 204
    assert stored(storage, prefix) == (0, 0)


def test_a_file_whose_request_died_after_the_bucket_had_it_is_verified_by_the_next(
    publisher: httpx2.Client, storage: ObjectStorage, database_url: str
) -> None:
    """The bucket has put the parts together, and the database has not heard of it."""
    put(publisher, CONTENT)
    execute(
        database_url,
        "ALTER TABLE checkpoint_files DISABLE TRIGGER checkpoint_files_immutable",
        "UPDATE checkpoint_files SET completed_at = NULL, touched_at = now() - interval '1 minute'",
    )
    assert put(publisher, b"", offset=len(CONTENT)).status_code == 201
    assert publisher.get(PATH).content == CONTENT


def test_a_bucket_that_does_not_answer_is_no_fault_of_the_request(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with serving(settings) as server:
        with _publisher(server) as http:
            answer = put(http, b"12", of=b"12")
        assert (answer.status_code, answer.json()["code"]) == (503, "service_unavailable")
        assert "127.0.0.1:9" not in answer.text


def _publisher(server: Server) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {server.key('lab-a')}"})
