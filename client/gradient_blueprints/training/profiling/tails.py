"""How heavy the tail of a submodule's gradient magnitudes is, from a histogram; no regression over raw ranks.

Least squares over all raw ranks gives about 1 for half-normal, Laplace and t samples alike. Here the
exponent is Hill's: the mean excess of the logarithms over a threshold, which estimates the rank-size
exponent alpha itself. Beside it stand a fit over log-spaced ranks, the Kolmogorov-Smirnov distance and
the likelihood ratio against a log-normal tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from gradient_blueprints.training.profiling.histograms import BINS_PER_OCTAVE, Floats, MagnitudeHistogram

CUTOFFS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the entries at which the Hill exponent is reported."""

START = 0.01
"""The share that `alpha` is read at."""

LOG_BINNED_START = 0.1
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""The fractions k at which `retained_mass` is reported."""

_FEWEST = 10  # entries below which no tail is fitted
_FEWEST_TO_DECIDE = 1_000
_FAR = 0.03  # Kolmogorov-Smirnov distance; a true power law of 1,000 entries stays below it nine times in ten
_WITHIN = (math.log(2) / BINS_PER_OCTAVE) ** 2 / 12  # variance of the logarithm inside a bin


@dataclass(frozen=True, slots=True)
class Excess:
    """The tail above a threshold: y = ln(x / threshold) of its entries, in bins or one by one."""

    threshold: float
    entries: int
    share: float
    mean: float
    mean_square: float
    survival_at: Floats  # y
    survival: Floats  # share of the tail above each y
    survival_before: Floats  # the same just below it


@dataclass(frozen=True, slots=True)
class Tail:
    """One submodule's tail."""

    alpha: float
    start: float
    entries: int
    ks: float
    versus_lognormal: float
    hill: tuple[tuple[float, float], ...]
    log_binned: float | None

    @property
    def power_law(self) -> bool:
        """Whether the power law wins against the log-normal and describes the tail.

        A short tail cannot tell the two apart. And where the excess is more dispersed than either
        allows (mixtures of matrices; most submodules of SmolLM2), the best log-normal *is* the
        power law: that is a tie between two bad fits, which the distance shows.
        """
        return self.versus_lognormal > 0 and self.ks <= _FAR and self.entries >= _FEWEST_TO_DECIDE


def fit_tail(histogram: MagnitudeHistogram) -> Tail | None:
    """Fit the tail of a histogram; None when fewer than a hundred entries are not zero or all are equal."""
    excess = tail_excess(histogram, START)
    if excess is None or excess.mean <= 0:
        return None
    hill = []
    for cutoff in CUTOFFS:
        at = tail_excess(histogram, cutoff)
        if at is not None and at.mean > 0:
            hill.append((cutoff, at.mean))
    return Tail(
        alpha=excess.mean,
        start=excess.share,
        entries=excess.entries,
        ks=_kolmogorov_smirnov(excess),
        versus_lognormal=versus_lognormal(excess.entries, excess.mean, excess.mean_square),
        hill=tuple(hill),
        log_binned=log_binned_exponent(histogram),
    )


def tail_excess(histogram: MagnitudeHistogram, share: float) -> Excess | None:
    """The largest entries, about that share of all (zeros count among all), at least 10."""
    entries = histogram.entries
    wanted = max(_FEWEST, round(share * entries))
    positive = entries - int(histogram.counts[0])
    if wanted >= positive or positive < 10 * _FEWEST:
        return None
    if wanted < len(histogram.top):
        threshold = float(histogram.top[wanted])
        logs = np.log(histogram.top[:wanted].astype(np.float64) / threshold)
        ranks = np.arange(1, wanted + 1)
        return Excess(
            threshold, wanted, wanted / entries, float(logs.mean()), float((logs**2).mean()),
            logs, ranks / wanted, (ranks - 1) / wanted,
        )  # fmt: skip
    counts, sums, low, _ = histogram.descending()
    above = np.cumsum(counts)
    last = int(np.argmin(np.abs(above - wanted)))
    threshold, held = float(low[last]), int(above[last])
    if threshold <= 0 or held < _FEWEST:
        return None
    counts, sums = counts[: last + 1], sums[: last + 1]
    logs = np.log(sums / counts / threshold) - _WITHIN / 2  # ln of the mean lies above the mean of ln
    y = np.log(low[: last + 1] / threshold)
    mean = float((counts * logs).sum() / held)
    mean_square = float((counts * (logs**2 + _WITHIN)).sum() / held)
    survival = above[: last + 1] / held
    return Excess(threshold, held, held / entries, mean, mean_square, y, survival, survival)


