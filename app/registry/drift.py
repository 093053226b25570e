"""Whether a published ranking of layers still holds for a local sample: pure functions, no I/O.

The question is about true values: how well do the ranks of the published layers, freed of measurement noise, agree
with the ranks that the local data would show if there were enough of them? The observed Spearman correlation is
smaller than that, because both sides are measured with noise; it is divided by its ceiling (Spearman 1904), and the
verdict is read off the interval of the quotient. docs/aggregation-and-staleness.md derives and tests it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from scipy import stats

from app.registry.agreement import (
    CONFIDENCE,
    Floats,
    disattenuated,
    kendall,
    kendall_interval,
    mid_ranks,
    row_correlations,
    row_kendalls,
    spearman,
    spearman_brown,
    spearman_interval,
)
from gradient_blueprints.statistics_models import Verdict

MIN_MATCHED = 5
"""Layers (or groups of them) below which nothing is read fresh: with 4, one ranking in 24 agrees fully by chance."""
MIN_BATCHES = 4
"""Batches from which both halves can be resampled."""
MIN_CEILING = 0.7
"""Below it the sample says too little of itself to judge anything by; it also bounds what wide published intervals
can do: the observed correlation is never raised by more than 1/0.7."""
MAX_TIED = 0.25
"""Share of layers that may share their value with another one on either side."""
MIN_SHARE = 0.5
"""Share of the published layers that has to be matched."""
RESAMPLES = 600
_MOST_CELLS = 4_000_000  # resamples times layers; 20,000 layers still get 200 resamples
_FEWEST_RESAMPLES = 200
_KENDALL_RESAMPLES = 100


class IntervalMethod(StrEnum):
    BATCHES = "bootstrap_over_batches"
    INTERVALS = "bootstrap_from_intervals"
    LAYERS = "fisher_z"


@dataclass(frozen=True)
class Sample:
    """One value per layer and what is known of its noise: the batches it is the mean of, or a standard error."""

    values: Floats  # (layers,)
    batches: Floats | None = None  # (batches, layers); `values` is their mean
    log_error: Floats | None = None  # (layers,), standard error of the logarithm
    scaled: bool = False  # `values` were given, and the batches multiplied to have them as their mean

    @classmethod
    def of_batches(cls, batches: npt.ArrayLike, values: npt.ArrayLike | None = None) -> Sample:
        """`values` (NaN: the batches' mean) are estimates, of which the batches tell the relative noise alone.

        Batches that are all zero tell none.
        """
        table = np.asarray(batches, np.float64)
        means = table.mean(0)
        if values is None:
            return cls(means, batches=table)
        given = np.isfinite(values)
        relative = np.divide(table, means, out=np.ones_like(table), where=means > 0)
        values = np.where(given, values, means)
        return cls(values, batches=np.where(given, relative * values, table), scaled=True)

    def take(self, chosen: Sequence[int]) -> Sample:
        return Sample(
            self.values[chosen],
            None if self.batches is None else self.batches[:, chosen],
            None if self.log_error is None else self.log_error[chosen],
            self.scaled,
        )

    def grouped(self, groups: Sequence[Sequence[int]]) -> Sample:
        """One value per group: the norm of the group's layers taken together, sqrt(sum of squares).

        Of batches it is that of each batch, which is exact for norms; the value is their mean, or of the given values.
        The relative variance of a group is that of its sum of squares, with independent layers: the error of log g is
        sqrt(sum (v_i^2 e_i)^2) / sum v_i^2.
        """

        members = [list(group) for group in groups]

        def norms(rows: Floats) -> Floats:
            return np.stack([np.hypot.reduce(rows[..., group], axis=-1) for group in members], -1)

        log_error = None
        if self.log_error is not None:
            log_error = np.array([_pooled_error(self.values[group], self.log_error[group]) for group in members])
        if self.batches is not None:
            return Sample.of_batches(norms(self.batches), norms(self.values) if self.scaled else None)
        return Sample(norms(self.values), log_error=log_error)

    @property
    def resampled(self) -> bool:
        return self.batches is not None and len(self.batches) >= MIN_BATCHES


def _pooled_error(values: Floats, errors: Floats) -> float:
    largest = values.max()
    squares = (values / largest) ** 2 if largest > 0 else np.ones(len(values))
    return float(np.sqrt(((squares * errors) ** 2).sum()) / squares.sum())


def log_errors(low: npt.ArrayLike, high: npt.ArrayLike, confidence: float = CONFIDENCE) -> Floats | None:
    """Standard errors of logarithms from intervals [low, high]: (log high - log low) / (2 z).

    An interval that is missing (NaN) or does not lie above 0 counts as the median one; None when that is most of them.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    usable = (low > 0) & (high >= low) & np.isfinite(high)
    if usable.sum() * 2 <= len(low):
        return None
    errors = np.full(len(low), np.nan)
    errors[usable] = (np.log(high[usable]) - np.log(low[usable])) / (2 * stats.norm.ppf((1 + confidence) / 2))
    errors[~usable] = np.median(errors[usable])
    return errors


@dataclass(frozen=True)
class Agreement:
    """What the matched layers say. `None` where a side is constant or there are too few of them."""

    layers: int
    rho: float | None
    rho_interval: tuple[float, float] | None
    tau: float | None
    tau_interval: tuple[float, float] | None
    ceiling: float | None  # None: nothing is known of the noise
    corrected: float | None
    corrected_interval: tuple[float, float] | None
    method: IntervalMethod
    verdict: Verdict
    reasons: tuple[str, ...]


def assess(published: Sample, local: Sample, *, threshold: float, seed: int, matched_share: float = 1.0) -> Agreement:
    """Judge the agreement of two samples over the same layers, in the same order.

    `fresh` when the whole interval of the corrected correlation lies at or above `threshold`, `stale` when it lies
    below, else `indeterminate`; what speaks against reading it fresh stands in `reasons`. The same samples and the
    same seed give the same numbers.
    """
    n = len(published.values)
    rho, tau = spearman(published.values, local.values), kendall(published.values, local.values)
    if rho is None or tau is None:
        reason = "too_few_layers" if n < MIN_MATCHED else "constant"
        return Agreement(
            n, None, None, None, None, None, None, None, IntervalMethod.LAYERS, Verdict.INDETERMINATE, (reason,)
        )
    known = ceiling(published, local, seed)
    if known is not None and (local.resampled or local.log_error is not None) and n >= MIN_MATCHED:
        method = IntervalMethod.BATCHES if local.resampled else IntervalMethod.INTERVALS
        errors = _errors(published, local, seed)
        df = max(1, len(local.batches) - 1) if local.resampled and local.batches is not None else np.inf
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, df))
        rho_interval = _around(rho, quantile * errors.rho)
        tau_interval = _around(tau, quantile * errors.tau)
    else:
        method = IntervalMethod.LAYERS
        rho_interval, tau_interval = spearman_interval(rho, n), kendall_interval(tau, n)
    reasons = _doubts(published, local, matched_share)
    corrected, interval = None, None
    if known is None:  # anything from MIN_CEILING to 1: fresh only if fresh for every ceiling, stale likewise
        reasons.append("ceiling_unknown")
        low, high = rho_interval
        interval = (min(low, low / MIN_CEILING), max(high, high / MIN_CEILING))
    elif known < MIN_CEILING:
        reasons.append("ceiling_too_low")
    else:
        corrected = disattenuated(rho, known)
        if method is IntervalMethod.LAYERS:
            interval = (rho_interval[0] / known, rho_interval[1] / known)
        else:
            half_width = quantile * errors.corrected
            interval = (corrected - half_width, corrected + half_width)
    verdict = _verdict(interval, threshold, reasons)
    return Agreement(
        layers=n,
        rho=rho,
        rho_interval=rho_interval,
        tau=tau,
        tau_interval=tau_interval,
        ceiling=known,
        corrected=None if corrected is None else _clipped(corrected),
        corrected_interval=None if interval is None else (_clipped(interval[0]), _clipped(interval[1])),
        method=method,
        verdict=verdict,
        reasons=tuple(reasons),
    )


