"""What Axolotl and LLaMA-Factory are told, held against their own rules."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import transformers as hf
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Granularity
from gradient_blueprints.training.bridges import freezing
from gradient_blueprints.training.bridges.freezing import axolotl_matches, to_axolotl, to_llama_factory
from gradient_blueprints.training.finetuning import apply_selection
from gradient_blueprints.training.selection import Budget, select
from tests.training.bridges.test_adapters import blueprint_of
from tests.training.profiling.small_models import gpt2, llama
from tests.training.test_data_selection import qwen2_vl


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("groups", ["tensor", "submodule", "block"])
def test_axolotl_unfreezes_what_the_selection_trains(make: Callable[[], nn.Module], groups: Granularity) -> None:
    model = make()
    selection = select(blueprint_of(model, groups), budget=0.6, unit="layer", model=model)
    patterns = to_axolotl(selection, model)
    assert unfrozen_by_axolotl(model, patterns) == {entry.name for entry in apply_selection(model, selection)}
    assert patterns


def unfrozen_by_axolotl(model: nn.Module, patterns: list[str]) -> set[str]:
    return {n for n, _ in model.named_parameters() if any(axolotl_matches(pattern, n) for pattern in patterns)}


def head_first(head: float = 9.0) -> Blueprint:
    """Lists the tied tensor by the head's name, its second in the model."""
    norms = {"lm_head": head, "model.layers.0": 1.0, "model.layers.1": 1.0, "model.norm": 0.0}
    layers = [{"id": name, "gradient_norm": norm} for name, norm in norms.items()]
    return Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})


def test_axolotl_is_told_a_tied_tensors_first_name_whichever_the_blueprint_lists() -> None:
    model = llama()
    selection = select(head_first(), budget=0.5, unit="layer", model=model)
    assert unfrozen_by_axolotl(model, to_axolotl(selection, model)) == {"model.embed_tokens.weight"}
    assert [entry.name for entry in apply_selection(model, selection)] == ["model.embed_tokens.weight"]


def test_axolotl_leaves_alone_what_was_frozen_before_the_selection() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.up_proj" not in name and "layernorm" not in name)
    selection = select(blueprint_of(model, "block"), budget=0.7, unit="layer", model=model)
    unfrozen = unfrozen_by_axolotl(model, to_axolotl(selection, model))
    assert "model.layers.1.mlp.down_proj.weight" in unfrozen
    assert unfrozen == {entry.name for entry in apply_selection(model, selection)}


def test_axolotl_is_not_handed_an_empty_list_which_means_full_fine_tuning() -> None:
    selection = select(blueprint_of(gpt2()), budget=0.6, unit="layer", model=gpt2())
    with pytest.raises(ConfigurationError, match="named otherwise"):
        to_axolotl(selection, llama())


def test_one_pattern_a_layer_does_where_indices_begin_alike() -> None:
    model = llama(num_hidden_layers=12)
    layers = [{"id": f"model.layers.{i}", "gradient_norm": 9.0 if i in {1, 4} else 0.1} for i in range(12)]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    selection = select(blueprint, budget=2.5 / 12, unit="layer", model=model)
    assert to_axolotl(selection, model) == ["^model.layers.1.", "^model.layers.4."]


def test_axolotls_dots_are_literal_and_escaped_ones_match_nothing() -> None:
    assert axolotl_matches("^model.layers.1.", "model.layers.1.mlp.weight")
    assert not axolotl_matches("^model.layers.1.", "model.layers.11.mlp.weight")
    assert not axolotl_matches("^modelXlayers", "model.layers.1.mlp.weight")
    assert not axolotl_matches(r"^model\.layers", "model.layers.1.mlp.weight")
    assert axolotl_matches("^model.layers.[0-1]+.mlp.[a-z]+$", "model.layers.1.mlp.weight")


def test_axolotl_cannot_be_told_of_coordinates() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="unit='layer'"):
        to_axolotl(select(blueprint_of(model), budget=0.1, model=model), model)