def hill_of_counts(counts: Floats, share: float, edges: Floats) -> Floats:
    """Hill exponents of many histograms over the same bins, (resamples, bins); nan where there is no tail.

    Each is of about the entries that `tail_excess` takes, to the nearest bin, at least 10. For bootstrap intervals: the
    rows are weighted sums of the batches' histograms. The first bin holds everything below the second edge.
    """
    lower = np.maximum(edges[:-1], 1e-45)
    logs = np.log((lower + edges[1:]) / 2) - _WITHIN / 2
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # entries in this bin and higher
    sums = np.cumsum((counts * logs)[:, ::-1], axis=1)[:, ::-1]
    missing = np.abs(above[:, 1:] - np.maximum(_FEWEST, share * above[:, :1]))
    first = np.where(above[:, 1:] < _FEWEST, np.inf, missing).argmin(axis=1) + 1  # the bin at which the tail starts
    rows = np.arange(len(counts))
    held = above[rows, first]
    alphas: Floats = sums[rows, first] / np.where(held < _FEWEST, np.nan, held) - np.log(lower[first])
    return alphas


def versus_lognormal(entries: int, mean: float, mean_square: float) -> float:
    """Log-likelihood ratio of the power law against the log-normal, both above the threshold; positive favours
    the power law.

    In y = ln(x/threshold) they are an exponential and a normal truncated at 0. The truncated normal
    contains the exponential as a limit, so its maximum is never lower; it pays for its second
    parameter with ln(entries)/2, as in Schwarz' criterion.
    """
    penalty = math.log(entries) / 2
    ratio = mean_square / mean**2
    if ratio >= 2:  # as dispersed as an exponential or more: the best log-normal is the power law itself
        return penalty
    beta = _truncation(ratio)
    if beta is None:
        return penalty
    hazard = _hazard(beta)
    sigma = 1 / (hazard - beta)  # in units of the mean of y
    mu = -beta * sigma
    log_survival = float(torch.special.log_ndtr(torch.tensor(-beta, dtype=torch.float64)))
    lognormal = (
        -math.log(sigma) - math.log(2 * math.pi) / 2 - (ratio - 2 * mu + mu * mu) / (2 * sigma**2) - log_survival
    )
    return entries * (-1 - lognormal) + penalty


def _truncation(ratio: float) -> float | None:
    """The truncation point beta (in standard deviations) at which E[y^2]/E[y]^2 of a truncated normal is `ratio`."""
    low, high = -30.0, 30.0
    if ratio > _moment_ratio(high):
        return None
    for _ in range(80):
        middle = (low + high) / 2
        if _moment_ratio(middle) < ratio:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _moment_ratio(beta: float) -> float:
    """Rises from 1 (a normal far above the threshold) to 2 (an exponential)."""
    hazard = _hazard(beta)
    return 1 + (1 + beta * hazard - hazard**2) / (hazard - beta) ** 2


def _hazard(beta: float) -> float:
    """phi(beta) / (1 - Phi(beta))."""
    return math.sqrt(2 / math.pi) / float(torch.special.erfcx(torch.tensor(beta / math.sqrt(2), dtype=torch.float64)))


def _kolmogorov_smirnov(excess: Excess) -> float:
    """Largest distance between the tail and the fitted power law, exp(-y/alpha)."""
    fitted = np.exp(-excess.survival_at / excess.mean)
    distance = np.maximum(np.abs(fitted - excess.survival), np.abs(fitted - excess.survival_before))
    return float(min(1.0, distance.max()))


def log_binned_exponent(histogram: MagnitudeHistogram) -> float | None:
    """Minus the slope of ln(magnitude) over ln(rank), least squares at ranks even in the logarithm, top tenth."""
    counts, _, low, _ = histogram.descending()
    ranks = np.concatenate([np.arange(1, len(histogram.top) + 1), np.cumsum(counts)]).astype(np.float64)
    sizes = np.concatenate([histogram.top.astype(np.float64), low])
    order = np.argsort(ranks, kind="stable")
    ranks, sizes = ranks[order], sizes[order]
    held = (sizes > 0) & (ranks >= _FEWEST) & (ranks <= LOG_BINNED_START * histogram.entries)
    if held.sum() < 3:
        return None
    x, y = np.log(ranks[held]), np.log(sizes[held])
    grid = np.linspace(x[0], x[-1], 50)
    slope = np.polyfit(grid, np.interp(grid, x, y), 1)[0]
    return max(0.0, float(-slope))


def best_fraction_of_curve(histogram: MagnitudeHistogram, fixed: float, variable: float) -> float | None:
    """The k that maximises mass(k) / (fixed + variable * k) on the measured curve; None if all is zero."""
    counts, _, _, _ = histogram.descending()
    if histogram.entries == int(histogram.counts[0]):
        return None
    smallest = max(1 / histogram.entries, 1e-6)
    shares = np.unique(np.concatenate([np.geomspace(smallest, 1, 2_000), np.cumsum(counts) / histogram.entries]))
    gains = histogram.retained_mass(shares) / (fixed + variable * shares)
    return float(shares[int(gains.argmax())])
