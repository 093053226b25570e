"""What stopping by one's own intervals does to them: how often they hold the truth, on norms whose mean is known.

    python -m examples.until_coverage

Norms of 100 layers are log-normal over batches, their spread in the logarithm from 0.1 to 0.6 by layer; they vary
each for itself, or mostly together, as when some batches are harder than others. A run ends when the default
`Until(width)` is reached; beside it stands a run of as many batches, fixed before. Prints a Markdown table, 100 runs a
row.
"""

from __future__ import annotations

import numpy as np

from examples.rankings import print_table
from gradient_blueprints.models import Statistic
from gradient_blueprints.training.profiling import Until
from gradient_blueprints.training.profiling.document import DocumentSettings, bootstrap, precise_enough
from gradient_blueprints.training.profiling.histograms import Floats

RUNS, LAYERS, MOST = 100, 100, 1_000
SIGMAS = np.geomspace(0.1, 0.6, LAYERS)
TRUTH = np.exp(SIGMAS**2 / 2)


def sample(rng: np.random.Generator, shared: float) -> Floats:
    """Norms (batches, layers), of whose logarithms a share of the variance is common to all layers."""
    common, own = rng.standard_normal((MOST, 1)), rng.standard_normal((MOST, LAYERS))
    return np.asarray(np.exp(SIGMAS * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)))


def covered(norms: Floats) -> float:
    interval = bootstrap(norms, Statistic.MEAN, 0)
    assert interval is not None
    return float(((interval[0] <= TRUTH) & (interval[1] >= TRUTH)).mean())


def main() -> None:
    rows = {}
    for shared in (0.0, 0.8):
        for width in (0.5, 0.3, 0.2):
            settings = DocumentSettings(until=Until(width))
            assert settings.until is not None
            looks = [number for number in range(1, MOST) if settings.until.looks_at(number)]
            sizes, stopped, fixed = [], [], []
            for run in range(RUNS):
                rng = np.random.default_rng(run)
                norms, other = sample(rng, shared), sample(rng, shared)
                size = next(number for number in looks if precise_enough(norms[:number], settings))
                sizes.append(size)
                stopped.append(covered(norms[:size]))
                fixed.append(covered(other[:size]))
            rows[f"{width}, {'mostly together' if shared else 'each for itself'}"] = {
                "batches": f"{np.mean(sizes):.0f} ({min(sizes)} to {max(sizes)})",
                "stopped by itself": f"{np.mean(stopped):.1%}",
                "as many, fixed before": f"{np.mean(fixed):.1%}",
            }
    print_table("until, and how layers vary", rows, ["batches", "stopped by itself", "as many, fixed before"])


if __name__ == "__main__":
    main()
