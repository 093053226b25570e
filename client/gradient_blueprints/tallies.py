"""Adding up what processes spent, so that what several of them saw of one device counts once.

A tally is a set of spans (`run_models.Span`). Merging tallies unites the sets, which can be done in any order and any
number of times; the figures are then sums over the sensors of what each counted.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Basis, Method, Resource, Span, Tally


def settle(
    spans: Iterable[Span],
    methods: Mapping[Resource, Method],
    *,
    region: str | None = None,
    carbon_intensity: float | None = None,
    hardware: Mapping[str, str] | None = None,
) -> Tally:
    """The tally whose figures are the sums of the spans; a resource whose method is not_read gets no figure."""
    kept = latest(spans)
    counts: dict[tuple[Resource, str], list[Span]] = defaultdict(list)
    for span in kept:
        counts[span.resource, span.sensor].append(span)
    figures: dict[str, Any] = {}
    for (resource, _), of_sensor in sorted(counts.items()):
        figures[resource] = figures.get(resource, 0.0) + covered(of_sensor)
    known = {resource: method for resource, method in methods.items() if resource in figures}
    return Tally(
        **{resource: amount for resource, amount in figures.items() if resource in known},
        methods=known,
        region=region,
        carbon_intensity=carbon_intensity,
        hardware=dict(sorted((hardware or {}).items())),
        spans=kept,
    )


def merge_tallies(tallies: Sequence[Tally]) -> Tally:
    """What all of these spent together: ranks side by side, and runs one after the other.

    Tokens, FLOPs, processor time and allocated memory belong to a process and add up. Wall time, accelerator hours
    and the joules of a device or processor belong to a machine: where the spans of two processes overlap, the common
    time counts once, at the rate of the one that counted more. Wall seconds are therefore those during which
    anything ran. Raises ConfigurationError for a tally without spans, whose figures were told and not metered.
    """
    if not tallies:
        raise ConfigurationError("no tallies to merge")
    if any(tally.amounts() and not tally.spans for tally in tallies):
        raise ConfigurationError("a tally without spans cannot be merged: nobody knows what its figures overlap with")
    intensities = {tally.carbon_intensity for tally in tallies}
    return settle(
        (span for tally in tallies for span in tally.spans),
        {resource: _joined([tally.methods[resource] for tally in tallies]) for resource in Resource},
        region="; ".join(sorted({tally.region for tally in tallies if tally.region is not None})) or None,
        carbon_intensity=intensities.pop() if len(intensities) == 1 else None,
        hardware={sensor: name for tally in tallies for sensor, name in tally.hardware.items()},
    )


def latest(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Of the readings of one count (same sensor, resource and start) the last."""
    found: dict[tuple[str, Resource, float], Span] = {}
    for span in spans:
        key = span.sensor, span.resource, span.started
        if key not in found or (found[key].ended, found[key].amount) < (span.ended, span.amount):
            found[key] = span
    return tuple(found[key] for key in sorted(found))


def covered(spans: Sequence[Span]) -> float:
    """What one sensor counted in the union of these spans; at each moment the largest of their mean rates holds.

    >>> hour = {"sensor": "GPU-0", "resource": "accelerator_hours"}
    >>> covered([Span(**hour, started=0, ended=3600, amount=1), Span(**hour, started=1800, ended=5400, amount=1)])
    1.5
    """
    total, together, reached = 0.0, list[Span](), -1.0
    for span in sorted(spans, key=lambda span: span.started):
        if span.started >= reached:
            total += _overlapping(together)
            together = []
        together.append(span)
        reached = max(reached, span.ended)
    return total + _overlapping(together)


def _overlapping(spans: Sequence[Span]) -> float:
    """The same of spans that hang together, by rising start."""
    if len(spans) < 2:  # exactly what was counted, and not a rate times a time
        return sum(span.amount for span in spans)
    total = 0.0
    bounds = sorted({moment for span in spans for moment in (span.started, span.ended)})
    running: list[tuple[float, float]] = []  # (-rate, end): the fastest first
    following = 0
    for start, end in itertools.pairwise(bounds):
        while following < len(spans) and spans[following].started <= start:
            span = spans[following]
            if span.ended > span.started:
                heapq.heappush(running, (-span.amount / (span.ended - span.started), span.ended))
            following += 1
        while running and running[0][1] <= start:
            heapq.heappop(running)
        if running:
            total += -running[0][0] * (end - start)
    return total


def _joined(methods: Sequence[Method]) -> Method:
    """The method of a sum: as good as the worst of its parts."""
    read = [method for method in methods if method.basis is not Basis.NOT_READ]
    bases = {method.basis for method in read}
    if not read:
        basis = Basis.NOT_READ
    elif len(read) < len(methods) or Basis.PARTIAL in bases:
        basis = Basis.PARTIAL
    else:
        basis = Basis.ESTIMATED if Basis.ESTIMATED in bases else Basis.MEASURED
    return Method(
        basis=basis,
        instruments=tuple(sorted({instrument for method in methods for instrument in method.instruments})),
        missing=tuple(sorted({part for method in methods for part in method.missing})),
    )
