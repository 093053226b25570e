"""Scores of coordinates within a tensor: plain functions of what is known about its gradients; the largest are trained.

What is known is a local sample of n sequences, with mean gradient ĝ and mean square q per coordinate, and a published
second moment v in row and column factors. A score of one tensor is compared with no other tensor's: every tensor
gives the same share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evidence.gradients import Array, Factors, Moments


@dataclass(frozen=True)
class Knowledge:
    """What is known when coordinates are chosen; `seed` draws what is random."""

    seed: int
    local: Moments | None = None
    published: Factors | None = None

    def generator(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


Score = Callable[[Knowledge, str, tuple[int, ...]], Array]
TINY = np.float32(1e-30)
LEAST_SIGNAL = 1e-4


def random(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
    """Chance."""
    return known.generator(name).random(shape, np.float32)


def local_mean(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
    """|ĝ|"""
    return np.abs(_local(known).mean[name])


def published(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
    """√v"""
    return np.sqrt(_published(known).second_moment(name, shape))


def bayes(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
    """√E[μ² | data] with the prior μ ~ N(0, τ²v) of the published factors; the local estimate ĝ ~ N(μ, s²/n).

    E[μ²|data] = (wĝ)² + w·s²/n, w = τ²v/(τ²v + s²/n). τ² by moments: mean(ĝ² − s²/n) / mean(v), over the tensor.
    s² is the sample's variance in row and column factors too: per coordinate it is nothing but noise for small n.
    Without published factors the prior's shape is that of the local q; without a local sample the score is √v.
    """
    if known.local is None:
        return published(known, name, shape)
    prior = (
        separable(known.local.square[name]) if known.published is None else known.published.second_moment(name, shape)
    )
    return _posterior(known.local, name, prior)


def sampled(score: Score, temperature: float) -> Score:
    """Chosen with chances that grow with score^(1/temperature): Gumbel noise on its logarithm (Kool et al. 2019).

    Temperature 0 is the largest scores, infinity is chance.
    """

    def noisy(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
        noise = known.generator(name).gumbel(size=shape)
        return np.asarray(np.log(score(known, name, shape) + TINY) + temperature * noise, np.float32)

    return noisy


def with_random(score: Score, share: float, budget: float) -> Score:
    """The largest scores for 1 − share of the budget, the rest of it at random among the others."""

    def mixed(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
        ranked = score(known, name, shape).reshape(-1)
        certain = round((1 - share) * budget * ranked.size)
        values = known.generator(name).random(ranked.size, np.float32)
        if certain:
            values[np.argpartition(-ranked, certain - 1)[:certain]] = 2
        return values.reshape(shape)

    return mixed


def ranked_along(score: Score, axis: int) -> Score:
    """Ranked within each row (axis 1) or column (axis 0), so that each of them takes part alike."""

    def ranks(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
        values = score(known, name, shape)
        if values.ndim < 2:
            return values
        order = values.argsort(axis).argsort(axis)
        return np.asarray(order, np.float32) + known.generator(name).random(shape, np.float32)

    return ranks


def even(score: Score) -> Score:
    """Over what its rows and columns explain: rows and columns take part alike, with their outstanding entries."""

    def ratio(known: Knowledge, name: str, shape: tuple[int, ...]) -> Array:
        values = score(known, name, shape)
        if values.ndim < 2:
            return values
        return np.asarray(values / np.sqrt(separable(np.square(values)) + TINY), np.float32)

    return ratio


def separable(square: Array) -> Array:
    """The rank-1 form of a non-negative matrix: row mean × column mean / mean."""
    if square.ndim < 2:
        return square
    return np.asarray(
        square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / max(square.mean(), TINY), np.float32
    )


def _posterior(local: Moments, name: str, prior: Array) -> Array:
    mean_square = np.square(local.mean[name])
    noise = separable(np.maximum(local.square[name] - mean_square, 0)) / max(1, local.count - 1)  # s²/n
    # A sample in which no signal is seen (τ² ≤ 0) leaves the prior's order, not zeros.
    signal = max(float((mean_square - noise).mean()), LEAST_SIGNAL * float(noise.mean()))
    scale = signal / max(float(prior.mean()), float(TINY))  # τ²
    weight = scale * prior / (scale * prior + noise + TINY)
    return np.asarray(np.sqrt(weight * weight * mean_square + weight * noise), np.float32)


def _local(known: Knowledge) -> Moments:
    assert known.local is not None, "this score needs a local sample"
    return known.local


def _published(known: Knowledge) -> Factors:
    assert known.published is not None, "this score needs published factors"
    return known.published


def top(scores: Array, share: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Flat indices of the largest `share` of a tensor's scores, ascending; at least one."""
    count = min(scores.size, max(1, round(share * scores.size)))
    flat = scores.reshape(-1)
    if count == scores.size:
        return np.arange(count)
    return np.sort(np.argpartition(-flat, count - 1)[:count]).astype(np.int64)


_SCORES: dict[str, Score] = {
    "random": random,
    "local_mean": local_mean,
    "published": published,
    "bayes": bayes,
}


def named(name: str, share: float) -> Score:
    """A score by name; `row:`, `column:`, `even:`, `half:` and `sampled0.5:` modify the score that follows them."""
    modifier, _, inner = name.partition(":")
    if not inner:
        return _SCORES[name]
    score = named(inner, share)
    if modifier == "row":
        return ranked_along(score, 1)
    if modifier == "column":
        return ranked_along(score, 0)
    if modifier == "even":
        return even(score)
    if modifier == "half":
        return with_random(score, 0.5, share)
    assert modifier.startswith("sampled"), name
    return sampled(score, float(modifier.removeprefix("sampled")))