_NEVER_FRESH = frozenset({"too_few_layers", "ties", "few_matched", "ceiling_too_low"})


def _doubts(published: Sample, local: Sample, matched_share: float) -> list[str]:
    doubts = []
    if len(published.values) < MIN_MATCHED:
        doubts.append("too_few_layers")
    if any(_tied_share(side.values) > MAX_TIED for side in (published, local)):
        doubts.append("ties")
    if matched_share < MIN_SHARE:
        doubts.append("few_matched")
    return doubts


def _verdict(interval: tuple[float, float] | None, threshold: float, reasons: list[str]) -> Verdict:
    if interval is None or "too_few_layers" in reasons:
        return Verdict.INDETERMINATE
    low, high = interval
    if high < threshold:
        return Verdict.STALE
    if low >= threshold:
        return Verdict.INDETERMINATE if _NEVER_FRESH.intersection(reasons) else Verdict.FRESH
    reasons.append("interval_straddles_threshold")
    return Verdict.INDETERMINATE


def _tied_share(values: Floats) -> float:
    _, counts = np.unique(values, return_counts=True)
    return float(counts[counts > 1].sum()) / len(values)


def _around(centre: float, half_width: float) -> tuple[float, float]:
    return _clipped(centre - half_width), _clipped(centre + half_width)


def _clipped(correlation: float) -> float:
    return min(1.0, max(-1.0, correlation))


# --- the ceiling


