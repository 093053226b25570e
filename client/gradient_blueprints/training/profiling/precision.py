"""When a profile is precise enough to stop: by the published intervals, looked at now and then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.histograms import Floats


@dataclass(frozen=True)
class Until:
    """Stop a domain when the 95 % interval of `gradient_norm` is narrow in most layers.

    `width`: of the interval, over the norm itself. `share`: of the layers that must be as narrow, so
    that a few noisy ones (norm layers of some hundred weights) do not keep a profile running for
    ever. `batches`: the fewest; intervals from fewer are too narrow to be believed.
    """

    width: float
    share: float = 0.9
    batches: int = 16

    def __post_init__(self) -> None:
        if not (self.width > 0 and 0 < self.share <= 1 and self.batches >= 2):
            raise ConfigurationError("until needs width > 0, 0 < share <= 1 and at least 2 batches.")

    def looks_at(self, batches: int) -> bool:
        """Whether to look after so many batches: after the fewest, then each time there are a quarter more.

        A look costs a bootstrap, and every look is a chance to stop by luck.
        """
        look = self.batches
        while look < batches:
            look += max(1, look // 4)
        return look == batches

    def reached(self, centre: Floats, interval: Floats | None) -> bool:
        """Whether so many layers are as narrow; `centre` (layers,), `interval` (2, layers)."""
        if interval is None:
            return False
        return bool(np.mean(interval[1] - interval[0] <= self.width * centre) >= self.share)
