"""Two processes train a selection as one would: replicas, shards, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.selected_parameters import local
from gradient_blueprints.training.selection import Selection, Unit
from tests.training.test_finetuning import OPTIONS, batches_for, make_model, make_selection

UNITS: tuple[Unit, ...] = ("coordinate", "row", "layer")
STEPS, ACCUMULATE, MAX_NORM = 6, 2, 0.05


def train(
    model: nn.Module, selection: Selection, share: slice, refit: Callable[[nn.Module], None], **options: Any
) -> SelectedAdamW:
    """Each micro-batch's examples are divided between the processes; the mean of their means is the whole's mean."""
    refit(model)
    optimizer = SelectedAdamW(apply_selection(model, selection), **OPTIONS, max_norm=MAX_NORM, **options)
    batches = batches_for(model, STEPS * ACCUMULATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for inputs, targets in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            loss = nn.functional.mse_loss(model(inputs[share]), targets[share]) / ACCUMULATE
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return optimizer


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


class Halves(nn.Module):
    """The second process never uses `rare`."""

    def __init__(self) -> None:
        super().__init__()
        self.often = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    share = slice(rank * 4, rank * 4 + 4)
    world = distributed.group.WORLD
    assert world is not None
    found: dict[str, torch.Tensor] = {}

    def note(kind: str, model: nn.Module) -> None:
        found.update({f"{kind}/{name}": value for name, value in weights(model).items()})

    mesh = init_device_mesh("cpu", (2,))
    for unit in UNITS:
        model = make_model()
        optimizer = train(model, make_selection(0.6, unit), share, lambda model: None, process_group=world)
        note(f"replica-{unit}", model)
        found[f"norm-replica-{unit}"] = torch.tensor(optimizer.last_norm)
        model = make_model()
        optimizer = train(model, make_selection(0.6, unit), share, lambda model: shard(model, mesh))
        note(f"shard-{unit}", model)
        found[f"norm-shard-{unit}"] = torch.tensor(optimizer.last_norm)
        found[f"held-{unit}"] = torch.tensor(sum(entry.selected for entry in optimizer.selected))
        found[f"trained-{unit}"] = torch.tensor(sum(entry.trained for entry in optimizer.selected))
    found["refused"] = torch.tensor(
        [
            refused_inside_a_wrapper(share, world),
            refused_without_a_group(share),
            refused_with_weights_of_its_own(rank, share, world),
            refused_with_a_selection_of_its_own(rank, share, world),
            refused_where_one_process_is_closed(rank, share, world),
            refused_where_no_process_has_a_gradient(world),
        ]
    )
    model = make_model()
    train(model, make_selection(), share, lambda model: None, process_group="alone")
    note("alone", model)
    straight, continued, refused = continue_from_files(rank, share, mesh, folder)
    note("straight", straight)
    note("continued", continued)
    found["refused-states"] = torch.tensor(refused)
    found["rare"] = mean_where_one_process_has_no_gradient(rank, world)
    found["rare-alone"] = mean_where_one_process_has_no_gradient(rank, world, selected=("rare",))
    save_file({name: value.contiguous() for name, value in found.items()}, f"{folder}/{rank}.safetensors")
    distributed.barrier()
    os._exit(0)  # a process that was done has been seen to abort while gloo's threads ended, on a loaded machine


def shard(model: nn.Module, mesh: Any) -> None:
    assert isinstance(model, nn.Sequential)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def continue_from_files(rank: int, share: slice, mesh: Any, folder: str) -> tuple[nn.Module, nn.Module, list[bool]]:
    """Shards trained straight on, and from files in a new model; and whether states of other shards were refused."""
    selection = make_selection(0.6, "layer")  # whole tensors: of each of their shards all is selected
    batches = batches_for(make_model(), STEPS)

    def sharded() -> tuple[nn.Module, SelectedAdamW]:
        model = make_model()
        shard(model, mesh)
        return model, SelectedAdamW(apply_selection(model, selection), **OPTIONS, max_norm=MAX_NORM)

    def go_on(model: nn.Module, optimizer: SelectedAdamW, steps: slice) -> None:
        for inputs, targets in batches[steps]:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[share]), targets[share]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def is_refused(optimizer: SelectedAdamW, state: dict[str, Any]) -> bool:
        try:
            optimizer.load_state_dict(state)
        except ConfigurationError as error:
            return "as many processes as saved it" in str(error)
        return False

    straight, first = sharded()
    go_on(straight, first, slice(0, STEPS // 2))
    shards = {name: local(parameter.detach()) for name, parameter in straight.named_parameters()}
    torch.save({"shards": shards, "optimizer": first.state_dict()}, f"{folder}/{rank}.pt")
    distributed.barrier()
    own, other = (torch.load(f"{folder}/{which}.pt", weights_only=True) for which in (rank, 1 - rank))
    go_on(straight, first, slice(STEPS // 2, STEPS))

    continued, second = sharded()
    for name, parameter in continued.named_parameters():
        local(parameter.detach()).copy_(own["shards"][name])
    alone = SelectedAdamW(apply_selection(make_model(), selection), process_group="alone")
    refused = [
        is_refused(second, other["optimizer"]),
        is_refused(alone, own["optimizer"]),
        is_refused(second, alone.state_dict()),
    ]
    second.load_state_dict(own["optimizer"])
    go_on(continued, second, slice(STEPS // 2, STEPS))
    return straight, continued, refused


def refused_inside_a_wrapper(share: slice, world: Any) -> bool:
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection()), process_group=world)
    wrapped = DistributedDataParallel(model)
    inputs, targets = batches_for(model, 1)[0]
    nn.functional.mse_loss(wrapped(inputs[share]), targets[share]).backward()  # type: ignore[no-untyped-call]
    try:
        optimizer.step()
    except ConfigurationError as error:
        return "DistributedDataParallel" in str(error)
    return False


def refused_without_a_group(share: slice) -> bool:
    try:
        train(make_model(), make_selection(), share, lambda model: None)
    except ConfigurationError as error:
        return "process_group" in str(error)
    return False


def refused_with_weights_of_its_own(rank: int, share: slice, world: Any) -> bool:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] += 1e-6 * rank
    try:
        train(model, make_selection(0.6, "layer"), share, lambda model: None, process_group=world)
    except ConfigurationError as error:
        return "different weights of 2.weight:" in str(error)
    return False


def refused_with_a_selection_of_its_own(rank: int, share: slice, world: Any) -> bool:
    try:
        train(make_model(), make_selection(0.6, seed=rank), share, lambda model: None, process_group=world)
    except ConfigurationError as error:
        return "selected different coordinates" in str(error)
    return False


def refused_where_one_process_is_closed(rank: int, share: slice, world: Any) -> bool:
    model = make_model()
    optimizer = train(model, make_selection(), share, lambda model: None, process_group=world)
    if rank == 0:
        optimizer.close()
    try:
        optimizer.step()
    except ConfigurationError as error:
        return ("closed" if rank == 0 else "another process refuses") in str(error)
    return False


def refused_where_no_process_has_a_gradient(world: Any) -> bool:
    optimizer = SelectedAdamW(apply_selection(make_model(), make_selection()), process_group=world)
    try:
        optimizer.step()
    except ConfigurationError as error:
        return "no gradient has reached" in str(error)
    return False


def mean_where_one_process_has_no_gradient(
    rank: int, world: Any, selected: tuple[str, ...] = ("often", "rare")
) -> torch.Tensor:
    torch.manual_seed(0)
    model = Halves().requires_grad_(False)
    for name in selected:
        model.get_submodule(name).requires_grad_(True)
    selection = make_selection(1.0)
    layers = tuple(type(selection.layers[0])(name, 20, 1.0, 0.5, 1.0) for name in selected)
    whole = Selection(**{**vars_of(selection), "layers": layers})
    optimizer = SelectedAdamW(apply_selection(model, whole), lr=0.1, process_group=world)
    output = model.often(torch.ones(1, 4))
    if rank == 0:
        output = model.rare(output)
    if output.requires_grad:
        output.sum().backward()
    optimizer.step()
    return model.rare.weight.detach()


def vars_of(selection: Selection) -> dict[str, Any]:
    return {name: getattr(selection, name) for name in Selection.__dataclass_fields__}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("processes")
    spawn(process, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]  # torch has no types
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["replica", "shard"])
@pytest.mark.parametrize("unit", UNITS)
def test_two_processes_train_what_one_trains(both: list[dict[str, torch.Tensor]], kind: str, unit: Unit) -> None:
    alone = make_model()
    optimizer = train(alone, make_selection(0.6, unit), slice(0, 8), lambda model: None)
    for found in both:  # clipping and Adam hide a wrong scale; the norm shows it
        assert float(found[f"norm-{kind}-{unit}"]) == pytest.approx(optimizer.last_norm, rel=1e-4)
    for name, expected in weights(alone).items():
        for found in both:
            torch.testing.assert_close(found[f"{kind}-{unit}/{name}"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(both[0][f"{kind}-{unit}/{name}"], both[1][f"{kind}-{unit}/{name}"])


def test_each_process_holds_the_state_of_its_shard_and_counts_all(both: list[dict[str, torch.Tensor]]) -> None:
    for unit in UNITS:
        whole = sum(entry.selected for entry in apply_selection(make_model(), make_selection(0.6, unit)))
        held = [int(found[f"held-{unit}"]) for found in both]
        assert sum(held) == whole
        assert all(0 < part < whole for part in held)
        assert all(int(found[f"trained-{unit}"]) == whole for found in both)


def test_shards_continue_from_files_as_if_they_had_not_stopped(both: list[dict[str, torch.Tensor]]) -> None:
    for found in both:
        for name, start in weights(make_model()).items():
            assert torch.equal(found[f"continued/{name}"], found[f"straight/{name}"])
            if name.startswith("2."):
                assert not torch.equal(found[f"straight/{name}"], start)


def test_the_state_of_another_shard_or_number_of_processes_is_refused(both: list[dict[str, torch.Tensor]]) -> None:
    for found in both:
        assert found["refused-states"].all(), found["refused-states"]


def test_wrong_averages_are_refused_loudly(both: list[dict[str, torch.Tensor]]) -> None:
    for found in both:
        assert found["refused"].tolist() == [True] * 6
    assert not torch.equal(both[0]["alone/2.weight"], both[1]["alone/2.weight"])


@pytest.mark.parametrize("kind", ["rare", "rare-alone"])
def test_a_tensor_that_one_process_did_not_use_stays_the_same_in_both(
    both: list[dict[str, torch.Tensor]], kind: str
) -> None:
    assert torch.equal(both[0][kind], both[1][kind])
    torch.manual_seed(0)
    assert not torch.isclose(both[1][kind], Halves().rare.weight).any()
