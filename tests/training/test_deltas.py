"""Sparse deltas: exact on, exact off, stacked, merged, and only on the model that they were made for."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.deltas import Change, Delta, DeltaStack, Weights, digest_of, save_delta
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.selection import Selection, select
from gradient_blueprints.training.selection.indices import pack, unpack
from tests.training.test_finetuning import make_model, make_selection, train_selected, weight_of
from tests.training.test_selection import make_blueprint


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@given(st.sets(st.integers(0, 70_000), max_size=60))
def test_packed_indices_come_back(chosen: set[int]) -> None:
    indices = np.array(sorted(chosen), np.int64)
    assert np.array_equal(unpack(pack(indices)), indices)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
def test_packed_random_indices_are_near_their_entropy(share: float) -> None:
    indices = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < share)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * 1_000_000 / 8
    assert pack(indices).nbytes < 1.05 * entropy


def test_a_delta_s_file_is_its_values_and_the_entropy_of_their_places(tmp_path: Path) -> None:
    base = {"w": torch.zeros(1000, 1000, dtype=torch.bfloat16)}
    tuned = {"w": (torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) < 0.1).bfloat16()}
    count = int(tuned["w"].count_nonzero())
    entropy = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)) * 1_000_000 / 8
    assert save_delta(base, tuned, None, tmp_path / "d").stat().st_size < 2 * count + 1.05 * entropy + 1_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_gives_the_tuned_model_and_its_removal_the_base_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base, selection = make_model(dtype), make_selection()
    tuned, _ = train_selected(make_model(dtype), selection, 3)
    delta = Delta.load(save_delta(base, tuned, selection, tmp_path / "delta.safetensors"))
    assert 0 < delta.changed <= selection.selected
    check_on_and_off(copy.deepcopy(base), delta, tuned)


def check_on_and_off(model: nn.Module, delta: Delta, tuned: nn.Module) -> None:
    """A delta makes the model the tuned one, and its removal what it was."""
    before = copy.deepcopy(model)
    stack = DeltaStack(model)
    stack.apply("task", delta)
    assert equal(model, tuned)
    stack.remove("task")
    assert equal(model, before)


def test_deltas_stack_in_any_order_and_each_can_be_removed(tmp_path: Path) -> None:
    base = make_model()
    tuned = [train_selected(make_model(), make_selection(share), 3)[0] for share in (0.2, 0.4, 0.6)]
    deltas = [Delta.load(save_delta(base, model, None, tmp_path / "d")) for model in tuned]
    sums = [
        sum((model_parameter - start for model_parameter in parameters), start).detach()
        for start, *parameters in zip(base.parameters(), *(model.parameters() for model in tuned), strict=True)
    ]
    for order in itertools.permutations(range(3)):
        model = copy.deepcopy(base)
        stack = DeltaStack(model)
        for number in order:
            stack.apply(str(number), deltas[number])
        for expected, found in zip(sums, model.parameters(), strict=True):
            torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
        changed = [[(a != b) for a, b in zip(base.parameters(), each.parameters(), strict=True)] for each in tuned]
        for index, found in enumerate(model.parameters()):
            for own, each in zip(changed, tuned, strict=True):
                alone = own[index] & (sum(other[index].int() for other in changed) == 1)
                assert torch.equal(found[alone], list(each.parameters())[index][alone]), "its value, not a rounded sum"
        stack.remove(str(order[0]))
        stack.remove(str(order[2]))
        assert equal(model, tuned[order[1]])
        stack.remove(str(order[1]))
        assert equal(model, base)


def test_a_weight_scales_the_change(tmp_path: Path) -> None:
    base, (tuned, _) = make_model(), train_selected(make_model(), make_selection(), 3)
    model = copy.deepcopy(base)
    DeltaStack(model).apply("half", Delta.load(save_delta(base, tuned, None, tmp_path / "d")), weight=0.5)
    for start, end, found in zip(base.parameters(), tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, (start + end) / 2)


def test_a_delta_is_not_put_on_another_model(tmp_path: Path) -> None:
    base, (tuned, _) = make_model(), train_selected(make_model(), make_selection(), 1)
    delta = Delta.load(save_delta(base, tuned, None, tmp_path / "d"))
    other = copy.deepcopy(base)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-6
    before = copy.deepcopy(other)
    for model in (other, nn.Linear(2, 2)):
        with pytest.raises(ConfigurationError, match="another model"):
            DeltaStack(model).apply("task", delta)
    assert equal(other, before)


def tune_by_hand(model: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter[0] += 1
    return tuned


def test_weights_that_changed_since_a_delta_was_removed_are_another_model(tmp_path: Path) -> None:
    base = make_model()
    delta = Delta.load(save_delta(base, tune_by_hand(base), None, tmp_path / "d"))
    stack = DeltaStack(base)
    stack.apply("task", delta)
    stack.remove("task")
    with torch.no_grad():
        next(base.parameters()).add_(1)
    with pytest.raises(ConfigurationError, match="another model"):
        stack.apply("task", delta)


def test_a_tensor_that_is_not_contiguous_takes_deltas_too(tmp_path: Path) -> None:
    base = make_model()
    tuned = tune_by_hand(base)
    delta = Delta.load(save_delta(base, tuned, None, tmp_path / "d"))
    model = copy.deepcopy(base)
    weight = weight_of(model)
    weight.data = weight.data.t().contiguous().t()
    stack = DeltaStack(model)
    stack.apply("task", delta)
    assert equal(model, tuned)
    assert not weight.is_contiguous()
    stack.remove("task")
    assert equal(model, base)


def test_removing_what_is_not_applied_says_what_is(tmp_path: Path) -> None:
    base = make_model()
    stack = DeltaStack(base)
    stack.apply("task", Delta.load(save_delta(base, tune_by_hand(base), None, tmp_path / "d")))
    with pytest.raises(ConfigurationError, match="'tusk' is not applied; there is task"):
        stack.remove("tusk")


def test_a_precision_changed_under_a_delta_is_refused_before_anything_is_lost(tmp_path: Path) -> None:
    base = make_model()
    delta = Delta.load(save_delta(base, tune_by_hand(base), None, tmp_path / "d"))
    model = copy.deepcopy(base)
    stack = DeltaStack(model)
    stack.apply("code", delta)
    before = copy.deepcopy(model.to(torch.bfloat16))
    with pytest.raises(ConfigurationError, match="before the precision is changed"):
        stack.apply("style", delta)
    with pytest.raises(ConfigurationError, match=r"bfloat16 now and was torch.float32"):
        stack.remove("code")
    assert stack.applied == {"code": 1.0}
    assert equal(model, before)
    model.float()  # what was rounded does not come back
    with pytest.raises(ConfigurationError, match="was trained, loaded or changed otherwise"):
        stack.remove("code")


def train_on(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)


def load_another(model: nn.Module, *, assign: bool) -> None:
    other = {name: value + 1 for name, value in make_model().state_dict().items()}
    model.load_state_dict(other, assign=assign)


@pytest.mark.parametrize(
    "change",
    [
        train_on,
        lambda model: load_another(model, assign=False),
        lambda model: load_another(model, assign=True),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(1))),
    ],
    ids=["trained", "loaded", "assigned", "smaller"],
)
def test_weights_that_changed_under_a_delta_are_refused_not_mixed_with_their_originals(
    tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    model = make_model()
    tuned = tune_by_hand(model)
    delta = Delta.load(save_delta(model, tuned, None, tmp_path / "d"))
    beside = copy.deepcopy(model)
    nn.init.zeros_(beside.get_parameter("4.bias"))
    other = Delta.load(save_delta(model, beside, None, tmp_path / "beside"))
    stack = DeltaStack(model)
    stack.apply("code", delta)
    stack.apply("style", delta, weight=0.3)
    change(model)
    before = copy.deepcopy(model)
    match = r"^0\.weight was trained, loaded .* merge\(\) keeps"
    with pytest.raises(ConfigurationError, match=match):
        stack.remove("code")
    with pytest.raises(ConfigurationError, match=match):
        stack.apply("other", other)
    assert equal(model, before)
    assert stack.applied == {"code": 1.0, "style": 0.3}
    stack.merge()
    assert equal(model, before)


def test_a_tensor_that_is_gone_under_a_delta_is_told(tmp_path: Path) -> None:
    model = make_model()
    stack = DeltaStack(model)
    stack.apply("code", Delta.load(save_delta(model, tune_by_hand(model), None, tmp_path / "d")))
    model[4] = nn.Identity()
    with pytest.raises(ConfigurationError, match=r"4\.weight is gone"):
        stack.remove("code")


def test_the_weights_of_now_are_read_at_each_call(tmp_path: Path) -> None:
    base = make_model()
    tuned = tune_by_hand(base)
    delta = Delta.load(save_delta(base, tuned, None, tmp_path / "d"))
    model = make_model()
    stack = DeltaStack(model)
    model.load_state_dict(copy.deepcopy(base.state_dict()), assign=True)
    stack.apply("task", delta)
    assert equal(model, tuned)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    stack.remove("task")
    assert equal(model, base)


def test_what_changed_beside_a_delta_stays_and_makes_another_base(tmp_path: Path) -> None:
    base = make_model()
    tuned = tune_by_hand(base)
    delta = Delta.load(save_delta(base, tuned, None, tmp_path / "d"))
    stack = DeltaStack(base)
    stack.apply("task", delta)
    with torch.no_grad():
        weight_of(base)[1] = 7
    with pytest.raises(ConfigurationError, match=r"another model: 2\.weight"):
        stack.apply("again", delta)
    stack.remove("task")
    assert (weight_of(base)[1] == 7).all()


def test_a_delta_that_does_not_fit_its_tensors_is_refused_before_anything_changes() -> None:
    model = make_model()
    before = copy.deepcopy(model)
    bias, weight = (model.get_parameter(name) for name in ("0.bias", "0.weight"))
    fitting = Change(torch.tensor([1]), torch.tensor([5.0]), digest_of(bias))
    stack = DeltaStack(model)
    for indices, values in (
        ([5, 192], [1.0, 2.0]),
        ([-1, 5], [1.0, 2.0]),
        ([5, 5], [1.0, 2.0]),
        ([5, 6], [1.0]),
        ([5], [1]),
        ([5.0], [1.0]),
    ):
        damaged = Change(torch.tensor(indices), torch.tensor(values), digest_of(weight))
        with pytest.raises(ConfigurationError, match=r"'task' is damaged: .* do not fit 0\.weight"):
            stack.apply("task", Delta({"0.bias": fitting, "0.weight": damaged}))
    with pytest.raises(ConfigurationError, match="finite"):
        stack.apply("task", Delta({"0.bias": fitting}), weight=math.nan)
    assert equal(model, before)
    assert stack.applied == {}


def test_a_file_that_is_no_delta_is_named(tmp_path: Path) -> None:
    base, file = make_model(), tmp_path / "delta.safetensors"
    save_delta(base, tune_by_hand(base), None, file)
    whole = file.read_bytes()
    make_selection().save(tmp_path / "selection")
    for content in (b"hello world, no safetensors", whole[:-40], whole.replace(b"0.weight/values", b"9.weight/values")):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"delta\.safetensors holds no whole delta"):
            Delta.load(file)
    with pytest.raises(ConfigurationError, match="selection holds no delta"):
        Delta.load(tmp_path / "selection")


@pytest.mark.parametrize("selected", [True, False])
def test_a_base_that_followed_the_training_is_refused(tmp_path: Path, selected: bool) -> None:
    model, selection = make_model(), make_selection()
    base = model.state_dict()
    copied = {name: tensor.clone() for name, tensor in base.items()}
    train_selected(model, selection, 1)
    for same in (base, model):
        with pytest.raises(ConfigurationError, match=r"0\.bias|0\.weight is the same memory .* clone the base"):
            save_delta(same, model, selection if selected else None, tmp_path / "d")
    assert Delta.load(save_delta(copied, model, selection if selected else None, tmp_path / "d")).changed


@pytest.mark.parametrize("selected", [True, False])
def test_tensors_that_were_not_trained_may_be_shared(tmp_path: Path, selected: bool) -> None:
    base = make_model()
    tuned = copy.deepcopy(base)
    tuned[0] = base[0]
    selection = select(make_blueprint({"2": 1.0, "4": 1.0}), budget=0.5, model=tuned)
    with torch.no_grad():
        parts = selection.indices("2.weight", (16, 16))
        weight_of(tuned).view(-1)[parts] += 1
    delta = Delta.load(save_delta(base, tuned, selection if selected else None, tmp_path / "d"))
    assert delta.changes.keys() == {"2.weight"}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1")])
def test_base_and_tuned_may_be_on_different_devices(tmp_path: Path, devices: tuple[str, str]) -> None:
    """Tensors without contents follow devices that are not here, and refuse to mix them, as real ones would."""
    with FakeTensorMode():
        base, tuned = ({"weight": torch.zeros(4, 4, device=device)} for device in devices)
        with pytest.raises(DynamicOutputShapeException):  # they were compared, with a number of differences it has not
            save_delta(base, tuned, None, tmp_path / "d")


def test_weights_that_are_not_loaded_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = make_model()
    for read in (lambda: save_delta(make_model(), model, None, tmp_path / "d"), lambda: DeltaStack(model)):
        with pytest.raises(ConfigurationError, match=r"0\.weight is on the meta device, 6 tensors"):
            read()


def test_one_shard_of_a_tuned_checkpoint_is_refused(tmp_path: Path) -> None:
    base = make_model()
    shard = {name: value for name, value in tune_by_hand(base).state_dict().items() if name.startswith("2.")}
    with pytest.raises(ConfigurationError, match=r"0\.weight is not in the tuned weights, 4 tensors"):
        save_delta(base, shard, None, tmp_path / "d")


class Tied(nn.Module):
    """A head that is the embedding, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize("base_is", ["model", "state"])
