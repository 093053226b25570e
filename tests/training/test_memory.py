"""The memory of a step: estimated without taking it, and measured in a fresh process that takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.theory import optimizer_bytes
from gradient_blueprints.training.memory import estimate_memory
from gradient_blueprints.training.selection import Budget, select
from gradient_blueprints.training.selection.budgets import saved_bytes
from tests.training.measured_training import CASES, make_batch, make_blueprint, make_model, make_selection
from tests.training.profiling.small_models import llama

WORST = 0.10


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Peaks of real training in a fresh process: of the allocator, and of the process' resident memory.

    glibc keeps freed blocks below a threshold, which it raises as it goes; held down, what is freed is given back.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.measured_training"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(case: str, measured: dict[str, dict[str, float]]) -> None:
    estimate = estimate_memory(make_model(case), make_selection(case), batch=make_batch(case))
    assert estimate.peak == pytest.approx(measured[case]["allocator"], rel=0.02)
    assert estimate.peak == pytest.approx(measured[case]["resident"], rel=WORST)


@pytest.mark.parametrize("free", [135e6, 200e6])
def test_what_a_device_has_room_for_fits_on_it(free: float) -> None:
    """`Budget.device` against the peak of the step that its selection is trained by."""
    model, batch = make_model("selected"), make_batch("selected")
    selection = select(make_blueprint(model), budget=Budget.device(model, batch, free=free), model=model)
    estimate = estimate_memory(model, selection, batch=batch)
    assert 0.8 * free < estimate.peak - estimate.weights <= free


def test_a_tied_embedding_s_gradients_are_counted_where_it_is_trained() -> None:
    """Of its two uses and of their sum; a frozen one has none."""
    model: Any = llama(vocab_size=20_000, hidden_size=64, intermediate_size=128)
    free = 30e6
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    budget = Budget.device(model, batch, free=free)
    estimate = estimate_memory(model, select(make_blueprint(model), budget=budget, model=model), batch=batch)
    assert 0.7 * free < estimate.peak - estimate.weights <= free
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    without = Budget.device(model, batch, free=free)
    saved = saved_bytes(model, batch)
    assert without.amount - budget.amount == pytest.approx(3 * embedding.nbytes - sum(saved) - max(saved), rel=0.01)


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="put labels into the batch"):
        estimate_memory(llama(), batch={"input_ids": torch.zeros(1, 8, dtype=torch.long)})


def test_a_budget_counts_what_checkpointing_spares_a_model_in_evaluation_mode() -> None:
    """As `from_pretrained` returns it: it checkpoints in training mode only."""
    batch = make_batch("checkpointed")
    model, whole = make_model("checkpointed").eval(), make_model("adamw").eval()
    budget = Budget.device(model, batch, free=1e9)
    assert not any(module.training for module in model.modules())
    assert budget == Budget.device(model.train(), batch, free=1e9)
    assert sum(saved_bytes(model.eval(), batch)) < sum(saved_bytes(whole, batch)) / 3


def test_a_budget_of_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = make_model("adamw")
    with pytest.raises(ConfigurationError, match="estimate_memory"):
        Budget.device(model, (4, 128), free=1e9)


class Restless(nn.Module):
    """Dropout's mask and batch norm's statistics: what is there in training alone, and what is changed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.BatchNorm1d(64).eval()
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.frozen(self.norm(inputs)))  # type: ignore[no-any-return]  # a module is untyped


@torch.no_grad()
def test_a_budget_is_measured_as_in_training_and_leaves_no_trace() -> None:
    model, batch = Restless(), {"inputs": torch.randn(32, 64)}
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lots = torch.get_rng_state()
    saved = saved_bytes(model, batch)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(lots, torch.get_rng_state())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert saved == saved_bytes(model.eval(), batch)
    assert saved.count(32 * 64 * 4) == 3  # what goes into each norm, and the mask


