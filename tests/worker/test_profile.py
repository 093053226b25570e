"""The work itself, called in this process: what is published of a checkpoint, and which models are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from gradient_blueprints import Blueprint
from gradient_blueprints.models import DataSource, NewJob, Progress
from worker.child import REPOSITORY, Specification
from worker.loading import load_config, load_model, plan_model
from worker.profile import profile
from worker.sources import SINGLE_FILE, SourceRefused

Run = Callable[..., Blueprint]


@pytest.fixture
def checkpoint(tmp_path: Path, roots: Path) -> Path:
    return Path(shutil.copytree(roots / "tiny", tmp_path / "tiny"))


@pytest.fixture
def specify(checkpoint: Path, roots: Path, tmp_path: Path) -> Callable[..., Specification]:
    numbers = iter(range(100))

    def make(max_model_bytes: int = 1 << 30, **options: Any) -> Specification:
        folder = tmp_path / f"job-{next(numbers)}"
        folder.mkdir()
        quick = {"batches": 2, "batch_size": 2, "sequence_length": 16}
        return Specification(
            job=NewJob.model_validate(
                {
                    "model_id": "tiny",
                    "training_checkpoint": 0.8,
                    "source": str(checkpoint),
                    "data": {"general": {"source": str(roots / "general.txt")}},
                    "options": quick | options,
                }
            ),
            folder=folder,
            allowed_roots=(tmp_path, roots),
            device="cpu",
            max_model_bytes=max_model_bytes,
            max_text_bytes=1 << 30,
        )

    return make


@pytest.fixture
def run(specify: Callable[..., Specification]) -> Run:
    def start(reports: list[Progress] | None = None, **options: Any) -> Blueprint:
        return profile(specify(**options), (reports if reports is not None else []).append)

    return start


def edit(checkpoint: Path, name: str, **members: Any) -> None:
    path = checkpoint / name
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(checkpoint / SINGLE_FILE)
    change(weights)
    save_file(weights, checkpoint / SINGLE_FILE, metadata={"format": "pt"})


def test_the_same_job_gives_the_same_numbers_and_another_seed_other_ones(run: Run) -> None:
    def norms(blueprint: Blueprint) -> list[float]:
        return [layer.gradient_norm for layer in blueprint.layers]

    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert norms(first) == norms(again)
    assert norms(first) != norms(other)
    assert first.attachments == again.attachments


def test_the_norms_are_those_of_plain_autograd(run: Run, checkpoint: Path, roots: Path) -> None:
    """Against the obvious loop: the packed batches, one backward each, the norm of a matrix's gradient."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from worker.texts import pack

    found = run(granularity="tensor").layer("model.layers.0.mlp.up_proj.weight").gradient_norm
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = pack(
        roots / "general.txt",
        field="text",
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        separator=tokenizer.eos_token_id,
        sequence_length=16,
        batch_size=2,
        batches=2,
        seed=0,
    )
    norms = []
    for start in (0, 2):
        model.zero_grad()
        ids = torch.tensor(text.sequences[start : start + 2])
        model(input_ids=ids, labels=ids).loss.backward()
        norms.append(float(model.model.layers[0].mlp.up_proj.weight.grad.norm()))
    assert found == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_padding_has_no_share_in_the_norms(
    specify: Callable[..., Specification], checkpoint: Path, roots: Path
) -> None:
    """A batch of documents of different lengths against each of them alone, without any padding."""
    from transformers import AutoModelForCausalLM

    specification = specify(batches=1, granularity="tensor")
    data = {"short": {"source": str(roots / "short.jsonl"), "packing": "padded"}}
    lines = ["gradient model the", "law court of the layer norm batch token"]
    (roots / "short.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    job = NewJob.model_validate(specification.job.model_dump() | {"data": data})
    blueprint = profile(specification.model_copy(update={"job": job}), lambda progress: None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    sequences = [tokenizer(line, add_special_tokens=False)["input_ids"][:16] for line in lines]
    predicted = sum(len(sequence) - 1 for sequence in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence])
        (model(input_ids=ids, labels=ids).loss * (len(sequence) - 1) / predicted).backward()
    expected = float(model.model.layers[0].mlp.up_proj.weight.grad.norm())
    found = blueprint.layer("model.layers.0.mlp.up_proj.weight").gradient_norm
    assert found == pytest.approx(expected, rel=1e-4)
    assert blueprint.provenance is not None
    assert blueprint.provenance.tokens == predicted


def test_progress_counts_the_batches(run: Run) -> None:
    reports: list[Progress] = []
    run(reports)
    phases = list(dict.fromkeys(report.phase for report in reports))
    assert phases == ["checking sources", "reading text", "loading the model", "profiling", "fitting"]
    assert [report.done for report in reports if report.phase == "profiling"] == [0, 1]
    assert {report.total for report in reports if report.phase == "profiling"} == {2}


def without_tensor(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.pop("model.norm.weight"))  # type: ignore[arg-type]


def other_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))


