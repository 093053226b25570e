"""Curves of Ψ over Γ, compared: pure functions, no I/O.

A curve is the monotone envelope of a run, [(Γ, best Ψ so far)…] by rising Γ, linear between its vertices. A budget
above what a run spent buys what the run reached, so that after its end a curve is flat; before its first score nothing
is known of it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from gradient_blueprints.record_models import Goal

CONFIDENCE = 0.95
MOST_VERTICES = 256
Curve = Sequence[tuple[float, float]]


def better(one: float, other: float, goal: Goal) -> float:
    return max(one, other) if goal == "rise" else min(one, other)


def envelope(points: Iterable[tuple[float, float]], goal: Goal) -> list[tuple[float, float]]:
    """The curve of scored points (Γ, Ψ) in the order of training.

    What was spent stays spent: where Γ falls, or is negative, the largest so far (at least 0) stands. Of long curves
    MOST_VERTICES stay, the first and the last among them, and scores and costs between them as near as these allow.

    >>> envelope([(1, 5.0), (2, 6.0), (3, 4.0)], "fall")
    [(1, 5.0), (2, 5.0), (3, 4.0)]
    """
    curve: list[tuple[float, float]] = []
    spent = 0.0
    for gamma, psi in points:
        spent = max(spent, gamma)
        best = better(curve[-1][1], psi, goal) if curve else psi
        if curve and curve[-1][0] == spent:
            curve.pop()
        curve.append((spent, best))
    corners = [
        point
        for index, point in enumerate(curve)
        if index in (0, len(curve) - 1) or not curve[index - 1][1] == point[1] == curve[index + 1][1]
    ]
    return corners if len(corners) <= MOST_VERTICES else _thinned(corners)


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Douglas and Peucker's line: a vertex more where the lines between those so far are furthest from the curve.

    Far is what changes a score, as a share of the curve's range of Ψ, or a cost, as a share of Γ, whichever is more:
    a drop is all score, and a slope that hardly falls all cost.
    """
    gamma, psi = np.array(curve).T
    span = abs(psi[-1] - psi[0])

    def furthest(left: int, right: int) -> tuple[float, int, int, int]:
        inner = slice(left + 1, right)
        wide, high = gamma[right] - gamma[left], psi[right] - psi[left]
        score = psi[left] + high * ((gamma[inner] - gamma[left]) / wide)
        cost = gamma[left] + wide * ((psi[inner] - psi[left]) / high)
        of_cost = np.abs(cost - gamma[inner]) / np.maximum(cost, gamma[inner])
        distance = np.maximum(np.abs(score - psi[inner]) / span, of_cost)
        middle = int(distance.argmax())
        return -float(distance[middle]), left, left + 1 + middle, right

    kept = [0, len(curve) - 1]
    lines = [furthest(*kept)]
    while len(kept) < MOST_VERTICES:
        _, left, middle, right = heapq.heappop(lines)
        kept.append(middle)
        for start, end in ((left, middle), (middle, right)):
            if end - start > 1:
                heapq.heappush(lines, furthest(start, end))
    return [curve[index] for index in sorted(kept)]


def score_at(curve: Curve, gamma: float) -> float | None:
    """Ψ bought by Γ; None before the first score."""
    if gamma < curve[0][0]:
        return None
    if gamma >= curve[-1][0]:
        return curve[-1][1]
    left = next(index for index, (reached, _) in enumerate(curve) if reached > gamma) - 1
    (spent, psi), (next_spent, next_psi) = curve[left], curve[left + 1]
    share = (gamma - spent) / (next_spent - spent)
    return psi + (next_psi - psi) * share


def cost_of(curve: Curve, psi: float, goal: Goal) -> float | None:
    """The least Γ at which Ψ is reached; None where it never is.

    A run whose first score is better already is given that score's Γ: when before it got there is not known.
    """
    if better(curve[0][1], psi, goal) == curve[0][1]:
        return curve[0][0]
    for (gamma, score), (next_gamma, next_score) in itertools.pairwise(curve):
        if better(next_score, psi, goal) == next_score:
            return gamma + (next_gamma - gamma) * ((psi - score) / (next_score - score))
    return None


def area(curve: Curve, low: float, high: float) -> float | None:
    """∫ Ψ d ln Γ from `low` to `high`, exact for the curve; None where it has no score at `low`.

    Of a piece Ψ = a + b·Γ the integral is a·ln(Γ₂/Γ₁) + b·(Γ₂ − Γ₁).
    """
    first = score_at(curve, low)
    if first is None or not 0 < low < high:
        return None
    last = score_at(curve, high)
    assert last is not None
    bounded = [(low, first), *(point for point in curve if low < point[0] < high), (high, last)]
    total = 0.0
    for (left, score), (right, next_score) in itertools.pairwise(bounded):
        slope = (next_score - score) / (right - left)
        total += (score - slope * left) * (math.log(right) - math.log(left)) + slope * (right - left)
    return total if math.isfinite(total) else None


def front(pairs: Iterable[tuple[float, float]], goal: Goal) -> list[tuple[float, float]]:
    """The pairs (Γ, Ψ) that none beats: no other is better for as little. By rising Γ.

    >>> front([(1, 3.0), (2, 4.0), (2, 2.5), (3, 2.0)], "fall")
    [(1, 3.0), (2, 2.5), (3, 2.0)]
    """
    kept: list[tuple[float, float]] = []
    for gamma, psi in sorted(set(pairs), key=lambda pair: (pair[0], -pair[1] if goal == "rise" else pair[1])):
        if not kept or (psi != kept[-1][1] and better(psi, kept[-1][1], goal) == psi):
            kept.append((gamma, psi))
    return kept


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of Student's t for the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean - width, mean + width


def window_ratio(first: tuple[float, float], last: tuple[float, float], goal: Goal) -> float | None:
    """Gain in Ψ per unit of Γ between two pairs (Γ, Ψ), positive where Ψ got better; None where nothing was spent."""
    spent = last[0] - first[0]
    if spent <= 0:
        return None
    gain = last[1] - first[1] if goal == "rise" else first[1] - last[1]
    ratio = gain / spent
    return ratio if math.isfinite(ratio) else None
