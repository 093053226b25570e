"""Checkpoint files: resumable, verified, closed to changes, and nobody else's to read."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest

from app.database import create_engine, create_sessions
from app.registry import files
from app.registry.file_store import FolderStore
from app.settings import Settings
from gradient_blueprints.canonical import digest_of
from gradient_blueprints.models import Scope
from tests.conftest import Server, execute, serving

CONTENT = random.Random(0).randbytes(10_000_000)
PATH = "/v1/models/org/tiny/checkpoints/0.8/files/model.safetensors"


def repr_digest(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def put(
    http: httpx2.Client, body: Any, *, of: bytes = CONTENT, offset: int = 0, path: str = PATH, **headers: str
) -> httpx2.Response:
    fields = {"Upload-Offset": str(offset), "Upload-Length": str(len(of)), "Repr-Digest": repr_digest(of)}
    return http.put(path, content=body, headers=fields | headers)


def offset_of(http: httpx2.Client, path: str = PATH) -> int:
    return int(http.head(path).headers["upload-offset"])


def stored(settings: Settings) -> list[Path]:
    return sorted(path for path in (settings.store / "checkpoints").rglob("*") if path.is_file())


def cut(content: bytes) -> Iterator[bytes]:
    yield content
    time.sleep(0.2)  # so that it leaves before the connection does
    raise ConnectionError("the network breaks")


def send_a_part(http: httpx2.Client, part: bytes, *, offset: int = 0) -> None:
    with pytest.raises(ConnectionError):
        put(http, cut(part), offset=offset)


def wait_for_offset(http: httpx2.Client, offset: int) -> None:
    deadline = time.monotonic() + 10
    while offset_of(http) != offset:
        assert time.monotonic() < deadline, f"at {offset_of(http)} and not at {offset}"
        time.sleep(0.02)


def test_a_file_comes_back_as_it_was_whole_and_in_ranges(server: Server, publisher: httpx2.Client) -> None:
    uploaded = put(publisher, CONTENT)
    assert uploaded.status_code == 201
    assert uploaded.json() == {
        "path": "model.safetensors",
        "lab": "lab-a",
        "size": len(CONTENT),
        "digest": digest_of(CONTENT),
        "received": len(CONTENT),
        "complete": True,
    }
    assert put(publisher, CONTENT).status_code == 200
    assert publisher.get(PATH).content == CONTENT
    for wanted, expected in (("0-9", CONTENT[:10]), ("9999990-", CONTENT[-10:]), ("-5", CONTENT[-5:])):
        answer = publisher.get(PATH, headers={"Range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert publisher.get(PATH, headers={"Range": "bytes=10000000-"}).status_code == 416
    assert publisher.get(PATH, headers={"Range": "bytes=0-" + 5_000 * "9"}).status_code == 200
    head = publisher.head(PATH)
    assert (head.status_code, head.headers["upload-complete"]) == (200, "?1")
    assert head.headers["repr-digest"] == repr_digest(CONTENT)
    assert publisher.get(PATH).headers["cache-control"] == "no-store"
    assert len(stored(server.settings)) == 1


def test_an_upload_that_is_cut_goes_on_where_it_was(server: Server, publisher: httpx2.Client) -> None:
    """Twice cut, each time by the connection's end; the bytes that arrived are not asked for again."""
    send_a_part(publisher, CONTENT[:5_000_001])
    wait_for_offset(publisher, 5_000_001)
    assert publisher.head(PATH).status_code == 204
    assert publisher.get(PATH).json()["code"] == "checkpoint_file_not_found"
    send_a_part(publisher, CONTENT[5_000_001:5_000_003], offset=5_000_001)
    wait_for_offset(publisher, 5_000_003)
    assert put(publisher, CONTENT[5_000_003:], offset=5_000_003).status_code == 201
    assert publisher.get(PATH).content == CONTENT
    assert len(stored(server.settings)) == 1, "the parts are gone"


