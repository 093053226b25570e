"""From a profiler's state to the blueprint: every number with its formula, rounded to what shards agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, CostModel, Layer, Provenance, Statistic, TailFit
from gradient_blueprints.theory import best_fraction, gain_exponent, gaussian_retained_mass
from gradient_blueprints.training.profiling.contributions import square
from gradient_blueprints.training.profiling.histograms import EDGES, MagnitudeHistogram
from gradient_blueprints.training.profiling.layers import Group
from gradient_blueprints.training.profiling.precision import Until
from gradient_blueprints.training.profiling.state import DomainState, ProfileState, ordered
from gradient_blueprints.training.profiling.tails import (
    SHARES,
    START,
    Tail,
    best_fraction_of_curve,
    fit_tail,
    hill_of_counts,
)

DEFAULT_COSTS = CostModel(fixed=4.0, variable=12.0)
"""Bytes per parameter in float32 training: the weight itself; and for a trained one its gradient and Adam's moments.

A partial update saves memory, hardly time (docs/profiling.md), so memory is what the default counts.
"""

RESAMPLES = 1_000
SIGNIFICANT_DIGITS = 6
SUMMED_DIGITS = 4  # of what is read off float32 sums over batches, whose last bits depend on the order of the batches
_CANCELLED = 1e-6  # of the terms of a difference; what is left below this is their rounding
_CI = (2.5, 97.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DocumentSettings:
    """How numbers become a document."""

    statistic: Statistic = Statistic.MEAN
    costs: CostModel = DEFAULT_COSTS
    general: str | None = None
    seed: int = 0
    until: Until | None = None


def build_blueprint(
    state: ProfileState,
    groups: Sequence[Group],
    *,
    model_id: str,
    training_checkpoint: float,
    provenance: Provenance,
    settings: DocumentSettings,
) -> Blueprint:
    """The document of a state. The layers' own numbers are of the general domain.

    The general domain is `settings.general`, else the one named `general`, else the first by name.
    """
    domains = {name: state.domains[name] for name in sorted(state.domains) if state.domains[name].records}
    if not domains:
        skipped = sum(len(domain.skipped) for domain in state.domains.values())
        reason = f"all {skipped} batches had non-finite losses or gradients" if skipped else "no batch was profiled"
        raise ConfigurationError(f"There is nothing to publish: {reason}.")
    general = general_domain(domains, settings.general)
    signals = {name: signal_and_spread(domain, groups)[0] for name, domain in domains.items()}
    norms = {name: batch_norms(domain) for name, domain in domains.items()}
    centre = np.median if settings.statistic is Statistic.MEDIAN else np.mean
    interval = bootstrap(norms[general], settings.statistic, settings.seed)
    histograms = domains[general].histograms or [MagnitudeHistogram() for _ in groups]  # none with "batches"
    tails = [fit_tail(histogram) for histogram in histograms]
    signal, spread = signal_and_spread(domains[general], groups)
    first_order = first_order_decrease(domains[general], groups)
    example_norm = example_norms(domains[general])
    layers = []
    for index, group in enumerate(groups):
        histogram, tail = histograms[index], tails[index]
        alpha_ci = alpha_interval(domains[general], index, settings.seed) if tail else None
        layers.append(
            Layer(
                id=group.id,
                gradient_norm=_digits(centre(norms[general][:, index])),
                gradient_norm_ci=None if interval is None else _pair(interval[:, index]),
                alpha=None if tail is None else _digits(tail.alpha),
                alpha_ci=alpha_ci,
                gamma=None if tail is None else _digits(gain_exponent(tail.alpha)),
                k_star=_k_star(histogram, tail, settings.costs),
                tail_fit=None if tail is None else _tail_fit(tail),
                parameters=group.size,
                kind=group.kind,
                depth=group.depth,
                example_norm=_digits(example_norm[index]),
                signal=None if signal is None else _summed(signal[index]),
                spread=None if spread is None else _summed(spread[index]),
                first_order=None if first_order is None else _summed(first_order[index]),
                retained_mass=_curve(histogram),
                domain_tags=_domain_tags(signals, general, index),
                domain_norms={name: _digits(centre(values[:, index])) for name, values in norms.items()},
            )
        )
    extra: dict[str, Any] = {
        "profile": {
            "general": general,
            "skipped_batches": {
                name: {str(key): state.domains[name].skipped[key] for key in ordered(state.domains[name].skipped)}
                for name in sorted(state.domains)
                if state.domains[name].skipped
            },
            "halved_micro_batches": {
                name: {str(key): state.domains[name].halved[key] for key in ordered(state.domains[name].halved)}
                for name in sorted(state.domains)
                if state.domains[name].halved
            },
            "gaussian_null": [[k, _digits(gaussian_retained_mass(k))] for k in SHARES],
            "tails": {group.id: _tail_extra(tail) for group, tail in zip(groups, tails, strict=True) if tail},
        }
    }
    if settings.until is not None:
        extra["profile"]["until"] = asdict(settings.until) | {
            "reached": {name: precise_enough(values, settings) for name, values in norms.items()}
        }
    return Blueprint(
        schema_version=1,
        model_id=model_id,
        training_checkpoint=training_checkpoint,
        statistic=settings.statistic,
        cost_model=settings.costs,
        layers=tuple(layers),
        provenance=provenance,
        extra=extra,
    )


def general_domain(domains: dict[str, DomainState], named: str | None) -> str:
    """The domain that the layers' own numbers are of."""
    if named is not None and named not in domains:
        raise ConfigurationError(f"No batch of the general domain {named!r} was profiled; there are {sorted(domains)}.")
    return named or ("general" if "general" in domains else min(domains))


