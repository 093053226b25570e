"""The closed forms against recomputed numbers, exact sums and brute force."""

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradient_blueprints import theory
from gradient_blueprints.theory import Regime

gammas = st.floats(0.05, 0.95)
costs = st.floats(0.01, 100)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(theory).failed == 0


@pytest.mark.parametrize(("alpha", "gamma"), [(1.47, 0.405), (1.12, 0.472), (1.50, 0.400)])
def test_gamma_follows_the_formula_and_not_the_example_of_the_schema(alpha: float, gamma: float) -> None:
    assert theory.gain_exponent(alpha) == pytest.approx(gamma, abs=5e-4)


def test_top_tenth_at_alpha_one_and_a_half_holds_98_percent_and_not_50() -> None:
    assert theory.retained_mass(0.1, 10_000, 1.5) == pytest.approx(0.978, abs=5e-4)
    assert theory.exact_retained_mass(0.1, 10_000, 1.5) == pytest.approx(0.983, abs=5e-4)


def test_half_the_mass_in_the_top_tenth_needs_alpha_of_about_three_quarters() -> None:
    assert theory.exact_retained_mass(0.1, 10_000, 0.73) == pytest.approx(0.5, abs=0.02)
    assert theory.retained_mass(0.1, 10_000, 0.73) == pytest.approx(0.5, abs=0.02)


def test_retained_mass_is_continuous_through_the_logarithmic_limit() -> None:
    limit = theory.retained_mass(0.1, 10_000, 1.0)
    assert limit == pytest.approx(math.log(1_000) / math.log(10_000))
    for alpha in (1 - 1e-12, 1 - 1e-7, 1 + 1e-7, 1 + 1e-12):
        assert theory.retained_mass(0.1, 10_000, alpha) == pytest.approx(limit, abs=1e-5)


@given(st.floats(0, 1), st.integers(2, 10**9), st.floats(0, 300))
def test_retained_mass_is_a_share_and_everything_keeps_everything(k: float, entries: int, alpha: float) -> None:
    assert 0 <= theory.retained_mass(k, entries, alpha) <= 1 + 1e-12
    assert theory.retained_mass(1, entries, alpha) == pytest.approx(1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.7])
def test_power_sum_is_the_plain_sum(alpha: float) -> None:
    assert theory.power_sum(20_000, alpha) == pytest.approx(math.fsum(r**-alpha for r in range(1, 20_001)), rel=1e-14)


def test_gaussian_null_is_the_papers_recomputed_one() -> None:
    share = theory.gaussian_retained_mass(0.1)
    assert share == pytest.approx(0.259, abs=5e-4)
    assert math.log(share) / math.log(0.1) == pytest.approx(0.587, abs=1e-3)
    assert theory.gaussian_retained_mass(math.erfc(8.5 / math.sqrt(2))) == pytest.approx(math.exp(-(8.5**2) / 2))


def test_the_papers_cost_example_gives_0_222() -> None:
    best = theory.best_fraction(0.6, 1, 4)
    assert best.fraction == pytest.approx(0.375)
    assert best.regime is Regime.PARTIAL
    assert pytest.approx(0.555, abs=5e-4) == 0.375**0.6
    assert theory.gain_per_cost(0.375, 0.6, 1, 4) == pytest.approx(0.222, abs=5e-4)
    assert theory.gain_per_cost(1, 0.6, 1, 4) == pytest.approx(0.2)


def test_proposition_4_1_is_conditional() -> None:
    """gamma = 0.6 with equal costs would give k* = 1.5: the full update is best."""
    assert theory.best_fraction(0.6, 1, 1) == (1.0, Regime.FULL)


@given(gammas, costs, costs)
def test_no_fraction_beats_the_best_one(gamma: float, fixed: float, variable: float) -> None:
    best = theory.best_fraction(gamma, fixed, variable)
    gain = theory.gain_per_cost(best.fraction, gamma, fixed, variable)
    assert all(theory.gain_per_cost(k / 200, gamma, fixed, variable) <= gain * (1 + 1e-9) for k in range(201))
    if best.regime is Regime.PARTIAL:
        assert gain == pytest.approx((1 - gamma) / fixed * best.fraction**gamma)  # eq. 19


def test_without_fixed_costs_the_smallest_fraction_gains_most_per_cost_unless_gains_are_linear() -> None:
    assert theory.best_fraction(0.5, 0, 1) == (0.0, Regime.PARTIAL)
    assert theory.best_gain_per_cost(0.5, 0, 1) == math.inf
    assert theory.best_gain_per_cost(1, 0, 4) == 0.25
    assert theory.best_gain_per_cost(0, 4, 1) == 0.25


def test_a_gain_that_costs_nothing_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="the cost is 0"):
        theory.gain_per_cost(0, 0.5, 0, 1)
    assert theory.gain_per_cost(0, 0.5, 1, 1) == 0


def test_gamma_one_over_one_plus_alpha_makes_k_star_the_cost_ratio_over_alpha() -> None:
    assert theory.best_fraction(theory.gain_exponent(1.47), 1, 4).fraction == pytest.approx(0.25 / 1.47)


def test_optimizer_state_of_a_frozen_80_percent_is_44_8_gigabytes() -> None:
    assert theory.optimizer_bytes(0.8 * 7e9) == pytest.approx(44.8e9)
    assert theory.optimizer_bytes(0.8 * 7e9, bytes_per_parameter=12) == pytest.approx(67.2e9)


def test_twelvefold_is_neither_the_exponents_nor_the_flops() -> None:
    assert theory.joint_gain(0.2, 0.3, 0.6, 0.7) / 0.06 == pytest.approx(2.73, abs=0.01)
    assert theory.joint_compute(0.2, 0.3) == pytest.approx(0.22)
    assert 0.72 / theory.joint_compute(0.2, 0.3) == pytest.approx(3.3, abs=0.05)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_fraction_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="not a fraction"):
        theory.retained_mass(share, 100, 1.5)
