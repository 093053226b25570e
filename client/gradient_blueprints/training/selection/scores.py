"""How much each coordinate of a tensor is worth: scores as functions of (tensor name, shape), to be mixed and replaced.

A score answers a flat float32 array with one value a coordinate, at least 0 and the larger the better, or None for a
tensor of which it knows nothing (then coordinates are drawn at random, as where all are 0). Between tensors scores are
not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.blocks import blocks
from gradient_blueprints.training.selection.indices import Scores, random_scores
from gradient_blueprints.training.selection.local import LocalStatistics, block_of
from gradient_blueprints.training.selection.moments import TINY, Moment, Shape

Score = Callable[[str, Shape], Scores | None]
Factors = Mapping[str, Mapping[str, Tensor]]
"""{tensor: {"row": ..., "column": ...}}, the means of the squared gradient over the other dimension."""

LEAST_SIGNAL = 1e-3
"""Smallest share of the local mean square that counts as signal: with none at all the prior alone must still rank."""


def published_factors(factors: Factors) -> Score:
    """RMS gradient that row and column factors stand for: √(row_i · column_j / mean(row)); for local factors too."""

    def score(name: str, shape: Shape) -> Scores | None:
        if name not in factors:
            return None
        moment = Moment(factors[name], name, shape, device := factors[name]["row"].device)
        return _by_blocks(math.prod(shape), device, lambda first, last: moment.between(first, last).sqrt())

    return score


def local_gradient(mean: Mapping[str, Tensor]) -> Score:
    """|mean local gradient|."""

    def score(name: str, shape: Shape) -> Scores | None:
        if name not in mean:
            return None
        flat = mean[name].detach().reshape(-1)
        return _by_blocks(len(flat), flat.device, lambda first, last: flat[first:last].float().abs())

    return score


def local_rms(statistics: LocalStatistics) -> Score:
    """Root mean square of the local batch gradients; gather with keep="square"."""

    def score(name: str, shape: Shape) -> Scores | None:
        if name not in statistics.square:
            return None
        flat = statistics.square[name].reshape(-1)
        return _by_blocks(len(flat), flat.device, lambda first, last: flat[first:last].float().sqrt())

    return score


def random_coordinates(seed: int = 0) -> Score:
    """The same lots at every call and on every machine."""
    return lambda name, shape: random_scores(name, math.prod(shape), seed)


def blended(*parts: tuple[float, Score]) -> Score:
    """Weighted sum of scores as shares of their sums within a tensor; what knows a tensor alone decides, any weight."""

    def score(name: str, shape: Shape) -> Scores | None:
        known = [(weight, found) for weight, part in parts if (found := part(name, shape)) is not None]
        masses = [float(found.sum(dtype=np.float64)) for _, found in known]
        telling = [(weight / mass, found) for (weight, found), mass in zip(known, masses, strict=True) if mass > 0]
        if len(telling) < 2:
            return next((found for _, found in telling or known), None)
        total = np.zeros_like(telling[0][1])
        for scale, found in telling:
            for first in range(0, len(total), _PART):
                total[first : first + _PART] += np.float32(scale) * found[first : first + _PART]
        return total

    return score


def empirical_bayes(
    factors: Factors, statistics: LocalStatistics, validity: float = 1.0, trust: float | None = None
) -> Score:
    """Root of the expected squared mean gradient, given the published factors and the local sample.

    Prior: the true mean gradient μ_ij of this domain has variance τ²·v_ij, v = α·v̂ + (1 − α)·u with v̂ the second
    moment of the published factors and u that of the local sample's own, both over their mean, α = validity·trust.
    `trust` is the weight of the published side; unless given, the one of 0, ½ and 1 under which the sample is likeliest
    (Akaike's criterion, per tensor), so that factors which do not fit the sample have no say. Data: the local mean ĝ_ij
    of b batches with noise variance e_ij = s²_ij/b, of rank one, from the local factors (`LocalStatistics.noise`).
    τ² is estimated per tensor from E ĝ² = τ²v + e. Then

        E[μ² | ĝ] = (w ĝ)² + w e,   w = τ²v / (τ²v + e).

    Without a local sample the factors alone, √v̂; with ever more of it the local gradient alone, |ĝ|. Where the noise is
    not known (fewer than two batches) factors and gradient are blended as shares, `weight_of_published` and the rest.
    """
    weight_of_prior = weight_of_published(validity, trust)

    def score(name: str, shape: Shape) -> Scores | None:
        known = name in factors and validity > 0
        if name not in statistics.mean:
            return published_factors(factors)(name, shape) if known else None
        noise = statistics.noise(name)
        if noise is None:
            ours, theirs = published_factors(factors), local_gradient(statistics.mean)
            return blended((weight_of_prior, ours), (1 - weight_of_prior, theirs))(name, shape)
        mean = statistics.mean[name].detach()
        variance = Moment(noise, name, shape, mean.device)
        own, parameters = _own_prior(statistics, name, mean)
        signal = _signal(mean, variance)
        published, alpha = own, 0.0
        if known:
            published = Moment(factors[name], name, shape, mean.device).over_its_mean()
            alpha = (
                _likeliest((0.0, 0.5 * validity, validity), mean, variance, published, own, signal, parameters)
                if trust is None
                else trust * validity
            )
        scale = signal / max((1 - alpha) * own.mean + alpha * published.mean, TINY)
        flat = mean.reshape(-1)

        def root_of_expected(first: int, last: int) -> Tensor:
            prior = own.between(first, last)
            if alpha > 0:
                prior = prior.lerp(published.between(first, last), alpha)
            prior, noisy = prior * scale, variance.between(first, last)
            weight = prior.div_((prior + noisy).clamp_min_(TINY))
            return (weight * flat[first:last]).square_().addcmul_(noisy, weight).sqrt_()

        return _by_blocks(len(flat), flat.device, root_of_expected)

    return score


def _likeliest(
    weights: Sequence[float],
    mean: Tensor,
    variance: Moment,
    published: Moment,
    own: Moment,
    signal: float,
    parameters: int,
) -> float:
    """The α of these under which the local mean is likeliest, with the prior α·published + (1 − α)·own.

    The own factors' number of parameters counts against all but α = 1 (Akaike). Of a large tensor a million coordinates
    drawn once stand for all.
    """
    flat, lots = mean.reshape(-1), torch.Generator().manual_seed(0)
    judged, step, size = min(len(flat), _JUDGED_BY), block_of(mean.device), len(flat)
    misfit = [parameters / size * judged if weight < 1 else 0.0 for weight in weights]
    for first in range(0, judged, step):
        last = min(first + step, judged)
        if judged < size:
            drawn = torch.randint(0, size, (last - first,), generator=lots).to(mean.device)
            square, noise, theirs, ours = flat[drawn], variance.at(drawn), published.at(drawn), own.at(drawn)
        else:
            square, noise, theirs, ours = (
                flat[first:last],
                *(each.between(first, last) for each in (variance, published, own)),
            )
        square = square.float().square()
        for place, weight in enumerate(weights):
            expected = torch.lerp(ours, theirs, weight).mul_(signal).add_(noise)
            expected.clamp_min_(max(TINY, _LEAST_VARIANCE * signal))
            misfit[place] += float((square / expected + expected.log()).sum(dtype=torch.float64)) / 2
    return weights[misfit.index(min(misfit))]


def _own_prior(statistics: LocalStatistics, name: str, mean: Tensor) -> tuple[Moment, int]:
    """The second moment by the sample's own row and column factors over its mean, and their number; of a vector 1."""
    own = statistics.factors_of(name)
    parameters = sum(each.numel() for each in own.values())
    if "column" not in own:
        own, parameters = {"row": torch.ones(mean.numel())}, 1
    return Moment(own, name, tuple(mean.shape), mean.device).over_its_mean(), parameters


def _signal(mean: Tensor, variance: Moment) -> float:
    """τ², of a prior whose mean is 1."""
    parts = blocks(mean.contiguous(), block_of(mean.device))
    squares = sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts) / mean.numel()
    return max(squares - variance.mean, LEAST_SIGNAL * squares)


