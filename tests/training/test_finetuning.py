"""Training a selection: equal to masked dense AdamW, with state and gradients for the chosen alone."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.deltas import DeltaStack, save_delta
from gradient_blueprints.training.finetuning import SelectedAdamW, SelectedParameter, apply_selection, optimizer_bytes
from gradient_blueprints.training.memory import peak_bytes
from gradient_blueprints.training.selection import (
    BYTES_PER_COORDINATE,
    BYTES_PER_DENSE_PARAMETER,
    LocalStatistics,
    Selection,
    Unit,
    select,
)
from tests.training.measured_training import make_blueprint

OPTIONS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def weight_of(model: nn.Module) -> torch.Tensor:
    assert isinstance(model, nn.Sequential)
    middle = model[2]
    assert isinstance(middle, nn.Linear)
    return middle.weight


def make_selection(budget: float = 0.3, unit: Unit = "coordinate", seed: int = 0) -> Selection:
    blueprint = Blueprint.from_dict(
        {
            "model_id": "m",
            "training_checkpoint": 1.0,
            "layers": [
                {"id": str(index), "gradient_norm": norm, "parameters": size}
                for index, norm, size in ((0, 1.0, 208), (2, 5.0, 272), (4, 2.0, 51))
            ],
        }
    )
    return select(blueprint, budget=budget, unit=unit, seed=seed)


def ranked_selection(model: nn.Module, budget: float = 0.3) -> Selection:
    gradients = {name: torch.rand(parameter.shape) for name, parameter in model.named_parameters()}
    layers = [
        {"id": name, "gradient_norm": 1.0, "parameters": gradient.numel()} for name, gradient in gradients.items()
    ]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    return select(blueprint, budget=budget, gradients=gradients, model=model)


def decaying(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def batches_for(model: nn.Module, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(steps, 8, 12, generator=generator, dtype=dtype)
    targets = torch.randn(steps, 8, 3, generator=generator, dtype=dtype)
    return [(inputs[step], targets[step]) for step in range(steps)]


def backward(model: nn.Module, pair: Any, scale: float = 1.0) -> None:
    (nn.functional.mse_loss(model(pair[0]), pair[1]) * scale).backward()  # type: ignore[no-untyped-call]


def train_masked_dense(
    model: nn.Module, selection: Selection, steps: int, accumulate: int = 1, max_norm: float | None = None
) -> nn.Module:
    """The oracle: dense AdamW with masked gradients, and what was not selected put back after each step."""
    masks = {}
    for name, parameter in model.named_parameters():
        indices = selection.indices(name, tuple(parameter.shape))
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[slice(None) if indices is None else torch.tensor(indices)] = True
        masks[name] = mask.view_as(parameter)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    schedule = decaying(optimizer)
    batches = batches_for(model, steps * accumulate)
    for step in range(steps):
        optimizer.zero_grad()
        for pair in batches[step * accumulate : (step + 1) * accumulate]:
            backward(model, pair, 1 / accumulate)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad *= masks[name]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(masks[name], parameter, start[name]))
        schedule.step()
    return model


def train_selected(
    model: nn.Module, selection: Selection, steps: int, accumulate: int = 1, max_norm: float | None = None
) -> tuple[nn.Module, SelectedAdamW]:
    optimizer = SelectedAdamW(apply_selection(model, selection), **OPTIONS, max_norm=max_norm)
    schedule = decaying(optimizer)
    batches = batches_for(model, steps * accumulate)
    for step in range(steps):
        optimizer.zero_grad()
        for pair in batches[step * accumulate : (step + 1) * accumulate]:
            backward(model, pair, 1 / accumulate)
        optimizer.step()
        schedule.step()
    return model, optimizer


@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
@pytest.mark.parametrize(("accumulate", "max_norm"), [(1, None), (3, None), (1, 0.05), (2, 0.05)])
def test_training_equals_masked_dense_adamw(unit: Unit, accumulate: int, max_norm: float | None) -> None:
    selection = make_selection(0.6, unit)
    dense = train_masked_dense(make_model(), selection, 20, accumulate, max_norm)
    sparse, _ = train_selected(make_model(), selection, 20, accumulate, max_norm)
    for expected, found in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(sparse.parameters(), make_model().parameters(), strict=True))


def test_training_equals_masked_dense_adamw_far_below_float32_rounding_in_float64() -> None:
    dense = train_masked_dense(make_model(torch.float64), make_selection(), 20)
    sparse, _ = train_selected(make_model(torch.float64), make_selection(), 20)
    for expected, found in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_what_is_not_selected_stays_bit_for_bit() -> None:
    selection, before = make_selection(), make_model()
    after, _ = train_selected(make_model(), selection, 5)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        indices = selection.indices(name, old.numel())
        assert indices is not None
        kept = torch.ones(old.numel(), dtype=torch.bool)
        kept[torch.tensor(indices)] = False
        assert torch.equal(old.flatten()[kept], new.flatten()[kept])
        assert not torch.isclose(old.flatten()[~kept], new.flatten()[~kept]).any()


def test_no_full_gradient_is_left_after_backward() -> None:
    model, selection = make_model(), make_selection()
    optimizer = SelectedAdamW(apply_selection(model, selection))
    backward(model, batches_for(model, 1)[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.largest_gradient_bytes == 16 * 16 * 4
    optimizer.close()
    backward(model, batches_for(model, 1)[0])
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_layers_that_are_not_selected_are_frozen() -> None:
    model = make_model()
    apply_selection(model, make_selection(0.6, "layer"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"2.weight", "2.bias"}  # the largest norm that fits


def test_measured_memory_is_what_the_budget_counted() -> None:
    selection = make_selection()
    model, optimizer = train_selected(make_model(), selection, 2)
    exact = sum(entry.selected for entry in optimizer.selected)
    assert optimizer.training_bytes() == exact * BYTES_PER_COORDINATE
    assert selection.training_bytes >= optimizer.training_bytes()
    assert optimizer.optimizer_bytes() == exact * 12
    whole = make_selection(1.0)
    _, optimizer = train_selected(make_model(), whole, 2)
    assert optimizer.training_bytes() == 531 * BYTES_PER_DENSE_PARAMETER == whole.training_bytes
    backward(model := make_model(), batches_for(model, 1)[0])
    full = torch.optim.AdamW(model.parameters())
    full.step()
    assert optimizer_bytes(full) == 531 * 8 + 6 * 4  # torch keeps each tensor's step count as a float32 tensor


def test_the_state_may_grow_while_its_bytes_are_counted() -> None:
    """As the first step of a training grows it, under the thread of a meter."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2)) for _ in range(2)])
    first, second = optimizer.param_groups[0]["params"]

    class Filling(torch.Tensor):
        @property
        def nbytes(self) -> int:  # type: ignore[override]  # torch declares an attribute
            optimizer.state[first]["exp_avg_sq"] = optimizer.state[second]["exp_avg"] = torch.ones(2)
            return 8

    optimizer.state[first]["exp_avg"] = torch.ones(2).as_subclass(Filling)
    assert optimizer_bytes(optimizer) == 8
    assert optimizer_bytes(optimizer) == 24


