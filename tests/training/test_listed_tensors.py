"""A blueprint on a model that it does not quite fit: other layers, tied, frozen and new tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from gradient_blueprints.allocation import LayerValue
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection, release_selection
from gradient_blueprints.training.selection import Budget, LocalStatistics, Selection, Unit, select
from tests.training.profiling.small_models import llama


class Tied(nn.Module):
    """An embedding that is the head too, and a block between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(inputs)))  # type: ignore[no-any-return]  # a module is untyped


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)


def blueprint_of(*layers: str, sizes: dict[str, int] | None = None) -> Blueprint:
    return Blueprint.from_dict(
        {
            "model_id": "m",
            "training_checkpoint": 1.0,
            "layers": [{"id": name, "gradient_norm": 1.0, "parameters": (sizes or {}).get(name)} for name in layers],
        }
    )


def trained(model: nn.Module, selection: Selection) -> dict[str, int]:
    return {entry.name: entry.selected for entry in apply_selection(model, selection)}


@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
def test_layers_that_the_model_does_not_have_get_nothing_of_the_budget(unit: Unit) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="2 of the blueprint's 4 layers are not in the model and are left out: 2, 3"):
        selection = select(blueprint_of("0", "1", "2", "3"), budget=0.5, unit=unit, model=model)
    assert [layer.id for layer in selection.layers] == ["0", "1"]
    assert selection.parameters == 144
    assert selection.selected == sum(trained(model, selection).values()) >= 64


def test_a_blueprint_of_a_model_of_another_size_is_warned_of() -> None:
    sizes = {"block": 72, "score": 27}
    with pytest.warns(UserWarning, match=r"other parameters than this model has in block \(144, here 72\)\. Unless"):
        select(blueprint_of("block", "score", sizes=sizes | {"block": 144}), budget=0.5, model=Classifier())
    model = Classifier()
    model.block.requires_grad_(False)
    select(blueprint_of("block", "score", sizes=sizes), budget=0.5, model=model)  # frozen or not, it is this one


def test_a_blueprint_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="are its tensors named otherwise"):
        select(blueprint_of("model.0"), model=nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    "layers", [("embedding", "block", "head"), ("embedding.weight", "block", "head.weight"), ("head", "block")]
)
@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
def test_tied_tensors_count_once_whatever_name_the_blueprint_has_for_them(layers: tuple[str, ...], unit: Unit) -> None:
    model = Tied()
    selection = select(blueprint_of(*layers), budget=1.0, unit=unit, model=model)
    assert selection.parameters == 160 + 72
    assert trained(model, selection) == {"embedding.weight": 160, "block.weight": 64, "block.bias": 8}
    gradients = {"embedding.weight": torch.rand(20, 8)}
    ranked = select(blueprint_of(*layers), budget=0.5, model=model, gradients=gradients)
    chosen = next(entry for entry in apply_selection(model, ranked) if entry.name == "embedding.weight")
    assert chosen.indices is not None
    largest = gradients["embedding.weight"].flatten().topk(80).indices
    assert chosen.indices.tolist() == sorted(largest.tolist())


# --- frozen tensors


@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
def test_what_was_frozen_is_not_selected(unit: Unit) -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    model.block.bias.requires_grad_(False)
    selection = select(blueprint_of("embedding", "block"), budget=Budget.parameters(64), unit=unit, model=model)
    assert trained(model, selection) == {"block.weight": 64}
    assert selection.parameters == selection.selected == 64
    assert not model.embedding.weight.requires_grad
    assert not model.block.bias.requires_grad


def test_numbers_that_have_no_gradient_are_not_selected() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    selection = select(blueprint_of("a", "b"), budget=0.5, model=model)
    assert trained(model, selection) == {"a.weight": 32, "a.bias": 4, "b.bias": 4}
    assert not selection.copies, "the integers are not trained"


def test_complex_numbers_are_frozen_with_a_warning_and_released() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    for name in ("b", "c"):
        model[name] = nn.Linear(8, 8, bias=False, dtype=torch.complex64)
    selection = select(blueprint_of("a", "b"), budget=0.5, model=model)
    with pytest.warns(UserWarning, match=r"complex numbers are not trained here, and frozen: b\.weight, c\.weight"):
        apply_selection(model, selection)
    assert trained(model, selection) == {"a.weight": 32, "a.bias": 4}
    assert not model["b"].weight.requires_grad
    assert not model["c"].weight.requires_grad
    release_selection(model)
    assert model["b"].weight.requires_grad
    assert model["c"].weight.requires_grad


def test_a_selection_made_without_the_model_leaves_frozen_tensors_and_says_so() -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    selection = select(blueprint_of("embedding", "block", sizes={"embedding": 160, "block": 72}), budget=0.5)
    with pytest.warns(UserWarning, match=r"frozen before and left so: embedding\.weight"):
        assert "embedding.weight" not in trained(model, selection)
    assert not model.embedding.weight.requires_grad
    frozen = Tied().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="all of it is frozen"):
        apply_selection(frozen, selection)
    with pytest.raises(ConfigurationError, match="everything that it lists is frozen"):
        select(blueprint_of("block"), model=frozen)


