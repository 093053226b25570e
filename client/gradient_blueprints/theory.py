"""The paper's closed forms: retained mass, the exponent gamma, the best fraction to update (standard library only).

Symbols are named once, because the paper uses alpha and beta for several things (docs/profiling.md):
`alpha` is the rank-size exponent of gradient magnitudes, ||g_(r)|| ~ r^-alpha (eq. 1); `gamma` the
exponent of the gain, Delta_k ~ k^gamma Delta_full (eq. 3); `fixed` and `variable` the costs per
parameter of C(k) = fixed + variable * k (section 4.1).
"""

from __future__ import annotations

import math
from enum import StrEnum
from statistics import NormalDist
from typing import NamedTuple

ADAM_MOMENT_BYTES = 8
"""Two float32 moments per trained parameter."""

_DIRECT_TERMS = 1_000  # summed one by one before the Euler-Maclaurin tail, whose error is then below 1e-16


class Regime(StrEnum):
    """Whether a partial update pays; it does exactly when gamma < variable/(fixed + variable)."""

    PARTIAL = "partial"
    FULL = "full"


class BestFraction(NamedTuple):
    """The fraction k* that maximises gain per cost, and whether the formula stayed inside (0, 1)."""

    fraction: float
    regime: Regime


def gain_exponent(alpha: float) -> float:
    """gamma = 1 - alpha/(1 + alpha) = 1/(1 + alpha), Appendix A.1.

    The schema's example prints alpha/(1 + alpha) instead; the formula has the right direction.

    >>> [round(gain_exponent(alpha), 3) for alpha in (1.47, 1.12, 1.50)]
    [0.405, 0.472, 0.4]
    """
    if alpha < 0:
        raise ValueError(f"alpha = {alpha}: a rank-size exponent is not negative")
    return 1 / (1 + alpha)


def retained_mass(k: float, entries: int, alpha: float) -> float:
    """Share of the total magnitude that the largest k * entries keep (eq. 7, an integral approximation).

    ((kN)^(1-alpha) - 1) / (N^(1-alpha) - 1), and ln(kN)/ln(N) in the limit alpha = 1. Below one
    entry, and for a single one, the share is 0 and 1.

    >>> round(retained_mass(0.1, 10_000, 1.5), 3)
    0.978
    >>> round(retained_mass(0.1, 10_000, 1.0), 3)
    0.75
    """
    _check_share(k)
    if k * entries <= 1:
        return 1.0 if entries == 1 and k == 1 else 0.0
    top, all_ = math.log(k * entries), math.log(entries)
    exponent = 1 - alpha
    if abs(exponent) * all_ < 1e-9:  # expm1(x)/expm1(y) tends to x/y
        return top / all_
    if exponent * all_ > 700:  # beyond float64; both minus ones are lost anyway
        return math.exp(exponent * (top - all_))
    return math.expm1(exponent * top) / math.expm1(exponent * all_)


def exact_retained_mass(k: float, entries: int, alpha: float) -> float:
    """The same share by the sums that eq. 7 approximates: sum_{r <= kN} r^-alpha / sum_{r <= N} r^-alpha.

    >>> round(exact_retained_mass(0.1, 10_000, 1.5), 3)
    0.983
    """
    _check_share(k)
    return power_sum(math.floor(k * entries + 1e-9), alpha) / power_sum(entries, alpha)


def power_sum(terms: int, alpha: float) -> float:
    """sum_{r = 1..terms} r^-alpha, to float64 precision for any number of terms.

    >>> round(power_sum(10**12, 1.0), 9)  # ln(n) + Euler's constant
    28.208236781
    """
    direct = min(terms, _DIRECT_TERMS)
    head = math.fsum(math.pow(r, -alpha) for r in range(1, direct + 1))
    if terms <= _DIRECT_TERMS:
        return head
    low, high = float(direct), float(terms)
    exponent = 1 - alpha
    span = math.log(high / low)
    integral = span if exponent == 0 else low**exponent * math.expm1(exponent * span) / exponent
    ends = (high**-alpha - low**-alpha) / 2
    slope = alpha * (low ** (-alpha - 1) - high ** (-alpha - 1)) / 12
    third = alpha * (alpha + 1) * (alpha + 2) * (low ** (-alpha - 3) - high ** (-alpha - 3)) / 720
    return float(head + integral + ends + slope - third)


