"""Rank statistics against scipy, published examples, and the coverage that their intervals promise."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from app.registry.agreement import (
    descending,
    disattenuated,
    kendall,
    kendall_interval,
    kendall_w,
    mid_ranks,
    rank_biased_overlap,
    row_kendalls,
    spearman,
    spearman_brown,
    spearman_interval,
    top_overlap,
)

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.floats(-100, 100)), min_size=3, max_size=40)


@given(PAIRS)
def test_rank_correlations_are_those_of_scipy_with_ties(pairs: list[tuple[int, float]]) -> None:
    x, y = [float(a) for a, _ in pairs], [b for _, b in pairs]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) is None
        assert kendall(x, y) is None
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)


@given(PAIRS, st.floats(0.1, 10), st.integers(0, 1_000))
def test_rank_correlations_know_no_order_scale_or_side(pairs: list[tuple[int, float]], scale: float, seed: int) -> None:
    x, y = np.array([a for a, _ in pairs], float), np.array([b for _, b in pairs])
    shuffled = np.random.default_rng(seed).permutation(len(x))
    for statistic in (spearman, kendall):
        value = statistic(x, y)
        if value is None:
            continue
        assert statistic(x[shuffled], y[shuffled]) == pytest.approx(value, abs=1e-12)
        assert statistic(y, x) == pytest.approx(value, abs=1e-12)
        assert statistic(scale * x + 1, y) == pytest.approx(value, abs=1e-12)
        assert statistic(-x, y) == pytest.approx(-value, abs=1e-12)


def test_spearman_of_the_textbook_example_of_intelligence_and_television() -> None:
    # The worked example of Wikipedia, "Spearman's rank correlation coefficient": rho = -29/165.
    intelligence = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(intelligence, hours) == pytest.approx(-29 / 165)


@pytest.mark.parametrize("length", [40, 1_600])  # compared each with each, and sorted
def test_kendalls_tau_of_many_rows_is_that_of_each(length: int) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 9, (3, length)).astype(float), draw.integers(0, 9, (3, length)).astype(float)
    for rows in (x, x[:1]):
        expected = [
            stats.kendalltau(one, two).statistic for one, two in zip(np.broadcast_to(rows, y.shape), y, strict=True)
        ]
        assert row_kendalls(rows, y) == pytest.approx(expected, abs=1e-12)
    y[1] = 5
    assert np.isnan(row_kendalls(x, y)).tolist() == [False, True, False]


def test_kendalls_tau_of_many_rows_holds_the_comparisons_of_a_few_at_a_time() -> None:
    x = np.random.default_rng(0).standard_normal((30, 500))
    tracemalloc.start()
    row_kendalls(x, x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 500**2  # bytes


def test_rank_correlations_of_kendalls_ten_boys() -> None:
    # Kendall, Rank Correlation Methods, ch. 1: ten boys by mathematics and by music; S = -3 of 45 pairs, and by hand
    # the squared differences of ranks add up to 182.
    mathematics = [7, 4, 3, 10, 6, 2, 9, 8, 1, 5]
    music = [5, 7, 3, 10, 1, 9, 6, 2, 8, 4]
    assert kendall(mathematics, music) == pytest.approx(-3 / 45)
    assert spearman(mathematics, music) == pytest.approx(1 - 6 * 182 / 990)


def test_kendalls_w_is_its_relation_to_the_mean_spearman_correlation() -> None:
    # Without ties W = (mean rho * (m - 1) + 1) / m, Kendall and Babington Smith (1939).
    generator = np.random.default_rng(7)
    rankings = np.array([generator.permutation(9) + 1.0 for _ in range(4)])
    pairs = [spearman(rankings[i], rankings[j]) for i in range(4) for j in range(i)]
    mean = sum(pair for pair in pairs if pair is not None) / len(pairs)
    assert kendall_w(rankings) == pytest.approx((mean * 3 + 1) / 4)


def test_kendalls_w_of_siegels_job_applicants() -> None:
    # Three interviewers rank six applicants (Siegel and Castellan 1988, sec. 9.6): W = 0.16.
    rankings = [[1, 6, 3, 2, 5, 4], [1, 5, 6, 4, 2, 3], [6, 3, 2, 5, 4, 1]]
    assert kendall_w(rankings) == pytest.approx(0.16, abs=0.005)


def test_kendalls_w_is_1_in_agreement_with_ties_too_and_absent_for_one_ranking() -> None:
    tied = mid_ranks([1.0, 1.0, 2.0, 5.0])
    assert kendall_w([tied, tied, tied]) == pytest.approx(1)
    assert kendall_w([tied]) is None
    assert kendall_w([[1.5, 1.5], [1.5, 1.5]]) is None


def _slow_overlap(first: list[str], second: list[str], p: float) -> float:
    agreements = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, len(first) + 1)]
    series = sum(agreement * p**d for d, agreement in enumerate(agreements, start=1))
    return agreements[-1] * p ** len(first) + (1 - p) / p * series


@given(st.permutations("abcdefg"), st.floats(0.1, 0.99))
def test_rank_biased_overlap_is_the_sum_that_defines_it(order: list[str], p: float) -> None:
    assert rank_biased_overlap("abcdefg", order, p) == pytest.approx(_slow_overlap(list("abcdefg"), order, p))
    assert rank_biased_overlap(order, "abcdefg", p) == pytest.approx(rank_biased_overlap("abcdefg", order, p))
    assert rank_biased_overlap(order, order, p) == pytest.approx(1)


def test_rank_biased_overlap_weighs_the_top_more_than_the_tail() -> None:
    names = list("abcdefghij")
    at_the_top, at_the_tail = names.copy(), names.copy()
    at_the_top[0], at_the_top[1] = names[1], names[0]
    at_the_tail[-1], at_the_tail[-2] = names[-2], names[-1]
    assert rank_biased_overlap(names, at_the_top, 0.8) < rank_biased_overlap(names, at_the_tail, 0.8) < 1


def test_equal_values_rank_in_the_order_of_their_names() -> None:
    assert descending([1, 2, 1], ["b", "c", "a"]) == ["c", "a", "b"]
    assert top_overlap(["a", "b"], ["b", "a"], 1) == 0


def test_spearman_browns_formula_lengthens_a_test_and_knows_no_negative_reliability() -> None:
    assert spearman_brown([0.6, 1.0, 0.0, -0.5]).tolist() == pytest.approx([0.75, 1, 0, 0])
    assert spearman_brown([0.5, 1.0, 0.0, -0.5], 3).tolist() == pytest.approx([0.75, 1, 0, 0])
    assert disattenuated(0.9, 0.9) == pytest.approx(1)


# --- intervals


def test_intervals_are_the_formulas_of_the_literature() -> None:
    # By hand: atanh(0.5) = 0.54931, sqrt(1.125 / 27) = 0.20412, 1.95996 * 0.20412 = 0.40008.
    expected = math.tanh(0.54931 - 0.40008), math.tanh(0.54931 + 0.40008)
    assert spearman_interval(0.5, 30) == pytest.approx(expected, abs=1e-4)
    # sqrt(0.437 / 26) = 0.12964, 1.95996 * 0.12964 = 0.25410.
    expected = math.tanh(0.54931 - 0.25410), math.tanh(0.54931 + 0.25410)
    assert kendall_interval(0.5, 30) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("n", [3, 4])
def test_below_five_layers_an_interval_says_nothing(n: int) -> None:
    assert spearman_interval(1.0, n) == kendall_interval(1.0, n) == (-1, 1)


def test_full_agreement_of_few_layers_leaves_room_for_less() -> None:
    for interval in (spearman_interval, kendall_interval):
        low, high = interval(1.0, 8)
        assert low < 0.9
        assert high == 1
        assert interval(-1.0, 8) == (-high, -low)
        assert interval(1.0, 300)[0] > 0.99


@pytest.mark.parametrize("n", [12, 48, 300])
@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
def test_intervals_over_layers_cover_the_true_correlation(n: int, r: float) -> None:
    """Bivariate normal layers: true rho = 6/pi asin(r/2), true tau = 2/pi asin(r).

    1,000 samples (200 of 300 layers): the standard error of a coverage of 0.95 is 0.007 (0.015). Fieller's variance is
    meant for |tau| below 0.8 and falls to 0.90 at n = 12, r = 0.9 (tau 0.71); no verdict is read off it.
    """
    generator = np.random.default_rng([4, n, int(10 * r)])
    true_rho, true_tau = 6 / math.pi * math.asin(r / 2), 2 / math.pi * math.asin(r)
    covered_rho = covered_tau = 0
    repetitions = 1_000 if n < 300 else 200
    for _ in range(repetitions):
        x, z = generator.standard_normal((2, n))
        y = r * x + math.sqrt(1 - r * r) * z
        rho, tau = spearman(x, y), kendall(x, y)
        assert rho is not None
        assert tau is not None
        low, high = spearman_interval(rho, n)
        covered_rho += low <= true_rho <= high
        low, high = kendall_interval(tau, n)
        covered_tau += low <= true_tau <= high
    assert 0.92 <= covered_rho / repetitions <= 0.99
    assert (0.87 if (n, r) == (12, 0.9) else 0.92) <= covered_tau / repetitions <= 0.995