@pytest.mark.parametrize("tuned_is", ["model", "state", "file"])
def test_a_tied_head_is_saved_once_from_models_and_from_mappings(tmp_path: Path, base_is: str, tuned_is: str) -> None:
    base = Tied()
    tuned = tune_by_hand(base)
    forms: dict[str, Weights] = {
        "model": tuned,
        "state": tuned.state_dict(),
        "file": {name: value for name, value in tuned.state_dict().items() if name != "head.weight"},
    }
    start = base if base_is == "model" else base.state_dict()
    delta = Delta.load(save_delta(start, forms[tuned_is], None, tmp_path / "d"))
    assert delta.changes.keys() == {"embedding.weight"}
    DeltaStack(base).apply("task", delta)
    assert equal(base, tuned)


@pytest.mark.parametrize("names", [("head.weight",), ("head.weight", "embedding.weight")])
def test_a_delta_may_know_a_tied_tensor_by_another_name_or_by_two(tmp_path: Path, names: tuple[str, ...]) -> None:
    base = Tied()
    tuned = tune_by_hand(base)
    before = copy.deepcopy(base)
    start, end = ({name: each.state_dict()[name].clone() for name in names} for each in (base, tuned))
    delta = Delta.load(save_delta(start, end, None, tmp_path / "d"))
    assert delta.changes.keys() == set(names)
    stack = DeltaStack(base)
    stack.apply("task", delta)
    assert equal(base, tuned)
    stack.remove("task")
    assert equal(base, before)


