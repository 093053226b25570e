"""What several labs say together about one layer: pure functions on the logarithms of their norms.

Norms of different labs are on different scales (batch size, loss scale, tokens), so each lab's are divided by its own
median over the core layers before they come here. docs/aggregation-and-staleness.md states what follows and its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.registry.agreement import Floats

WEIGHT_RATIO = 2.0
"""Largest ratio between the weights of two labs. With it labs that are fewer than a third of all never hold half of
the weight, whatever intervals they claim: k labs of weight sqrt(2) against n - k of 1/sqrt(2) need k >= n/3."""
_MAD_OF_NORMAL = 1.4826  # 1 / Phi^-1(3/4)
_ROUNDING = 1e-9  # of the whole weight: sums of weights with a root in them meet a half to about 1e-16 for each lab


def weights(errors: npt.ArrayLike) -> Floats:
    """Weights from the standard errors of the logarithms: (median error / error)^2 within [1/sqrt 2, sqrt 2].

    A lab without an interval (NaN) weighs 1, as the median lab does; an error of 0 is as good as the best allowed.
    """
    errors = np.asarray(errors, np.float64)
    known = np.isfinite(errors)
    if not known.any():
        return np.ones(len(errors))
    middle = float(np.median(errors[known]))
    root = math.sqrt(WEIGHT_RATIO)
    given = np.ones(len(errors))
    if middle > 0:
        with np.errstate(divide="ignore", over="ignore"):
            given[known] = np.clip((middle / errors[known]) ** 2, 1 / root, root)
    return given


def weighted_median(values: npt.ArrayLike, weight: npt.ArrayLike) -> float:
    """The value with half of the weight on either side; midway between two when the halves meet exactly between them.

    -inf (the logarithm of a zero) is a value like others; midway between it and another is -inf.

    >>> weighted_median([1.0, 2.0, 10.0], [1, 1, 1]), weighted_median([1.0, 2.0], [1, 1])
    (2.0, 1.5)
    """
    values, weight = np.asarray(values, np.float64), np.asarray(weight, np.float64)
    order = np.argsort(values, kind="stable")
    ordered, cumulative = values[order], weight[order].cumsum()
    half, rounding = cumulative[-1] / 2, cumulative[-1] * _ROUNDING
    lower = ordered[np.searchsorted(cumulative, half - rounding)]
    upper = ordered[np.searchsorted(cumulative, half + rounding)]
    return float(lower) if lower == upper else float((lower + upper) / 2)


def leave_one_out(values: npt.ArrayLike, weight: npt.ArrayLike) -> Floats:
    """The weighted median without each value in turn, one sort for all. NaN where none is left."""
    values, weight = np.asarray(values, np.float64), np.asarray(weight, np.float64)
    n = len(values)
    if n < 2:
        return np.full(n, np.nan)
    order = np.argsort(values, kind="stable")
    ordered, mine = values[order], weight[order]
    cumulative = mine.cumsum()
    position = np.arange(n)
    half, rounding = (cumulative[-1] - mine) / 2, cumulative[-1] * _ROUNDING

    def find(sums: Floats) -> npt.NDArray[np.intp]:
        # Before the one left out the sums are as they were; behind it they are smaller by its weight.
        before = np.searchsorted(cumulative, sums)
        behind = np.searchsorted(cumulative, sums + mine)
        return np.asarray(np.where(before < position, before, np.maximum(behind, position + 1)))

    lower, upper = ordered[find(half - rounding)], ordered[find(half + rounding)]
    with np.errstate(invalid="ignore"):
        middle = np.where(lower == upper, lower, (lower + upper) / 2)
    result = np.empty(n)
    result[order] = middle
    return result


def spread(values: npt.ArrayLike) -> float | None:
    """1.4826 * the median distance from the median; None for fewer than 2 values or among zeros."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    middle = np.median(values)
    if not np.isfinite(middle):
        return None
    mad = float(np.median(np.abs(values - middle)))
    return _MAD_OF_NORMAL * mad if math.isfinite(mad) else None


def i_squared(values: npt.ArrayLike, errors: npt.ArrayLike) -> float | None:
    """Higgins and Thompson's I^2 = max(0, (Q - df) / Q), Q = sum w (y - mean_w)^2, w = 1/error^2, df = labs - 1.

    Over the labs with an interval; None for fewer than 2 of them.
    """
    values, errors = np.asarray(values, np.float64), np.asarray(errors, np.float64)
    usable = np.isfinite(values) & np.isfinite(errors) & (errors > 0)
    if usable.sum() < 2:
        return None
    y, precision = values[usable], (errors[usable].min() / errors[usable]) ** 2
    mean = (precision * y).sum() / precision.sum()
    q = float((precision * (y - mean) ** 2).sum() / errors[usable].min() ** 2)
    df = int(usable.sum()) - 1
    return max(0.0, (q - df) / q) if q > 0 and math.isfinite(q) else 0.0 if q == 0 else 1.0


@dataclass(frozen=True)
class Combined:
    """One layer: the estimate on the common scale (log), and how the labs disagree."""

    log_norm: float
    spread: float | None
    i_squared: float | None
    influential: int | None  # position of the lab without which the estimate moves most
    without: float | None  # the log estimate then
    deviations: Floats  # distance of each lab from the estimate of the others; NaN where there is none


def combine(logs: npt.ArrayLike, errors: npt.ArrayLike) -> Combined:
    """Combine one layer of several labs, whose order is that of their names."""
    logs, errors = np.asarray(logs, np.float64), np.asarray(errors, np.float64)
    weight = weights(errors)
    estimate = weighted_median(logs, weight)
    others = leave_one_out(logs, weight)
    with np.errstate(invalid="ignore"):
        deviations = np.where(np.isfinite(logs) & np.isfinite(others), np.abs(logs - others), np.nan)
        moves = np.where(others == estimate, 0.0, np.abs(others - estimate))
    influential = None if len(logs) < 2 else int(np.argmax(moves))
    return Combined(
        log_norm=estimate,
        spread=spread(logs),
        i_squared=i_squared(logs, errors),
        influential=influential,
        without=None if influential is None else float(others[influential]),
        deviations=np.asarray(deviations),
    )


def ranked(shares: Sequence[float], norms: Sequence[float], ids: Sequence[str]) -> list[int]:
    """Ranks from 1 by falling median rank share, then falling norm, then id."""
    order = sorted(range(len(ids)), key=lambda i: (-shares[i], -norms[i], ids[i]))
    ranks = [0] * len(ids)
    for rank, index in enumerate(order, start=1):
        ranks[index] = rank
    return ranks
