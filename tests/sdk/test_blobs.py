"""Attachments: streamed, verified, resumed, cached."""

from __future__ import annotations

import hashlib
import socket
import time
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from gradient_blueprints import (
    BlobNotFound,
    Blueprint,
    Client,
    ConfigurationError,
    ConnectionFailed,
    UnexpectedAnswer,
    cache,
)
from gradient_blueprints.canonical import digest_of
from tests.conftest import Server
from tests.documents import blueprint_document
from tests.sdk.conftest import Connect
from tests.sdk.faulty_network import FaultyNetwork, answer

CONTENT = bytes(range(256)) * 4000
DIGEST = digest_of(CONTENT)


async def test_a_file_comes_back_as_it_was_and_then_from_the_cache(
    connect: Connect, server: Server, lab_a: Any, tmp_path: Path
) -> None:
    file = tmp_path / "factors.safetensors"
    file.write_bytes(CONTENT)
    summary = await lab_a.upload_blob(file)
    assert (summary.digest, summary.size, summary.created) == (DIGEST, len(CONTENT), True)
    assert not (await lab_a.upload_blob(CONTENT)).created
    path = await connect(server.url).fetch_blob(DIGEST)
    assert path.read_bytes() == CONTENT
    assert await connect(server.url, offline=True).fetch_blob(DIGEST) == path
    target = await connect(server.url, offline=True).fetch_blob(DIGEST, tmp_path / "deep" / "mine.bin")
    assert target == tmp_path / "deep" / "mine.bin"
    assert target.read_bytes() == CONTENT
    target.write_bytes(b"mine now")  # a copy of its own: the cache keeps what it has
    assert path.read_bytes() == CONTENT


async def test_the_factors_of_a_blueprint_are_fetched_by_their_name(lab_a: Any) -> None:
    await lab_a.upload_blob(CONTENT)
    attachment = {"name": "factors.safetensors", "media_type": "application/octet-stream", "digest": DIGEST, "size": 1}
    attachment["size"] = len(CONTENT)
    await lab_a.publish_blueprint(blueprint_document(attachments=[attachment]))
    blueprint = await lab_a.fetch_blueprint("tiny", 0.8)
    assert (await lab_a.fetch_factors(blueprint)).read_bytes() == CONTENT
    with pytest.raises(BlobNotFound, match=r"no attachment factors\.safetensors"):
        await lab_a.fetch_factors(Blueprint.from_dict(blueprint_document()))


async def test_a_blob_that_is_not_there_is_an_error_and_leaves_nothing(lab_a: Any, tmp_path: Path) -> None:
    with pytest.raises(BlobNotFound):
        await lab_a.fetch_blob(DIGEST, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "sdk-cache" / "unfinished").iterdir()) == []


async def test_a_broken_download_goes_on_where_it_broke_off(connect: Connect) -> None:
    middle = 300_000
    first = answer(200, CONTENT)[: middle + 100]
    seen = len(first.partition(b"\r\n\r\n")[2])
    rest = answer(206, CONTENT[seen:], Content_Range=f"bytes {seen}-{len(CONTENT) - 1}/{len(CONTENT)}")
    with FaultyNetwork(first, rest) as network:
        assert (await connect(network.url).fetch_blob(DIGEST)).read_bytes() == CONTENT
        assert network.connections == 2
        assert f"bytes={seen}-".encode() in network.requests[1]


async def test_a_download_starts_anew_where_ranges_are_not_known(connect: Connect) -> None:
    with FaultyNetwork(answer(200, CONTENT)[:300_000], answer(200, CONTENT)) as network:
        assert (await connect(network.url).fetch_blob(DIGEST)).read_bytes() == CONTENT


async def test_a_folder_is_no_place_for_a_file(connect: Connect, tmp_path: Path) -> None:
    with FaultyNetwork(answer(200, b"x")) as network:
        with pytest.raises(ConfigurationError, match="is a folder"):
            await connect(network.url).fetch_blob(digest_of(b"x"), tmp_path)
        assert network.connections == 0


async def test_wrong_bytes_are_refused_and_not_kept(connect: Connect, tmp_path: Path) -> None:
    with FaultyNetwork(answer(200, b"something else")) as network:
        with pytest.raises(UnexpectedAnswer, match="another digest"):
            await connect(network.url).fetch_blob(DIGEST, tmp_path / "out")
        assert network.connections == 1
    assert not (tmp_path / "out").exists()