def test_a_delta_that_tears_a_tied_tensor_apart_is_refused(tmp_path: Path) -> None:
    base, before = Tied(), Tied()
    before.load_state_dict(base.state_dict())
    start = {name: base.head.weight.detach().clone() for name in ("embedding.weight", "head.weight")}
    end = {name: weights + i for i, (name, weights) in enumerate(start.items(), 1)}
    delta = Delta.load(save_delta(start, end, None, tmp_path / "d"))
    with pytest.raises(ConfigurationError, match=r"head\.weight is the same tensor as embedding\.weight"):
        DeltaStack(base).apply("task", delta)
    assert equal(base, before)


@pytest.mark.parametrize("layer", ["embedding", "head"])
@pytest.mark.parametrize("tuned_is", ["model", "file"])
def test_a_trained_tied_head_is_within_its_selection_by_whichever_name_the_blueprint_has_for_it(
    tmp_path: Path, layer: str, tuned_is: str
) -> None:
    base = Tied()
    tuned = copy.deepcopy(base)
    blueprint, gradient = make_blueprint({layer: 1.0}), torch.arange(1.0, 16.0).view(5, 3)
    selection = select(blueprint, budget=0.4, model=tuned, gradients={"embedding.weight": gradient})
    optimizer = SelectedAdamW(apply_selection(tuned, selection), lr=0.1)
    tuned.head(tuned.embedding(torch.arange(5))).square().sum().backward()
    optimizer.step()
    file = {name: value for name, value in tuned.state_dict().items() if name != "head.weight"}
    result = tuned if tuned_is == "model" else file
    delta = Delta.load(save_delta(base, result, selection, tmp_path / "d"))
    assert delta.changed == selection.selected == 6
    other = select(blueprint, budget=0.4, model=base, gradients={"embedding.weight": gradient.flip(0)})
    with pytest.raises(ConfigurationError, match="outside the selection"):
        save_delta(base, result, other, tmp_path / "d")
    DeltaStack(base).apply("task", delta)
    assert equal(base, tuned)


