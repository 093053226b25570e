"""What would have been saved: stopping rules replayed on the curve of a run that went on to its end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.stopping import Goal, MarginalReturn


class Check(NamedTuple):
    """One evaluation of a finished run. `decay_ahead`: the learning rate was still to be decayed."""

    gamma: float
    psi: float
    decay_ahead: bool = False


@dataclass(frozen=True)
class Replay:
    """What a rule would have done."""

    rule: str
    stopped_at: int | None
    """Index of the check at which it stops; None: it never does."""
    saved: float
    """Share of the run's Γ that would not have been spent."""
    lost: float
    """How much worse Ψ is where it stops than at the end of the run; negative where it is better."""


def replay(
    curve: Sequence[Check],
    eta: Iterable[float],
    patience: Iterable[int] = (1, 3, 5),
    window: Iterable[int] = (5,),
    goal: Goal = "fall",
) -> list[Replay]:
    """Every `MarginalReturn` of the grid on the curve.

    >>> curve = [Check(gamma, 1 + 1 / gamma) for gamma in range(1, 21)]
    >>> for row in replay(curve, eta=[0.1, 0.01], patience=[1], window=[2]):
    ...     print(row.rule, row.stopped_at, f"{row.saved:.0%} saved, {row.lost:.3f} lost")
    eta 0.1, patience 1, window 2 4 75% saved, 0.150 lost
    eta 0.01, patience 1, window 2 11 40% saved, 0.033 lost
    """
    rows = []
    for threshold, times, width in itertools.product(eta, patience, window):
        rule = MarginalReturn(threshold, times, width, goal)

        def stops(check: Check, rule: MarginalReturn = rule) -> bool:
            return rule.update(check.psi, check.gamma, decay_ahead=check.decay_ahead).stop

        rows.append(_outcome(f"eta {threshold}, patience {times}, window {width}", curve, stops, goal))
    return rows


def replay_early_stopping(
    curve: Sequence[Check],
    patience: Iterable[int] = (1, 3, 5),
    threshold: Iterable[float] = (0.0,),
    goal: Goal = "fall",
) -> list[Replay]:
    """The baseline: stop at `patience` checks in a row that do not better the best Ψ by more than `threshold`.

    As `transformers.EarlyStoppingCallback` does. It does not know what a check costs, nor of the decay.
    """
    rows = []
    for times, least in itertools.product(patience, threshold):
        best, waited = math.inf, 0

        def stops(check: Check, times: int = times, least: float = least) -> bool:
            nonlocal best, waited
            psi = check.psi if goal == "fall" else -check.psi
            if psi < best - least or best == math.inf:
                best, waited = psi, 0
            else:
                waited += 1
            return waited >= times

        rows.append(_outcome(f"early stopping, patience {times}, threshold {least:g}", curve, stops, goal))
    return rows


def pareto(rows: Iterable[Replay]) -> list[Replay]:
    """Those of which no other saves as much and loses less, by rising savings."""
    best: list[Replay] = []
    for row in sorted(rows, key=lambda row: (-row.saved, row.lost)):
        if not best or row.lost < best[-1].lost:
            best.append(row)
    return best[::-1]


def returns(curve: Sequence[Check], window: int = 5, goal: Goal = "fall") -> list[float]:
    """The ratios that a rule sees, where to look for a sensible eta."""
    rule = MarginalReturn(-1.0, 1, window, goal)
    ratios = [rule.update(check.psi, check.gamma).ratio for check in curve]
    return [ratio for ratio in ratios if ratio is not None]


def table(rows: Iterable[Replay]) -> str:
    """The rows as a Markdown table."""
    lines = ["| Rule | Γ saved | Ψ lost |", "|---|---|---|"]
    for row in rows:
        saved = "never stops" if row.stopped_at is None else f"{row.saved:.1%}"
        lines.append(f"| {row.rule} | {saved} | {row.lost:+.4f} |")
    return "\n".join(lines)


def _outcome(name: str, curve: Sequence[Check], stops: Callable[[Check], bool], goal: Goal) -> Replay:
    if len(curve) < 2 or curve[-1].gamma <= 0:
        raise ConfigurationError("a curve has at least two checks and a positive Γ at its end")
    stopped_at = next((index for index, check in enumerate(curve) if stops(check)), None)
    if stopped_at is None:
        return Replay(name, None, 0.0, 0.0)
    stopped, end = curve[stopped_at], curve[-1]
    worse = stopped.psi - end.psi if goal == "fall" else end.psi - stopped.psi
    return Replay(name, stopped_at, 1 - stopped.gamma / end.gamma, worse)
