"""Hostile and broken sources: each is refused before anything loads it, with a reason that a person understands."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.sources import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointFiles,
    SourceRefused,
    check_safetensors,
    files_of_checkpoint,
    resolve,
    resolve_checkpoint,
    resolve_file,
)

LIMIT = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def checkpoint(root: Path, roots: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(roots / "tiny", root / "tiny"))


def check(folder: Path, *, limit: int = LIMIT) -> CheckpointFiles:
    return resolve_checkpoint(str(folder), [folder.parent], max_model_bytes=limit)


def change(path: Path, **members: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def safetensors(header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


# --- where


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "/nonexistent/at/all", "{root}/../outside", "{root}/../../etc/passwd"]
)
def test_what_lies_outside_the_roots_is_refused_in_the_same_words(source: str, root: Path) -> None:
    source = source.format(root=root)
    with pytest.raises(SourceRefused) as refused:
        resolve(source, [root])
    assert str(refused.value) == f"{source!r} does not lie under an allowed root of this worker: {root}"


def test_a_link_that_leads_outside_is_refused_and_one_that_stays_inside_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (root / "inside.txt").write_text("text")
    (root / "out").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    (root / "in").symlink_to(root / "inside.txt")
    for name in ("out", "up/secret.txt"):
        with pytest.raises(SourceRefused, match="allowed root"):
            resolve_file(str(root / name), [root], limit=LIMIT)
    assert resolve_file(str(root / "in"), [root], limit=LIMIT) == (root / "inside.txt").resolve()


def test_a_folder_whose_name_begins_like_a_root_is_not_under_it(root: Path) -> None:
    neighbour = root.parent / (root.name + "-other")
    neighbour.mkdir()
    with pytest.raises(SourceRefused, match="allowed root"):
        resolve(str(neighbour), [root])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("s3://bucket/model", "is a URL"),
        ("http://169.254.169.254/latest", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("models/tiny", "relative path"),
        ("", "relative path"),
        ("/" + "x" * 5_000, "cannot be followed|allowed root"),
    ],
)
def test_what_is_no_local_path_is_refused(source: str, reason: str, root: Path) -> None:
    with pytest.raises(SourceRefused, match=reason):
        resolve(source, [root])


def test_without_roots_nothing_is_read(root: Path) -> None:
    with pytest.raises(SourceRefused, match="BLUEPRINTS_ALLOWED_ROOTS"):
        resolve(str(root), [])


def test_pipes_folders_and_links_in_circles_are_no_files(root: Path) -> None:
    os.mkfifo(root / "pipe.txt")
    (root / "circle.txt").symlink_to(root / "circle.txt")
    (root / "folder.txt").mkdir()
    for name in ("pipe.txt", "circle.txt", "folder.txt", "missing.txt", "y" * 300 + ".txt"):
        with pytest.raises(SourceRefused):
            resolve_file(str(root / name), [root], limit=LIMIT)


def test_a_file_beyond_the_limit_is_refused(root: Path) -> None:
    (root / "long.txt").write_text("x" * 101)
    with pytest.raises(SourceRefused, match="101 bytes; this worker reads at most 100"):
        resolve_file(str(root / "long.txt"), [root], limit=100)


# --- checkpoints


def test_a_checkpoint_as_it_is_saved_is_accepted(checkpoint: Path) -> None:
    found = check(checkpoint)
    assert list(found.weights) == [SINGLE_FILE]
    assert found.config["model_type"] == "llama"
    assert "tokenizer.json" in found.tokenizer


def test_the_digest_names_the_weights_wherever_they_lie(checkpoint: Path) -> None:
    before = check(checkpoint).digest()
    moved = checkpoint.rename(checkpoint.with_name("elsewhere"))
    assert check(moved).digest() == before
    weights = moved / SINGLE_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert check(moved).digest() != before


def test_the_loader_sees_only_files_that_were_checked(checkpoint: Path, tmp_path: Path) -> None:
    for stray in ("adapter_config.json", "modeling_evil.py", "pytorch_model.bin", "generation_config.json"):
        (checkpoint / stray).write_text("{}")
    view = tmp_path / "view"
    check(checkpoint).link_into(view)
    assert {path.name for path in view.iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip


def edit(name: str, **members: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, **members)


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return run


def only_pickle(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / SINGLE_FILE
    weights.write_bytes(weights.read_bytes()[:-100])


def linked_outside(folder: Path) -> None:
    outside = folder.parent.parent / "weights"
    (folder / SINGLE_FILE).rename(outside)
    (folder / SINGLE_FILE).symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (only_pickle, "can run code when it is read"),
        (lambda folder: (folder / SINGLE_FILE).unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (edit("config.json", auto_map={"AutoModel": "evil.Model"}), "code of its own"),
        (edit("config.json", text_config={"auto_map": {"AutoModel": "evil.Model"}}), "code of its own"),
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}), "code of its own"),
        (edit("config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
        (replace("config.json", b"{"), "not JSON"),
        (replace("config.json", b"[]"), "not a JSON object"),
        (replace("config.json", b"[" * 200_000), "not JSON"),
        (replace("config.json", b"\xff\xfe"), "not JSON"),
        (truncated, "cut short or added to"),
        (replace(SINGLE_FILE, b""), "cut short or no safetensors"),
        (replace(SINGLE_FILE, b"\x80\x04\x95pickle"), "cut short or no safetensors"),
        (linked_outside, "allowed root"),
        (replace(INDEX_FILE, b"{}"), "no weight_map"),
        (
            replace(INDEX_FILE, json.dumps({"weight_map": {"a": "../b.safetensors"}}).encode()),
            "no safetensors file",
        ),
        (replace(INDEX_FILE, json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()), "no safetensors file"),
        (replace(INDEX_FILE, json.dumps({"weight_map": {"a": "model-9.safetensors"}}).encode()), "cannot be read"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason(
    damage: Callable[[Path], None], reason: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(SourceRefused, match=reason):
        check(checkpoint)


def test_a_model_beyond_the_limit_is_refused(checkpoint: Path) -> None:
    with pytest.raises(SourceRefused, match="at most 1,000"):
        check(checkpoint, limit=1_000)


def test_a_sharded_checkpoint_is_accepted_with_every_shard_checked(checkpoint: Path) -> None:
    shutil.copy(checkpoint / SINGLE_FILE, checkpoint / "model-1.safetensors")
    (checkpoint / SINGLE_FILE).rename(checkpoint / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / INDEX_FILE).write_text(json.dumps(index))
    assert list(check(checkpoint).weights) == ["model-1.safetensors", "model-2.safetensors"]
    (checkpoint / "model-2.safetensors").write_bytes(b"short")
    with pytest.raises(SourceRefused, match=r"model-2\.safetensors is cut short"):
        check(checkpoint)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("used", "copies"),
    [
        ([INDEX_FILE, *SHARDS], ["consolidated.safetensors", SINGLE_FILE]),
        ([INDEX_FILE, *SHARDS, "mtp.safetensors"], ["consolidated-00001-of-00002.safetensors"]),
        ([INDEX_FILE, "model.safetensors-00001-of-00001.safetensors"], [SINGLE_FILE]),
        ([INDEX_FILE, SINGLE_FILE], []),
        ([SINGLE_FILE], ["consolidated.safetensors", *SHARDS]),
        ([INDEX_FILE, "a.safetensors", "b.safetensors"], []),
    ],
)
def test_copies_of_the_weights_that_the_model_does_not_use_are_not_fetched(used: list[str], copies: list[str]) -> None:
    beside = ["pytorch_model.bin", "README.md", "onnx/model.safetensors"]
    wanted = {"config.json", "tokenizer.json", *used}
    assert files_of_checkpoint([*wanted, *copies, *beside]) == wanted


# --- headers


def tensor(begin: Any, stop: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, stop]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors({}, b"", length=2**63), "header would have"),
        (safetensors({}, b"", length=200_000_000), "header would have"),
        (safetensors(b"{not json", b""), "cannot be read"),
        (safetensors(b"[]", b""), "not a JSON object"),
        (safetensors(b'{"a": 1, "a": 2}', b""), "appears twice"),
        (safetensors({"a": tensor(0, 16)}, bytes(16)), "needs 8 bytes by its shape"),
        (safetensors({"a": tensor(0, 8)}, bytes(4)), "holds 4 bytes of tensors"),
        (safetensors({"a": tensor(0, 8)}, bytes(12)), "holds 12 bytes of tensors"),
        (safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "overlaps"),
        (safetensors({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)), "leaves a gap"),
        (safetensors({"a": tensor(-8, 0)}, bytes(8)), "needs 8 bytes"),
        (safetensors({"a": tensor(0, 8, shape=(-1, -2))}, bytes(8)), "malformed"),
        (safetensors({"a": tensor(0, 8, shape=(True, 2))}, bytes(8)), "malformed"),
        (safetensors({"a": tensor(0, 8, shape="2")}, bytes(8)), "malformed"),
        (safetensors({"a": tensor(0.0, 8.0)}, bytes(8)), "malformed"),
        (safetensors({"a": tensor(0, 8, dtype="OBJECT")}, bytes(8)), "unknown dtype"),
        (safetensors({"a": tensor(0, 8, shape=(2**40, 2**40))}, bytes(8)), "needs"),
        (safetensors({"a": 5}, b""), "malformed"),
        (safetensors({"a": {"dtype": "F32"}}, b""), "malformed"),
    ],
)
def test_a_header_that_lies_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceRefused, match=reason):
        check_safetensors(path)


def test_a_true_header_tells_the_bytes_of_each_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    header = {"b": tensor(8, 12, shape=(1,)), "a": tensor(0, 8), "empty": tensor(8, 8, shape=(0,)), "__metadata__": {}}
    path.write_bytes(safetensors(header, bytes(12)))
    assert check_safetensors(path) == {"a": 8, "b": 4, "empty": 0}