def precise_enough(norms: Floats, settings: DocumentSettings) -> bool:
    """Whether the intervals of `gradient_norm` are as narrow as `settings.until` asks, norms (batches, layers)."""
    if settings.until is None or len(norms) < settings.until.batches:
        return False
    centre = np.median if settings.statistic is Statistic.MEDIAN else np.mean
    return settings.until.reached(centre(norms, axis=0), bootstrap(norms, settings.statistic, settings.seed))


def batch_norms(domain: DomainState) -> Floats:
    rows = [domain.records[key].norms for key in ordered(domain.records)]
    if any(row is None for row in rows):
        raise ConfigurationError(
            'The profiler measured examples only, and gradient_norm is of batches; use statistics="batches" or "all".'
        )
    return np.stack([row for row in rows if row is not None])  # (batches, layers)


def example_norms(domain: DomainState) -> Floats:
    """Mean over examples of the norm of the example's gradient, per layer."""
    squares = np.concatenate([domain.records[key].example_squares for key in ordered(domain.records)], axis=1)
    return np.asarray(np.sqrt(squares).mean(1))


def signal_and_spread(domain: DomainState, groups: Sequence[Group]) -> tuple[Floats | None, Floats | None]:
    """Unbiased norm of the mean gradient and trace of the examples' covariance, per layer.

    signal^2 = (||sum g||^2 - sum ||g||^2) / (n (n - 1)), below zero taken as zero; and
    spread = sum ||g||^2 / n - signal^2 before that clipping, so that both are unbiased.
    """
    n = domain.examples
    if n < 2 or not domain.sums:
        return None, None
    total = np.array([sum(_sum_of_squares(domain, name) for name in group.parameters) for group in groups])
    each = np.sum([domain.records[key].example_squares.sum(1) for key in ordered(domain.records)], axis=0)
    squared = (total - each) / (n * (n - 1))
    squared[np.abs(squared) < _CANCELLED * each / n] = 0
    return np.sqrt(np.maximum(squared, 0)), np.maximum(each / n - squared, 0)


def _sum_of_squares(domain: DomainState, name: str) -> float:
    tensor = domain.sums.get(name)
    return 0.0 if tensor is None else float(square(tensor))


def first_order_decrease(domain: DomainState, groups: Sequence[Group]) -> Floats | None:
    """sum_c g_A g_B / sqrt(v), averaged over all ways to split the batches into two disjoint halves A and B.

    With s_b the sum of a batch's gradients, the mean of s_b s_b' over pairs of different batches is
    (S^2 - Q) / (n^2 - sum n_b^2), S = sum s_b, Q = sum s_b^2: no half has to be kept apart. And
    v = Q / sum n_b^2 is the second moment of the batch gradient, what Adam divides by. A
    first Adam step of size lr decreases the loss by lr times this, to first order. None where Q lacks a batch.
    """
    sizes = np.array([len(domain.records[key].losses) for key in ordered(domain.records)], dtype=np.float64)
    if len(sizes) < 2 or not domain.squares:
        return None
    own = float((sizes**2).sum())
    pairs = float(sizes.sum()) ** 2 - own
    found = []
    for group in groups:
        value = 0.0
        for name in group.parameters:
            if name in domain.squares:
                blocks = zip(
                    torch.split(domain.sums[name].reshape(-1), 1 << 20),
                    torch.split(domain.squares[name].reshape(-1), 1 << 20),
                    strict=True,
                )
                for total, squared in blocks:
                    root = squared.sqrt()
                    ratio = torch.where(squared > 0, total.square() / root, root)
                    value += float(ratio.sum(dtype=torch.float64) - root.sum(dtype=torch.float64))
        found.append(value * math.sqrt(own) / pairs)
    return np.array(found)


