"""The search for a learning rate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evidence.tuning import best, missing


@given(optimum=st.integers(-2, 6), start=st.integers(0, 4))
def test_the_search_ends_with_the_best_inside_its_grid(optimum: int, start: int) -> None:
    losses: dict[int, float] = {}
    while (step := missing(losses, start)) is not None:
        losses[step] = abs(step - optimum) + 0.1 * (step > optimum)
    assert best(losses) == optimum
    assert {optimum - 1, optimum + 1} <= set(losses)


def test_a_rate_that_diverged_is_never_the_best() -> None:
    assert best({3: float("nan"), 2: 5.0}) == 2
