"""When to stop: the marginal return ΔΨ/ΔΓ of training, and the rule of the paper's section 3."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Resource

Goal = Literal["fall", "rise"]


class Reason(StrEnum):
    """Why training goes on, or does not."""

    FILLING = "filling"
    """Fewer checks than the window holds."""
    PAYS = "pays"
    BELOW = "below"
    """The ratio is below eta, not yet often enough."""
    DECAY_AHEAD = "decay_ahead"
    """It is below eta at the present learning rate, whose decay will bring gains of its own: begin the decay."""
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """What the rule made of one check. `ratio` is the gain in Ψ per unit of Γ over the window; None while it fills."""

    stop: bool
    reason: Reason
    ratio: float | None


class MarginalReturn:
    """Stop when the return over a moving window has been below `eta` at `patience` successive checks.

    With checks 0, 1, …, t the ratio is (Ψ_t − Ψ_{t−w}) / (Γ_t − Γ_{t−w}), w = `window`, signed so that a gain is
    positive: `goal` says whether Ψ falls (a loss) or rises (a score). The quotient of the differences, not the mean
    of the quotients that the paper's words might mean: in that mean a check that cost little counts as much as a dear
    one, and noise divided by a small cost dominates.

    >>> rule = MarginalReturn(eta=0.5, patience=2, window=1)
    >>> [rule.update(psi, gamma).reason.value for gamma, psi in enumerate([9.0, 8.0, 7.9, 7.8])]
    ['filling', 'pays', 'below', 'stop']

    A Ψ that is not finite counts as a check without return. Raises ValueError where Γ falls.
    """

    def __init__(self, eta: float, patience: int = 3, window: int = 5, goal: Goal = "fall") -> None:
        if not math.isfinite(eta) or patience < 1 or window < 1 or goal not in ("fall", "rise"):
            raise ConfigurationError(
                f"eta = {eta}, patience = {patience}, window = {window}, goal = {goal!r}: "
                "need a finite eta in units of Ψ per Γ, counts of at least 1, and 'fall' or 'rise'"
            )
        self.eta, self.patience, self.window, self.goal = eta, patience, window, goal
        self._checks: deque[tuple[float, float]] = deque(maxlen=window + 1)  # (Ψ, Γ)
        self._below = 0
        self._last_gamma = -math.inf
        self.last: Decision | None = None

    def update(self, psi: float, gamma: float, *, decay_ahead: bool = False) -> Decision:
        """Take in one check. While `decay_ahead` it never stops, and checks below eta do not count towards patience."""
        if not gamma >= self._last_gamma:
            raise ValueError(f"Γ fell from {self._last_gamma} to {gamma}: resources that were spent stay spent")
        self._last_gamma = gamma
        self.last = self._decide(psi, gamma, decay_ahead)
        return self.last

    def _decide(self, psi: float, gamma: float, decay_ahead: bool) -> Decision:
        ratio: float | None
        if math.isfinite(psi):
            self._checks.append((psi, gamma))
            if len(self._checks) <= self.window:
                return Decision(False, Reason.FILLING, None)
            ratio = self._ratio()
            if ratio is None:  # nothing was spent since; nothing can be said
                return Decision(False, Reason.FILLING, None)
        else:
            ratio = -math.inf
        if ratio >= self.eta:
            self._below = 0
            return Decision(False, Reason.PAYS, ratio)
        if decay_ahead:
            self._below = 0
            return Decision(False, Reason.DECAY_AHEAD, ratio)
        self._below += 1
        stop = self._below >= self.patience
        return Decision(stop, Reason.STOP if stop else Reason.BELOW, ratio)

    def _ratio(self) -> float | None:
        (old_psi, old_gamma), (psi, gamma) = self._checks[0], self._checks[-1]
        if gamma == old_gamma:
            return None
        gain = psi - old_psi if self.goal == "rise" else old_psi - psi
        return gain / (gamma - old_gamma)

    def settings(self) -> dict[str, Any]:
        """What it was made with."""
        return {"eta": self.eta, "patience": self.patience, "window": self.window, "goal": self.goal}

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON."""
        return {
            "checks": [list(check) for check in self._checks],
            "below": self._below,
            "last_gamma": self._last_gamma if math.isfinite(self._last_gamma) else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; eta, patience, window and goal stay what this rule was made with."""
        self._checks.clear()
        self._checks.extend((psi, gamma) for psi, gamma in state["checks"])
        self._below = state["below"]
        self._last_gamma = -math.inf if state["last_gamma"] is None else state["last_gamma"]


def priced(amounts: Mapping[Resource, float], prices: Mapping[Resource, float]) -> float:
    """Γ as one number: Σ price × amount. Raises ConfigurationError for a resource that was not read.

    >>> priced({Resource.SECONDS: 7200, Resource.ENERGY_KWH: 3}, {Resource.ENERGY_KWH: 0.25, Resource.SECONDS: 0.001})
    7.95
    """
    missing = sorted(resource for resource in prices if resource not in amounts)
    if missing:
        raise ConfigurationError(
            f"{', '.join(missing)} cannot be read here, so it cannot be Γ; "
            f"there is {', '.join(sorted(amounts)) or 'nothing'}"
        )
    return sum(price * amounts[resource] for resource, price in prices.items())