def gaussian_retained_mass(k: float) -> float:
    """The share that the top k keeps when the entries are Gaussian: the null beside every measured curve.

    E[|x|; |x| > z] / E|x| = exp(-z^2 / 2) with P(|x| > z) = k.

    >>> round(gaussian_retained_mass(0.1), 3)
    0.259
    """
    _check_share(k)
    if k in {0, 1}:
        return float(k)
    z = NormalDist().inv_cdf(k / 2)  # minus the threshold; 1 - k/2 is 1 for a small k
    return math.exp(-z * z / 2)


def cost(k: float, fixed: float, variable: float) -> float:
    """C(k) = fixed + variable * k, per parameter (section 4.1)."""
    return fixed + variable * k


def gain_per_cost(k: float, gamma: float, fixed: float, variable: float) -> float:
    """G(k) = k^gamma / (fixed + variable * k), eq. 12. Raises ValueError where that costs nothing.

    >>> round(gain_per_cost(0.375, 0.6, 1, 4), 3), gain_per_cost(1, 0.6, 1, 4)
    (0.222, 0.2)
    """
    _check_share(k)
    spent = cost(k, fixed, variable)
    if not spent > 0:
        raise ValueError(f"k = {k}, fixed = {fixed}, variable = {variable}: the cost is {spent}; need > 0")
    return math.pow(k, gamma) / spent


def best_fraction(gamma: float, fixed: float, variable: float) -> BestFraction:
    """k* = gamma * fixed / (variable * (1 - gamma)), eq. 15, clipped to 1.

    The paper states it for every variable > 0; it holds only for gamma < variable/(fixed + variable).
    Otherwise G still grows at k = 1 and the full update is best.

    >>> best_fraction(0.5, 1, 4)
    BestFraction(fraction=0.25, regime=<Regime.PARTIAL: 'partial'>)
    >>> best_fraction(0.6, 1, 1)  # the formula alone gives 1.5
    BestFraction(fraction=1.0, regime=<Regime.FULL: 'full'>)
    """
    if gamma < 0 or fixed < 0 or variable <= 0:
        raise ValueError(f"gamma = {gamma}, fixed = {fixed}, variable = {variable}: need >= 0, >= 0, > 0")
    if gamma * (fixed + variable) >= variable:
        return BestFraction(1.0, Regime.FULL)
    fraction = gamma * fixed / (variable * (1 - gamma))
    return BestFraction(min(1.0, fraction), Regime.PARTIAL)


def best_gain_per_cost(gamma: float, fixed: float, variable: float) -> float:
    """G at the best fraction; ((1 - gamma)/fixed) * (k*)^gamma in the partial regime (eq. 19).

    Infinite there without fixed costs: the smaller the fraction, the more it gains per cost.

    >>> round(best_gain_per_cost(0.6, 1, 4), 3)
    0.222
    """
    fraction = best_fraction(gamma, fixed, variable).fraction
    return gain_per_cost(fraction, gamma, fixed, variable) if fraction or fixed else math.inf


def joint_gain(k: float, q: float, gamma: float, delta: float) -> float:
    """k^gamma * q^delta: the gain of a share k of the parameters on a share q of the data, if independent (eq. 35).

    >>> round(joint_gain(0.2, 0.3, 0.6, 0.7), 3)
    0.164
    """
    _check_share(k)
    _check_share(q)
    return math.pow(k, gamma) * math.pow(q, delta)


def joint_compute(k: float, q: float) -> float:
    """Training cost of that pair relative to everything: q * (2/3 + k/3).

    The forward pass and the gradient of the activations, two thirds of a step, remain whatever k is.

    >>> round(joint_compute(0.2, 0.3), 2)
    0.22
    """
    _check_share(k)
    _check_share(q)
    return q * (2 + k) / 3


def optimizer_bytes(parameters: float, bytes_per_parameter: float = ADAM_MOMENT_BYTES) -> float:
    """Bytes of optimizer state for that many trained parameters.

    >>> optimizer_bytes(1e9) / 1e9
    8.0
    """
    return parameters * bytes_per_parameter


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{share} is not a fraction between 0 and 1")
