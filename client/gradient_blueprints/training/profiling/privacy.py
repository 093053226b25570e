"""Differential privacy of a blueprint: clipped norms of single examples, summed on a grid, plus Gaussian noise.

A private blueprint holds sizes that the lab chose and numbers made of the noised sums, nothing else;
docs/privacy.md derives the sensitivity. Noise and accounting are OpenDP's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradient_blueprints.errors import ConfigurationError, MissingExtra
from gradient_blueprints.models import Blueprint, CostModel, Layer, Noise, Provenance, Statistic
from gradient_blueprints.training.profiling.layers import Group

GRID = 1 << 32
"""Steps of the clipping norm, in which clipped vectors are summed exactly, as integers."""

PUBLIC = {"weights_digest", "weights_revision", "notes"}
"""What a caller may say in the provenance of a private blueprint."""

_MOST_EXAMPLES = 1 << 28  # sums and noise stay far inside 64 bits

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Privacy:
    """(epsilon, delta) differential privacy of what is published about the examples.

    Two data sets are neighbours when they differ in one document; a document makes up at most
    `rows_per_document` rows of all batches together. Their number, and the domain of each, is public.
    `clip`: R, to which the vector of a row's submodule norms is scaled down, fixed without looking
    at these data. `releases`: how many blueprints of the same data share the budget.

    ConfigurationError where a value cannot be used, MissingExtra without OpenDP.
    """

    clip: float
    epsilon: float
    delta: float
    rows_per_document: int = 1
    releases: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 1e-4 <= self.epsilon <= 100 and 1e-15 <= self.delta < 1):
            raise ConfigurationError("Privacy needs clip > 0, epsilon from 0.0001 to 100 and delta from 1e-15 to 1.")
        if self.rows_per_document < 1 or self.releases < 1:
            raise ConfigurationError("rows_per_document and releases count from 1.")
        _opendp()

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the sums when a document is replaced, in steps of the grid.

        Vectors of norms are not negative, so two of length R differ by at most sqrt(2) R.
        """
        return math.sqrt(2) * self.rows_per_document * GRID * (1 + 1e-12)

    @cached_property
    def scale(self) -> float:
        """Standard deviation of the noise on every sum, in steps of the grid: the least that keeps the budget."""
        dp = _opendp()
        together = self.sensitivity * math.sqrt(self.releases)  # the releases as one long vector

        def make(scale: float) -> Any:
            return dp.c.make_fix_delta(dp.c.make_zCDP_to_approxDP(_mechanism(1, scale)), self.delta)

        bounds = (together * 0.05, together * 1e6)  # epsilon from 300 down
        scale: float = dp.binary_search_param(make, together, (self.epsilon, self.delta), bounds=bounds)
        return scale

    def sigma(self, examples: int) -> float:
        """Standard deviation of the noise on a published mean over so many examples, in units of the norm."""
        return self.scale / GRID * self.clip / examples

    def clipped(self, norms: Floats) -> Integers:
        """Norms (examples, layers), each row scaled down to length R at most, in whole steps of R / 2^32."""
        finite = np.where(np.isfinite(norms).all(1, keepdims=True), norms, 0.0)
        with np.errstate(over="ignore"):  # a row too long for float64 becomes zero
            lengths = np.sqrt((finite**2).sum(1, keepdims=True))
        shares = finite / np.maximum(lengths, self.clip)  # of length 1 at most, but for rounding
        return np.asarray(np.floor(shares * ((1 - 1e-9) * GRID)), dtype=np.int64)

    def noised_mean(self, norms: Floats) -> Floats:
        """Mean over examples (examples, layers) of the clipped norms, with noise, never negative, (layers,)."""
        examples, layers = norms.shape
        if not 0 < examples <= _MOST_EXAMPLES:
            raise ConfigurationError(f"A private mean is of 1 to {_MOST_EXAMPLES:,} examples, not {examples:,}.")
        sums = self.clipped(norms).sum(0)
        noised = np.array(_mechanism(layers, self.scale)(sums.tolist()), dtype=np.float64)
        return np.asarray(np.maximum(noised, 0) / GRID * self.clip / examples)


def _mechanism(size: int, scale: float) -> Any:
    dp = _opendp()
    space = dp.vector_domain(dp.atom_domain(T="i64"), size=size), dp.l2_distance(T="f64")
    return dp.m.make_gaussian(*space, scale=scale)


def _opendp() -> Any:
    try:
        import opendp.prelude as dp  # an extra of its own: 90 MB that only private blueprints need
    except ModuleNotFoundError as missing:
        raise MissingExtra("privacy", "A private blueprint") from missing
    dp.enable_features("contrib")  # OpenDP's word for what awaits its last review; the Gaussian is among it
    return dp


def noised_means(tables: Mapping[str, Floats], privacy: Privacy) -> dict[str, Floats]:
    """One release: the noised mean of every domain's (examples, layers). Call it once for the same data."""
    return {name: privacy.noised_mean(tables[name]) for name in sorted(tables)}


def private_blueprint(
    means: Mapping[str, Floats],
    examples: Mapping[str, int],
    groups: Sequence[Group],
    privacy: Privacy,
    *,
    general: str,
    model_id: str,
    training_checkpoint: float,
    provenance: Provenance,
    costs: CostModel,
) -> Blueprint:
    """The document of noised means and of public sizes; `provenance` must hold nothing that depends on the data.

    `gradient_norm` is of batches of one example, which makes it the `example_norm`. Exponents, curves,
    signal, intervals, losses and token counts would each cost budget and are left out.
    """
    noise = Noise(
        mechanism="discrete Gaussian",
        sigma=_digits(privacy.sigma(examples[general])),
        clip=privacy.clip,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
    )
    layers = [
        Layer(
            id=group.id,
            gradient_norm=_digits(means[general][index]),
            example_norm=_digits(means[general][index]),
            parameters=group.size,
            kind=group.kind,
            depth=group.depth,
            domain_norms={name: _digits(values[index]) for name, values in means.items()},
        )
        for index, group in enumerate(groups)
    ]
    total = sum(examples.values())
    extra: dict[str, Any] = {
        "profile": {
            "general": general,
            "privacy": {
                "neighbours": "one document replaced by another in the same domains",
                "rows_per_document": privacy.rows_per_document,
                "releases": privacy.releases,
                "domains": {
                    name: {"examples": count, "sigma": _digits(privacy.sigma(count))}
                    for name, count in sorted(examples.items())
                },
            },
        }
    }
    return Blueprint(
        schema_version=1,
        model_id=model_id,
        training_checkpoint=training_checkpoint,
        statistic=Statistic.MEAN,
        cost_model=costs,
        layers=tuple(layers),
        provenance=provenance.model_copy(update={"noise": noise, "batches": total, "batch_size": 1, "examples": total}),
        extra=extra,
    )


def refuse_private_facts(provenance: Provenance | None) -> None:
    """ConfigurationError when the caller's own words could tell what the noise hides."""
    told = set() if provenance is None else provenance.model_dump(exclude_none=True).keys() - PUBLIC
    if told:
        raise ConfigurationError(
            f"The provenance of a private blueprint may hold {', '.join(sorted(PUBLIC))}, "
            f"not {', '.join(sorted(told))}: losses, digests and counts of the data would undo the noise."
        )


def _digits(value: float) -> float:
    return float(f"{float(value):.6g}")