def test_a_scaler_of_gradients_is_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    entries = [SelectedParameter(name, parameter, None) for name, parameter in model.named_parameters()]
    optimizer, scaler = SelectedAdamW(entries), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    with pytest.raises(ConfigurationError, match="train in bfloat16"):
        scaler.step(optimizer)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["coordinate", "row"])
def test_training_continues_from_a_file_as_if_it_had_not_stopped(
    tmp_path: Path, dtype: torch.dtype, unit: Unit
) -> None:
    selection = make_selection(0.6, unit)
    straight, _ = train_selected(make_model(dtype), selection, 6)
    model = make_model(dtype)
    first = SelectedAdamW(apply_selection(model, selection), **OPTIONS)
    schedule = decaying(first)
    batches = batches_for(model, 6)
    for pair in batches[:3]:
        first.zero_grad()
        backward(model, pair)
        first.step()
        schedule.step()
    torch.save({"optimizer": first.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "state.pt")
    first.close()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = SelectedAdamW(apply_selection(model, selection), lr=1.0)
    schedule = decaying(second)
    second.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for pair in batches[3:]:
        second.zero_grad()
        backward(model, pair)
        second.step()
        schedule.step()
    for expected, found in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_state_of_a_tensor_of_another_shape_is_refused_though_its_size_is_the_same() -> None:
    def train(width: int) -> tuple[nn.Linear, SelectedAdamW]:
        model = nn.Linear(width, 12 // width, bias=False)
        selection = select(make_blueprint(model), budget=1.0, model=model)
        return model, SelectedAdamW(apply_selection(model, selection), lr=0.1)

    model, optimizer = train(3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    _, other = train(4)
    with pytest.raises(ConfigurationError, match=r"another shape: weight was .* \(4, 3\), and here .* \(3, 4\)"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("unit", ["coordinate", "row"])
@pytest.mark.parametrize(("budget", "seed"), [(0.5, 0), (0.3, 1)])
def test_the_state_of_another_selection_is_refused(unit: Unit, budget: float, seed: int) -> None:
    _, optimizer = train_selected(make_model(), make_selection(0.3, unit), 1)
    other = SelectedAdamW(apply_selection(make_model(), make_selection(budget, unit, seed)))
    with pytest.raises(ConfigurationError, match="another selection"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_state_that_names_no_selection_is_refused() -> None:
    optimizer = SelectedAdamW(apply_selection(model := make_model(), make_selection()))
    with pytest.raises(ConfigurationError, match="does not say to which selection"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_a_newer_optimizer_closes_the_older_and_trains_as_if_it_were_the_only_one() -> None:
    selection = make_selection()
    alone, _ = train_selected(make_model(), selection, 3)
    model = make_model()
    older = SelectedAdamW(apply_selection(model, selection))
    train_selected(model, selection, 3)
    for expected, found in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found)
    with pytest.raises(ConfigurationError, match="closed"):
        older.step()


def test_a_discarded_optimizer_no_longer_takes_gradients() -> None:
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection()))
    del optimizer
    backward(model, batches_for(model, 1)[0])
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_weights_that_were_changed_from_outside_count_and_not_the_copies_of_before() -> None:
    selection = make_selection()
    model, optimizer = train_selected(make_model(torch.bfloat16), selection, 3)
    fresh = make_model(torch.bfloat16)
    assert not torch.equal(weight_of(model), weight_of(fresh))
    model.load_state_dict(fresh.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    backward(model, batches_for(model, 1)[0])
    optimizer.step()
    for expected, found in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_model_that_is_made_bfloat16_after_its_first_step_keeps_small_updates_too() -> None:
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection()), lr=1e-4, weight_decay=0.0)
    pair = batches_for(model, 1)[0]
    backward(model, pair)
    optimizer.step()
    model.to(torch.bfloat16)
    before = weight_of(model).detach().clone()
    for _ in range(200):
        backward(model, (pair[0].bfloat16(), pair[1].bfloat16()))
        optimizer.step()
    moved = (weight_of(model).detach() - before).flatten()[torch.tensor(make_selection().indices("2.weight", 256))]
    assert float(moved.abs().float().median()) > 5e-3


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"max_norm": 0.0}]
)
def test_options_with_which_adamw_would_not_descend_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        SelectedAdamW(apply_selection(make_model(), make_selection()), **options)