def test_a_body_may_end_before_the_file_does(publisher: httpx2.Client) -> None:
    answer = put(publisher, CONTENT[:100])
    assert (answer.status_code, answer.json()["received"], answer.json()["complete"]) == (202, 100, False)
    assert put(publisher, CONTENT[100:], offset=100).status_code == 201


def test_an_empty_file_is_a_file(publisher: httpx2.Client) -> None:
    assert put(publisher, b"", of=b"").status_code == 201
    assert publisher.get(PATH).content == b""


def test_another_offset_than_the_stored_one_is_refused_but_for_0_which_begins_again(publisher: httpx2.Client) -> None:
    put(publisher, CONTENT[:100])
    for offset in (50, 200):
        answer = put(publisher, CONTENT[offset:], offset=offset)
        assert (answer.status_code, answer.json()["code"]) == (409, "upload_conflict")
        assert (answer.json()["received"], answer.headers["upload-offset"]) == (100, "100")
    assert put(publisher, CONTENT).status_code == 201
    assert publisher.get(PATH).content == CONTENT


def test_going_on_with_other_content_is_refused(publisher: httpx2.Client) -> None:
    put(publisher, CONTENT[:100])
    other = CONTENT[:-1] + b"x"
    answer = put(publisher, other[100:], of=other, offset=100)
    assert (answer.status_code, answer.json()["received"]) == (409, 0)
    assert put(publisher, other, of=other).status_code == 201


def test_a_wrong_digest_is_refused_and_nothing_is_kept(server: Server, publisher: httpx2.Client) -> None:
    for first in (0, 100):  # hashed as it came, and read back
        if first:
            put(publisher, CONTENT[:first])
        answer = put(publisher, CONTENT[first:-1] + b"x", offset=first)
        assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
        assert stored(server.settings) == []
        assert publisher.head(PATH).status_code == 404


def test_a_complete_file_cannot_change(publisher: httpx2.Client, database_url: str) -> None:
    put(publisher, b"one", of=b"one")
    answer = put(publisher, b"two", of=b"two")
    assert (answer.status_code, answer.json()["code"]) == (409, "already_exists")
    assert publisher.get(PATH).content == b"one"
    with pytest.raises(asyncpg.RestrictViolationError):
        execute(database_url, "UPDATE checkpoint_files SET place = 'elsewhere'")
    assert publisher.delete(PATH).status_code == 204
    assert put(publisher, b"two", of=b"two").status_code == 201


def test_a_deleted_file_is_gone_from_the_store(server: Server, publisher: httpx2.Client) -> None:
    for content in (CONTENT, CONTENT[:1000]):
        put(publisher, content)
        assert publisher.delete(PATH).status_code == 204
        assert stored(server.settings) == []
    assert publisher.delete(PATH).json()["code"] == "checkpoint_file_not_found"


