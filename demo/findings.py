"""What a run of the demo found, for the screen and the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from demo.adapting import Outcome
from gradient_blueprints.models import Blueprint
from gradient_blueprints.statistics_models import Staleness
from gradient_blueprints.training.selection import Selection

UNTUNED = (
    "The learning rates of this comparison were not tuned: it shows what each way fits in, not that one learns more."
)


def agreement_text(checked: Staleness) -> str:
    """How far the local layer ranks follow the published ones, in words."""
    found = checked.agreement
    if found.corrected is None or found.corrected_ci is None:
        return f"{found.n} layers, too noisy or too few to tell ({', '.join(found.reasons)})"
    low, high = found.corrected_ci
    return f"rank correlation without noise {found.corrected:.2f} [{low:.2f}, {high:.2f}] over {found.n} layers"


@dataclass
class Findings:
    """What the report shows; everything in it was computed in this run."""

    checkpoints: list[Blueprint] = field(default_factory=list)
    domains: Blueprint | None = None
    versions: list[tuple[str, ...]] = field(default_factory=list)
    adaptations: list[Adapted] = field(default_factory=list)
    pretraining: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Adapted:
    """One model brought to another domain."""

    blueprint: Blueprint
    domain: str
    steps: int
    rates_tuned: bool
    staleness: Staleness
    selection: Selection
    base_loss: float
    full: Outcome
    outcomes: tuple[Outcome, ...]

    def share_of_gain(self, outcome: Outcome) -> float:
        """Of full fine-tuning's gain in held-out loss."""
        return (self.base_loss - outcome.loss) / (self.base_loss - self.full.loss)
