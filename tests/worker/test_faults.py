"""What the machine does to a job is not laid at the job's door: such an attempt crashes, and there are more of them."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from gradient_blueprints.models import NewJob
from tests.worker.test_fetch import outcome
from worker.child import REPOSITORY, Specification
from worker.loading import load_config, load_model, load_tokenizer
from worker.sources import SourceRefused, resolve_checkpoint, resolve_file
from worker.speaking import FAILED
from worker.texts import pack


@contextmanager
def limit(what: int, value: int) -> Iterator[None]:
    """Limits this process, and those that it starts within."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.fixture
def specify(roots: Path, tmp_path: Path) -> Callable[..., Specification]:
    def make(checkpoint: Path, device: str = "cpu") -> Specification:
        (tmp_path / "job").mkdir()
        job = {
            "model_id": "tiny",
            "training_checkpoint": 0.8,
            "source": str(checkpoint),
            "data": {"general": {"source": str(roots / "general.txt")}},
            "options": {"batches": 1, "batch_size": 2, "sequence_length": 16},
        }
        return Specification(
            job=NewJob.model_validate(job),
            folder=tmp_path / "job",
            allowed_roots=(tmp_path, roots),
            device=device,
            max_model_bytes=1 << 30,
            max_text_bytes=1 << 30,
        )

    return make


def test_a_device_that_is_not_there_crashes_the_attempt(specify: Callable[..., Specification], roots: Path) -> None:
    kind, reason = outcome(specify(roots / "tiny", "cuda:99"))
    assert kind == "died", reason
    assert "the profiling process ended with status 1 and no result" in reason


def test_a_disk_that_takes_no_more_crashes_the_attempt(specify: Callable[..., Specification], roots: Path) -> None:
    with limit(resource.RLIMIT_FSIZE, 2_000):  # the factors are larger
        kind, reason = outcome(specify(roots / "tiny"))
    assert kind == "died", reason
    assert "File too large" in reason


def test_a_model_that_cannot_be_profiled_fails_its_job_at_once(
    specify: Callable[..., Specification], roots: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(roots / "tiny", tmp_path / "mixture"))
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    MixtralForCausalLM(config).save_pretrained(checkpoint)
    kind, reason = outcome(specify(checkpoint))
    assert (kind, reason.partition(":")[0]) == (FAILED, "ConfigurationError")


def test_a_machine_that_opens_no_more_files_is_not_the_source_s_fault(roots: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["law"] * 9}), table)
    folder, device = roots / "tiny", torch.device("cpu")
    config = load_config(folder)

    def read_table() -> None:
        kept = {"field": "text", "separator": None, "sequence_length": 2, "batch_size": 1, "batches": 1, "seed": 0}
        pack(table, encode=lambda text: [1, 2], **kept)  # type: ignore[arg-type]

    steps: list[Callable[[], object]] = [
        lambda: resolve_checkpoint(str(folder), [roots], max_model_bytes=1 << 30),
        lambda: load_config(folder),
        lambda: load_tokenizer(folder, config),
        lambda: load_model(folder, config, device, 1 << 30, 100),
        read_table,
    ]
    for step in steps:
        step()
        with pytest.raises(OSError, match="Too many open files"), limit(resource.RLIMIT_NOFILE, 0):
            step()
    with pytest.raises(SourceRefused, match="cannot be read"):
        resolve_file(str(roots / "missing"), [roots], limit=9)


def test_a_worker_does_not_start_without_the_device_that_it_is_set_to() -> None:
    settings = dict.fromkeys(("BLUEPRINTS_URL", "BLUEPRINTS_API_KEY", "BLUEPRINTS_BROKER_URL"), "http://127.0.0.1:9")
    started = subprocess.run(
        [sys.executable, "-m", "worker"],
        cwd=REPOSITORY,
        env=settings | {"BLUEPRINTS_DEVICE": "cuda:99", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert started.returncode == 2
    assert started.stderr.startswith("BLUEPRINTS_DEVICE: the device 'cuda:99' cannot be used: ")