def test_a_buffer_that_moved_is_refused(tmp_path: Path) -> None:
    """A delta that left it away would not give the tuned model."""
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tuned = copy.deepcopy(base)
    tuned(torch.randn(8, 4))
    for left, right in ((base, tuned), (base.state_dict(), tuned), (base, tuned.state_dict())):
        with pytest.raises(ConfigurationError, match=r"1\.running_mean changed, which is a buffer"):
            save_delta(left, right, None, tmp_path / "delta.safetensors")
    tuned[1].load_state_dict(base[1].state_dict())
    assert Delta.load(save_delta(base, tuned, None, tmp_path / "delta.safetensors")).changed == 0


def test_a_buffer_that_checkpoints_brought_into_a_delta_is_told(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    tuned = tune_by_hand(base)
    tuned(torch.randn(8, 4))
    delta = Delta.load(save_delta(base.state_dict(), tuned.state_dict(), None, tmp_path / "d"))
    with pytest.raises(ConfigurationError, match=r"1\.running_mean, a buffer of this model"):
        DeltaStack(base).apply("task", delta)


def test_a_buffer_of_nan_that_stayed_is_no_change(tmp_path: Path) -> None:
    base = nn.Linear(4, 4)
    base.register_buffer("quantile", torch.tensor([math.nan]))
    assert Delta.load(save_delta(base, tune_by_hand(base), None, tmp_path / "d")).changed == 5


def test_shards_are_refused_with_how_to_gather_them(tmp_path: Path) -> None:
    base, sharded = nn.Linear(2, 2), nn.Linear(2, 2)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # torch's own, without a peer
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ConfigurationError, match="full_state_dict"):
            save_delta(base, sharded, None, tmp_path / "d")
        with pytest.raises(ConfigurationError, match="full_state_dict"):
            DeltaStack(sharded)
    finally:
        distributed.destroy_process_group()