def test_a_deletion_that_fails_to_commit_leaves_the_file_with_its_bytes(
    server: Server, publisher: httpx2.Client
) -> None:
    put(publisher, CONTENT)
    execute(
        server.settings.database_url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$",
        "CREATE CONSTRAINT TRIGGER late AFTER DELETE ON checkpoint_files DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    assert publisher.delete(PATH).status_code == 500
    assert publisher.get(PATH).content == CONTENT


def test_of_two_that_write_the_same_file_the_later_goes_on_and_the_file_is_whole(
    server: Server, publisher: httpx2.Client
) -> None:
    """The first sends wrong bytes, slowly, and is overtaken; what it still writes is never looked at."""
    going = threading.Event()
    overtaken: list[httpx2.Response] = []

    def slowly() -> Iterator[bytes]:
        yield CONTENT[:4_194_304]
        assert going.wait(10)
        yield bytes(len(CONTENT) - 4_194_304)

    def first() -> None:
        with httpx2.Client(base_url=server.url, headers=publisher.headers) as http:
            overtaken.append(put(http, slowly()))

    thread = threading.Thread(target=first)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while publisher.head(PATH).headers.get("upload-offset") != "4194304":
            assert time.monotonic() < deadline
        assert put(publisher, CONTENT[4_194_304:5_000_000], offset=4_194_304).status_code == 202
        going.set()
        thread.join(20)
    finally:
        going.set()
    assert overtaken[0].json()["code"] == "upload_conflict"
    assert put(publisher, CONTENT[5_000_000:], offset=5_000_000).status_code == 201
    assert publisher.get(PATH).content == CONTENT


def test_of_two_that_begin_the_same_file_at_once_one_is_kept_whole(server: Server, publisher: httpx2.Client) -> None:
    contents = (b"A" * 1_000, b"BB" * 400)

    async def begin_both() -> list[httpx2.Response]:
        """Neither finds the file, and both wait for the lock of their lab."""
        connection = await asyncpg.connect(server.settings.database_url)
        async with httpx2.AsyncClient(base_url=server.url, headers=publisher.headers) as http:
            async with connection.transaction():
                await connection.execute(
                    "SELECT pg_advisory_xact_lock(hashtextextended('files:' || id, 0)) FROM labs WHERE name = 'lab-a'"
                )
                waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                requests = [
                    asyncio.ensure_future(http.put(PATH, content=one, headers={"Repr-Digest": repr_digest(one)}))
                    for one in contents
                ]
                async with asyncio.timeout(20):
                    while await connection.fetchval(waiting) < len(requests):
                        await connection.execute("SELECT pg_sleep(0.02)")
            await connection.close()
            return await asyncio.gather(*requests)

    answers = asyncio.run(begin_both())
    (kept,) = (content for content, answer in zip(contents, answers, strict=True) if answer.status_code == 201)
    assert publisher.get(PATH).content == kept
    assert publisher.head(PATH).headers["repr-digest"] == repr_digest(kept)


def test_a_piece_that_could_not_be_noted_is_kept_before_what_came_after_it(
    publisher: httpx2.Client, database_url: str
) -> None:
    execute(
        database_url,
        "CREATE SEQUENCE notes",
        "CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF nextval('notes') = 1 THEN RAISE 'no'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER fail_once BEFORE UPDATE OF received ON checkpoint_files "
        "FOR EACH ROW WHEN (NEW.received > OLD.received) EXECUTE FUNCTION fail_once()",
    )
    with suppress(httpx2.TransportError):  # the server answers, and closes, while the body still comes
        assert put(publisher, CONTENT[:5_000_000]).status_code == 500
    deadline = time.monotonic() + 10
    while (received := offset_of(publisher)) <= 4_194_304:
        assert time.monotonic() < deadline, f"only {received} bytes were kept"
        time.sleep(0.02)
    assert put(publisher, CONTENT[received:], offset=received).status_code == 201
    assert publisher.get(PATH).content == CONTENT


def test_a_store_that_lost_a_part_is_told_and_the_upload_begins_again(server: Server, publisher: httpx2.Client) -> None:
    put(publisher, CONTENT[:5_000_000])
    (part,) = stored(server.settings)
    os.truncate(part, 4_000_000)
    answer = put(publisher, CONTENT[5_000_000:], offset=5_000_000)
    assert (answer.json()["code"], answer.json()["received"]) == ("upload_conflict", 0)
    assert put(publisher, CONTENT).status_code == 201


# --- whose


def test_only_its_lab_workers_and_administrators_read_a_file(server: Server, publisher: httpx2.Client) -> None:
    put(publisher, b"secret", of=b"secret")
    keys = {
        "own": server.key("lab-a", Scope.PROFILE),
        "own reader": server.key("lab-a", Scope.READ),
        "stranger": server.key("lab-b", Scope.PUBLISH, Scope.PROFILE, Scope.READ),
        "worker": server.key("workers", Scope.WORK),
        "administrator": server.admin_key,
    }
    folder = PATH.rpartition("/")[0]
    seen = {}
    for name, key in keys.items():
        with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}) as http:
            plain, named = http.get(PATH), http.get(PATH, params={"lab": "lab-a"})
            listed = http.get(folder, params={"lab": "lab-a"})
            seen[name] = (plain.status_code, named.status_code, listed.status_code)
            if name == "stranger":
                unknown = http.get(PATH, params={"lab": "nobody"}).json()["detail"].replace("nobody", "lab-a")
                assert named.json()["detail"] == unknown, "whether there is such a lab is not told"
    assert seen == {
        "own": (200, 200, 200),
        "own reader": (403, 403, 403),
        "stranger": (404, 404, 404),
        "worker": (404, 200, 200),
        "administrator": (404, 200, 200),
    }
    with httpx2.Client(base_url=server.url) as http:
        assert http.get(PATH).status_code == 401