@pytest.mark.parametrize("group", ["WORLD", object()])
def test_what_is_no_process_group_is_refused(group: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"is no process group: .* mesh\.get_group\(\)"):
        SelectedAdamW(apply_selection(make_model(), make_selection()), process_group=group)


@pytest.mark.parametrize(
    ("make_groups", "why"),
    [
        (lambda selected: [], "nothing to train"),
        (lambda selected: [{"params": []}], "nothing to train"),
        (lambda selected: [{"params": selected[:1]}, *selected[1:]], "has to be in one"),
        (lambda selected: [{"params": selected, "maximize": True}], "no option maximize"),
        (lambda selected: [{"params": selected, "max_norm": 1.0}], "no option max_norm"),
        (lambda selected: [{"params": selected[:1]}, {"params": selected[1:], "weight_decay": -1}], "weight_decay"),
        (lambda selected: [{"params": selected[:2]}, {"params": selected[1:]}], "weight is given twice"),
    ],
)
def test_groups_that_would_train_otherwise_than_they_say_are_refused_before_an_older_optimizer_is_closed(
    make_groups: Callable[[list[SelectedParameter]], list[Any]], why: str
) -> None:
    model = make_model()
    selected = apply_selection(model, make_selection())
    own: dict[str, Any] = {"params": sorted(selected, key=lambda entry: entry.name), "name": "of mine"}
    older = SelectedAdamW([own])
    with pytest.raises(ConfigurationError, match=why):
        SelectedAdamW(make_groups(older.selected))
    backward(model, batches_for(model, 1)[0])
    older.step()


