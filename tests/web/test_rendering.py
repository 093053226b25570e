"""How values are written on pages."""

from __future__ import annotations

import doctest

import pytest

from app.web import rendering
from app.web.rendering import count, number, percent


def test_the_examples_of_the_filters_hold() -> None:
    assert doctest.testmod(rendering).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1.0, "1.00"),
        (999.7, "1,000"),
        (99.96, "100"),
        (1.7976931348623157e308, "1.80e308"),
        (5e-324, "4.94e−324"),
        (-1e-5, "−1.00e−5"),
        (0.00012345, "0.000123"),
    ],
)
def test_numbers_keep_three_digits_whatever_their_size(value: float | None, text: str) -> None:
    assert number(value) == text


def test_counts_and_shares_are_short() -> None:
    assert count(None) == "–"
    counts = (999_999, 1_000_000, 9_996_000, 28_311_552, 999_499_999, 999_500_000, 7 * 10**12, 2**53)
    assert list(map(count, counts)) == [
        "999,999",
        "1.00 M",
        "10.0 M",
        "28.3 M",
        "999 M",
        "1.00 B",
        "7.00 T",
        "9,010 T",
    ]
    assert [percent(None), percent(0.0049), percent(1.0)] == ["–", "0%", "100%"]
