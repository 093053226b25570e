"""What a run of the demo found, for the screen and the report."""

from __future__ import annotations

from dataclasses import dataclass, field

from demo.adapting import Outcome
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.selection import Selection
from gradient_blueprints.training.staleness import LocalAgreement

UNTUNED = (
    "The learning rates of this comparison were not tuned: it shows what each way fits in, not that one learns more."
)


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
    agreement: LocalAgreement
    selection: Selection
    base_loss: float
    full: Outcome
    outcomes: tuple[Outcome, ...]

    def share_of_gain(self, outcome: Outcome) -> float:
        """Of full fine-tuning's gain in held-out loss."""
        return (self.base_loss - outcome.loss) / (self.base_loss - self.full.loss)
