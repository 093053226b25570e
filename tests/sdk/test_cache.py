"""The cache: what opens a socket and what does not, damage, sharing among processes, size."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gradient_blueprints import (
    Blueprint,
    BlueprintNotFound,
    CheckpointNotFound,
    Client,
    ConfigurationError,
    ConnectionFailed,
    DigestMismatch,
    OfflineMiss,
    Unauthenticated,
    UnexpectedAnswer,
)
from gradient_blueprints.cache import Cache, Question, Remembered
from gradient_blueprints.canonical import digest_of
from tests.conftest import Server
from tests.documents import blueprint_document
from tests.sdk.cache_processes import contents, hammer, store_for_ever
from tests.sdk.conftest import Connect
from tests.sdk.faulty_network import FaultyNetwork, answer

QUESTION = Question.of("http://registry", "/v1/models/tiny/checkpoints/0.8/blueprint")


def served(document: dict[str, Any], version: int = 1, **headers: str) -> bytes:
    """The bytes of a registry's answer to a fetch."""
    body = Blueprint.from_dict(document).to_canonical_bytes()
    digest = digest_of(body)
    told = {
        "Blueprint_Version": str(version),
        "Blueprint_Digest": digest,
        "Blueprint_Lab": "lab-a",
        "ETag": f'"{digest}"',
    }
    return answer(200, body, Content_Type="application/json", **(told | headers))


# --- what opens a socket


@pytest.mark.parametrize("pin", ["version", "digest"])
async def test_a_pinned_blueprint_that_is_cached_opens_no_socket(connect: Connect, pin: str) -> None:
    with FaultyNetwork(served(blueprint_document())) as network:
        newest = await connect(network.url).fetch_blueprint("tiny", 0.8)
        pinned = await connect(network.url).fetch_blueprint("tiny", "0.80", **{pin: getattr(newest, pin)})
        assert pinned == newest
        assert (pinned.version, pinned.digest, pinned.lab) == (1, newest.digest, "lab-a")
        assert await connect(network.url).fetch_by_digest(newest.digest) == newest
        assert network.connections == 1


async def test_a_pinned_blueprint_is_fetched_once(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document(), 7)) as network:
        for _ in range(3):
            assert (await connect(network.url).fetch_blueprint("tiny", 0.8, version=7)).version == 7
        assert network.connections == 1
        assert b"?version=7 " in network.requests[0]


async def test_what_is_asked_of_another_registry_is_not_answered_from_this_one(connect: Connect) -> None:
    with (
        FaultyNetwork(served(blueprint_document())) as one,
        FaultyNetwork(served(blueprint_document(norm=2.0))) as other,
    ):
        first = await connect(one.url).fetch_blueprint("tiny", 0.8, version=1)
        second = await connect(other.url).fetch_blueprint("tiny", 0.8, version=1)
        assert first != second
        assert other.connections == 1


async def test_a_version_of_another_lab_than_asked_for_is_not_answered_from_the_cache(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document()), answer(404, b"")) as network:
        sdk = connect(network.url)
        await sdk.fetch_blueprint("tiny", 0.8, version=1)
        await sdk.fetch_blueprint("tiny", 0.8, version=1, lab="lab-a")
        assert network.connections == 1
        with pytest.raises(UnexpectedAnswer):
            await sdk.fetch_blueprint("tiny", 0.8, version=1, lab="lab-b")
        assert b"lab=lab-b" in network.requests[1]


async def test_the_newest_is_revalidated_and_its_bytes_are_not_sent_again(
    connect: Connect, lab_a: Any, server: Server
) -> None:
    await lab_a.publish_blueprint(blueprint_document(layers=200))
    sdk = connect(server.url)
    first = await sdk.fetch_blueprint("tiny", 0.8)
    statuses = []
    if isinstance(sdk.client, Client):
        sdk.client._client().event_hooks["response"].append(lambda response: statuses.append(response.status_code))
        assert await sdk.fetch_blueprint("tiny", 0.8) == first
        assert statuses == [304]
    await lab_a.publish_blueprint(blueprint_document(norm=3.0))
    assert (await sdk.fetch_blueprint("tiny", 0.8)).version == 2


async def test_revalidation_tells_that_a_version_was_yanked_meanwhile(lab_a: Any) -> None:
    await lab_a.publish_blueprint(blueprint_document())
    await lab_a.set_alias("tiny", "stable", 0.8, 1)
    assert (await lab_a.fetch_by_alias("tiny", "stable")).warnings == ()
    await lab_a.yank_version("tiny", 0.8, 1, reason="wrong data")
    again = await lab_a.fetch_by_alias("tiny", "stable")
    assert again.version == 1
    assert "wrong data" in again.warnings[0].detail