def test_what_an_earlier_selection_froze_is_free_for_the_next() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["c"].requires_grad_(False)
    worth: dict[str, LayerValue] = {
        "a": lambda layer: float(layer.id == "a"),
        "b": lambda layer: float(layer.id == "b"),
    }
    for layer in ("a", "b", "a"):
        selection = select(blueprint_of("a", "b"), budget=0.5, unit="layer", criterion=worth[layer], model=model)
        assert trained(model, selection) == {f"{layer}.weight": 64, f"{layer}.bias": 8}
        assert not model["c"].weight.requires_grad
    copied = copy.deepcopy(model)
    assert len(trained(copied, select(blueprint_of("a", "b"), budget=0.5, model=copied))) == 4


def train_one_layer_of_two(model: nn.Module) -> None:
    one = select(blueprint_of("a", "b"), budget=0.5, unit="layer", criterion=lambda layer: layer.id == "b", model=model)
    assert trained(model, one) == {"b.weight": 64, "b.bias": 8}


def test_what_is_frozen_after_a_selection_was_released_stays_so() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["c"] = nn.Linear(8, 8).requires_grad_(False)
    train_one_layer_of_two(model)
    release_selection(model)
    model["a"].requires_grad_(False)
    next_one = select(blueprint_of("a", "b", "c"), budget=0.5, model=model)
    assert trained(model, next_one) == {"b.weight": 32, "b.bias": 4}


def test_once_all_was_set_free_the_flags_count() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    train_one_layer_of_two(model)
    model.requires_grad_(True)
    model["b"].requires_grad_(False)
    assert trained(model, select(blueprint_of("a", "b"), budget=0.5, model=model)) == {"a.weight": 32, "a.bias": 4}


@pytest.mark.parametrize(("changed", "trainable"), [("b.weight", False), ("a.weight", True)])
def test_other_flags_than_the_last_selection_left_are_refused(changed: str, trainable: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    train_one_layer_of_two(model)
    model.get_parameter(changed).requires_grad_(trainable)
    with pytest.raises(ConfigurationError, match=rf"by peft: {changed}\. .* call release_selection\(model\)"):
        select(blueprint_of("a", "b"), model=model)


# --- adapters of peft


def test_a_model_with_adapters_is_refused_with_what_to_do() -> None:
    model = llama()
    blueprint = blueprint_of("model.layers.0.self_attn")
    selection = select(blueprint, model=model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    ids = torch.arange(6).view(1, 6)
    for asked in (
        lambda: select(blueprint, model=model),
        lambda: apply_selection(model, selection),
        lambda: LocalStatistics.gather(model, [{"input_ids": ids}]),
    ):
        with pytest.raises(ConfigurationError, match=r"adapters of peft, at .*q_proj.* merge_and_unload\(\)"):
            asked()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_after_an_adapter_was_merged_nothing_is_selected_until_it_is_released() -> None:
    model = llama()
    blueprint = blueprint_of(*(name for name, _ in model.named_parameters()))
    apply_selection(model, select(blueprint, budget=0.3, unit="layer", model=model))
    merged = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    with pytest.raises(ConfigurationError, match="since the last selection, by you or by peft"):
        select(blueprint, model=merged)
    release_selection(merged)
    assert select(blueprint, model=merged).parameters == sum(each.numel() for each in merged.parameters())


# --- tensors outside the blueprint


def test_a_new_head_is_frozen_with_a_warning_or_trained_on_request() -> None:
    model, blueprint = Classifier(), blueprint_of("block")
    with pytest.warns(UserWarning, match=r"does not list score\.weight, score\.bias: frozen .* also_train"):
        assert trained(model, select(blueprint, budget=0.5, model=model)) == {"block.weight": 32, "block.bias": 4}
    for pattern in ("score", "score.*", "sc*"):
        selection = select(blueprint, budget=0.5, model=model, also_train=[pattern])
        assert trained(model, selection) == {"block.weight": 32, "block.bias": 4, "score.weight": 24, "score.bias": 3}
        assert (selection.selected, selection.parameters) == (63, 99)
    with pytest.raises(ConfigurationError, match="nothing in the model that may be trained is named 'classifier'"):
        select(blueprint, model=model, also_train=["classifier", "score"])


def test_a_tensor_of_the_blueprint_can_be_trained_whole_beside_the_budget() -> None:
    model = Classifier()
    blueprint = blueprint_of("block", "score", sizes={"score": 27})
    selection = select(blueprint, budget=0.5, model=model, also_train=["*.bias", "score"])
    assert trained(model, selection) == {"block.weight": 32, "block.bias": 8, "score.weight": 24, "score.bias": 3}


def test_a_selection_on_a_model_survives_its_file(tmp_path: Path) -> None:
    model = Classifier()
    model.block.bias.requires_grad_(False)
    selection = select(blueprint_of("block"), budget=0.5, model=model, also_train=["score"])
    again = Selection.load(selection.save(tmp_path / "selection"))
    assert again.layers == selection.layers
    assert again.summary() == selection.summary()
    assert trained(copy.deepcopy(model), again) == trained(model, selection)


def test_a_new_head_learns_beside_the_selection() -> None:
    torch.manual_seed(0)
    model = Classifier()
    before = copy.deepcopy(model)
    selection = select(blueprint_of("block"), budget=0.5, model=model, also_train=["score"])
    optimizer = SelectedAdamW(apply_selection(model, selection), lr=0.1)
    model.score(model.block(torch.ones(2, 8))).square().sum().backward()
    optimizer.step()
    assert not torch.isclose(model.score.weight, before.score.weight).any()
    assert np.isclose((model.block.weight != before.block.weight).float().mean().item(), 0.5)