async def test_a_download_that_makes_no_progress_ends(connect: Connect) -> None:
    def stall(connection: socket.socket) -> None:
        connection.sendall(answer(200, CONTENT)[:200])
        connection.recv(1)

    with FaultyNetwork(stall) as network, pytest.raises(ConnectionFailed):
        await connect(network.url, timeout=0.5).fetch_blob(DIGEST)


async def test_an_upload_that_is_never_answered_ends(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    began = time.monotonic()
    with FaultyNetwork(answer(404), lambda connection: time.sleep(30)) as network:
        sdk = connect(network.url, timeout=0.3)
        with pytest.raises(ConnectionFailed):
            await sdk.upload_blob(tmp_path / "file")
        with pytest.raises(ConnectionFailed):
            await sdk.finish_shard("7", 0, 1, tmp_path / "file")
    assert time.monotonic() - began < 15


async def test_a_damaged_cached_file_is_fetched_again(connect: Connect) -> None:
    with FaultyNetwork(answer(200, CONTENT)) as network:
        path = await connect(network.url).fetch_blob(DIGEST)
        path.chmod(0o644)
        path.write_bytes(CONTENT[:-1])
        assert (await connect(network.url).fetch_blob(DIGEST)).read_bytes() == CONTENT
        assert network.connections == 2


async def test_without_a_usable_cache_a_file_goes_straight_to_its_target(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for kept_in in (False, tmp_path / "file" / "cache"):
        with FaultyNetwork(answer(200, CONTENT)) as network:
            sdk = connect(network.url, cache=kept_in)
            target = await sdk.fetch_blob(DIGEST, tmp_path / "out")
            assert target.read_bytes() == CONTENT
            with pytest.raises(ConfigurationError, match="path="):
                await sdk.fetch_blob(DIGEST)


@pytest.fixture(params=["while it is written", "at its end"])
def full_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache whose folders can be made and whose files cannot: the device is full, or a folder is in the way."""
    folder = tmp_path / "full"
    if request.param == "at its end":
        name = DIGEST.removeprefix("sha256:")
        (folder / "contents" / name[:2] / name[2:] / "in the way").mkdir(parents=True)
        return folder
    unfinished_file = cache._unfinished_file

    def on_a_full_device(parent: Path, mode: int) -> tuple[Path, BinaryIO]:
        path, file = unfinished_file(parent, mode)
        if parent != folder / "unfinished":
            return path, file
        file.close()
        return path, Path("/dev/full").open("w+b")

    monkeypatch.setattr(cache, "_unfinished_file", on_a_full_device)
    return folder


async def test_a_cache_that_fills_up_costs_a_warning_and_its_help(
    connect: Connect, full_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyNetwork(answer(200, CONTENT)) as network:
        sdk = connect(network.url, cache=full_cache)
        assert (await sdk.fetch_blob(DIGEST, tmp_path / "out")).read_bytes() == CONTENT
        with pytest.raises(ConfigurationError, match="path="):
            await sdk.fetch_blob(DIGEST)
        assert list((full_cache / "unfinished").iterdir()) == []
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("digest", ["sha256:abc", "md5:" + "0" * 64, "../../etc/passwd", "sha256:" + "A" * 64])
async def test_what_is_no_digest_is_refused(connect: Connect, digest: str) -> None:
    with pytest.raises(ConfigurationError, match="not a digest"):
        await connect("http://127.0.0.1:9").fetch_blob(digest)


def test_a_large_file_is_held_in_memory_neither_up_nor_down(tmp_path: Path) -> None:
    size = 64 << 20
    file = tmp_path / "large"
    with file.open("wb") as out:
        for number in range(64):
            out.write(hashlib.sha256(bytes([number])).digest() * (1 << 15))
    digest = digest_of(file.read_bytes())

    def send(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode())
        with file.open("rb") as content:
            connection.sendfile(content)

    with FaultyNetwork(send) as network, Client(network.url, cache=tmp_path / "cache") as client:
        tracemalloc.start()
        try:
            client.fetch_blob(digest)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 16 << 20
