"""Models whose weights accelerate keeps on disk: the same numbers as in memory, without keeping what is lent."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload, load_checkpoint_and_dispatch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradient_blueprints.training.profiling import GradientProfiler
from tests.training.profiling.small_models import Batch, batch, build

BATCHES = [batch(3, 9, seed=1), batch(4, 7, seed=2)]


def profiled(model: nn.Module, batches: list[Batch] = BATCHES) -> GradientProfiler:
    with GradientProfiler(model, groups="tensor") as profiler:
        for values in batches:
            profiler.step(values)
    return profiler


def assert_same_profile(one: GradientProfiler, two: GradientProfiler) -> None:
    assert [layer.id for layer in one.layers] == [layer.id for layer in two.layers]
    np.testing.assert_allclose(one.table(), two.table(), rtol=1e-5, atol=1e-9)
    mine, others = one.domain(), two.domain()
    assert mine.sums.keys() == others.sums.keys()
    for name, total in mine.sums.items():
        torch.testing.assert_close(total, others.sums[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "bert", "mixtral"])
def test_a_model_on_disk_is_measured_like_one_in_memory(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    expected = profiled(copy.deepcopy(model))
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):  # after a forward pass accelerate has put other objects in the places of tied weights
        found = profiled(model)
        assert found.one_by_one is None
        assert_same_profile(found, expected)
        assert "weights offloaded" in str(found.blueprint("tiny", 1.0).provenance)
    assert all(parameter.is_meta and parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_with_half_its_blocks_on_disk_is_measured_like_one_in_memory(tmp_path: Path) -> None:
    model = build("untied_llama")
    expected = profiled(model)
    model.save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = load_checkpoint_and_dispatch(
        build("untied_llama"), tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    assert_same_profile(profiled(spread), expected)


def test_a_weight_without_its_module_is_found_and_measured_on_disk_too(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.first(inputs * self.scale)
            return hidden

    def loss(outputs: torch.Tensor, values: object) -> torch.Tensor:
        return outputs.square().sum((1, 2))

    tables = []
    for where in ("memory", "disk"):
        model = Model()
        if where == "disk":
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
            for parameter in model.parameters():
                parameter.requires_grad_(True)
        with GradientProfiler(model, groups="tensor", loss=loss) as profiler:
            for seed in (1, 2):
                profiler.step({"inputs": torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed))})
        tables.append(profiler.table())
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-5)


def test_lent_weights_are_not_kept_for_the_backward_pass(tmp_path: Path) -> None:
    loans: list[Any] = []

    class Borrower(nn.Linear):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            loans.append(StorageWeakRef(self.weight.untyped_storage()))  # type: ignore[no-untyped-call]
            return super().forward(*inputs)

    model = nn.Sequential(*(Borrower(6, 6) for _ in range(3)))
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    expired: list[bool] = []

    def loss(outputs: torch.Tensor, values: object) -> torch.Tensor:
        expired.extend(loan.expired() for loan in loans)
        return outputs.square().sum((1, 2))

    with GradientProfiler(model, loss=loss, verify=False) as profiler:
        profiler.step({"input": torch.randn(2, 4, 6)})
    assert len(expired) == 3 + 6  # the first example alone, then the batch
    assert all(expired)