def not_finite(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights["model.norm.weight"].fill_(float("nan")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "options", "reason"),
    [
        (without_tensor, {}, "the weights lack 1 tensors that config.json asks for, such as 'model.norm.weight'"),
        (lambda folder: edit(folder, "config.json", num_hidden_layers=1), {}, "config.json has no place for"),
        (other_shape, {}, "shapes that config.json asks for|cannot be loaded"),
        (not_finite, {}, "non-finite|finite"),
        (lambda folder: edit(folder, "config.json", model_type="never-heard-of"), {}, "no causal language model"),
        (lambda folder: edit(folder, "config.json", model_type="t5"), {}, "no causal language model"),
        (lambda folder: edit(folder, "config.json", hidden_size=-5), {}, "no causal language model"),
        (lambda folder: edit(folder, "config.json", vocab_size=10**9), {}, "takes 64,0.* bytes in float32"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), {}, "tokenizer cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), {}, "tokenizer cannot be loaded"),
        (lambda folder: None, {"sequence_length": 65}, "at most 64 tokens"),
        (lambda folder: None, {"sequence_length": 60_000, "batch_size": 4_096}, "domain 'general': .* give more text"),
    ],
)
def test_a_model_that_cannot_be_profiled_is_refused_with_its_reason(
    damage: Callable[[Path], None], options: dict[str, Any], reason: str, checkpoint: Path, run: Run
) -> None:
    damage(checkpoint)
    with pytest.raises(Exception, match=reason) as refused:
        run(**options)
    assert isinstance(refused.value, SourceRefused) or "finite" in reason


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, run: Run) -> None:
    edit(checkpoint, "config.json", vocab_size=20)

    def cut(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:20].clone()

    edit_weights(checkpoint, cut)
    with pytest.raises(SourceRefused, match="do not belong together"):
        run()


def test_the_model_limit_counts_what_the_configuration_asks_for(run: Run) -> None:
    with pytest.raises(SourceRefused, match="at most 10,000"):
        run(max_model_bytes=10_000)


def test_the_model_limit_counts_the_precision_that_the_device_is_given(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items()}))
    edit(checkpoint, "config.json", dtype="bfloat16")
    parameters = sum(parameter.numel() for parameter in plan_model(load_config(checkpoint)).parameters())

    def load(device: str, limit: int) -> Any:
        return load_model(checkpoint, load_config(checkpoint), torch.device(device), limit, 1_000)

    assert load("meta", 2 * parameters).dtype == torch.bfloat16  # stands for an accelerator
    with pytest.raises(SourceRefused, match=rf"takes {2 * parameters:,} bytes in bfloat16, as it is loaded on meta"):
        load("meta", 2 * parameters - 1)
    assert load("cpu", 4 * parameters).dtype == torch.float32
    with pytest.raises(SourceRefused, match=rf"takes {4 * parameters:,} bytes in float32, as it is loaded on cpu"):
        load("cpu", 4 * parameters - 1)


def test_the_process_ends_and_cleans_up_when_its_stdin_does(specify: Callable[..., Specification]) -> None:
    """Its stdout stays open here, so that only the thread that watches stdin can end it."""
    specification = specify(batches=5_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.profile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    with process:
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(specification.model_dump_json().encode() + b"\n")
            process.stdin.flush()
            while b"profiling" not in process.stdout.readline():
                pass
            drain = threading.Thread(target=process.stdout.read)
            drain.start()
            process.stdin.close()
            assert process.wait(5) == 1
            drain.join()
            assert not specification.folder.exists()
        finally:
            process.kill()


def test_a_text_is_read_as_its_name_says_whatever_it_is_linked_to(
    specify: Callable[..., Specification], roots: Path, tmp_path: Path
) -> None:
    """As the cache links a file of the store from another file system, where it is called by its digest."""
    shutil.copy(roots / "general.txt", tmp_path / "0a1b2c")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "0a1b2c")
    specification = specify(batches=1)
    data = {"general": DataSource(source=str(tmp_path / "linked.txt"))}
    specification.job = specification.job.model_copy(update={"data": data})
    assert profile(specification, lambda progress: None).layers
