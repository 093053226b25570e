"""The robust combination of several labs: known answers, slow oracles, and how far a hostile lab gets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.registry.consensus import combine, i_squared, leave_one_out, ranked, spread, weighted_median, weights

LOGS = st.lists(st.one_of(st.floats(-50, 50), st.just(-math.inf)), min_size=1, max_size=9)
NAN = math.nan


@given(LOGS)
def test_with_equal_weights_the_estimate_is_the_median(logs: list[float]) -> None:
    assert weighted_median(logs, np.ones(len(logs))) == pytest.approx(np.median(logs))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), min_size=1, max_size=8))
def test_a_weight_is_as_many_equal_voices(pairs: list[tuple[int, int]]) -> None:
    values, counts = [value for value, _ in pairs], [count for _, count in pairs]
    assert weighted_median(values, counts) == np.median(np.repeat(values, counts))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_halves_that_meet_but_for_rounding_meet(count: int) -> None:
    for weight in itertools.product([1 / math.sqrt(2), 1.0, math.sqrt(2)], repeat=count):
        before = itertools.accumulate(weight)
        half = math.fsum(weight) / 2
        middle = next(i + 0.5 if math.isclose(sum_, half) else i for i, sum_ in enumerate(before) if sum_ > half - 1e-6)
        assert weighted_median(np.arange(count), weight) == middle


@given(LOGS, st.integers(0, 1_000))
def test_leaving_one_out_is_the_median_of_the_others(logs: list[float], seed: int) -> None:
    weight = np.random.default_rng(seed).choice([1 / math.sqrt(2), 1.0, math.sqrt(2)], len(logs))
    fast = leave_one_out(logs, weight)
    for index in range(len(logs)):
        others = np.arange(len(logs)) != index
        if not others.any():
            assert math.isnan(fast[index])
            continue
        assert fast[index] == weighted_median(np.array(logs)[others], weight[others])


def test_a_sure_lab_weighs_more_but_at_most_twice_as_much_as_an_unsure_one() -> None:
    assert weights([NAN, NAN]).tolist() == [1, 1]
    assert weights([0.1, 0.1, NAN]).tolist() == [1, 1, 1]
    given_weights = weights([1e-12, 0.1, 0.1, 1e12, 0.0])
    assert given_weights.max() / given_weights.min() == pytest.approx(2)
    assert weights([0.11, 0.1, 0.09])[0] == pytest.approx((0.1 / 0.11) ** 2)
    assert weights([0.0, 0.0]).tolist() == [1, 1]


@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=12),
    st.lists(st.one_of(st.floats(-700, 700), st.just(-math.inf)), min_size=1, max_size=3),
    st.floats(1e-9, 10),
)
def test_fewer_than_a_third_of_hostile_labs_stay_within_the_range_of_the_others(
    honest: list[float], hostile: list[float], claimed_error: float
) -> None:
    """The stated bound: the estimate lies between the smallest and the largest honest value, whatever is claimed."""
    hostile = hostile[: (len(honest) - 1) // 2]
    errors = [0.1] * len(honest) + [claimed_error] * len(hostile)
    estimate = combine(honest + hostile, errors).log_norm
    assert min(honest) <= estimate <= max(honest)


@given(LOGS, st.permutations(range(9)), st.floats(-5, 5))
def test_the_order_of_the_labs_is_no_matter_and_a_common_unit_is_carried_through(
    logs: list[float], order: list[int], unit: float
) -> None:
    order = [index for index in order if index < len(logs)]
    errors = np.full(len(logs), NAN)
    first, second = combine(logs, errors), combine([logs[index] for index in order], errors)
    assert first.log_norm == second.log_norm
    assert first.spread == second.spread
    assert combine([value + unit for value in logs], errors).log_norm == pytest.approx(first.log_norm + unit)


def test_the_influential_lab_is_the_one_without_which_the_estimate_moves_most() -> None:
    combined = combine([0.0, 1.0, 5.0, 6.0, 7.0], [NAN] * 5)
    assert combined.log_norm == 5
    assert combined.influential == 3  # without 6 (or 7, which comes later) the middle lies between 1 and 5
    assert combined.without == pytest.approx(3)
    assert combined.deviations.tolist() == [5.5, 4.5, 1.5, 3, 4]
    assert combine([1.0], [NAN]).influential is None


def test_heterogeneity_of_an_example_by_hand() -> None:
    # Weights 100, 25, 100; mean (0*100 + 1*25 + 0.5*100)/225 = 1/3;
    # Q = 100/9 + 25*4/9 + 100/36 = 25; I^2 = 23/25.
    assert i_squared([0.0, 1.0, 0.5], [0.1, 0.2, 0.1]) == pytest.approx(23 / 25)
    assert i_squared([0.3, 0.3], [0.1, 0.1]) == 0
    assert i_squared([0.3, 0.4], [0.1, NAN]) is None


def test_spread_is_the_standard_deviation_of_normal_values() -> None:
    values = np.random.default_rng(0).normal(3, 2, 20_000)
    assert spread(values) == pytest.approx(2, rel=0.03)
    assert spread([-math.inf, -math.inf, 0.0]) is None


def test_ranks_follow_the_shares_then_the_norms_then_the_ids() -> None:
    assert ranked([0.5, 0.9, 0.5, 0.5], [1.0, 0.1, 2.0, 1.0], ["b", "c", "d", "a"]) == [4, 1, 2, 3]
