"""LoRA configurations from blueprints, counted on the models that peft builds of them."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Granularity
from gradient_blueprints.training.bridges.adapters import SCALE, adapter_parameters, to_peft
from gradient_blueprints.training.profiling.layers import group_parameters
from gradient_blueprints.training.selection import Budget, Unit, select
from tests.training.profiling.small_models import VOCABULARY, gpt2, llama, mixtral

# peft 0.21 reads an attribute that transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def blueprint_of(model: nn.Module, groups: Granularity = "submodule", **stars: float) -> Blueprint:
    """Norms by position; k_star by the end of a layer's id."""
    return Blueprint.from_dict(
        {
            "model_id": "m",
            "training_checkpoint": 1.0,
            "layers": [
                {
                    "id": group.id,
                    "gradient_norm": float(number + 1),
                    "parameters": group.size,
                    "k_star": next((star for end, star in stars.items() if group.id.endswith(end)), None),
                }
                for number, group in enumerate(group_parameters(model, groups))
            ],
        }
    )


def built(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, int, float]]:
    """(module, rank, scaling) of every adapter of the real model."""
    for name, module in get_peft_model(model, config).named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield name.removeprefix("base_model.model."), module.r["default"], module.scaling["default"]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_what_peft_builds_keeps_the_budget_to_the_last_rank(make: Callable[[], nn.Module], share: float) -> None:
    model = make()
    total = sum(parameter.numel() for parameter in model.parameters())
    config = to_peft(blueprint_of(model, attn=0.6, mlp=0.2), model, share, fan_in_fan_out=make is gpt2)
    promised = adapter_parameters(model, config)
    adapted = get_peft_model(model, config)
    assert trainable(adapted) == promised
    assert share * total - 40 < promised <= share * total  # the smallest adapter costs 24 or 32 a rank


