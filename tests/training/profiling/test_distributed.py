"""Two real processes over gloo: parts of the batches, or of the parameters too, give the document of one process."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling import GradientProfiler, ProfileState, gather_states
from gradient_blueprints.training.profiling.state_files import load_state, save_state
from tests.training.profiling.small_models import Batch, batch, build

WORLD = 2
BATCHES = [batch(3, 9, seed=1), batch(4, 7, seed=2), batch(4, 9, seed=3), batch(2, 11, seed=4)]
SHARDED = ["llama", "mixtral"]


def profile(model: Any, batches: dict[int, Batch]) -> GradientProfiler:
    with GradientProfiler(model) as profiler:
        for number, values in batches.items():
            profiler.step(values, key=number)
    return profiler


def rank(number: int, folder: Path, connection: Any) -> None:
    """What each process of a training run does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=WORLD)
    mine = {key: values for key, values in enumerate(BATCHES) if key % WORLD == number}
    found: dict[str, Any] = {}

    wrapped = DistributedDataParallel(build("llama"))
    profiler = profile(wrapped, mine)
    save_state(gather_states(profiler.state()), folder / f"ddp {number}")
    wrapped(**BATCHES[number]).loss.backward()  # trains on
    found["ddp trains"] = all(parameter.grad is not None for parameter in wrapped.parameters())

    mine_alone = profiler.state()
    if number:
        mine_alone.domains["general"].squares, mine_alone.domains["general"].squared = {}, 0
    found["squares of some"] = gather_states(mine_alone).domains["general"].squares

    mesh = init_device_mesh("cpu", (WORLD,))
    for architecture in SHARDED:
        model: Any = build(architecture)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        profiler = profile(model, mine)
        save_state(gather_states(profiler.state()), folder / f"{architecture} {number}")
        found[f"{architecture} shards"] = [
            parameter.to_local().numel() / parameter.numel() for parameter in model.parameters()
        ]
        found[f"{architecture} one by one"] = profiler.one_by_one
        model(**BATCHES[number]).loss.backward()
        found[f"{architecture} trains"] = all(parameter.grad is not None for parameter in model.parameters())
        with GradientProfiler(model, micro_batch=1, verify=False) as uneven:
            try:
                uneven.step(batch(2 + number))
            except ConfigurationError as error:
                found["uneven"] = str(error)
    connection.send(found)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes found."""
    context = multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("ranks")
    running = []
    for number in range(WORLD):
        mine, theirs = context.Pipe()
        process = context.Process(target=rank, args=(number, folder, theirs))
        process.start()
        theirs.close()
        running.append((process, mine))
    found = [mine.recv() for _, mine in running]
    for number, (process, _) in enumerate(running):
        process.join()
        found[number] |= {name: load_state(folder / f"{name} {number}") for name in ("ddp", *SHARDED)}
    return found


def assert_document_of_one_process(state: ProfileState, architecture: str) -> None:
    whole = profile(build(architecture), dict(enumerate(BATCHES)))
    gathered = GradientProfiler(build(architecture))
    gathered.absorb(state)
    assert state.domains["general"].records.keys() == {0, 1, 2, 3}
    for name, total in whole.domain().sums.items():
        torch.testing.assert_close(state.domains["general"].sums[name], total, rtol=1e-4, atol=1e-5)
    mine, others = gathered.blueprint("tiny", 1.0), whole.blueprint("tiny", 1.0)
    for one, two in zip(mine.layers, others.layers, strict=True):
        for name, value in two.model_dump().items():
            if isinstance(value, float) and name != "signal":  # a difference of sums, zero within its rounding
                assert getattr(one, name) == pytest.approx(value, rel=1e-4, abs=1e-5), (one.id, name)
            elif isinstance(value, int | str):
                assert getattr(one, name) == value
        assert one.signal == pytest.approx(two.signal, rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(gathered.table(), whole.table(), rtol=1e-4, atol=1e-6)


def test_ranks_with_a_model_each_gather_the_document_of_one_process(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert_document_of_one_process(found["ddp"], "llama")
        assert found["ddp trains"]
        assert found["ddp"].domains["general"].squares
        assert found["squares of some"] == {}


@pytest.mark.parametrize("architecture", SHARDED)
def test_ranks_that_share_the_parameters_gather_the_document_of_one_process(
    ranks: list[dict[str, Any]], architecture: str
) -> None:
    for found in ranks:
        assert max(found[f"{architecture} shards"]) < 1
        assert found[f"{architecture} one by one"] is None
        assert_document_of_one_process(found[architecture], architecture)
        assert found[f"{architecture} trains"]


def test_ranks_that_share_the_parameters_must_run_in_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "[2, 3]" in found["uneven"]
