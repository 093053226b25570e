"""The estimate before a run, against the products that torch counts in the run."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling import GradientProfiler, estimate_cost
from gradient_blueprints.training.profiling.state import Statistics
from tests.training.profiling.small_models import batch, gpt2, llama


def wide(length: int) -> nn.Module:
    """Wide enough that weights outweigh attention; the long one has a large tied head."""
    tied = length > 30
    return llama(
        hidden_size=64, intermediate_size=160, vocab_size=1_013 if tied else 211, tie_word_embeddings=tied
    ).eval()


@pytest.mark.parametrize("length", [8, 16, 48])
@pytest.mark.parametrize("statistics", ["examples", "batches", "all"])
def test_the_estimate_is_within_a_tenth_of_the_products_that_are_run(length: int, statistics: Statistics) -> None:
    """Short sequences go by Gram matrices, long ones by written-out gradients."""
    model = wide(length)
    values = {"input_ids": batch(4, length, padded=False)["input_ids"]}
    with GradientProfiler(model, statistics=statistics, verify=False) as profiler:
        profiler.step(values)
        with FlopCounterMode(display=False) as profiling:
            profiler.step(values)
    with FlopCounterMode(display=False) as training:
        model(**values, labels=values["input_ids"]).loss.backward()
    with FlopCounterMode(display=False) as validation, torch.no_grad():
        model(**values)
    found = estimate_cost(model, (4, length), batches=3, statistics=statistics, timed=False)
    counted = profiling.get_total_flops()
    assert found.flops == pytest.approx(3 * counted, rel=0.1)
    assert found.over_training == pytest.approx(counted / training.get_total_flops(), rel=0.1)
    assert found.over_validation == pytest.approx(counted / validation.get_total_flops(), rel=0.1)


def test_the_probe_finds_seconds_and_memory_and_leaves_the_model_alone() -> None:
    model = gpt2().train()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    found = estimate_cost(model, (4, 16), batches=10)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (found.weight_bytes, found.sum_bytes) == (4 * parameters, 12 * parameters)
    assert found.seconds is not None
    assert found.activation_bytes is not None
    doubled = estimate_cost(model, (8, 16), batches=10)
    assert doubled.activation_bytes == pytest.approx(2 * found.activation_bytes, rel=0.05)
    assert doubled.flops == 2 * found.flops
    assert "10 batches" in str(found)
    held = found.weight_bytes + found.sum_bytes + found.activation_bytes
    assert str(found).endswith(f", {held / 2**20:.2f} MiB")
    assert str(replace(found, weight_bytes=2**30, sum_bytes=0, activation_bytes=0)).endswith(", 1.00 GiB")


def test_what_cannot_be_estimated_is_told() -> None:
    with pytest.raises(ConfigurationError, match="probe"):
        estimate_cost(nn.Linear(3, 3), (2, 4), 1)
    with pytest.raises(ConfigurationError, match="at least one"):
        estimate_cost(gpt2(), (2, 4), 0)
    assert estimate_cost(nn.Linear(40, 40), (2, 4), 1, statistics="examples", timed=False).over_training < 1