def test_ranks_follow_k_star_at_one_scaling_everywhere() -> None:
    model = llama()
    config = to_peft(blueprint_of(model, self_attn=0.4, mlp=0.1), model, Budget.parameters(2_000))
    ranks = {name: rank for name, rank, _ in built(model, config)}
    # k_star · d · p / (d + p): attention 0.4 · 16 · 16 / 32 = 3.2 and 0.4 · 16 · 8 / 24 = 2.1, feed-forward 0.96
    assert ranks["model.layers.0.self_attn.q_proj"] > 2.5 * ranks["model.layers.0.mlp.up_proj"]
    assert ranks["model.layers.0.self_attn.q_proj"] > ranks["model.layers.0.self_attn.k_proj"]
    assert ranks["model.layers.0.self_attn.q_proj"] == ranks["model.layers.1.self_attn.q_proj"]
    model = llama()
    assert {scaling for _, _, scaling in built(model, config)} == {SCALE}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_scale_that_leaves_no_alpha_whole_is_kept_and_saved_all_the_same(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model = make()
    base = copy.deepcopy(model)
    config = to_peft(blueprint_of(model, self_attn=0.4), model, 0.1, scale=0.3, init_lora_weights=False)
    assert len({config.r, *config.rank_pattern.values()}) > 1
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.randint(VOCABULARY, (2, 6))
    assert torch.equal(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    scalings = [scaling for _, _, scaling in built(base, LoraConfig.from_pretrained(tmp_path))]
    assert scalings == pytest.approx([0.3] * len(scalings))


def test_ranks_follow_the_share_of_the_gradient_norm_when_asked_to() -> None:
    model = llama()
    config = to_peft(blueprint_of(model), model, Budget.parameters(4_000), by="share")
    ranks = {name: rank for name, rank, _ in built(model, config)}
    assert ranks["model.layers.1.self_attn.q_proj"] > 1.5 * ranks["model.layers.0.self_attn.q_proj"]  # norms 2 and 6


def test_a_selection_of_layers_gets_adapters_there_alone() -> None:
    model = llama()
    blueprint = blueprint_of(model)
    selection = select(blueprint, budget=0.5, unit="layer", model=model)
    chosen = {layer.id for layer in selection.layers if layer.fraction == 1}
    config = to_peft(selection, model, Budget.parameters(500))
    modules = {name for name, _, _ in built(model, config)}
    assert modules
    assert {name.rpartition(".")[0] for name in modules} <= chosen


@pytest.mark.parametrize("unit", ["coordinate", "row", "layer"])
def test_matrices_of_which_a_selection_trains_nothing_get_no_adapter(unit: Unit) -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    selection = select(blueprint_of(model, "block"), budget=0.5, unit=unit, model=model)
    modules = {name for name, _, _ in built(model, to_peft(selection, model, 0.2))}
    assert modules
    assert all("self_attn" in name for name in modules)


def test_a_selections_ranks_follow_what_it_trains_of_each_matrix() -> None:
    model = llama()
    selection = select(blueprint_of(model, "block"), model=model)
    query, key = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    chosen = {f"{query}.weight": np.arange(100), f"{key}.weight": np.arange(10)}
    ranks = {name: rank for name, rank, _ in built(model, to_peft(replace(selection, parts=chosen), model, 0.2))}
    assert ranks[query] > 5 * ranks[key]  # 100 / (16 + 16) and 10 / (16 + 8)


def test_a_tied_matrix_is_known_by_the_name_that_the_blueprint_lists() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["a"].weight.requires_grad_(False)
    layers = [{"id": name, "gradient_norm": 1.0} for name in "abc"]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    selection = select(blueprint, budget=0.5, model=model)
    assert to_peft(selection, model, 0.5).target_modules == {"c"}


@pytest.mark.parametrize("groups", ["tensor", "block"])
def test_every_granularity_of_a_blueprint_finds_its_modules(groups: Granularity) -> None:
    model = llama()
    config = to_peft(blueprint_of(model, groups), model, 0.2)
    assert len(list(built(model, config))) == 14


def test_the_head_stays_out_and_no_rank_exceeds_its_matrix() -> None:
    model = llama(tie_word_embeddings=False)
    config = to_peft(blueprint_of(model), model, 1.0)
    found = list(built(model, config))
    assert all(rank <= 16 for _, rank, _ in found)
    assert "lm_head" not in {name for name, _, _ in found}


def test_a_config_survives_being_saved_and_trains(tmp_path: Path) -> None:
    model = llama()
    adapted = get_peft_model(model, to_peft(blueprint_of(model, mlp=0.5), model, 0.1, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    again.inference_mode = False
    assert adapter_parameters(llama(), again) == trainable(adapted)
    ids = torch.randint(VOCABULARY, (2, 6))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


@settings(max_examples=10, deadline=None)
@given(st.integers(600, 9_000), st.floats(0.01, 1), st.floats(0.01, 1))
def test_no_budget_is_ever_exceeded(capacity: int, attention: float, feed_forward: float) -> None:
    model = llama()
    blueprint = blueprint_of(model, self_attn=attention, mlp=feed_forward)
    config = to_peft(blueprint, model, Budget.parameters(capacity))
    assert adapter_parameters(model, config) <= capacity


def test_building_a_config_leaves_the_model_alone() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    to_peft(blueprint_of(model), model, 0.1)
    assert {name for name, _ in model.named_parameters()} <= before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_a_layer_under_a_parametrization_is_adapted_and_left_alone() -> None:
    model = nn.ModuleDict({"a": spectral_norm(nn.Linear(8, 6)), "b": weight_norm(nn.Linear(8, 8))})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [{"id": name, "gradient_norm": 1.0} for name in "ab"]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    config = to_peft(blueprint, model, Budget.parameters(60))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {name for name, _, _ in built(model, config)} == {"a", "b"}


def test_a_projection_whose_weight_is_used_without_a_call_gets_no_rank() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    layers = [{"id": name, "gradient_norm": 1.0} for name in ("self_attn", "linear1", "linear2")]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    adapted = get_peft_model(model, to_peft(blueprint, model, 0.5))
    adapted(torch.randn(2, 3, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def deepseek() -> nn.Module:
    model: nn.Module = hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=12,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            max_position_embeddings=64,
        )
    )
    return model


def mamba2() -> nn.Module:
    model: nn.Module = hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            state_size=8,
            n_groups=1,
            chunk_size=8,
        )
    )
    return model


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "gaussian"}])
@pytest.mark.parametrize("budget", [300, 2_000])
def test_modules_that_peft_takes_for_the_experts_are_left_out_with_a_warning(
    budget: int, options: dict[str, Any]
) -> None:
    model = deepseek()
    with pytest.warns(UserWarning, match=r"no adapters of their own to .*mlp\.down_proj.* and 3 more"):
        config = to_peft(blueprint_of(model), model, Budget.parameters(budget), experts=False, **options)
    adapted = get_peft_model(deepseek(), config)
    assert budget - 40 < trainable(adapted) <= budget
    assert {name.rpartition(".")[2] for name, _, _ in built(model, config)} <= {
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
    }


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
def test_experts_of_such_a_model_get_their_ranks_all_the_same() -> None:
    model = deepseek()
    with pytest.warns(UserWarning, match="no adapters of their own"):
        config = to_peft(blueprint_of(model, experts=0.5), model, Budget.parameters(2_000))
    assert set(config.target_parameters) == {f"model.layers.1.mlp.experts.{name}_proj" for name in ("down", "gate_up")}
    assert 1_960 < trainable(get_peft_model(model, config)) <= 2_000