def test_options_that_a_schedule_adds_to_the_groups_are_loaded_with_the_state() -> None:
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection()))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-1, total_steps=9)
    other = SelectedAdamW(apply_selection(make_model(), make_selection()))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_lr"] == 1e-1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [0.05, float("inf")])
def test_a_gradient_that_is_no_number_is_clipped_as_by_torch(value: float, max_norm: float) -> None:
    dense, model = make_model(), make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection(1.0)), **OPTIONS, max_norm=max_norm)
    oracle = torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for each in (dense, model):
        weight = each.get_parameter("0.weight")
        weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), value))  # type: ignore[no-untyped-call]
        backward(each, batches_for(each, 1)[0])
    if max_norm < float("inf"):  # which stands for no clipping
        nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    oracle.step()
    optimizer.step()
    for expected, found in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_plain_parameters_are_refused_with_what_to_give_instead() -> None:
    with pytest.raises(ConfigurationError, match="apply_selection"):
        SelectedAdamW(make_model().parameters())  # type: ignore[arg-type]  # what is refused


def test_a_sparse_gradient_is_refused_by_the_name_of_its_tensor() -> None:
    model = nn.ModuleDict({"0": nn.Embedding(26, 8, sparse=True)})
    optimizer = SelectedAdamW(apply_selection(model, make_selection()))
    with pytest.raises(ConfigurationError, match=r"0\.weight has a sparse gradient"):
        model["0"](torch.tensor([1, 2])).sum().backward()
    optimizer.close()


def test_bfloat16_weights_keep_updates_below_their_resolution() -> None:
    selection = make_selection()
    model = make_model(torch.bfloat16)
    optimizer = SelectedAdamW(apply_selection(model, selection), lr=1e-4, weight_decay=0.0)
    pair = batches_for(model, 1)[0]
    before = weight_of(model).detach().clone()
    for _ in range(200):  # one step of 1e-4 is lost on a bfloat16 weight of 0.1
        optimizer.zero_grad()
        backward(model, pair)
        optimizer.step()
    indices = torch.tensor(selection.indices("2.weight", 256))
    moved = (weight_of(model).detach() - before).flatten()[indices].abs()
    assert float(moved.float().median()) > 5e-3


