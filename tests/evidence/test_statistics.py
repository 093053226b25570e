"""Intervals and tests of paired differences, against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evidence.statistics import difference, holm, interval, sign_flip


def test_five_equal_signs_have_the_smallest_p_that_five_can_have() -> None:
    assert sign_flip([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2 / 32)


def test_values_around_zero_are_no_evidence() -> None:
    assert sign_flip([0.3, -0.3, 0.2, -0.2]) == 1.0


def test_no_p_of_random_signs_is_zero() -> None:
    values = np.random.default_rng(1).normal(5, 1, 16)
    assert sign_flip(values) == pytest.approx(1 / 10_001)
    assert sign_flip(np.tile([1.0, -1.0], 8)) == 1.0


@pytest.mark.parametrize("unit", [1e-13, 1e13])
def test_a_p_has_no_unit(unit: float) -> None:
    assert sign_flip(unit * np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)
    assert sign_flip(unit * np.array([0.1, 0.2, -0.3, 0.7, 0.7])) == sign_flip([0.1, 0.2, -0.3, 0.7, 0.7])


def test_holms_correction_is_the_textbooks() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_the_interval_of_many_values_is_students() -> None:
    values = np.random.default_rng(3).normal(5, 1, 60)
    expected = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert interval(values) == pytest.approx(expected, abs=0.06)


def test_the_interval_of_ten_values_covers_the_mean() -> None:
    generator = np.random.default_rng(4)
    covered = [low <= 0 <= high for low, high in (interval(generator.normal(0, 1, 10)) for _ in range(150))]
    assert np.mean(covered) >= 0.93  # a percentile bootstrap of ten values covers about 0.9


@pytest.mark.parametrize("values", [[0.986, 0.9861, 0.97], [0.98, 0.981, 0.979, 0.9805, 0.9]])
def test_the_interval_of_few_values_is_students_however_close_some_of_them_lie(values: list[float]) -> None:
    assert interval(values) == pytest.approx(
        stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    )


def test_a_difference_is_taken_over_the_common_seeds() -> None:
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.4, 7: 0.0})
    assert found is not None
    assert found.pairs == 2
    assert found.mean == pytest.approx(0.55)
    assert difference({0: 1.0}, {0: 0.5}) is None
