"""A profile by submodules or blocks out of one by tensors, without running the model again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.histograms import Counts, MagnitudeHistogram
from gradient_blueprints.training.profiling.layers import Group
from gradient_blueprints.training.profiling.state import BatchRecord, DomainState, ProfileState

Parts = Sequence[Sequence[int]]


def coarser(state: ProfileState, finer: Sequence[Group], groups: Sequence[Group]) -> ProfileState:
    """The state that a run with the coarser `groups` would have had, up to the rounding of sums.

    Squared norms of an example or a batch add up over the parts of a layer and histograms merge;
    what is kept by parameter stays as it is. ConfigurationError where a finer layer lies in two of
    the `groups`.
    """
    home = {parameter: index for index, group in enumerate(groups) for parameter in group.parameters}
    parts: list[list[int]] = [[] for _ in groups]
    for index, group in enumerate(finer):
        homes = {home[parameter] for parameter in group.parameters}
        if len(homes) > 1:
            raise ConfigurationError(f"Layer {group.id} lies in several of the layers asked for; profile finer ones.")
        parts[homes.pop()].append(index)
    layers = tuple(group.id for group in groups)
    return ProfileState(layers, {name: _domain(domain, parts) for name, domain in state.domains.items()})


def _domain(domain: DomainState, parts: Parts) -> DomainState:
    held = domain.histograms  # none when only norms were measured
    merged = [reduce(MagnitudeHistogram.merged, (held[i] for i in part)) for part in parts] if held else []
    return replace(
        domain,
        records={key: _record(record, parts) for key, record in domain.records.items()},
        histograms=merged,
    )


def _record(record: BatchRecord, parts: Parts) -> BatchRecord:
    return replace(
        record,
        example_squares=np.stack([record.example_squares[list(part)].sum(0) for part in parts]),
        norms=None
        if record.norms is None
        else np.array([np.sqrt((record.norms[list(part)] ** 2).sum()) for part in parts]),
        counts=None if record.counts is None else [_added([record.counts[i] for i in part]) for part in parts],
    )


def _added(ranges: Sequence[tuple[int, Counts]]) -> tuple[int, Counts]:
    low = min(start for start, _ in ranges)
    total = np.zeros(max(start + len(counts) for start, counts in ranges) - low, np.int64)
    for start, counts in ranges:
        total[start - low : start - low + len(counts)] += counts
    return low, total
