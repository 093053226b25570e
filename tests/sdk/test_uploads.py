"""Uploading a checkpoint: what is sent, what is not, and how it goes on after a cut."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradient_blueprints import (
    AlreadyExists,
    CheckpointFile,
    CheckpointFileNotFound,
    ConfigurationError,
    ConnectionFailed,
    DigestMismatch,
    PermissionDenied,
    RateLimited,
    Scope,
    ServiceUnavailable,
    UnexpectedAnswer,
    file_methods,
)
from gradient_blueprints.canonical import digest_of
from gradient_blueprints.commands import app
from tests.conftest import Server
from tests.sdk.conftest import Connect
from tests.sdk.cutting_proxy import CuttingProxy
from tests.sdk.faulty_network import Act, FaultyNetwork, answer, hang_up, json_answer, problem

WEIGHTS = random.Random(0).randbytes(12_000_000)
NO_FILES = json_answer('{"files": []}')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with what people leave lying in one."""
    folder = tmp_path / "checkpoint"
    (folder / "texts").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "texts" / "bio.jsonl").write_text(json.dumps({"text": "a gene"}))
    for stray in ("modeling_evil.py", "pytorch_model.bin", "README.md", ".gitattributes"):
        (folder / stray).write_text("stray")
    return folder


async def test_a_folder_is_uploaded_and_comes_back(connect: Connect, lab_a: Any, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    files = await lab_a.upload_checkpoint(folder, "org/tiny", 0.8, progress=lambda *news: told.append(news))
    assert [file.path for file in files] == ["config.json", "texts/bio.jsonl", "model.safetensors"]
    assert all(file.complete for file in files)
    assert ("model.safetensors", 0, len(WEIGHTS)) in told
    assert told[-1] == ("model.safetensors", len(WEIGHTS), len(WEIGHTS))
    assert sorted(await lab_a.list_checkpoint_files("org/tiny", 0.8), key=lambda file: file.path) == sorted(
        files, key=lambda file: file.path
    )
    fetched = await lab_a.fetch_checkpoint_file("org/tiny", 0.8, files[-1], tmp_path / "back")
    assert fetched.read_bytes() == WEIGHTS


async def test_an_upload_that_is_cut_goes_on_and_not_from_the_beginning(
    connect: Connect, server: Server, folder: Path
) -> None:
    """Three cuts within the weights. What is sent twice is what was on its way when the connection broke."""
    key = server.key("lab-a", Scope.PROFILE)
    with CuttingProxy(server.url, 3_000_000, 4_000_000, 2_000_000) as network:
        files = await connect(network.url, api_key=key).upload_checkpoint(folder, "tiny", 0.8)
        assert network.cut == 3
        assert network.sent < len(WEIGHTS) + 1_000_000
    assert files[-1].complete


async def test_a_second_call_goes_on_with_what_the_first_left(connect: Connect, server: Server, folder: Path) -> None:
    """The first process dies: nothing but the registry knows how far it was."""
    key = server.key("lab-a", Scope.PROFILE)
    with CuttingProxy(server.url, 5_000_000, *([1] * 100_000)) as network:
        client = connect(network.url, api_key=key, timeout=1)
        with pytest.raises(ConnectionFailed):
            await client.upload_checkpoint(folder, "tiny", 0.8)
    with CuttingProxy(server.url) as network:
        await connect(network.url, api_key=key).upload_checkpoint(folder, "tiny", 0.8)
        assert network.sent < len(WEIGHTS) - 4_000_000


async def test_what_is_there_already_is_not_sent_again(connect: Connect, server: Server, folder: Path) -> None:
    key = server.key("lab-a", Scope.PROFILE)
    await connect(server.url, api_key=key).upload_checkpoint(folder, "tiny", 0.8)
    (folder / "tokenizer.json").write_text("{}")
    with CuttingProxy(server.url) as network:
        files = await connect(network.url, api_key=key).upload_checkpoint(folder, "tiny", 0.8)
        assert network.sent < 10_000
    assert len(files) == 4


async def test_changed_content_needs_the_old_to_be_deleted(lab_a: Any, folder: Path) -> None:
    await lab_a.upload_checkpoint(folder, "tiny", 0.8)
    (folder / "config.json").write_text('{"changed": true}')
    with pytest.raises(AlreadyExists, match="delete it first"):
        await lab_a.upload_checkpoint(folder, "tiny", 0.8)
    await lab_a.delete_checkpoint_file("tiny", 0.8, "config.json")
    await lab_a.upload_checkpoint(folder, "tiny", 0.8)
    with pytest.raises(CheckpointFileNotFound):
        await lab_a.delete_checkpoint_file("tiny", 0.8, "other.json")


async def test_a_deletion_whose_answer_is_lost_is_not_repeated(connect: Connect) -> None:
    with FaultyNetwork(hang_up, problem(404, "checkpoint_file_not_found")) as network:
        with pytest.raises(ConnectionFailed, match="may have been carried out"):
            await connect(network.url, api_key="k").delete_checkpoint_file("tiny", 0.8, "config.json")
        assert network.connections == 1


async def test_one_file_can_be_added_under_a_name(lab_a: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    file: CheckpointFile = await lab_a.upload_checkpoint_file(tmp_path / "text.txt", "tiny", 0.8, "texts/law.txt")
    assert (file.path, file.size) == ("texts/law.txt", 9)
    assert (await lab_a.upload_checkpoint_file(tmp_path / "text.txt", "tiny", 0.8)).path == "text.txt"


async def test_pickles_and_folders_without_weights_are_refused_before_anything_is_sent(
    connect: Connect, folder: Path, tmp_path: Path
) -> None:
    with FaultyNetwork(b"") as network:
        client = connect(network.url, api_key="k")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin is in a format that can run code"):
            await client.upload_checkpoint(folder, "tiny", 0.8)
        (folder / "pytorch_model.bin").unlink()
        with pytest.raises(ConfigurationError, match="holds no safetensors"):
            await client.upload_checkpoint(folder, "tiny", 0.8)
        with pytest.raises(ConfigurationError, match="is not a folder"):
            await client.upload_checkpoint(tmp_path / "nothing", "tiny", 0.8)
        assert network.connections == 0


async def test_the_checkpoints_in_the_folder_of_a_training_are_not_sent_with_it(
    lab_a: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "checkpoint-500").mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(b"{}")
        (folder / "checkpoint-500" / name).write_bytes(b"{}")
    with caplog.at_level("INFO"):
        files = await lab_a.upload_checkpoint(folder, "tiny", 0.8)
    assert [file.path for file in files] == ["config.json", "texts/bio.jsonl", "model.safetensors"]
    assert "checkpoint-500/model.safetensors" in caplog.text
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"itself holds no safetensors; give .*checkpoint-500"):
        await lab_a.upload_checkpoint(folder, "tiny", 0.8)


@pytest.mark.parametrize("name", ["tokenizer (1).json", "x" * 200 + ".json"])
async def test_every_name_is_checked_before_anything_is_sent(connect: Connect, folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    with FaultyNetwork(NO_FILES) as network:
        with pytest.raises(ConfigurationError, match="is no name for a file"):
            await connect(network.url).upload_checkpoint(folder, "tiny", 0.8)
        assert network.connections == 0


async def test_a_key_that_may_only_read_uploads_nothing(connect: Connect, server: Server, folder: Path) -> None:
    with pytest.raises(PermissionDenied):
        await connect(server.url, api_key=server.key("lab-a", Scope.READ)).upload_checkpoint(folder, "tiny", 0.8)


async def test_a_file_that_changes_while_it_is_sent_is_an_error(lab_a: Any, folder: Path) -> None:
    weights = folder / "model.safetensors"

    def change(path: str, sent: int, size: int) -> None:
        if path == weights.name and sent == 1 << 20:
            with weights.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(bytes([WEIGHTS[-1] ^ 1]))

    with pytest.raises(DigestMismatch, match="nothing was kept"):
        await lab_a.upload_checkpoint(folder, "tiny", 0.8, progress=change)


async def test_a_file_that_is_cut_while_it_is_sent_is_an_error_and_what_is_appended_stays(
    lab_a: Any, folder: Path
) -> None:
    weights = folder / "model.safetensors"

    def change(size: int) -> Any:
        return lambda path, sent, _: os.truncate(weights, size) if path == weights.name and sent == 1 << 20 else None

    with pytest.raises(ConfigurationError, match="cut while it is sent"):
        await lab_a.upload_checkpoint(folder, "tiny", 0.8, progress=change(3_000_000))
    weights.write_bytes(WEIGHTS)
    files = await lab_a.upload_checkpoint(folder, "tiny", 0.9, progress=change(len(WEIGHTS) + 1))
    assert (files[-1].complete, files[-1].digest) == (True, digest_of(WEIGHTS))


def page(status: int) -> bytes:
    """What a gateway answers when it cannot reach the registry."""
    return answer(status, b"<html><h1>Bad Gateway</h1></html>", Content_Type="text/html")


@pytest.mark.parametrize("status", [502, 504])
async def test_an_upload_that_a_gateway_answered_in_between_goes_on(
    connect: Connect, tmp_path: Path, status: int
) -> None:
    (tmp_path / "a.json").write_text("{}")
    file = {"path": "a.json", "lab": "lab-a", "size": 2, "digest": digest_of(b"{}"), "received": 2, "complete": True}
    acts = (NO_FILES, page(status), answer(204, Upload_Offset="1"), json_answer(json.dumps(file), 201))
    with FaultyNetwork(*acts) as network:
        assert (await connect(network.url).upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)).complete
        assert b"upload-offset: 1\r" in network.requests[-1].lower()


async def test_an_upload_that_something_else_answers_ends_at_once(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with FaultyNetwork(NO_FILES, page(404)) as network:
        with pytest.raises(UnexpectedAnswer, match="Bad Gateway"):
            await connect(network.url).upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)
        assert network.connections == 2


@pytest.mark.parametrize(
    ("faults", "raised"),
    [
        ([problem(503, "service_unavailable")], ServiceUnavailable),
        ([page(502)], ConnectionFailed),
        ([problem(503, "service_unavailable"), answer(204, Upload_Offset="0")] * 20, ConnectionFailed),
    ],
)
async def test_a_registry_that_keeps_nothing_is_given_up(
    connect: Connect, tmp_path: Path, faults: list[bytes], raised: type[Exception]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    with FaultyNetwork(NO_FILES, *faults) as network:
        client = connect(network.url, api_key="k", timeout=1)
        with pytest.raises(raised):
            await client.upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)


async def test_an_upload_whose_time_runs_out_in_a_pause_made_no_progress(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(file_methods, "jitter", lambda attempt: 1.1)
    acts = [page(502), answer(204, Upload_Offset="0")] * 5
    with FaultyNetwork(NO_FILES, *acts) as network, pytest.raises(ConnectionFailed, match="No progress"):
        await connect(network.url, timeout=1).upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)


@pytest.mark.parametrize(
    ("faults", "raised"),
    [
        ([problem(429, "rate_limited", Retry_After="3600")], RateLimited),
        ([problem(503, "service_unavailable", Retry_After="3600")], ServiceUnavailable),
        ([hang_up, answer(429, Content_Type="application/problem+json", Retry_After="3600")], RateLimited),
    ],
)
async def test_an_upload_that_is_to_come_back_later_than_it_can_ends_at_once(
    connect: Connect, tmp_path: Path, faults: list[bytes | Act], raised: type[Exception]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    with FaultyNetwork(NO_FILES, *faults) as network:
        with pytest.raises(raised):
            await connect(network.url).upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)
        assert network.connections == 1 + len(faults)


async def test_an_upload_waits_as_long_as_it_is_asked_to(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    file = {"path": "a.json", "lab": "lab-a", "size": 2, "digest": digest_of(b"{}"), "received": 2, "complete": True}
    busy = problem(503, "service_unavailable", Retry_After="1")
    with FaultyNetwork(NO_FILES, busy, answer(204, Upload_Offset="0"), json_answer(json.dumps(file), 201)) as network:
        began = time.monotonic()
        assert (await connect(network.url).upload_checkpoint_file(tmp_path / "a.json", "tiny", 0.8)).complete
        assert time.monotonic() - began >= 1


async def test_a_blob_is_not_sent_to_a_registry_that_asks_to_wait(connect: Connect) -> None:
    with FaultyNetwork(answer(429, Content_Type="application/problem+json", Retry_After="3600")) as network:
        with pytest.raises(RateLimited) as raised:
            await connect(network.url).upload_blob(b"content")
        assert (raised.value.retry_after, network.connections) == (3600, 1)


def test_the_command_uploads_a_folder(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEPRINTS_URL", server.url)
    monkeypatch.setenv("BLUEPRINTS_API_KEY", server.key("lab-a", Scope.PROFILE))
    run = CliRunner().invoke(app, ["upload", str(folder), "tiny", "0.8"])
    assert run.exit_code == 0, run.output
    assert "3 files" in run.output
    again = CliRunner().invoke(app, ["upload", str(folder), "tiny", "0.8", "--json"])
    assert [file["path"] for file in json.loads(again.output)] == [
        "config.json",
        "texts/bio.jsonl",
        "model.safetensors",
    ]