def test_merged_deltas_are_the_new_base(tmp_path: Path) -> None:
    base, (tuned, _) = make_model(), train_selected(make_model(), make_selection(), 1)
    delta = Delta.load(save_delta(base, tuned, None, tmp_path / "d"))
    stack = DeltaStack(base)
    stack.apply("task", delta)
    stack.merge()
    assert equal(base, tuned)
    assert stack.applied == {}
    with pytest.raises(ConfigurationError, match="another model"):
        stack.apply("task", delta)


def test_a_change_outside_the_selection_is_refused(tmp_path: Path) -> None:
    base = make_model()
    tuned, _ = train_selected(make_model(), make_selection(0.6), 1)
    with pytest.raises(ConfigurationError, match="outside the selection"):
        save_delta(base, tuned, make_selection(0.1), tmp_path / "d")


# --- new heads, and checkpoints that name tensors otherwise


def headed(seed: int, head: str = "score", outputs: int = 3) -> nn.ModuleDict:
    """The same body at every load, under a head that is drawn anew."""
    torch.manual_seed(0)
    body = nn.Linear(4, 4)
    torch.manual_seed(seed)
    return nn.ModuleDict({"body": body, head: nn.Linear(4, outputs)})


def tune_with_head(seed: int) -> tuple[nn.ModuleDict, Selection]:
    tuned = headed(seed)
    selection = select(make_blueprint({"body": 1.0}), budget=0.5, model=tuned, also_train=["score"])
    optimizer = SelectedAdamW(apply_selection(tuned, selection), lr=0.1)
    tuned["score"](tuned["body"](torch.ones(2, 4))).square().sum().backward()
    optimizer.step()
    return tuned, selection