def test_each_lab_has_files_of_its_own_under_the_same_name(server: Server, publisher: httpx2.Client) -> None:
    put(publisher, b"ours", of=b"ours")
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key('lab-b')}"}) as other:
        assert put(other, b"theirs", of=b"theirs").status_code == 201
        assert other.delete(PATH).status_code == 204
    assert publisher.get(PATH).content == b"ours"
    assert publisher.get("/v1/models").json()["models"] == [], "an upload does not announce a model"


# --- what is refused


REFUSED_PATHS = {
    "..%2f..%2fetc%2fpasswd.json": "not a path",
    "a/%2e%2e/b.json": "not a path",
    ".hidden.json": "not a path",
    "a//b.json": "not a path",
    "a\\b.json": "not a path",
    "one/two/three/four/five.json": "not a path",
    "x" * 300 + ".json": "200 characters",
    "pytorch_model.bin": "can run code when it is read",
    "weights.PT": "can run code when it is read",
    "modeling_evil.py": "ends in none of",
    "noextension": "ends in none of",
}


def test_a_path_that_leads_elsewhere_or_is_no_data_is_refused(server: Server, publisher: httpx2.Client) -> None:
    for path, reason in REFUSED_PATHS.items():
        answer = put(publisher, b"x", of=b"x", path=f"{PATH.rpartition('/')[0]}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), path
        assert reason in answer.json()["detail"]
    assert stored(server.settings) == []


def test_headers_that_cannot_be_used_are_refused(publisher: httpx2.Client) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"Repr-Digest": "sha-512=:AAAA:"},
        {"Repr-Digest": "sha-256=:" + "A" * 43 + ":"},
        {"Upload-Offset": "9"},
        {"Upload-Length": "-1"},
        {"Upload-Offset": "x"},
    )
    for headers in wrong:
        assert put(publisher, b"12345678", of=b"12345678", **headers).status_code in {400, 422}, headers


def test_more_bytes_than_promised_are_refused(publisher: httpx2.Client) -> None:
    assert put(publisher, CONTENT, of=CONTENT[:100]).json()["code"] == "invalid_request"


def test_files_beyond_the_limits_of_one_and_of_a_lab_are_refused(settings: Settings) -> None:
    limits = {"max_file_bytes": 1000, "lab_file_bytes": 1500}
    with serving(settings.model_copy(update=limits)) as server:
        headers = {"Authorization": f"Bearer {server.key('lab-a')}"}
        with httpx2.Client(base_url=server.url, headers=headers) as http:
            assert "at most 1,000 bytes" in put(http, b"", of=bytes(1001)).json()["detail"]
            assert put(http, b"", of=bytes(1000)).status_code == 202  # begun, and so counted
            other = PATH.replace("model.", "other.")
            refused = put(http, b"", of=bytes(501), path=other)
            assert (refused.status_code, refused.json()["code"]) == (413, "payload_too_large")
            assert put(http, bytes(500), of=bytes(500), path=other).status_code == 201
            assert put(http, bytes(900), of=bytes(900)).status_code == 201, "begun again, smaller"


