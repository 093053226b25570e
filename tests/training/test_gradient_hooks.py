"""An optimizer that takes gradients, and measurements of gradients, on one model at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.data_selection import exact_influences
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.gradient_similarity import projected_gradients
from gradient_blueprints.training.selection import Selection, mean_gradients, select
from tests.training.profiling.small_models import VOCABULARY, Batch, llama

MEASUREMENTS: dict[str, Callable[[nn.Module, list[Batch]], float]] = {
    "local sample": lambda model, batches: max(float(mean.norm()) for mean in mean_gradients(model, batches).values()),
    "profile": lambda model, batches: float(exact_influences(model, batches).min()),
    "projections": lambda model, batches: float(projected_gradients(model, batches, 64).norm()),
}


def make_selection(model: nn.Module) -> Selection:
    layers = [{"id": name, "gradient_norm": 1.0, "parameters": each.numel()} for name, each in model.named_parameters()]
    blueprint = Blueprint.from_dict({"model_id": "m", "training_checkpoint": 1.0, "layers": layers})
    return select(blueprint, budget=0.5, model=model)


@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_gradients_measured_in_the_midst_of_a_step_are_seen_and_leave_the_training_alone(kind: str) -> None:
    quiet = llama()
    watched = copy.deepcopy(quiet)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24).view(2, 2, 6) % VOCABULARY]
    for model in (quiet, watched):
        optimizer = SelectedAdamW(apply_selection(model, make_selection(model)), lr=1e-2)
        for batch in batches:
            model(**batch).loss.backward()
            if model is watched:
                assert MEASUREMENTS[kind](model, batches) > 0
        optimizer.step()
    for expected, found in zip(quiet.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)