@pytest.mark.parametrize("base_is", ["model", "state"])
@pytest.mark.parametrize(("head", "outputs"), [("score", 3), ("score", 2), ("lm_head", 9)])
def test_a_delta_brings_its_new_head_whatever_head_the_base_had(
    tmp_path: Path, base_is: str, head: str, outputs: int
) -> None:
    tuned, selection = tune_with_head(seed=1)
    base = headed(2, head, outputs)
    delta = Delta.load(
        save_delta(base if base_is == "model" else base.state_dict(), tuned, selection, tmp_path / "delta")
    )
    check_on_and_off(headed(seed=3), delta, tuned)


def test_a_new_head_stacks_as_any_tensor(tmp_path: Path) -> None:
    model, before = headed(seed=3), headed(seed=3)
    stack = DeltaStack(model)
    heads = []
    for seed in (1, 2):
        tuned, selection = tune_with_head(seed)
        heads.append(tuned.get_parameter("score.weight"))
        delta = Delta.load(save_delta(headed(seed), tuned, selection, tmp_path / "delta"))
        stack.apply(str(seed), delta, weight=0.5)
    torch.testing.assert_close(model.get_parameter("score.weight"), (heads[0] + heads[1]) / 2)
    stack.remove("1")
    stack.remove("2")
    assert equal(model, before)


def test_a_new_head_of_another_size_and_another_body_are_refused(tmp_path: Path) -> None:
    tuned, selection = tune_with_head(seed=1)
    delta = Delta.load(save_delta(headed(seed=1), tuned, selection, tmp_path / "delta"))
    with pytest.raises(ConfigurationError, match=r"another model: score\.weight is not what"):
        DeltaStack(headed(seed=1, outputs=2)).apply("task", delta)
    with pytest.raises(ConfigurationError, match=r"another model: body\.weight is not what"):
        DeltaStack(tune_by_hand(headed(seed=1))).apply("task", delta)


def test_a_tuned_checkpoint_without_a_listed_tensor_is_one_shard_with_a_new_head_too(tmp_path: Path) -> None:
    tuned, selection = tune_with_head(seed=1)
    shard = {name: value for name, value in tuned.state_dict().items() if name != "body.bias"}
    with pytest.raises(ConfigurationError, match=r"body\.bias is not in the tuned weights"):
        save_delta(headed(seed=1), shard, selection, tmp_path / "delta")


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"stored.{name}": value for name, value in model.state_dict().items()}


def test_a_checkpoint_that_names_its_tensors_otherwise_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    base, selection = make_model(), make_selection()
    tuned, _ = train_selected(make_model(), selection, 1)
    with pytest.raises(ConfigurationError, match=r"0\.weight is not in the base, 6 tensors .* from_pretrained"):
        save_delta(renamed(base), tuned, selection, tmp_path / "d")
    with pytest.raises(ConfigurationError, match=r"stored\.0\.weight changed outside .* from_pretrained"):
        save_delta(renamed(base), renamed(tuned), selection, tmp_path / "d")
    delta = Delta.load(save_delta(renamed(base), renamed(tuned), None, tmp_path / "d"))
    with pytest.raises(ConfigurationError, match=r"stored\.0\.weight is not in this.* from_pretrained"):
        DeltaStack(base).apply("task", delta)