def test_the_parts_of_a_full_adamw_update_are_those_of_its_definition() -> None:
    model = make_model("adamw")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(model, batch=make_batch("adamw"))
    assert estimate.gradients == 4 * parameters
    assert estimate.optimizer_state == pytest.approx(8 * parameters, rel=1e-3)
    assert estimate.indices == 0
    assert estimate.peak < estimate.weights + estimate.gradients + estimate.optimizer_state + estimate.activations


def test_a_selections_parts_are_moments_gradient_and_index_of_what_is_selected() -> None:
    selection = make_selection("selected")
    assert selection is not None
    estimate = estimate_memory(make_model("selected"), selection, batch=make_batch("selected"))
    assert estimate.indices == pytest.approx(4 * selection.selected, rel=0.01)
    assert estimate.optimizer_state == pytest.approx(8 * selection.selected, rel=0.01)
    assert estimate.gradients == pytest.approx(4 * selection.selected, rel=0.01)


def seven_billion() -> nn.Module:
    """7.0 billion parameters in 8 wide layers, on the meta device: 28 GB that are not there."""
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32_000,
                hidden_size=8_192,
                intermediate_size=22_016,
                num_hidden_layers=8,
                num_attention_heads=64,
                tie_word_embeddings=False,
            )
        )
    return model


def test_freezing_four_fifths_of_seven_billion_saves_what_its_assumptions_say() -> None:
    """The paper's "~67 GB of optimizer state" takes 12 bytes a parameter; Adam's float32 moments are 8."""
    assert optimizer_bytes(0.8 * 7e9) / 1e9 == pytest.approx(44.8)
    assert optimizer_bytes(0.8 * 7e9, bytes_per_parameter=12) / 1e9 == pytest.approx(67.2)

    model = seven_billion()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(7e9, rel=0.01)
    ids = torch.empty(1, 8, dtype=torch.long, device="meta")
    full = estimate_memory(model, batch={"input_ids": ids, "labels": ids})
    frozen = 0
    for parameter in model.parameters():
        if frozen + parameter.numel() <= 0.8 * parameters:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    partial = estimate_memory(model, batch={"input_ids": ids, "labels": ids})
    assert frozen / parameters == pytest.approx(0.8, abs=0.03)
    assert full.optimizer_state - partial.optimizer_state == pytest.approx(8 * frozen, rel=1e-3)
    saved_with_gradients = full.optimizer_state + full.gradients - partial.optimizer_state - partial.gradients
    assert saved_with_gradients == pytest.approx(12 * frozen, rel=1e-3)


def test_asking_changes_nothing_in_the_model() -> None:
    model = make_model("selected")
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    model.eval()
    estimate_memory(model, make_selection("selected"), batch=make_batch("selected"))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not model.training


def test_half_precision_halves_the_weights() -> None:
    model, batch = make_model("adamw"), make_batch("adamw")
    whole, half = estimate_memory(model, batch=batch), estimate_memory(model, batch=batch, dtype=torch.bfloat16)
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.01)
    assert half.activations < whole.activations


def test_a_device_that_this_torch_cannot_use_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigurationError, match="cannot use cuda"):
        estimate_memory(make_model("adamw"), batch=make_batch("adamw"), device="cuda")


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        y = self.layer(x)
        return SimpleNamespace(loss=y.sum() if y.sum() > 0 else y.mean())


def test_a_model_that_looks_into_its_tensors_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="what is in its tensors"):
        estimate_memory(Peeking(), batch={"x": torch.ones(2, 4)})


def test_experts_whose_products_torch_cannot_foretell_say_how_to_ask() -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    model: Any = MixtralForCausalLM(config)
    ids = torch.randint(64, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    for experts in ("grouped_mm", "eager"):
        model.set_experts_implementation(experts)
        with pytest.raises(ConfigurationError, match=r'set_experts_implementation\("batched_mm"\)'):
            estimate_memory(model, batch=batch)
    model.set_experts_implementation("batched_mm")
    assert estimate_memory(model, batch=batch).activations > 0
    model.set_experts_implementation("grouped_mm")
    assert estimate_memory(model, batch=batch, dtype=torch.bfloat16).activations > 0
