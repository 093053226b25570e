"""Fitting the exponent and the retained mass of all entries of a gradient beside one pass over its memory.

    python -m benchmarks.tails [--rounds 9] [--entries 28311552]

The pass is `gradient.abs().sum()` on one thread; besides it a plain `bincount` of the same entries' upper 16 bits,
which is the part of the work that cannot be left out when every entry is to be counted.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.results import Ratio, interleaved, processor_seconds, publish, ratios
from gradient_blueprints.training.profiling.histograms import MagnitudeHistogram
from gradient_blueprints.training.profiling.tails import fit_tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--entries", type=int, default=49_152 * 576)  # the embedding of SmolLM2-135M
    options = parser.parse_args()
    torch.set_num_threads(1)
    gradient = torch.randn(options.entries, generator=torch.Generator().manual_seed(0)).pow_(3)
    shares = np.geomspace(1e-4, 1, 32)

    def fit() -> None:
        histogram = MagnitudeHistogram.of(gradient)
        assert fit_tail(histogram) is not None
        histogram.retained_mass(shares)

    def count() -> None:
        torch.bincount(gradient.view(torch.int16).view(-1, 2)[:, 1] & 0x7FFF, minlength=1 << 15)

    found = interleaved(
        options.rounds,
        fit=lambda: processor_seconds(fit),
        a_pass=lambda: processor_seconds(lambda: gradient.abs().sum()),
        counting=lambda: processor_seconds(count),
    )
    print({name: f"{1000 * min(times):.0f} ms" for name, times in found.items()})
    work = "exponent fit and retained mass of all entries"
    publish(
        [
            Ratio(work, "gradient.abs().sum(), one thread", ratios(found, "fit", "a_pass"), 2),
            Ratio(work, "torch.bincount of 16 bits of each", ratios(found, "fit", "counting")),
        ]
    )


if __name__ == "__main__":
    main()
