"""Checkpoints and texts made to harm: each ends its job as failed with a reason to act on, and harms nothing.

What a folder alone can be refused for is in test_sources.py; here the whole work is done on it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradient_blueprints import Client
from gradient_blueprints.models import Job, JobState, NewJob
from tests.http_server import QuietHandler, serving_http
from tests.worker.conftest import Processes
from tests.worker.test_fetch import Specify, ignore, outcome, specify  # noqa: F401 - a fixture
from worker.child import Specification
from worker.fetch import fetch
from worker.profile import work
from worker.sources import SINGLE_FILE, SourceRefused
from worker.speaking import FAILED

Damage = Callable[[Path], None]


class RunsACommand:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


# --- what is done to a checkpoint


def config(**members: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | members))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def run(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_FILE)
        change(tensors)
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})

    return run


def one_number(value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value

    return weights(change)


def pickled(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsACommand(folder.parent / "executed")))


def disguised_pickle(folder: Path) -> None:
    torch.save(RunsACommand(folder.parent / "executed"), folder / SINGLE_FILE)  # a zip archive


def pickle_beside(folder: Path) -> None:
    """The index sends the loader to it."""
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsACommand(folder.parent / "executed")))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')")
    config(model_type="evil", auto_map={"AutoConfig": "modeling_evil.Evil"})(folder)


def shared_bytes(folder: Path) -> None:
    """Two tensors in the same place: more model than there is file."""
    content = (folder / SINGLE_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = [name for name in header if "layernorm" in name][:2]
    header[second] = header[first]
    raw = json.dumps(header).encode().ljust(length)
    (folder / SINGLE_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def linked_elsewhere(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


@pytest.fixture
def checkpoint(tmp_path: Path, roots: Path) -> Path:
    return Path(shutil.copytree(roots / "tiny", tmp_path / "tiny"))


def refusal(checkpoint: Path, text: Path, *, field: str = "text") -> str:
    """Why the work on these is refused."""
    folder = checkpoint.parent / "job"
    folder.mkdir()
    job = {
        "model_id": "tiny",
        "training_checkpoint": 0.8,
        "source": str(checkpoint),
        "data": {"general": {"source": str(text), "field": field}},
        "options": {"batches": 1, "batch_size": 2, "sequence_length": 16},
    }
    specification = Specification(
        job=NewJob.model_validate(job),
        folder=folder,
        allowed_roots=(checkpoint.parent, text.parent),
        device="cpu",
        max_model_bytes=1 << 30,
        max_text_bytes=1 << 28,
    )
    with pytest.raises(SourceRefused) as refused:
        work(specification, ignore)
    assert not (checkpoint.parent / "executed").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (pickled, "a format that can run code when it is read; save them as safetensors"),
        (disguised_pickle, "cut short or no safetensors file"),
        (pickle_beside, "names 'pytorch_model.bin', which is no safetensors file"),
        (remote_code, "asks for code of its own"),
        (shared_bytes, "overlaps another tensor"),
        (linked_elsewhere, "does not lie under an allowed root"),
        (
            config(hidden_size=10**9),
            "takes 2,196,000,000,000 bytes in float32, as it is loaded on cpu; this worker takes at most",
        ),
        (config(vocab_size=2**62), "describes no causal language model: Storage size calculation overflowed"),
        (config(num_hidden_layers=10**12), r"asks for 1,000,000,000,000 \(num_hidden_layers\)"),
        (config(text_config={"num_layers": 1e300}), r"\(num_layers\), far more than the weights have tensors for"),
        (config(num_hidden_layers=1_000), "asks for more than 1,040 parameters to be kept apart"),
        (config(model_type="mixtral", num_local_experts=10**8), "asks for|bytes in float32"),
        (one_number(float("nan")), "hold NaN or infinite numbers, in 'model.layers.1.mlp.up_proj.weight'"),
        (one_number(float("-inf")), "hold NaN or infinite numbers, in 'model.layers.1.mlp.up_proj.weight'"),
    ],
)
def test_a_hostile_checkpoint_is_refused_with_a_reason(
    damage: Damage, reason: str, checkpoint: Path, roots: Path
) -> None:
    damage(checkpoint)
    told = refusal(checkpoint, roots / "general.txt")
    assert re.search(reason, told), told
    assert len(told) < 1_000


# --- texts that unpack to more than they seem


def test_a_compressed_text_is_refused_by_what_it_unpacks_to(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.texts.MAX_GROUP_BYTES", 10 << 20)
    bomb = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": ["gradient " * 2_000_000]})
    pyarrow.parquet.write_table(table, bomb, compression="zstd", use_dictionary=False)
    assert bomb.stat().st_size < 100_000
    told = pyarrow.parquet.read_metadata(bomb).row_group(0).column(0).total_uncompressed_size
    reason = f"has {told:,} bytes of text when unpacked; a worker reads at most 10,485,760"
    assert reason in refusal(checkpoint, bomb)  # by what the file says of itself, before any of it is unpacked


def test_a_dictionary_that_lies_about_its_size_is_refused_as_it_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.texts.MAX_GROUP_BYTES", 10 << 20)
    monkeypatch.setattr("worker.texts._unpacked_size", lambda *_: 0)  # what the file says of itself
    bomb = tmp_path / "bomb.parquet"
    words = pyarrow.array([f"{number} " + "gradient " * 200_000 for number in range(10)])
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), bomb, compression="zstd")
    assert "of text when unpacked" in refusal(checkpoint, bomb)


def test_a_long_text_named_again_and_again_is_held_once(checkpoint: Path, tmp_path: Path) -> None:
    """54 GB, were each row a text of its own; the refusal is of what comes after reading."""
    bomb = tmp_path / "bomb.parquet"
    rows = pyarrow.array([0] * 300_000, pyarrow.int32())
    words = pyarrow.DictionaryArray.from_arrays(rows, ["gradient " * 20_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), bomb)
    assert bomb.stat().st_size < 3 << 20
    config(num_hidden_layers=1_000)(checkpoint)
    assert "parameters to be kept apart" in refusal(checkpoint, bomb)


# --- sources that lead elsewhere


@contextmanager
def leading_to(target: str) -> Iterator[str]:
    """A server that sends whoever asks to `target`."""

    class Elsewhere(QuietHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - the base class calls it so

    with serving_http(Elsewhere) as url:
        yield url


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("http://[::ffff:169.254.169.254]/latest/meta-data", "::ffff:169.254.169.254"),
        ("http://localhost:1/", "127.0.0.1"),  # a name whose answer is private; or ::1, which is tried first
    ],
)
def test_a_hub_that_leads_to_a_private_address_fails_the_job(
    target: str,
    address: str,
    specify: Specify,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "localhost:1")  # is no proxy, which might be private
    with leading_to(target) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        kind, reason = outcome(specify("hf://org/tiny", allowed_hub=("*",)))
    assert kind == FAILED
    assert reason.startswith("a source leads where this worker does not connect to: ")
    assert address in reason or "::1 is not" in reason
    assert "BLUEPRINTS_SOURCE_NETWORKS" in reason


def test_a_bucket_that_leads_elsewhere_is_not_followed(
    specify: Specify,  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it would keep these credentials for the tests that follow
    with leading_to("http://169.254.169.254/latest/meta-data") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with pytest.raises(SourceRefused, match="said to lie elsewhere"):
            fetch(specify("s3://bucket/tiny", allowed_buckets=("bucket",)), ignore)


# --- the worker


def test_after_a_hostile_job_has_failed_the_worker_takes_the_next(
    lab: Client, submit: Callable[..., Job], processes: Processes, roots: Path, tmp_path: Path
) -> None:
    root = tmp_path / "hostile"
    damages = {"absurd": config(num_hidden_layers=1_000), "nan": one_number(float("nan"))}
    hostile = []
    for name, damage in damages.items():
        damage(Path(shutil.copytree(roots / "tiny", root / name / "tiny")))
        hostile.append(submit(source=root / name / "tiny"))
    processes.relay()
    worker = processes.worker(BLUEPRINTS_ALLOWED_ROOTS=os.pathsep.join((str(root), str(roots))))
    ended = [lab.wait_for_job(job.id, 240) for job in hostile]
    assert [(job.state, job.attempts) for job in ended] == [(JobState.FAILED, 1)] * 2
    reasons = [job.reason or "" for job in ended]
    assert "parameters to be kept apart" in reasons[0]
    assert "NaN or infinite numbers" in reasons[1]
    assert worker.poll() is None
