"""Whether a published blueprint still holds on local data: the simple form, one rank correlation and its ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradient_blueprints.models import Blueprint, Layer

TOLERANCE = 0.9
"""A blueprint holds while it follows the local ranks at least this much as well as local data follow themselves."""


@dataclass(frozen=True)
class LocalAgreement:
    """How well a published blueprint's layer ranks agree with those of local data."""

    correlation: float
    """Spearman correlation of the published norms with those of the whole local sample."""
    ceiling: float
    """What a second local sample of the same size would reach: the correlation of the sample's two halves, stepped
    up to the whole sample (Spearman-Brown). A correlation beyond it cannot be expected."""
    layers: int

    @property
    def stale(self) -> bool:
        return self.correlation < TOLERANCE * self.ceiling

    def __str__(self) -> str:
        verdict = "stale here" if self.stale else "holds here"
        return f"{verdict}: rank correlation {self.correlation:.2f}, ceiling {self.ceiling:.2f}, {self.layers} layers"


def compare_with_local(blueprint: Blueprint, local: Blueprint, halves: tuple[Blueprint, Blueprint]) -> LocalAgreement:
    """Compare layer ranks with those of a local profile, and of its halves with each other.

    `local` is a profile of the whole local sample, `halves` are profiles of two disjoint halves of it. Ranks are
    those of `signal` where all four documents have it (it tells domains apart where plain norms hardly do), else of
    `gradient_norm`. Raises ValueError when fewer than 3 layers are common or all norms are equal.
    """
    documents = (blueprint, local, *halves)
    by_id = [{layer.id: layer for layer in document.layers} for document in documents]
    common = [layer.id for layer in blueprint.layers if all(layer.id in layers for layers in by_id)]
    with_signal = all(layers[name].signal is not None for layers in by_id for name in common)
    published, whole, first, second = (
        [_norm(layers[name], with_signal=with_signal) for name in common] for layers in by_id
    )
    correlation, between_halves = spearman(published, whole), spearman(first, second)
    if correlation is None or between_halves is None:
        raise ValueError(f"ranks of {len(common)} common layers cannot be correlated: profile the same model")
    reliability = max(0.0, between_halves)
    return LocalAgreement(correlation, 2 * reliability / (1 + reliability), len(common))


def _norm(layer: Layer, *, with_signal: bool) -> float:
    return layer.signal if with_signal and layer.signal is not None else layer.gradient_norm


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation, ties by mean rank; None for fewer than 3 pairs or a constant side.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 3)
    0.8
    """
    if len(left) < 3:
        return None
    ranks = [_mean_ranks(np.asarray(side, np.float64)) for side in (left, right)]
    if any(side.min() == side.max() for side in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1]).item(1))


def _mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: npt.NDArray[np.float64] = (2 * last - counts + 1) / 2
    return ranks[inverse]
