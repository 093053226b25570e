"""The cost model fitted from steps on this machine, and the fraction that it recommends."""

from __future__ import annotations

import doctest

import pytest

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import CostModel
from gradient_blueprints.theory import Regime, gain_per_cost
from gradient_blueprints.training import costs
from gradient_blueprints.training.costs import fit_costs, measure_costs, recommended_fraction
from tests.training.profiling.small_models import batch, llama


def test_the_examples_hold() -> None:
    assert doctest.testmod(costs).failed == 0


def test_measured_memory_is_a_line_whose_slope_is_the_bytes_of_a_selected_coordinate() -> None:
    """Two float32 moments and an int32 index: the gradients come while the activations go, and do not show."""
    model = llama(hidden_size=64, intermediate_size=192)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = measure_costs(model, batch(64, padded=False), shares=(0.1, 0.5, 1.0), repeats=1)
    fit = fit_costs([step.share for step in measured], [step.peak_bytes for step in measured], parameters)
    assert fit.error < 0.01
    assert fit.costs.variable == pytest.approx(12, rel=0.05)
    assert all(step.seconds > 0 for step in measured)


def test_what_is_frozen_is_not_trained_when_costs_are_measured() -> None:
    model = llama()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    frozen, free = (measure_costs(each, batch(4), (1.0,), repeats=1)[0].peak_bytes for each in (model, llama()))
    assert frozen < free


def test_the_recommended_fraction_gains_more_per_cost_than_any_other() -> None:
    found = recommended_fraction(CostModel(fixed=10, variable=40), gamma=0.5)
    assert found.regime is Regime.PARTIAL
    best = gain_per_cost(found.fraction, 0.5, 10, 40)
    assert best > gain_per_cost(1, 0.5, 10, 40)
    assert best >= max(gain_per_cost(k / 1000, 0.5, 10, 40) for k in range(1, 1001))


def test_where_activations_dwarf_the_moments_the_full_update_is_best() -> None:
    assert recommended_fraction(CostModel(fixed=66, variable=12), gamma=0.4).regime is Regime.FULL
    assert recommended_fraction(CostModel(fixed=66, variable=12), retained_mass=[(0.1, 0.5)]).fraction == 1


def test_costs_that_do_not_rise_have_no_optimum() -> None:
    with pytest.raises(ConfigurationError, match="do not rise"):
        fit_costs([0.1, 1.0], [5.0, 4.0], 1)
    with pytest.raises(ConfigurationError, match="two shares"):
        fit_costs([0.5, 0.5], [5.0, 4.0], 1)


def test_costs_of_picoseconds_a_parameter_keep_their_digits() -> None:
    """A step of 24 ms of a model with 7 billion parameters."""
    fit = fit_costs([0.1, 0.5, 1.0], [0.0204, 0.022, 0.024], 7_000_000_000)
    assert (fit.costs.fixed, fit.costs.variable) == pytest.approx((0.02 / 7e9, 0.004 / 7e9), rel=1e-6)


def test_exactly_one_of_exponent_and_curve_is_wanted() -> None:
    with pytest.raises(ConfigurationError, match="one of them"):
        recommended_fraction(CostModel(fixed=1, variable=1))
