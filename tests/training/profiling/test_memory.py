"""What is held while a batch is measured, what is left of one that fails, and what happens when memory ends."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.state import DomainState
from tests.training.profiling.memory_processes import send, squared
from tests.training.profiling.small_models import batch, build


class Kinked(nn.Module):
    """Where `kink` is 0 the loss is finite and the gradient of what lies before the kink is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs: Tensor, kink: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        output: Tensor = self.second(hidden + torch.sqrt(kink * hidden.square()))
        return output


def inputs(seed: int, *, broken: bool = False) -> dict[str, Tensor]:
    kink = torch.ones(4, 1, 1)
    kink[3] = 0 if broken else 1
    return {"inputs": torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(seed)), "kink": kink}


def assert_same(one: DomainState, two: DomainState) -> None:
    """To the bit."""
    for name in ("sums", "squares"):
        mine, others = getattr(one, name), getattr(two, name)
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in mine)
    for mine, others in zip(one.histograms, two.histograms, strict=True):
        for part in ("counts", "sums", "top"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(others, part))
    assert one.factors.keys() == two.factors.keys()
    for key, factors in one.factors.items():
        assert torch.equal(factors.row, two.factors[key].row)
    assert one.records.keys() == two.records.keys()


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("place", ["host", "files"])
def test_a_batch_whose_gradient_breaks_midway_leaves_nothing_behind(
    tmp_path: Path, place: str, micro_batch: int | None
) -> None:
    states = []
    for broken in (False, True):
        sums: Any = tmp_path if place == "files" else "host"
        with GradientProfiler(Kinked(), loss=squared, sums=sums, micro_batch=micro_batch, verify=False) as profiler:
            profiler.step(inputs(1), key=1)
            if broken:
                assert np.isnan(profiler.step(inputs(3, broken=True), key="broken"))
            profiler.step(inputs(2), key=2)
        states.append(profiler.domain())
    assert "non-finite gradient in first" in states[1].skipped["broken"]
    assert_same(*states)


def test_sums_in_files_are_those_in_memory_and_leave_no_file(tmp_path: Path) -> None:
    model = build("gpt2")
    states = []
    for place in ("host", tmp_path):
        with GradientProfiler(model, sums=place) as profiler:
            for seed in range(3):
                profiler.step(batch(seed=seed))
        states.append(profiler.domain())
    assert_same(*states)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("statistics", ["batches", "all"])
def test_statistics_of_a_batch_in_micro_batches_are_those_of_the_whole(statistics: Any) -> None:
    model = build("llama")
    states = []
    for size in (None, 2):
        with GradientProfiler(model, groups="tensor", statistics=statistics, micro_batch=size) as profiler:
            profiler.step(batch(5))
            profiler.step(batch(4, padded=False))
        states.append(profiler.domain())
    for key in (0, 1):
        one, two = (np.asarray(state.records[key].norms) for state in states)
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-7)
    for name, total in states[0].sums.items():
        torch.testing.assert_close(states[1].sums[name], total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(states[1].squares[name], states[0].squares[name], rtol=1e-4, atol=1e-6)
    assert (states[0].sums != {}) == (statistics == "all")


# --- in a process of its own


@pytest.fixture(scope="module")
def apart() -> tuple[dict[str, int], dict[str, Any]]:
    """Peaks by statistics; and a run without and one with a limit on memory."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=send, args=(theirs,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system
        process.start()
    theirs.close()
    try:
        found: tuple[dict[str, int], dict[str, Any]] = mine.recv()
        return found
    finally:
        process.join()


def test_gradients_are_freed_layer_by_layer(apart: tuple[dict[str, int], dict[str, Any]]) -> None:
    gradient = 12 * (4 << 20)
    peaks, _ = apart
    assert peaks["examples"] < gradient / 2
    assert peaks["batches"] < gradient / 2
    assert peaks["all"] > gradient  # keeps the batch until it is known to be finite


def test_a_device_that_runs_out_of_memory_halves_the_micro_batch_and_goes_on(
    apart: tuple[dict[str, int], dict[str, Any]],
) -> None:
    _, found = apart
    assert found["halved"][0] == {}
    assert found["halved"][1].keys() == {"large"}
    assert found["halved"][1]["large"] in (1, 2, 4)
    assert found["extra"] == {"general": {"large": found["halved"][1]["large"]}}
    np.testing.assert_allclose(found["norms"][1], found["norms"][0], rtol=1e-4)
    np.testing.assert_allclose(found["squares"][1], found["squares"][0], rtol=1e-4)
    assert found["keys"] == ["small", "large", "after"]
    assert "shorten its sequence" in found["message"]
