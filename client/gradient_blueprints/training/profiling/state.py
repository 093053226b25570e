"""What a profiler has learnt so far: per domain the batches' records and the sums that merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.histograms import Counts, MagnitudeHistogram

Key = int | str
Statistics = Literal["examples", "batches", "all"]


@dataclass(slots=True)
class BatchRecord:
    """One batch: scalars per layer (g) and per example (n)."""

    losses: NDArray[np.float64]  # (n,) mean loss of each example
    tokens: NDArray[np.int64]  # (n,)
    example_squares: NDArray[np.float64]  # (g, n) squared norms
    norms: NDArray[np.float64] | None  # (g,) of the gradient of the batch's token mean
    counts: list[tuple[int, Counts]] | None  # per layer: first bin and counts
    length: int | None = None  # positions of the batch, padding included
    digest: str | None = None  # of the batch's tensors, hexadecimal

    @property
    def statistics(self) -> Statistics:
        """What was measured of the batch."""
        return "examples" if self.norms is None else "batches" if self.counts is None else "all"

    @property
    def loss(self) -> float:
        """Mean loss per target token."""
        return float((self.losses * self.tokens).sum() / max(1, self.tokens.sum()))


@dataclass(slots=True)
class Factors:
    """Sums over batches of row and column sums of squared batch gradients of one matrix (leading dims kept)."""

    row: Tensor  # float64, (..., rows)
    column: Tensor | None  # float64, (..., columns); None for a vector

    def merged(self, other: Factors) -> Factors:
        column = None if self.column is None or other.column is None else self.column + other.column
        return Factors(self.row + other.row, column)


@dataclass(slots=True)
class DomainState:
    """Everything about one domain."""

    records: dict[Key, BatchRecord] = field(default_factory=dict)
    histograms: list[MagnitudeHistogram] = field(default_factory=list)  # per layer
    sums: dict[str, Tensor] = field(default_factory=dict)  # per parameter: sum of the examples' gradients
    squares: dict[str, Tensor] = field(default_factory=dict)  # per parameter: sum of squared batch sums
    squared: int = 0  # batches that `squares` are of: all, or none, since those of some are of no use
    factors: dict[str, Factors] = field(default_factory=dict)
    skipped: dict[Key, str] = field(default_factory=dict)  # batches left out, and why
    halved: dict[Key, int] = field(default_factory=dict)  # the micro-batch of batches whose own ran out of memory
    silent: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # positions of a batch's examples without a target

    def counted(self, key: Key) -> NDArray[np.bool_]:
        """Which examples of a batch have a target, and so a place in its record, (examples,)."""
        silent = self.silent.get(key, ())
        measured = len(self.records[key].losses) if key in self.records else 0
        found = np.ones(measured + len(silent), np.bool_)
        found[list(silent)] = False
        return found

    @property
    def examples(self) -> int:
        return sum(len(record.losses) for record in self.records.values())

    @property
    def tokens(self) -> int:
        return sum(int(record.tokens.sum()) for record in self.records.values())

    @property
    def loss(self) -> float:
        """Mean loss per target token."""
        records = [self.records[key] for key in ordered(self.records)]
        return float(sum((r.losses * r.tokens).sum() for r in records) / max(1, self.tokens))


@dataclass(slots=True)
class ProfileState:
    """A profiler's state, or a shard of one; `merge` is associative and commutative."""

    layers: tuple[str, ...]
    domains: dict[str, DomainState] = field(default_factory=dict)


def ordered(keys: Iterable[Key]) -> list[Key]:
    """Numbers before names, so that results do not depend on the order of arrival."""
    return sorted(keys, key=lambda key: (isinstance(key, str), key))


def merge(states: Iterable[ProfileState]) -> ProfileState:
    """The state of all batches together; ConfigurationError when shards overlap, have other layers or statistics."""
    shards = list(states)
    if not shards:
        raise ConfigurationError("There is no state to merge.")
    merged = ProfileState(shards[0].layers)
    for shard in shards:
        if shard.layers != merged.layers:
            raise ConfigurationError("The states are of different models or granularities; their layers differ.")
        for domain, part in shard.domains.items():
            whole = merged.domains.get(domain)
            merged.domains[domain] = part if whole is None else _merged_domain(domain, whole, part)
    for domain, whole in merged.domains.items():
        refuse_mixed_statistics(domain, {record.statistics for record in whole.records.values()})
    return merged


def _merged_domain(domain: str, one: DomainState, two: DomainState) -> DomainState:
    twice = (one.records.keys() | one.skipped.keys()) & (two.records.keys() | two.skipped.keys())
    if twice:
        raise ConfigurationError(f"Batch {ordered(twice)[0]!r} of domain {domain!r} is in two of the states.")
    if one.histograms and two.histograms:
        histograms = [a.merged(b) for a, b in zip(one.histograms, two.histograms, strict=True)]
    else:
        histograms = one.histograms or two.histograms
    squared = all(part.squared == len(part.records) for part in (one, two))
    return DomainState(
        records=one.records | two.records,
        histograms=histograms,
        sums=_added(one.sums, two.sums),
        squares=_added(one.squares, two.squares) if squared else {},
        squared=one.squared + two.squared if squared else 0,
        factors={
            name: one.factors[name].merged(two.factors[name])
            if name in one.factors and name in two.factors
            else (one.factors.get(name) or two.factors[name])
            for name in one.factors | two.factors
        },
        skipped=one.skipped | two.skipped,
        halved=one.halved | two.halved,
        silent=one.silent | two.silent,
    )


def refuse_mixed_statistics(domain: str, statistics: set[Statistics]) -> None:
    """ConfigurationError unless all batches of a domain were measured alike: else sums are of some of them only."""
    if len(statistics) > 1:
        found = " and ".join(sorted(statistics))
        raise ConfigurationError(
            f"Batches of domain {domain!r} were measured with different statistics, {found}; sums would be of some of "
            "them only. Measure all batches of a domain with the same `statistics`."
        )


def _added(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, Tensor]:
    both = one | two
    return {name: torch.add(one[name], two[name]) if name in one and name in two else both[name] for name in both}
