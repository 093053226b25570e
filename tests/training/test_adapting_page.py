"""docs/adapting.md is true: its Python runs in order, against the real service, on a small model."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from gradient_blueprints import Client
from gradient_blueprints.training.deltas import save_delta
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.checkpoints import with_factors
from gradient_blueprints.training.selection import select
from tests.conftest import Server
from tests.training.profiling.small_models import VOCABULARY, llama

PAGE = (Path(__file__).parents[2] / "docs" / "adapting.md").read_text(encoding="utf-8")


def batches_of(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(VOCABULARY, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def publish(model: nn.Module, server: Server) -> None:
    with GradientProfiler(model) as profiler:
        for batch in batches_of(2, seed=1):
            profiler.step(batch, domain="code")
        document = with_factors(
            profiler.blueprint("foundation-7b", 0.8), profiler.save_factors(Path("factors.safetensors"))
        )
    with Client(server.url, api_key=server.key("lab-a"), cache=False) as client:
        client.upload_blob(Path("factors.safetensors"))
        client.publish_blueprint(document)


def save_another_delta(base: nn.Module, path: str) -> None:
    tuned = copy.deepcopy(base)
    with GradientProfiler(tuned) as profiler:
        profiler.step(batches_of(1, seed=2)[0], domain="style")
    selection = select(profiler.blueprint("foundation-7b", 0.8), model=tuned)
    optimizer = SelectedAdamW(apply_selection(tuned, selection), lr=1e-3)
    tuned(**batches_of(1, seed=2)[0]).loss.backward()
    optimizer.step()
    save_delta(base, tuned, selection, path)


def test_the_python_of_the_page_runs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLUEPRINTS_URL", server.url)
    monkeypatch.setenv("BLUEPRINTS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = llama()
    base, before = copy.deepcopy(model), copy.deepcopy(model)
    publish(model, server)
    save_another_delta(base, "style.safetensors")
    data = [{"input_ids": row, "labels": row} for batch in batches_of(4, seed=3) for row in batch["input_ids"]]
    names: dict[str, object] = {
        "model": model,
        "base": base,
        "local_batches": batches_of(8, seed=4),
        "batches": batches_of(3, seed=5),
        "data": data,
        "arguments": TrainingArguments("runs", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True),
    }
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/adapting.md, block {number}", "exec"), names)
    merged = dict(base.named_parameters())
    assert any(not torch.equal(merged[name], value) for name, value in before.named_parameters())