def test_modules_that_peft_refuses_are_left_out_with_its_reason() -> None:
    model = mamba2()
    with pytest.warns(UserWarning, match="out_proj.*incompatible with Mamba"):
        config = to_peft(blueprint_of(model), model, Budget.parameters(400))
    assert {name.rpartition(".")[2] for name, _, _ in built(model, config)} == {"in_proj"}


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        ({"exclude_modules": ["out_proj"]}, {"0.mixer.in_proj", "1.mixer.in_proj"}),
        ({"exclude_modules": r".*(out_proj|1\.mixer\.in_proj)"}, {"0.mixer.in_proj"}),
        ({"exclude_modules": ["out_proj"], "layers_to_transform": [1]}, {"1.mixer.in_proj"}),
    ],
)
def test_options_that_pick_modules_are_heeded_before_ranks_are_dealt_out(
    option: dict[str, Any], kept: set[str]
) -> None:
    model = mamba2()
    config = to_peft(blueprint_of(model), model, Budget.parameters(400), **option)
    assert {name.removeprefix("backbone.layers.") for name, _, _ in built(model, config)} == kept
    assert 200 < adapter_parameters(mamba2(), config) <= 400


def test_options_that_leave_no_module_and_those_that_peft_refuses_say_so() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="see exclude_modules"):
        to_peft(blueprint_of(model), model, exclude_modules=".*")
    with pytest.raises(ValueError, match="init_lora_weights"):
        to_peft(blueprint_of(model), model, 0.1, init_lora_weights="nonsense")


# peft 0.21 looks for the patterns' names among modules alone, and heeds those of parameters nonetheless
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
def test_fused_experts_get_adapters_of_their_own_within_the_budget(tmp_path: Path) -> None:
    model = mixtral()
    total = sum(parameter.numel() for parameter in model.parameters())
    config = to_peft(blueprint_of(model, experts=0.5, self_attn=0.1), model, 0.1)
    assert set(config.target_parameters) == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")
    }
    adapted = get_peft_model(model, config)
    assert 0.09 * total < trainable(adapted) <= 0.1 * total
    assert {scaling for _, _, scaling in built(mixtral(), config)} == {SCALE}
    adapted.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    again.inference_mode = False
    assert adapter_parameters(mixtral(), config) == adapter_parameters(mixtral(), again) == trainable(adapted)
    shapes = {tuple(each.shape) for name, each in adapted.named_parameters() if "experts" in name and "lora_A" in name}
    rank = config.rank_pattern.get("model.layers.0.mlp.experts.gate_up_proj", config.r)
    assert (4 * rank, 16) in shapes, "four experts' adapters of this rank, on inputs of 16"
    ids = torch.randint(VOCABULARY, (2, 6))
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)


def test_fused_experts_are_left_out_on_request() -> None:
    model = mixtral()
    config = to_peft(blueprint_of(model), model, 0.02, experts=False, lora_dropout=0.1)
    assert not config.target_parameters
    assert len(list(built(model, config))) == 8


def test_a_budget_below_every_adapter_is_refused() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="no adapter of rank 1"):
        to_peft(blueprint_of(model), model, Budget.parameters(20))


def test_a_budget_that_gives_no_module_half_a_rank_buys_a_rank_for_those_nearest_to_it() -> None:
    model = llama()
    blueprint = blueprint_of(model, self_attn=0.5, mlp=0.4)
    # by k_star · d · p / (d + p): q and o 4, k and v 2.7, feed-forward 3.8; an adapter of q or o costs 32 a rank
    config = to_peft(blueprint, model, Budget.parameters(100))
    ranks = {name: rank for name, rank, _ in built(model, config)}
    assert ranks == dict.fromkeys(
        ("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"), 1
    )


def test_a_budget_below_the_module_that_it_is_meant_for_buys_what_it_can() -> None:
    model = llama()
    config = to_peft(blueprint_of(model, self_attn=0.001, mlp=0.9), model, Budget.parameters(30))
    assert [rank for _, rank, _ in built(model, config)] == [1]


def test_a_source_that_tells_nothing_apart_is_not_taken_for_a_small_budget() -> None:
    model = llama()
    document = blueprint_of(model).to_dict()
    flat = Blueprint.from_dict(document | {"layers": [layer | {"gradient_norm": 0.0} for layer in document["layers"]]})
    with pytest.raises(ConfigurationError, match="tells nothing apart by 'share'"):
        to_peft(flat, model, 0.5, by="share")
    assert to_peft(flat, model, 0.5).r > 0
    layers = [layer | {"gradient_norm": float("embed" in layer["id"])} for layer in document["layers"]]
    embedding = select(Blueprint.from_dict(document | {"layers": layers}), budget=0.3, unit="layer", model=model)
    with pytest.raises(ConfigurationError, match="none of the model's linear modules"):
        to_peft(embedding, model, 0.5)


def test_ranks_by_something_unknown_are_refused() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="by k_star or share, not by 'norm'"):
        to_peft(blueprint_of(model), model, by="norm")  # type: ignore[arg-type]  # as an untyped caller might


def test_a_blueprint_of_another_model_and_a_budget_in_bytes_are_refused() -> None:
    model = llama()
    with pytest.raises(ConfigurationError, match="another model"):
        to_peft(blueprint_of(gpt2()), model)
    with pytest.raises(ConfigurationError, match="parameters"):
        to_peft(blueprint_of(model), model, Budget.bytes(1e6))


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    spec = importlib.util.find_spec("gradient_blueprints.training.bridges.adapters")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match="pip install peft"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