def llama_factorys_rule(model: nn.Module, arguments: dict[str, str | int], blocks: int) -> set[str]:
    """`_setup_freeze_tuning` restated: the parameters that stay trainable."""
    count = int(arguments["freeze_trainable_layers"])
    indices = range(max(0, blocks - count), blocks) if count > 0 else range(min(-count, blocks))
    fragments = []
    for module in str(arguments["freeze_trainable_modules"]).split(","):
        fragments += [f".{index:d}.{module}" for index in indices]
    if "freeze_extra_modules" in arguments:
        extra = str(arguments["freeze_extra_modules"]).split(",")
        outside = {n.split(".")[-2] for n, _ in model.named_parameters() if re.search(r"\.\d+\.", n) is None}
        assert set(extra) <= outside
        fragments += extra
    return {name for name, _ in model.named_parameters() if any(fragment in name for fragment in fragments)}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_llama_factory_trains_what_was_promised_within_the_budget(make: Callable[[], nn.Module], share: float) -> None:
    model = make()
    found = to_llama_factory(blueprint_of(model), model, share)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert llama_factorys_rule(model, found.arguments, 2) == set(found.parameters)
    assert found.trained == sum(sizes[name] for name in found.parameters) <= share * sum(sizes.values())
    assert 0 < found.share <= 1
    if share == 1:
        assert found.share == pytest.approx(1)


def test_llama_factory_is_given_the_end_of_the_model_that_matters() -> None:
    model = llama()
    for end, sign in (("0", -1), ("1", 1)):
        norms = {
            "model_id": "m",
            "training_checkpoint": 1.0,
            "layers": [{"id": f"model.layers.{i}", "gradient_norm": 9.0 if str(i) == end else 1.0} for i in range(2)],
        }
        found = to_llama_factory(Blueprint.from_dict(norms), model, Budget.parameters(2_100))
        assert found.arguments["freeze_trainable_layers"] == sign
        assert found.arguments["finetuning_type"] == "freeze"


def test_llama_factory_is_told_what_a_tied_tensor_is_worth_by_its_second_name() -> None:
    found = to_llama_factory(head_first(head=98.0), llama(), 0.9)
    assert "model.embed_tokens.weight" in found.parameters
    assert found.share > 0.98


def test_a_norm_outside_the_blocks_drags_the_norms_inside_along_and_they_are_counted() -> None:
    model = llama()
    blueprint = blueprint_of(model)
    only_norm = Blueprint.from_dict(
        blueprint.to_dict() | {"layers": [{"id": "model.norm", "gradient_norm": 1.0, "parameters": 16}]}
    )
    found = to_llama_factory(only_norm, model, 0.5)
    assert "model.norm.weight" in found.parameters
    assert "model.layers.0.input_layernorm.weight" in found.parameters  # its name contains "norm"
    assert found.trained >= 5 * 16


def gemma3n() -> nn.Module:
    """With 17 names of modules: 2^17 combinations, of up to 30 blocks."""
    model: nn.Module = hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            vocab_size=32,
            vocab_size_per_layer_input=32,
            hidden_size=16,
            hidden_size_per_layer_input=8,
            intermediate_size=24,
            num_hidden_layers=30,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * 30,
            layer_types=["full_attention"] * 30,
        )
    )
    return model


@pytest.mark.timeout(30)
def test_llama_factory_is_told_of_a_model_with_many_modules_too() -> None:
    model = gemma3n()
    found = to_llama_factory(blueprint_of(model), model, 0.3)
    assert llama_factorys_rule(model, found.arguments, 30) == set(found.parameters)
    assert found.trained <= 0.3 * sum(parameter.numel() for parameter in model.parameters())
    assert found.share > 0.3


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_the_greedy_search_comes_near_the_best(
    make: Callable[[], nn.Module], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    best = to_llama_factory(blueprint_of(model), model, share)
    monkeypatch.setattr(freezing, "EXHAUSTIVE", 0)
    greedy = to_llama_factory(blueprint_of(model), model, share)
    assert 0.9 * best.share <= greedy.share <= best.share + 1e-12
    assert llama_factorys_rule(model, greedy.arguments, 2) == set(greedy.parameters)


def test_llama_factory_is_not_told_of_towers_that_it_keeps_frozen() -> None:
    model = qwen2_vl()
    with pytest.raises(ConfigurationError, match="to_axolotl"):
        to_llama_factory(blueprint_of(llama()), model, 0.3)


def test_a_budget_below_every_module_is_refused() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="no module"):
        to_llama_factory(blueprint_of(model), model, Budget.parameters(3))
