"""A staleness check of 288 layers with its intervals beside the least that numpy needs for the same resamples.

python -m benchmarks.staleness [--rounds 9]

The floor draws the same resamples of the batches, multiplies them into values, sorts every row for its ranks (ties
ignored) and correlates the rows: what the interval, the split halves and the ceiling cannot do without. The check
does Kendall's tau with its interval, ties, verdict and reasons besides.
"""

from __future__ import annotations

import argparse

import numpy as np

from app.registry.agreement import Floats
from app.registry.drift import RESAMPLES, Sample, assess
from benchmarks.results import Ratio, interleaved, processor_seconds, publish, ratios

LAYERS, BATCHES = 288, 32
REPETITIONS = 10


def floor(published: Floats, batches: Floats) -> float:
    generator = np.random.default_rng(0)
    count, half = len(batches), len(batches) // 2

    def ranks(rows: Floats) -> Floats:
        order, ranked = rows.argsort(1), np.empty(rows.shape)
        np.put_along_axis(ranked, order, np.arange(rows.shape[1], dtype=float)[None, :], 1)
        return ranked

    def correlations(one: Floats, other: Floats) -> Floats:
        one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
        return np.asarray((one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1)))

    def halves(resamples: int) -> tuple[Floats, Floats]:
        order = generator.random((resamples, count)).argsort(1)
        weights = np.zeros((2, resamples, count))
        for number in range(2):
            np.put_along_axis(weights[number], order[:, number * half : (number + 1) * half], 1 / half, 1)
        return weights[0], weights[1]

    split = [weights @ batches for weights in halves(RESAMPLES // 2)]
    agreement = correlations(ranks(split[0]), ranks(split[1])).mean()
    drawn = [generator.multinomial(half, weights) / half @ batches for weights in halves(RESAMPLES)]
    own = correlations(ranks(drawn[0]), ranks(drawn[1]))
    theirs = np.broadcast_to(published, drawn[0].shape)
    rho = correlations(ranks(theirs[:1]), ranks((drawn[0] + drawn[1]) / 2))
    return float(agreement + own.std() + rho.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    generator = np.random.default_rng(1)
    truth = generator.lognormal(size=LAYERS)
    published = truth * generator.lognormal(sigma=0.05, size=LAYERS)
    batches = truth * generator.lognormal(sigma=0.3, size=(BATCHES, LAYERS))
    found = interleaved(
        parser.parse_args().rounds,
        check=lambda: processor_seconds(
            lambda: assess(Sample(published), Sample.of_batches(batches), threshold=0.95, seed=0), REPETITIONS
        ),
        floor=lambda: processor_seconds(lambda: floor(published, batches), REPETITIONS),
    )
    print({name: f"{1000 * min(values):.1f} ms" for name, values in found.items()})
    publish([Ratio("staleness of 288 layers", "numpy's floor", ratios(found, "check", "floor"), 2)])


if __name__ == "__main__":
    main()
