"""How far two rankings of the same layers agree, and how sure that is: pure functions on vectors.

References: Bonett and Wright, Psychometrika 65 (2000), 23-28; Fieller, Hartley and Pearson, Biometrika 44 (1957),
470-481; Kendall and Babington Smith, Ann. Math. Statist. 10 (1939), 275-287; Webber, Moffat and Zobel, ACM TOIS 28
(2010), article 20; Spearman, Am. J. Psychol. 15 (1904), 72-101.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
SMALLEST_SAMPLE = 5  # the variances below hold asymptotically; n - 3 and n - 4 stand in their denominators


def mid_ranks(values: npt.ArrayLike) -> Floats:
    """Ranks from 1 for the smallest; equal values share the mean of their ranks. Along the last axis.

    >>> mid_ranks([10.0, 20.0, 20.0, 5.0]).tolist()
    [2.0, 3.5, 3.5, 1.0]
    """
    array = np.asarray(values, np.float64)
    order = array.argsort(-1)
    ascending = np.take_along_axis(array, order, -1)
    if not (ascending[..., 1:] > ascending[..., :-1]).all():  # ties, or NaN, which stays NaN
        return np.asarray(stats.rankdata(array, method="average", axis=-1), np.float64)
    ranks = np.empty(array.shape)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(1.0, array.shape[-1] + 1), array.shape), -1)
    return ranks


def is_constant(values: npt.ArrayLike) -> bool:
    array = np.asarray(values, np.float64)
    return bool(array.size == 0 or array.min() == array.max())


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float | None:
    """Spearman's rho: Pearson's correlation of mid-ranks. None below 3 pairs or where a side is constant.

    Without ties 1 - 6 * sum(d^2) / (n^3 - n), d the differences of ranks.

    >>> spearman([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    if np.size(x) < 3 or is_constant(x) or is_constant(y):
        return None
    return round(float(row_correlations(mid_ranks(x)[None, :], mid_ranks(y)[None, :]).item()), 15)


def kendall(x: npt.ArrayLike, y: npt.ArrayLike) -> float | None:
    """Kendall's tau-b: (C - D) / sqrt((n0 - n1)(n0 - n2)), n0 = n(n-1)/2, n1 and n2 the pairs tied in x and in y.

    None below 3 pairs or where a side is constant.
    """
    if np.size(x) < 3 or is_constant(x) or is_constant(y):
        return None
    return float(row_kendalls(np.asarray(x, np.float64)[None, :], np.asarray(y, np.float64)[None, :]).item())


_MOST_COMPARED = 1_500
"""Values up to which comparing each with each beats sorting: scipy's call alone takes longer than a few hundred."""
Truths = npt.NDArray[np.bool_]


def row_kendalls(x: Floats, y: Floats) -> Floats:
    """Kendall's tau-b of each row of x with that of y, NaN where a row is constant. x of one row goes with all of y."""
    if x.shape[-1] > _MOST_COMPARED:
        pairs = zip(np.broadcast_to(x, y.shape), y, strict=True)
        return np.array([stats.kendalltau(*pair, variant="b", method="asymptotic").statistic for pair in pairs])
    if len(x) == 1:
        above = _above(x[0])
        return np.array([_tau(above, _above(row)) for row in y])
    return np.array([_tau(_above(one), _above(two)) for one, two in zip(x, y, strict=True)])


def _above(values: Floats) -> Truths:
    """Whether value i lies above value j, (n, n)."""
    return values[:, None] > values[None, :]


def _tau(x: Truths, y: Truths) -> float:
    """Each pair that is not tied stands once in x: concordant where y says the same, discordant where it says the
    opposite."""
    concordant, discordant = np.count_nonzero(x & y), np.count_nonzero(x & y.T)
    untied = float(np.count_nonzero(x)) * np.count_nonzero(y)
    return (concordant - discordant) / math.sqrt(untied) if untied else math.nan


def row_correlations(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each row of x with that of y; 0 where a row is constant."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    product = (x * y).sum(-1)
    return np.asarray(np.divide(product, scale, out=np.zeros_like(product), where=scale > 0))


# --- intervals when nothing but the two vectors is known: the layers count as a sample of layers


def spearman_interval(rho: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Fisher's z with the variance of Bonett and Wright: tanh(atanh(rho) ± z * sqrt((1 + rho^2/2) / (n - 3))).

    Below 5 pairs [-1, 1]. At |rho| = 1, where atanh has no value, rho is first drawn in to
    1 - 6 * 2 / (n^3 - n): one swap of neighbours, the nearest that n ranks can come.
    """
    if n < SMALLEST_SAMPLE:
        return -1.0, 1.0
    nearest = 1 - 12 / (n**3 - n)
    drawn_in = min(max(rho, -nearest), nearest)
    half_width = _quantile(confidence) * math.sqrt((1 + drawn_in**2 / 2) / (n - 3))
    low, high = math.tanh(math.atanh(drawn_in) - half_width), math.tanh(math.atanh(drawn_in) + half_width)
    return (low, 1.0) if rho >= nearest else (-1.0, high) if rho <= -nearest else (low, high)


def kendall_interval(tau: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Fisher's z with the variance of Fieller, Hartley and Pearson: tanh(atanh(tau) ± z * sqrt(0.437 / (n - 4))).

    Below 5 pairs [-1, 1]. At |tau| = 1 tau is first drawn in to one swap of neighbours, 1 - 4 / (n(n-1)).
    """
    if n < SMALLEST_SAMPLE:
        return -1.0, 1.0
    nearest = 1 - 4 / (n * (n - 1))
    drawn_in = min(max(tau, -nearest), nearest)
    half_width = _quantile(confidence) * math.sqrt(0.437 / (n - 4))
    low, high = math.tanh(math.atanh(drawn_in) - half_width), math.tanh(math.atanh(drawn_in) + half_width)
    return (low, 1.0) if tau >= nearest else (-1.0, high) if tau <= -nearest else (low, high)


def _quantile(confidence: float) -> float:
    return float(stats.norm.ppf((1 + confidence) / 2))


# --- agreement at the top


def descending(values: npt.ArrayLike, names: Sequence[str]) -> list[str]:
    """The names by falling value; equal values in the order of their names, so that the input's order is no matter."""
    return [name for _, name in sorted(zip(-np.asarray(values, np.float64), names, strict=True))]


def top_overlap(first: Sequence[str], second: Sequence[str], k: int) -> float:
    """Share of the top k that two rankings have in common; k/n is what chance would give.

    >>> top_overlap(["a", "b", "c", "d"], ["b", "d", "a", "c"], 2)
    0.5
    """
    return len(set(first[:k]) & set(second[:k])) / k


def rank_biased_overlap(first: Sequence[str], second: Sequence[str], p: float) -> float:
    """Extrapolated rank-biased overlap of two rankings of the same n names (Webber et al., eq. 30 for s = l = n).

    RBO = A_n * p^n + (1 - p)/p * sum over d = 1..n of A_d * p^d, where A_d is the share that the tops d have in common.
    A reader who goes on from each rank to the next with probability p sees 1/(1 - p) ranks on average.

    >>> round(rank_biased_overlap(["a", "b", "c"], ["a", "c", "b"], 0.9), 6)
    0.955
    """
    seen_first: set[str] = set()
    seen_second: set[str] = set()
    common, total, share, weight = 0, 0.0, 0.0, 1.0
    for depth, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        seen_first.add(one)
        seen_second.add(other)
        common += (one in seen_second) + (other in seen_first) - (one == other)
        share = common / depth
        weight *= p
        total += share * weight
    return share * weight + (1 - p) / p * total


# --- the ceiling


def spearman_brown(part: npt.ArrayLike, times: float = 2) -> Floats:
    """Reliability of a whole sample, f times as large as two parts that correlate by r: f r / (1 + (f - 1) r).

    0 for r <= 0.

    >>> round(float(spearman_brown(0.6)), 6)
    0.75
    """
    r = np.maximum(np.asarray(part, np.float64), 0)
    return np.asarray(times * r / (1 + (times - 1) * r))


def disattenuated(correlation: float, ceiling: float) -> float:
    """The correlation without measurement noise: r / ceiling, ceiling = sqrt(reliability of x * reliability of y).

    Spearman (1904). Noise can carry it beyond 1; that is reported as it is and read as 1.
    """
    return correlation / ceiling


# --- many rankings


def kendall_w(rankings: npt.ArrayLike) -> float | None:
    """Kendall's coefficient of concordance of m rankings of n things, an m × n array of mid-ranks.

    W = 12 * sum (R_i - m(n + 1)/2)^2 / (m^2 (n^3 - n) - m * sum T_j), R_i the rank sums, T_j = sum (t^3 - t) over the
    groups of t ties in ranking j. 1 is full agreement, 1/m what independent rankings give on average. None for fewer
    than 2 rankings or things, or when all are tied throughout.
    """
    ranks = np.asarray(rankings, np.float64)
    m = len(ranks)
    ties = sum(int((counts**3 - counts).sum()) for counts in (np.unique(row, return_counts=True)[1] for row in ranks))
    return concordance(ranks.sum(0), m, ties)


def concordance(rank_sums: npt.ArrayLike, m: int, ties: float) -> float | None:
    """Kendall's W from the rank sums of n things over m rankings and the sum of t^3 - t over all groups of ties."""
    sums = np.asarray(rank_sums, np.float64)
    n = len(sums)
    if m < 2 or n < 2:
        return None
    greatest = m**2 * (n**3 - n) - m * ties
    if greatest <= 0:
        return None
    return float(12 * ((sums - m * (n + 1) / 2) ** 2).sum() / greatest)