async def test_a_304_without_blueprint_headers_keeps_what_was_known(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document(), 3), answer(304)) as network:
        sdk = connect(network.url)
        await sdk.fetch_blueprint("tiny", 0.8)
        assert (await sdk.fetch_blueprint("tiny", 0.8)).version == 3
        assert b'"sha256:' in network.requests[1].lower().split(b"if-none-match:")[1]


async def test_published_documents_are_cached_for_pinned_fetches(connect: Connect, lab_a: Any, server: Server) -> None:
    publication = await lab_a.publish_blueprint(Blueprint.from_dict(blueprint_document()))
    offline = connect(server.url, offline=True)
    assert (await offline.fetch_blueprint("tiny", 0.8, version=publication.version)).digest == publication.digest


async def test_a_digest_of_another_model_than_named_is_refused(connect: Connect) -> None:
    document = blueprint_document()
    digest = Blueprint.from_dict(document).digest
    with FaultyNetwork(served(document)) as network:
        with pytest.raises(DigestMismatch, match=r"not a blueprint of other at 0\.8"):
            await connect(network.url).fetch_blueprint("other", 0.8, digest=digest)
        assert (await connect(network.url).fetch_blueprint("tiny", 0.8, digest=digest)).model_id == "tiny"


@pytest.mark.parametrize("also", [{"version": 1}, {"lab": "lab-a"}, {"nearest": True}])
async def test_a_digest_with_another_way_to_choose_is_refused(connect: Connect, also: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        await connect("http://127.0.0.1:9").fetch_blueprint("tiny", 0.8, digest="sha256:" + "0" * 64, **also)


async def test_bytes_that_are_not_those_of_their_digest_are_refused_and_not_kept(
    connect: Connect, tmp_path: Path
) -> None:
    lie = served(blueprint_document(), Blueprint_Digest="sha256:" + "0" * 64)
    with FaultyNetwork(lie) as network, pytest.raises(UnexpectedAnswer, match="other bytes"):
        await connect(network.url).fetch_blueprint("tiny", 0.8)
    assert contents(tmp_path / "sdk-cache") == []


# --- offline


@pytest.fixture
def offline_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEPRINTS_OFFLINE", "1")


async def test_offline_answers_the_newest_as_it_was_last_seen_and_says_so(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyNetwork(served(blueprint_document(), 4)) as network:
        await connect(network.url).fetch_blueprint("tiny", 0.8)
        monkeypatch.setenv("BLUEPRINTS_OFFLINE", "1")
        assert (await connect(network.url).fetch_blueprint("tiny", 0.8)).version == 4
        assert network.connections == 1
    assert "Offline" in caplog.text
    assert "version 4" in caplog.text


@pytest.mark.usefixtures("offline_environment")
async def test_offline_opens_no_socket_whatever_is_called(connect: Connect, tmp_path: Path) -> None:
    file = tmp_path / "blueprint.json"
    file.write_text("{}")
    with FaultyNetwork(b"") as network:
        sdk = connect(network.url)
        calls = [
            sdk.fetch_blueprint("tiny", 0.8),
            sdk.fetch_blueprint("tiny", 0.8, version=1),
            sdk.fetch_by_digest("sha256:" + "0" * 64),
            sdk.fetch_by_alias("tiny", "stable"),
            sdk.fetch_blob("sha256:" + "0" * 64),
            sdk.publish_blueprint(file),
            sdk.upload_blob(b"x"),
            sdk.list_models(),
            sdk.whoami(),
            sdk.watch_job("1"),
            sdk.wait_for_job("1"),
            sdk.delete_alias("tiny", "stable"),
        ]
        for call in calls:
            with pytest.raises(OfflineMiss, match="BLUEPRINTS_OFFLINE"):
                await call
        assert network.connections == 0


@pytest.mark.usefixtures("offline_environment")
async def test_an_offline_miss_names_what_is_missing_and_where_it_was_sought(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(OfflineMiss, match=r"tiny/checkpoints/0.8/blueprint version=2 .*sdk-cache.*Fetch it once"):
        await connect("http://127.0.0.1:9").fetch_blueprint("tiny", 0.8, version=2)


@pytest.mark.usefixtures("offline_environment")
async def test_an_argument_outweighs_the_environment(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document())) as network:
        assert (await connect(network.url, offline=False).fetch_blueprint("tiny", 0.8)).version == 1


def test_an_offline_switch_that_is_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEPRINTS_OFFLINE", "perhaps")
    with pytest.raises(ConfigurationError, match="BLUEPRINTS_OFFLINE"):
        Client("http://127.0.0.1:9")


def test_the_environment_configures_a_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLUEPRINTS_URL", "https://registry.example.org/")
    monkeypatch.setenv("BLUEPRINTS_API_KEY", "gbr_abc")
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("BLUEPRINTS_OFFLINE", "yes")
    client = Client()
    assert repr(client) == "<Client https://registry.example.org, with a key, offline>"
    assert client.cache.folder == tmp_path / "mine"


async def test_a_registry_that_is_away_is_a_failure_that_points_to_the_cached_version(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document(), 5)) as network:
        await connect(network.url).fetch_blueprint("tiny", 0.8)
    with pytest.raises(ConnectionFailed) as raised:
        await connect(network.url, timeout=0.3).fetch_blueprint("tiny", 0.8)
    assert "version 5" in raised.value.__notes__[0]


# --- keys


async def test_the_newest_is_never_answered_from_the_cache_to_a_key_that_may_not_read(connect: Connect) -> None:
    denied = answer(401, b'{"code": "unauthenticated", "detail": "no"}', Content_Type="application/problem+json")
    with FaultyNetwork(served(blueprint_document()), denied) as network:
        await connect(network.url, api_key="gbr_may_read").fetch_blueprint("tiny", 0.8)
        with pytest.raises(Unauthenticated):
            await connect(network.url, api_key="gbr_may_not").fetch_blueprint("tiny", 0.8)


@pytest.mark.skipif(os.name != "posix", reason="rights of folders")
def test_a_new_cache_folder_is_its_owners_alone(tmp_path: Path) -> None:
    Cache(tmp_path / "new").store(digest_of(b"x"), b"x")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


# --- damage


@pytest.mark.parametrize("damage", [b"", b"{", b"\x00" * 50])
async def test_a_damaged_content_is_noticed_and_fetched_again(
    connect: Connect, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyNetwork(served(blueprint_document())) as network:
        whole = await connect(network.url).fetch_blueprint("tiny", 0.8)
        (path,) = contents(tmp_path / "sdk-cache")
        path.chmod(0o644)
        path.write_bytes(damage)
        for pin in ({"version": 1}, {}):
            assert await connect(network.url).fetch_blueprint("tiny", 0.8, **pin) == whole
        assert b"if-none-match" not in network.requests[1].lower()
        assert path.read_bytes() == whole.to_canonical_bytes()
    assert "Removing" in caplog.text


async def test_a_damaged_answer_is_noticed_and_fetched_again(connect: Connect, tmp_path: Path) -> None:
    with FaultyNetwork(served(blueprint_document())) as network:
        await connect(network.url).fetch_blueprint("tiny", 0.8)
        for path in (tmp_path / "sdk-cache" / "answers").iterdir():
            path.chmod(0o644)
            path.write_text(path.read_text()[:40])
        assert (await connect(network.url).fetch_blueprint("tiny", 0.8, version=1)).version == 1
        assert network.connections == 2


def test_an_answer_to_another_question_is_not_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    known = Remembered(
        question=QUESTION, digest="sha256:" + "0" * 64, version=1, lab="lab-a", seen_at=datetime.now(UTC)
    )
    cache.remember(known)
    assert cache.recall(QUESTION) == known
    (path,) = (tmp_path / "answers").iterdir()
    other = Question.of("http://elsewhere", QUESTION.path)
    path.rename(tmp_path / "answers" / cache._answer_path(other).name)  # type: ignore[union-attr]
    assert cache.recall(other) is None


async def test_a_cache_that_cannot_be_written_does_not_stop_fetching_and_warns_once(
    connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with FaultyNetwork(served(blueprint_document())) as network:
        sdk = connect(network.url, cache=tmp_path / "file" / "cache")
        for _ in range(3):
            assert (await sdk.fetch_blueprint("tiny", 0.8)).version == 1
        assert network.connections == 3
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "BLUEPRINTS_CACHE" in warnings[0].getMessage()


async def test_without_a_cache_every_fetch_asks_the_registry(connect: Connect) -> None:
    with FaultyNetwork(served(blueprint_document())) as network:
        for _ in range(2):
            await connect(network.url, cache=False).fetch_blueprint("tiny", 0.8, version=1)
        assert network.connections == 2


async def test_errors_of_a_fetch_are_the_registrys(connect: Connect, lab_a: Any, server: Server) -> None:
    await lab_a.publish_blueprint(blueprint_document(checkpoint=0.5))
    sdk = connect(server.url)
    with pytest.raises(CheckpointNotFound) as raised:
        await sdk.fetch_blueprint("tiny", 0.8)
    assert raised.value.extensions["checkpoints"] == [0.5]
    assert raised.value.request_id
    with pytest.raises(BlueprintNotFound):
        await sdk.fetch_blueprint("tiny", 0.5, version=9)


# --- sharing


def test_many_processes_share_a_cache_even_while_it_is_being_damaged(server: Server, tmp_path: Path) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        digest = client.publish_blueprint(blueprint_document(layers=500)).digest
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=spawn) as pool:
        runs = [pool.submit(hammer, server.url, str(tmp_path / "shared"), 12) for _ in range(3)]
        assert {found for run in runs for found in run.result(timeout=120)} == {digest}
    assert list((tmp_path / "shared" / "unfinished").iterdir()) == []


def test_a_process_killed_while_it_stores_leaves_only_whole_entries(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=store_for_ever, args=(str(tmp_path),))
    writer.start()
    try:
        deadline = time.monotonic() + 60
        while len(contents(tmp_path)) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.join()
    written = contents(tmp_path)
    assert len(written) >= 20
    assert all(digest_of(path.read_bytes()) == "sha256:" + path.parent.name + path.name for path in written)


def test_threads_share_a_client(server: Server, tmp_path: Path) -> None:
    with Client(server.url, api_key=server.key("lab-a"), cache=tmp_path / "threads") as client:
        digests = {client.publish_blueprint(blueprint_document(norm=norm)).version: norm for norm in (1.0, 2.0, 3.0)}
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(lambda number: client.fetch_blueprint("tiny", 0.8, version=number % 3 + 1), range(60))
            )
    assert all(blueprint.layers[0].gradient_norm == digests[blueprint.version or 0] for blueprint in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_process_goes_on_with_connections_of_its_own(server: Server) -> None:
    with Client(server.url, api_key=server.admin_key, cache=False) as client:
        client.whoami()
        parent_http: httpx2.Client = client._client()
        client._process = -1  # what a child finds: the process that connected was another
        client.whoami()
        assert client._client() is not parent_http
        parent_http.close()


# --- size


def test_the_longest_unused_contents_go_first_and_recent_ones_never(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    old = time.time() - 10_000
    digests = []
    for number in range(4):
        content = bytes([number]) * 100
        digests.append(digest_of(content))
        cache.store(digests[-1], content)
        os.utime(contents_of(tmp_path, digests[-1]), (old + number, old + number))
    assert cache.read(digests[0]) is not None  # used just now
    Cache(tmp_path, max_bytes=250).trim()
    assert [cache.read(digest) is not None for digest in digests] == [True, False, False, True]


def test_answers_count_and_go_as_contents_do(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    questions = [Question(registry="r", path=f"/{number}") for number in range(9)]
    for question in questions:
        answered = Remembered(question=question, digest=digest_of(b""), version=1, lab="a", seen_at=datetime.now(UTC))
        cache.remember(answered)
    for number, question in enumerate(questions):
        path = cache._answer_path(question)
        assert path is not None
        os.utime(path, (number, number))
    assert cache.recall(questions[0]) is not None  # used just now
    Cache(tmp_path, max_bytes=1000).trim()
    assert cache.recall(questions[0]) is not None
    assert cache.recall(questions[1]) is None
    assert sum(path.stat().st_size for path in (tmp_path / "answers").iterdir()) <= 1000


async def test_a_version_that_is_no_whole_number_is_refused(connect: Connect) -> None:
    for version in (1.9, 0, "x", None):
        with pytest.raises(ConfigurationError, match="is no version"):
            await connect("http://127.0.0.1:9").yank_version("m", 0.8, version, reason="r")


def test_an_empty_folder_is_the_default_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path))
    assert Client("http://127.0.0.1:9", cache="").cache.folder == tmp_path


def contents_of(folder: Path, digest: str) -> Path:
    return folder / "contents" / digest[7:9] / digest[9:]


def test_abandoned_files_are_removed_and_fresh_ones_left(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store(digest_of(b"x"), b"x")
    abandoned, fresh = tmp_path / "unfinished" / "abandoned", tmp_path / "unfinished" / "fresh"
    for path in (abandoned, fresh):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    cache.trim()
    assert not abandoned.exists()
    assert fresh.exists()


def test_a_store_beyond_the_bound_trims_by_itself(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1000)
    for number in range(50):
        content = bytes([number]) * 100
        cache.store(digest_of(content), content)
        os.utime(contents_of(tmp_path, digest_of(content)), (number, number))
    assert sum(path.stat().st_size for path in contents(tmp_path)) <= 1100