def ceiling(published: Sample, local: Sample, seed: int) -> float | None:
    """The largest correlation to be expected: sqrt(reliability of local * reliability of published).

    The local reliability is the correlation of two halves of its batches (mean over random halves), stepped up by
    Spearman-Brown to all of them; of a side with intervals instead it is estimated by redrawing it within them, which
    gives a little too much (the redrawn vary about the noisy values), so never makes a correlation look better than it
    is. Published values without intervals are taken at their word. None when nothing is known of the local noise.
    """
    generator = np.random.default_rng([seed, 1])
    if local.batches is not None and len(local.batches) >= 2:
        count = len(local.batches)
        reliability = float(spearman_brown(_split_half(local.batches, generator), count / (count // 2)))
        own = math.sqrt(reliability)
    elif local.log_error is not None:
        own = _redrawn(local, local.log_error, generator)
    else:
        return None
    return own * (1.0 if published.log_error is None else _redrawn(published, published.log_error, generator))


def _split_half(batches: Floats, generator: np.random.Generator) -> float:
    """Mean Spearman correlation of disjoint halves over random splits."""
    first, second = _halves(len(batches), _resamples(batches.shape[1]) // 2, generator)
    return float(row_correlations(mid_ranks(first @ batches), mid_ranks(second @ batches)).mean())


def _redrawn(sample: Sample, log_error: Floats, generator: np.random.Generator) -> float:
    draws = _draws(sample, log_error, _FEWEST_RESAMPLES, generator)
    return max(0.0, float(row_correlations(mid_ranks(sample.values)[None, :], mid_ranks(draws)).mean()))


def _draws(sample: Sample, log_error: Floats, count: int, generator: np.random.Generator) -> Floats:
    noise = generator.standard_normal((count, len(sample.values)))
    with np.errstate(over="ignore"):  # only ranks are read, and infinity has one
        return np.asarray(sample.values * np.exp(np.clip(log_error * noise, -300, 300)))


def _halves(batches: int, count: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Weights of two disjoint halves of the batches, each (count, batches), each row summing to 1."""
    size = batches // 2
    order = generator.random((count, batches)).argsort(1)
    first, second = np.zeros((count, batches)), np.zeros((count, batches))
    np.put_along_axis(first, order[:, :size], 1 / size, 1)
    np.put_along_axis(second, order[:, size : 2 * size], 1 / size, 1)
    return first, second


# --- the bootstrap


@dataclass(frozen=True)
class _Errors:
    """Standard errors over the resamples."""

    rho: float
    tau: float
    corrected: float


def _errors(published: Sample, local: Sample, seed: int) -> _Errors:
    """Resample the batches within random halves, and the published values within their intervals.

    Resampling within halves keeps the halves independent, so that each resample has a ceiling of its own. A half of m
    batches, resampled, varies (m - 1)/m times too little; its deviations are stretched by sqrt(m / (m - 1)). Of an odd
    number of batches a resample leaves one out, and its ceiling is that of the others.
    """
    generator = np.random.default_rng([seed, 2])
    n = len(local.values)
    count = _resamples(n)
    if local.resampled and local.batches is not None:
        halves = [_resampled(half, generator) @ local.batches for half in _halves(len(local.batches), count, generator)]
        drawn = (halves[0] + halves[1]) / 2
        agreement = row_correlations(mid_ranks(halves[0]), mid_ranks(halves[1]))
        own = np.sqrt(spearman_brown(agreement))
    else:
        assert local.log_error is not None, "one of the two says how noisy the local sample is"
        drawn = _draws(local, local.log_error, count, generator)
        own = np.full(count, _redrawn(local, local.log_error, generator))
    if published.log_error is None:
        theirs, factor = published.values[None, :], 1.0
    else:
        theirs = _draws(published, published.log_error, count, generator)
        factor = _redrawn(published, published.log_error, generator)
    rho = row_correlations(mid_ranks(theirs), mid_ranks(drawn))
    corrected = rho / np.maximum(own * factor, MIN_CEILING / 2)  # a floor, so that a halting resample has no say
    tau = np.nan_to_num(row_kendalls(theirs[:_KENDALL_RESAMPLES], drawn[:_KENDALL_RESAMPLES]))
    return _Errors(float(rho.std(ddof=1)), float(np.std(tau, ddof=1)), float(corrected.std(ddof=1)))


def _resampled(half: Floats, generator: np.random.Generator) -> Floats:
    """Weights of the same halves with their batches drawn with replacement."""
    size = round(1 / half.max())
    counts = generator.multinomial(size, half)
    stretch = math.sqrt(size / (size - 1))
    return np.asarray(half + stretch * (counts / size - half))


def _resamples(layers: int) -> int:
    return max(_FEWEST_RESAMPLES, min(RESAMPLES, _MOST_CELLS // max(1, layers)))
