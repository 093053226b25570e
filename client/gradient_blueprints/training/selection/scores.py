"""How much each coordinate of a tensor is worth: scores as functions of (tensor name, shape), to be mixed and replaced.

A score answers a flat float32 array with one value a coordinate, at least 0 and the larger the better, or None for a
tensor of which it knows nothing (then coordinates are drawn at random, as where all are 0). Between tensors scores are
not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.selection.indices import Scores, random_scores
from gradient_blueprints.training.selection.local import LocalStatistics, as_matrix

Shape = tuple[int, ...]
Score = Callable[[str, Shape], Scores | None]
Factors = Mapping[str, Mapping[str, Tensor]]
"""{tensor: {"row": ..., "column": ...}}, the means of the squared gradient over the other dimension."""

LEAST_SIGNAL = 1e-3
"""Smallest share of the local mean square that counts as signal: with none at all the prior alone must still rank."""


def published_factors(factors: Factors) -> Score:
    """RMS gradient that row and column factors stand for: √(row_i · column_j / mean(row)); for local factors too."""

    def score(name: str, shape: Shape) -> Scores | None:
        return _flat(outer(factors[name], name, shape).sqrt_()) if name in factors else None

    return score


def local_gradient(mean: Mapping[str, Tensor]) -> Score:
    """|mean local gradient|."""

    def score(name: str, shape: Shape) -> Scores | None:
        return _flat(mean[name].detach().float().abs()) if name in mean else None

    return score


def local_rms(statistics: LocalStatistics) -> Score:
    """Root mean square of the local batch gradients; gather with keep="square"."""

    def score(name: str, shape: Shape) -> Scores | None:
        return _flat(statistics.square[name].float().sqrt()) if name in statistics.square else None

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
            total += np.float32(scale) * found
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
        mean = statistics.mean[name].detach().float()
        variance = outer(noise, name, shape).to(mean.device)
        prior, parameters = _own_prior(statistics, name, mean)
        if known:
            published = _over_its_mean(outer(factors[name], name, shape).to(mean.device))
            weights = (0.0, 0.5, 1.0) if trust is None else (trust,)
            fit = _Fit(mean, variance, published, prior, parameters)
            prior.lerp_(published, max((validity * each for each in weights), key=fit))
        prior.mul_(_signal(mean, variance) / max(float(prior.mean()), _TINY))
        weight = prior.div_((prior + variance).clamp_min_(_TINY))
        return _flat((weight * mean).square_().add_(variance.mul_(weight)).sqrt_())

    return score


class _Fit:
    """Log likelihood of the local mean under α·published + (1 − α)·own, less the own factors' parameters (Akaike).

    Of a large tensor a million coordinates drawn once stand for all.
    """

    def __init__(self, mean: Tensor, variance: Tensor, published: Tensor, own: Tensor, parameters: int) -> None:
        self._signal = _signal(mean, variance)
        self._parameters = parameters / mean.numel()
        places: Tensor | slice = slice(None)
        if mean.numel() > _JUDGED_BY:
            lots = torch.Generator().manual_seed(0)
            places = torch.randint(0, mean.numel(), (_JUDGED_BY,), generator=lots).to(mean.device)
        self._square, self._variance, self._published, self._own = (
            each.flatten()[places] for each in (mean, variance, published, own)
        )
        self._square = self._square.square()

    def __call__(self, weight: float) -> float:
        """Per coordinate, up to a constant."""
        expected = torch.lerp(self._own, self._published, weight).mul_(self._signal).add_(self._variance)
        expected.clamp_min_(max(_TINY, _LEAST_VARIANCE * self._signal))
        likelihood = -float((self._square / expected + expected.log()).double().mean()) / 2
        return likelihood - (self._parameters if weight < 1 else 0.0)


def _own_prior(statistics: LocalStatistics, name: str, mean: Tensor) -> tuple[Tensor, int]:
    """The second moment by the sample's own row and column factors over its mean, and their number; of a vector 1."""
    own = statistics.factors_of(name)
    if "column" not in own:
        return torch.ones_like(mean), 1
    parameters = own["row"].numel() + own["column"].numel()
    return _over_its_mean(outer(own, name, tuple(mean.shape)).to(mean.device)), parameters


def _over_its_mean(moment: Tensor) -> Tensor:
    return moment.div_(float(moment.mean().clamp_min(_TINY)))


def _signal(mean: Tensor, variance: Tensor) -> float:
    """τ², of a prior whose mean is 1."""
    squares = float(mean.square().mean())
    return max(squares - float(variance.mean()), LEAST_SIGNAL * squares)


def weight_of_published(validity: float, trust: float | None) -> float:
    """Of the factors against the local gradient, as shares: validity·trust, or validity/(1 + validity) by default."""
    return validity / (1 + validity) if trust is None else validity * trust


_TINY = float(torch.finfo(torch.float32).tiny)
_JUDGED_BY = 1 << 20
_LEAST_VARIANCE = 1e-6
"""Of τ²: a coordinate that a prior holds for unused and is not says no more than this against it."""


def outer(factor: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    """The second moment that factors stand for, row_i · column_j / mean(row), in the tensor's shape, float32.

    A vector has its second moment as row alone; a stack of matrices (experts) has factors for each.
    """
    _check_shape(factor, name, shape)
    row = factor["row"].detach().float().abs()
    if "column" in factor:
        column = factor["column"].detach().float().abs().to(row.device)
        row = (row / row.mean(-1, keepdim=True).clamp_min(_TINY))[..., :, None] * column[..., None, :]
    else:
        row = row.clone()
    return row.view(shape)


def _check_shape(factor: Mapping[str, Tensor], name: str, shape: Shape) -> None:
    """ConfigurationError for factors of a tensor of another shape, though it may be of the same size."""
    matrix = tuple(as_matrix(torch.empty(shape, device="meta")).shape)
    row, column = tuple(factor["row"].shape), tuple(factor["column"].shape) if "column" in factor else ()
    fits = (row, column) == (matrix[:-1], matrix[:-2] + matrix[-1:]) if column else math.prod(row) == math.prod(shape)
    if not fits:
        raise ConfigurationError(
            f"{name} is {tuple(shape)}, and its factors are of a tensor of another shape, rows {row}, columns "
            f"{column or 'none'}: they are of another model, or of one that holds its matrices transposed (Conv1D)"
        )


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


def _flat(scores: Tensor) -> Scores:
    return np.asarray(scores.flatten().cpu().numpy(), np.float32)