def test_bfloat16_weights_are_the_rounded_weights_of_float32_training_on_the_same_gradients() -> None:
    """One linear map of fixed inputs: its gradient does not depend on the weights, so rounding them changes nothing."""

    def train(dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"2": nn.Linear(16, 16).to(torch.bfloat16).to(dtype)})
        optimizer = SelectedAdamW(apply_selection(model, make_selection()), **OPTIONS)
        for inputs, _ in batches_for(model, 5):
            optimizer.zero_grad()
            model["2"](torch.cat([inputs, inputs[:, :4]], 1).bfloat16().to(dtype)).sum().backward()
            optimizer.step()
        return dict(model.named_parameters())["2.weight"].detach()

    # bfloat16 products of the forward pass differ from float32's by their rounding, 2^-8
    torch.testing.assert_close(train(torch.bfloat16).float(), train(torch.float32), rtol=2e-2, atol=2e-2)


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++ on a CPU")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor itself imports such
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NO_COMPILER)])
def test_a_compiled_model_trains_as_the_plain_one(backend: str) -> None:
    selection = make_selection()
    plain, _ = train_selected(make_model(), selection, 4)
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, selection), **OPTIONS)
    schedule = decaying(optimizer)
    compiled = torch.compile(model, backend=backend)
    for inputs, targets in batches_for(model, 4):
        optimizer.zero_grad()
        nn.functional.mse_loss(compiled(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


class Chain(nn.Sequential):
    """With a forward pass of its own: torch leaves its own modules as they are where they are compiled in place."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for module in self:
            inputs = module(inputs)
        return inputs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_block_by_block_the_full_gradients_of_one_exist_at_a_time_and_as_one_graph_all_do() -> None:
    def train(compile_in_place: Callable[[Chain], None]) -> tuple[Chain, float]:
        """Also the peak of the second backward pass, in full gradients of one of the eight tensors."""
        torch.manual_seed(0)
        model = Chain(*(Chain(*(nn.Linear(256, 256, bias=False) for _ in range(2))) for _ in range(4)))
        layers = [{"id": str(block), "gradient_norm": 1.0} for block in range(4)]
        blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
        compile_in_place(model)
        selection = select(blueprint, budget=0.01, model=model)
        optimizer = SelectedAdamW(apply_selection(model, selection), **OPTIONS)
        inputs = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
        model(inputs).square().mean().backward()
        optimizer.step()
        loss = model(inputs).square().mean()
        peak = peak_bytes(loss.backward)
        optimizer.step()
        return model, peak / optimizer.largest_gradient_bytes

    def compile_blocks(model: Chain) -> None:
        for block in model:
            block.compile(backend="aot_eager")

    plain, one = train(lambda model: None)
    blocks, those_of_a_block = train(compile_blocks)
    whole, all_of_the_graph = train(lambda model: model.compile(backend="aot_eager"))
    assert one < 1.3
    assert 2 <= those_of_a_block < 2.3
    assert 8 <= all_of_the_graph < 8.3
    for found in (blocks, whole):
        for expected, parameter in zip(plain.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_names_that_torch_compile_gave_are_refused_with_how_to_compile(tmp_path: Path) -> None:
    model, selection = make_model(), make_selection()
    model[2] = torch.compile(model[2], backend="aot_eager")  # type: ignore[assignment]  # typed as a function
    blueprint = Blueprint.from_dict(
        {"model_id": "m", "training_checkpoint": 1.0, "layers": [{"id": "2", "gradient_norm": 1.0}]}
    )
    readers: list[Callable[[], object]] = [
        lambda: select(blueprint, model=model),
        lambda: apply_selection(model, selection),
        lambda: LocalStatistics.gather(model, [{}]),
        lambda: save_delta(make_model(), model, selection, tmp_path / "d"),
        lambda: DeltaStack(model),
    ]
    for read in readers:
        with pytest.raises(ConfigurationError, match=r"2\._orig_mod\.weight: compile in place, module\.compile\(\)"):
            read()


def test_the_norm_is_put_together_from_several_devices() -> None:
    """Tensors without contents follow devices that are not here, and refuse to mix them, as real ones would."""
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection(0.6)), max_norm=1.0)
    with FakeTensorMode():
        for number, entry in enumerate(optimizer.selected):
            optimizer._gradients[entry.parameter] = torch.ones(entry.selected, device=f"cuda:{number % 2}")
        with pytest.raises(DataDependentOutputException):  # the norm is there, a number it has not
            optimizer._global_norm()


def test_torchs_distributed_checkpoint_is_refused_with_what_to_save_instead() -> None:
    model = make_model()
    optimizer = SelectedAdamW(apply_selection(model, make_selection()))
    with pytest.raises(ConfigurationError, match=r"save optimizer\.state_dict"):
        get_optimizer_state_dict(model, optimizer)


def test_groups_of_parameters_have_options_of_their_own() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    selected = apply_selection(model, make_selection(1.0))
    groups: list[dict[str, Any]] = [
        {"params": [entry for entry in selected if entry.parameter.dim() == 2], "lr": 0.0, "weight_decay": 0.0},
        {"params": [entry for entry in selected if entry.parameter.dim() == 1]},
    ]
    optimizer = SelectedAdamW(groups, **OPTIONS)
    backward(model, batches_for(model, 1)[0])
    optimizer.step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (old.dim() == 2)


def test_rows_are_trained_whole_and_take_no_index_a_coordinate() -> None:
    selection = make_selection(0.6, "row")
    before, (after, optimizer) = weight_of(make_model()), train_selected(make_model(), selection, 2)
    changed = (weight_of(after) != before).any(1)
    assert torch.equal(changed, (weight_of(after) != before).all(1))
    assert 0 < changed.sum() < 16
    exact = sum(entry.selected for entry in optimizer.selected)
    indices = sum(entry.indices.numel() for entry in optimizer.selected if entry.indices is not None)
    assert optimizer.training_bytes() == exact * BYTES_PER_DENSE_PARAMETER + 4 * indices


def test_an_optimizer_that_no_gradient_reaches_says_so() -> None:
    optimizer = SelectedAdamW(apply_selection(make_model(), make_selection()))
    with pytest.raises(ConfigurationError, match="no gradient has reached"):
        optimizer.step()


def test_an_optimizer_that_went_on_from_a_state_says_so_too() -> None:
    _, trained = train_selected(make_model(), make_selection(), 2)
    optimizer = SelectedAdamW(apply_selection(make_model(), make_selection()))
    optimizer.load_state_dict(trained.state_dict())
    with pytest.raises(ConfigurationError, match="no gradient has reached"):
        optimizer.step()


@pytest.mark.parametrize("replaced", ["2", ""])
def test_an_optimizer_whose_tensors_were_replaced_in_the_model_says_so(replaced: str) -> None:
    model, optimizer = train_selected(make_model(), make_selection(), 1)
    part = model.get_submodule(replaced)
    part.load_state_dict(copy.deepcopy(part.state_dict()), assign=True)
    backward(model, batches_for(model, 1)[0])
    with pytest.raises(ConfigurationError, match=r"the model has other tensors now .*\.weight.* apply_selection"):
        optimizer.step()


def test_gradients_taken_before_a_replacement_still_count_and_steps_without_gradients_are_none() -> None:
    model, optimizer = train_selected(make_model(), make_selection(), 1)
    optimizer.step()
    backward(model, batches_for(model, 1)[0])
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.step()


def test_an_optimizer_is_not_copied() -> None:
    _, optimizer = train_selected(make_model(), make_selection(), 1)
    with pytest.raises(ConfigurationError, match=r"cannot be copied or pickled.* state_dict\(\)"):
        copy.deepcopy(optimizer)


def test_the_state_of_tensors_of_another_size_is_refused() -> None:
    _, optimizer = train_selected(make_model(), make_selection(1.0), 1)
    smaller = make_model()
    smaller[4] = nn.Linear(16, 2)
    other = SelectedAdamW(apply_selection(smaller, make_selection(1.0)), lr=0.5)
    with pytest.raises(ConfigurationError, match=r"another shape: 4\.bias was .* \(3,\), and here .* \(2,\)"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
def test_weights_in_another_order_of_memory_train_as_any_others(unit: Unit, before: bool) -> None:
    def train(memory_format: torch.memory_format) -> nn.Module:
        torch.manual_seed(0)
        model = nn.ModuleDict({"2": nn.Conv2d(3, 8, 3)})
        if before:
            model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch has no types for it
        optimizer = SelectedAdamW(apply_selection(model, selection), **OPTIONS)
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        for _ in range(3):
            model["2"](torch.ones(1, 3, 5, 5)).square().sum().backward()
            optimizer.step()
        return model

    layer = {"id": "2", "gradient_norm": 1.0, "parameters": 224}
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": [layer]})
    selection = select(blueprint, budget=1.0 if unit == "layer" else 0.5, unit=unit)
    plain, other = train(torch.contiguous_format), train(torch.channels_last)
    assert not other.get_parameter("2.weight").is_contiguous()
    for expected, found in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_whose_tensors_were_all_frozen_since_says_so() -> None:
    model, optimizer = train_selected(make_model(), make_selection(), 1)
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="was frozen after apply_selection"):
        optimizer.step()


def test_gradients_taken_before_a_freeze_still_count() -> None:
    model, optimizer = train_selected(make_model(), make_selection(), 1)
    before = copy.deepcopy(model)
    model(torch.ones(2, 12)).sum().backward()
    model.requires_grad_(False)
    optimizer.step()
    assert not torch.equal(weight_of(model), weight_of(before))


def test_a_selection_for_a_smaller_model_is_warned_of() -> None:
    larger = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    with pytest.warns(UserWarning, match="larger than in the model that the selection was made for: 2, 4"):
        apply_selection(larger, make_selection())


def test_a_selection_for_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="selects nothing"):
        apply_selection(nn.ModuleDict({"other": nn.Linear(2, 2)}), make_selection())


@pytest.mark.filterwarnings("error")
def test_a_chosen_coordinate_is_held_in_4_bytes_by_the_selection_and_its_training_together(tmp_path: Path) -> None:
    model = make_model()
    selection = ranked_selection(model)
    for held in (selection, Selection.load(selection.save(tmp_path / "selection.safetensors")), copy.copy(selection)):
        for entry in apply_selection(model, held):
            assert entry.indices is not None
            assert held.parts[entry.name].nbytes == 4 * entry.selected
            assert entry.indices.data_ptr() == held.parts[entry.name].ctypes.data