def weight_of_published(validity: float, trust: float | None) -> float:
    """Of the factors against the local gradient, as shares: validity·trust, or validity/(1 + validity) by default."""
    return validity / (1 + validity) if trust is None else validity * trust


_JUDGED_BY = 1 << 20
_PART = 1 << 18
_LEAST_VARIANCE = 1e-6
"""Of τ²: a coordinate that a prior holds for unused and is not says no more than this against it."""


def of_domain(factors: Mapping[str, Tensor] | None, domain: str | None) -> dict[str, dict[str, Tensor]]:
    """{tensor: {"row": ..., "column": ...}} of the domain asked for."""
    parsed: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in (factors or {}).items():
        head, _, side = key.rpartition("/")
        tag, _, name = head.rpartition("/")  # a domain tag may hold slashes, a parameter name does not
        parsed.setdefault(tag, {}).setdefault(name, {})[side] = tensor
    if not parsed:
        return {}
    if domain is None and len(parsed) == 1:
        return next(iter(parsed.values()))
    if domain is None or domain not in parsed:
        raise ConfigurationError(
            f"the factors hold the domains {', '.join(sorted(parsed))}: name yours with domain=; factors of a wrong "
            "domain may choose worse than chance, so leave them out when yours is not there"
        )
    return parsed[domain]


def row_scores(scores: Scores, width: int) -> Scores:
    """Root mean square over each row of `width` coordinates."""
    return np.asarray(np.sqrt(np.square(scores.reshape(-1, width)).mean(1)), np.float32)


def _by_blocks(size: int, device: torch.device, part: Callable[[int, int], Tensor]) -> Scores:
    """Scores of a tensor, of which `part` makes those between two flat indices."""
    scores = np.empty(size, np.float32)
    for first in range(0, size, step := block_of(device)):
        last = min(first + step, size)
        scores[first:last] = part(first, last).cpu().numpy()
    return scores
