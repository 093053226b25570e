"""Learning rates tuned alike for every arm: a grid of factors of 2, extended until the best lies inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evidence.runs import Run, Store

WIDEST = 7
"""Steps to either side of the first rate at which the search gives up."""


def rate(step: int) -> float:
    """2^step · 10⁻³; steps are integers, so that equal rates are equal numbers."""
    return 1e-3 * 2.0**step


def missing(losses: Mapping[int, float], start: int) -> int | None:
    """The next grid step to try, None when the best is known to lie inside: lower than both of its neighbours.

    >>> missing({}, 3), missing({3: 2.0}, 3), missing({2: 2.1, 3: 2.0}, 3), missing({2: 2.1, 3: 2.0, 4: 1.9}, 3)
    (3, 2, 4, 5)
    """
    for step in (start, start - 1, start + 1):
        if step not in losses:
            return step
    best = min(losses, key=lambda step: (_finite(losses[step]), step))
    for step in (best - 1, best + 1):
        if step not in losses and abs(step - start) <= WIDEST:
            return step
    return None


def best(losses: Mapping[int, float]) -> int:
    return min(losses, key=lambda step: (_finite(losses[step]), step))


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


class Tuning:
    """The search for one arm's rate, over runs that are already stored or still to be made."""

    def __init__(self, store: Store, template: Run, seeds: Sequence[int], start: int) -> None:
        """`template` is a run of the arm; its purpose, rate and seed are replaced."""
        self._store, self._template, self._seeds, self._start = store, template, seeds, start

    def runs(self, step: int) -> list[Run]:
        return [replace(self._template, purpose="tune", rate=rate(step), seed=seed) for seed in self._seeds]

    def losses(self) -> dict[int, float]:
        """Mean loss of every grid step whose seeds are all there."""
        found = {}
        for step in range(self._start - WIDEST - 1, self._start + WIDEST + 2):
            results = [self._store.get(run) for run in self.runs(step)]
            losses = [result.loss for result in results if result is not None]
            if len(losses) == len(self._seeds):
                found[step] = sum(losses) / len(losses)
        return found

    def next_runs(self) -> list[Run]:
        """What has to be run before more is known; empty when the rate is found."""
        step = missing(self.losses(), self._start)
        return [] if step is None else [run for run in self.runs(step) if self._store.get(run) is None]

    def rate(self) -> float | None:
        """The tuned rate, None while the search goes on."""
        losses = self.losses()
        return rate(best(losses)) if missing(losses, self._start) is None else None