def bootstrap(values: Floats, statistic: Statistic, seed: int) -> Floats | None:
    """95 % percentile interval over resampled batches, (2, layers); None with a single batch."""
    batches = len(values)
    if batches < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, batches, (RESAMPLES, batches))
    centre = np.median if statistic is Statistic.MEDIAN else np.mean
    return np.stack([np.percentile(centre(column[picks], axis=1), _CI) for column in values.T], axis=1)


def alpha_interval(domain: DomainState, layer: int, seed: int) -> tuple[float, float] | None:
    """95 % interval of the Hill exponent over resampled batches; never alpha/sqrt(n), since entries are dependent."""
    kept = [domain.records[key].counts for key in ordered(domain.records)]
    if len(kept) < 2 or any(counts is None for counts in kept):
        return None
    ranges = [counts[layer] for counts in kept if counts is not None]
    low = min(start for start, _ in ranges)
    high = max(start + len(counts) for start, counts in ranges)
    table = np.zeros((len(ranges), high))
    for row, (start, counts) in zip(table, ranges, strict=True):
        row[start : start + len(counts)] = counts
    batches = len(table)
    weights = np.random.default_rng(seed).multinomial(batches, [1 / batches] * batches, RESAMPLES // 2)
    resampled = np.zeros((len(weights), high - low + 1))
    resampled[:, 1:] = weights @ table[:, low:]
    resampled[:, 0] = weights @ table[:, :low].sum(1)
    if low == 0:  # bin 0, of zeros and what underflows, is itself the lowest
        resampled = resampled[:, 1:]
    alphas = hill_of_counts(resampled, START, EDGES[max(low - 1, 0) : high + 1])
    alphas = alphas[np.isfinite(alphas)]
    return _pair(np.percentile(alphas, _CI)) if len(alphas) else None


def _k_star(histogram: MagnitudeHistogram, tail: Tail | None, costs: CostModel) -> float | None:
    """From the measured curve, unless the power law wins against the log-normal: then eq. 15."""
    if tail is not None and tail.power_law:
        return _digits(best_fraction(gain_exponent(tail.alpha), costs.fixed, costs.variable).fraction)
    fraction = best_fraction_of_curve(histogram, costs.fixed, costs.variable)
    return None if fraction is None else _digits(fraction)


def _curve(histogram: MagnitudeHistogram) -> tuple[tuple[float, float], ...] | None:
    if histogram.entries == int(histogram.counts[0]):
        return None
    return tuple(zip(SHARES, map(_digits, histogram.retained_mass(np.array(SHARES))), strict=True))


def _domain_tags(signals: dict[str, Floats | None], general: str, layer: int) -> dict[str, float] | None:
    """Signal in each domain over the one in general; absent where that has none above its noise."""
    reference = signals[general]
    if reference is None or reference[layer] <= 0:
        return None
    return {name: _summed(values[layer] / reference[layer]) for name, values in signals.items() if values is not None}


def _tail_fit(tail: Tail) -> TailFit:
    return TailFit(
        method="hill",
        start=_digits(tail.start),
        entries=tail.entries,
        ks=_digits(tail.ks),
        versus_lognormal=_digits(tail.versus_lognormal),
    )


def _tail_extra(tail: Tail) -> dict[str, Any]:
    return {
        "hill": [[cutoff, _digits(alpha)] for cutoff, alpha in tail.hill],
        "log_binned": None if tail.log_binned is None else _digits(tail.log_binned),
    }


def _pair(interval: Floats) -> tuple[float, float]:
    return _digits(interval[0]), _digits(interval[1])


def _digits(value: float | np.floating[Any]) -> float:
    """Six significant digits: what the order of float64 sums and the number of shards leave alone."""
    return float(f"{float(value):.{SIGNIFICANT_DIGITS}g}")


def _summed(value: float | np.floating[Any]) -> float:
    """Four significant digits, for float32 sums."""
    return float(f"{float(value):.{SUMMED_DIGITS}g}")
