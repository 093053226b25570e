"""What a run claims, held against what its devices can do: marks for figures that cannot be right.

The limits are generous on purpose. A mark says that a figure is impossible, or that the wrong device was named; no
mark says nothing about figures that are merely too good.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from gradient_blueprints.record_models import Implausible, Mark, NewRun, ReportedPoint
from gradient_blueprints.run_models import Resource, Tally

LEAST_WATTS = 0.1
"""Below what anything that trains draws."""
PROCESSOR_PEAK = 1e15
"""FLOP/s beyond the processors of any one machine."""
TOLERANCE = 0.01  # relative: figures are rounded
_PROCESSORS = re.compile(r" \(\d+ cores\)$")
"""How the SDK's meter ends their name, which stands among those of accelerators."""
ROUGHNESS = 0.2  # relative: what counters of FLOPs leave out, such as norms and the first layer's input gradient


class Device(NamedTuple):
    idle_watts: float
    """About half of what nvidia-smi commonly shows of an idle board, the deepest sleep included."""
    peak: float
    """FLOP/s of the vendor's data sheet in the narrowest format that training uses (FP8 where there is one), dense."""


DEVICES = {
    "B200": Device(50, 4.5e15),
    "H200": Device(35, 1.98e15),
    "H100": Device(25, 1.98e15),
    "A100": Device(20, 3.12e14),
    "L40S": Device(10, 7.33e14),
    "A40": Device(8, 1.5e14),
    "A10": Device(5, 1.25e14),
    "L4": Device(4, 2.42e14),
    "T4": Device(4, 6.5e13),
    "V100": Device(12, 1.25e14),
    "P100": Device(12, 2.12e13),
    "RTX 4090": Device(4, 6.61e14),
    "RTX 3090": Device(4, 1.42e14),
}


def marks_of(
    run: NewRun, points: Sequence[ReportedPoint], tally: Tally
) -> tuple[tuple[Mark, ...], tuple[Implausible, ...]]:
    """The marks, and the claims that could not be checked."""
    found: list[Mark] = []
    unchecked: list[Implausible] = []
    for check in (_energy, _flops, _tokens):
        code, checked, detail = check(run, tally)
        if detail is not None:
            found.append(Mark(code=code, detail=detail))
        if not checked:
            unchecked.append(code)
    return (*found, *_of_curve(points, tally)), tuple(unchecked)


def accelerator_of(name: str) -> Device | None:
    """The device whose name stands as words of its own in `name`: A10 is not in A100."""
    words = f" {name.replace('-', ' ')} "
    return next((device for known, device in DEVICES.items() if f" {known} " in words), None)


Checked = tuple[Implausible, bool, str | None]


def _accelerators(tally: Tally) -> list[Device]:
    """None unless each is known: which of them the hours and the FLOPs are of is not told."""
    found = [accelerator_of(name) for name in tally.hardware.values() if not _PROCESSORS.search(name)]
    return [] if None in found else [device for device in found if device is not None]


def _energy(run: NewRun, tally: Tally) -> Checked:
    code = Implausible.ENERGY_BELOW_IDLE
    if tally.energy_kwh is None or tally.seconds is None:
        return code, False, None
    least, what = LEAST_WATTS * tally.seconds / 3.6e6, f"{LEAST_WATTS} W"
    known = _accelerators(tally)
    missing = tally.methods[Resource.ENERGY_KWH].missing
    if known and tally.accelerator_hours is not None and "accelerator" not in missing:
        watts = min(device.idle_watts for device in known)
        idle = watts * tally.accelerator_hours / 1e3
        if idle > least:
            least, what = idle, f"{watts:g} W for each of {tally.accelerator_hours:.4g} accelerator hours"
    if tally.energy_kwh >= least * (1 - TOLERANCE):
        return code, True, None
    return code, True, f"{tally.energy_kwh:.4g} kWh, where idling at {what} takes {least:.4g} kWh"


def _flops(run: NewRun, tally: Tally) -> Checked:
    code = Implausible.FLOPS_BEYOND_PEAK
    if tally.flops is None or tally.seconds is None:
        return code, False, None
    known = _accelerators(tally)
    if tally.accelerator_hours is None:
        most, what = PROCESSOR_PEAK * tally.seconds * max(1, len(tally.hardware)), "processors"
    elif known:
        most, what = max(device.peak for device in known) * tally.accelerator_hours * 3600, "accelerators"
    else:
        return code, False, None
    if tally.flops <= most * (1 + TOLERANCE):
        return code, True, None
    return code, True, f"{tally.flops:.4g} FLOPs, where the {what} at their peak do {most:.4g} in the time"


def _tokens(run: NewRun, tally: Tally) -> Checked:
    code = Implausible.TOKENS_BEYOND_FLOPS
    if tally.tokens is None or tally.flops is None or run.parameters is None:
        return code, False, None
    chosen = run.selection
    share = 1.0 if chosen is None else min(1.0, chosen.trained / max(1, chosen.parameters))
    # Below the lowest layer that is trained nothing is propagated back: the last layers alone take little more than
    # the forward pass and the gradients of their weights.
    each = 6.0 if share == 1 else 2 + 2 * share
    needed = each * run.parameters * tally.tokens
    if tally.flops >= needed * (1 - ROUGHNESS):
        return code, True, None
    detail = (
        f"{tally.tokens:.4g} tokens of {run.parameters:,} parameters take {needed:.4g} FLOPs, not {tally.flops:.4g}"
    )
    return code, True, detail


def _of_curve(points: Sequence[ReportedPoint], tally: Tally) -> list[Mark]:
    """One mark of a kind for each resource, at the first point that shows it."""
    found: list[Mark] = []
    amounts = tally.amounts()
    for resource in Resource:
        series = [(point.step, point.gamma[resource]) for point in points if resource in point.gamma]
        negative = next((pair for pair in series if pair[1] < 0), None)
        if negative is not None:
            detail = f"{resource} is {negative[1]:.4g} at step {negative[0]}"
            found.append(Mark(code=Implausible.NEGATIVE_GAMMA, detail=detail))
        fallen = next(((one, two) for one, two in itertools.pairwise(series) if two[1] < one[1]), None)
        if fallen is not None:
            (_, before), (step, after) = fallen
            detail = f"{resource} falls from {before:.6g} to {after:.6g} at step {step}"
            found.append(Mark(code=Implausible.FALLING_GAMMA, detail=detail))
        highest = max((amount for _, amount in series), default=0.0)
        if resource in amounts and amounts[resource] < highest * (1 - TOLERANCE):
            detail = f"{resource} is {amounts[resource]:.6g} in the end, and {highest:.6g} within the curve"
            found.append(Mark(code=Implausible.TALLY_BELOW_CURVE, detail=detail))
    return found