# --- the rest


def test_a_listing_tells_what_is_there_and_what_is_on_its_way(publisher: httpx2.Client) -> None:
    folder = PATH.rpartition("/")[0]
    for name in ("a.json", "texts/b.txt", "texts/c.txt"):
        put(publisher, b"12", of=b"12", path=f"{folder}/{name}")
    put(publisher, CONTENT[:7])
    first = publisher.get(folder, params={"limit": 3}).json()
    rest = publisher.get(first["next"]).json()
    listed = [(file["path"], file["received"], file["complete"]) for file in first["files"] + rest["files"]]
    assert listed == [
        ("a.json", 2, True),
        ("model.safetensors", 7, False),
        ("texts/b.txt", 2, True),
        ("texts/c.txt", 2, True),
    ]
    assert "next" not in rest


def test_a_large_file_is_never_held_in_memory(publisher: httpx2.Client) -> None:
    chunk = os.urandom(1 << 20)
    whole = chunk * 64
    digest = {"Upload-Length": str(len(whole)), "Repr-Digest": repr_digest(whole)}
    del whole
    tracemalloc.start()  # the server runs in this process
    try:
        publisher.put(PATH, content=(chunk for _ in range(64)), headers=digest).raise_for_status()
        with publisher.stream("GET", PATH) as answer:
            received = sum(len(piece) for piece in answer.iter_bytes())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert received == 64 << 20
    assert peak < 24 << 20


async def _sweep(settings: Settings, folder: FolderStore) -> int:
    engine = create_engine(settings)
    try:
        return await files.remove_abandoned(create_sessions(engine), folder, upload_seconds=3600)
    finally:
        await engine.dispose()


def test_an_upload_that_nobody_goes_on_with_is_removed_and_others_stay(
    server: Server, publisher: httpx2.Client, database_url: str
) -> None:
    settings = server.settings
    other = PATH.replace("model.", "other.")
    put(publisher, CONTENT[:100])
    put(publisher, CONTENT[:100], path=other)
    complete = PATH.replace("model.", "complete.")
    put(publisher, b"all", of=b"all", path=complete)
    folder = settings.store / "checkpoints"
    orphan = folder / "incoming" / f"{'0' * 32}.1"
    orphan.write_bytes(b"left by a request that died")
    os.utime(orphan, (0, 0))
    execute(
        database_url,
        "UPDATE checkpoint_files SET touched_at = now() - interval '2 hours' WHERE path = 'model.safetensors'",
    )
    assert asyncio.run(_sweep(settings, FolderStore(folder))) == 2
    assert publisher.head(PATH).status_code == 404
    assert (offset_of(publisher, other), publisher.get(complete).content) == (100, b"all")
    assert len(stored(settings)) == 2


def test_a_file_whose_request_died_before_it_was_verified_is_verified_by_the_next(
    server: Server, publisher: httpx2.Client, database_url: str
) -> None:
    """Neither all bytes sent nor the file in its place says that it is complete: the database does."""
    put(publisher, CONTENT[:-1])
    store = FolderStore(server.settings.store / "checkpoints")
    (part,) = stored(server.settings)
    with part.open("ab") as file:
        file.write(CONTENT[-1:])
    execute(database_url, f"UPDATE checkpoint_files SET received = {len(CONTENT)}")
    waiting = put(publisher, b"", offset=len(CONTENT))
    assert (waiting.status_code, waiting.json()["complete"]) == (202, False), "perhaps the other still lives"
    execute(database_url, "UPDATE checkpoint_files SET touched_at = now() - interval '1 minute'")
    assert put(publisher, b"", offset=len(CONTENT)).status_code == 201
    assert publisher.get(PATH).content == CONTENT
    assert store.unfinished(0) == set()
