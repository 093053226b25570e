"""`select`: from a blueprint, a local sample and a budget to a selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor, nn

from gradient_blueprints import allocation
from gradient_blueprints.allocation import LayerValue, allocate, criterion_value, validity_of
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.selection_models import Criterion, SelectionUnit
from gradient_blueprints.statistics_models import Staleness
from gradient_blueprints.training.selection.chosen import SelectedLayer, Selection, parts_of, width_of
from gradient_blueprints.training.selection.indices import Indices, best, drawn, prefixes
from gradient_blueprints.training.selection.local import LocalStatistics
from gradient_blueprints.training.selection.scores import (
    Factors,
    Score,
    Shape,
    blended,
    empirical_bayes,
    local_gradient,
    local_rms,
    of_domain,
    published_factors,
    random_coordinates,
    row_scores,
)

Unit = SelectionUnit
ScoreName = Literal["empirical_bayes", "blend", "factors", "mean_gradient", "rms", "local_factors", "random"]
DEFAULT_SCORE: ScoreName = "empirical_bayes"
"""The one place that says by what coordinates are chosen where factors or a local sample are given. Without them they
are drawn at random. What either was measured to be worth: docs/evidence.md."""
FEWEST_SEQUENCES = 32
"""Local sequences from which on their mean gradient is believed by itself: in the pilot 8 chose worse than chance, 32
better. Below, and where the published side is not to be believed either, a share of the budget goes to chance."""


def select(
    blueprint: Blueprint,
    local: Blueprint | None = None,
    budget: float | allocation.Budget = 0.1,
    unit: Unit = "coordinate",
    factors: Mapping[str, Tensor] | None = None,
    trust: float | None = None,
    *,
    criterion: Criterion
    | Literal["norm", "signal", "first_order", "size_normalised", "absolute"]
    | LayerValue = "norm",
    score: ScoreName | Score | None = None,
    statistics: LocalStatistics | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    staleness: Staleness | None = None,
    domain: str | None = None,
    model: nn.Module | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    random_share: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Selection:
    """Choose what to train (Algorithm 1): blend, rank, pick.

    1. Between layers as `allocation.allocate` says: shares of the criterion blended by `trust` (the paper's α), then
       whole layers by an exact 0/1 knapsack (`unit="layer"`), or a fraction of every layer.
    2. Within each tensor coordinates (`"coordinate"`), or output channels (`"row"`), by their `score`. The default
       weighs the published factors against the local sample by how noisy that is (`empirical_bayes`). The largest
       scores are taken; with a `temperature` they are drawn with chances that grow with score^(1/`temperature`). A
       tensor for which nothing is known gets random parts, the same ones each time for one `seed`: a rival hard to
       beat, and safer than statistics of a wrong domain, which choose worse than chance.
    3. Under the default score a share (1 − validity)·(1 − n/32) of each tensor's budget goes to chance, n the local
       sequences, validity what is to be believed of the published factors: nothing is left to evidence that in the
       pilot did worse than chance.

    Args:
        local: a blueprint of the local sample (`GradientProfiler`).
        budget: a fraction such as 0.1, or a `Budget` in parameters or bytes of training memory, or of a device.
        factors: as `GradientProfiler.factors()` or a blueprint's attachment holds them, `{domain}/{tensor}/row` and
            `.../column`, of the adapter's own domain; `domain` names it when they hold several.
        trust: weight of the published side, between layers and within tensors. Else `default_trust` between layers;
            within tensors the factors are believed unless `staleness` speaks against it.
        criterion: what a layer is worth: a name, or a function of a `Layer`. `absolute` is Σ|g|, from factors and
            local gradients, which have to cover every layer.
        score: a name, or a function (tensor name, shape) → float32 array that `scores` describes.
        statistics: of the local sample, `LocalStatistics.gather`; `gradients` is its mean alone, noise unknown.
        staleness: of `client.check_staleness`. Stale: the published side has no say, not even its factors; where a
            coarser level holds, its norms have one between the groups of that level.
        model: counts parameters where the blueprint does not say how many a layer has, and knows the tensors' shapes
            and precision; needed for a score of your own or rows without local statistics.
        groups: layer ids by group, the `groups` of a staleness check: the published ranks hold between these groups
            and not within them, so that within a group the published side tells no layer from another.
        random_share: share of each tensor's budget drawn at random, instead of what 3. says.
        temperature: 0 takes the largest scores, more spreads the choice, towards chance.

    Raises ConfigurationError when a layer's parameter count is unknown or a tensor's shape does not fit.
    """
    budget = budget if isinstance(budget, allocation.Budget) else allocation.Budget.fraction(budget)
    if unit not in get_args(SelectionUnit):
        raise ConfigurationError(f"a selection is by coordinate, row or layer, not by {unit!r}")
    if isinstance(score, str) and score not in get_args(ScoreName):
        raise ConfigurationError(f"there is no score {score!r}: {', '.join(get_args(ScoreName))}, or a function")
    if trust is not None and not 0 <= trust <= 1:
        raise ConfigurationError(f"trust is a weight in [0, 1], got {trust}")
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(f"a temperature is 0 (the largest scores) or a positive number, got {temperature}")
    verdict = None if staleness is None else staleness.verdict
    known = _Known(
        of_domain(factors, domain),
        statistics or LocalStatistics(mean=dict(gradients or {}), sequences=None if gradients else 0),
        trust,
        validity_of(verdict) if trust is None else trust,
    )
    if staleness is not None and groups is None:
        groups = staleness.groups
    shapes = _shapes(model, known)
    sizes = _layer_sizes(blueprint, shapes, counts=model is not None)
    copies = model is not None and any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    named = criterion if callable(criterion) else Criterion(criterion).value
    value, local_value = _values(criterion, blueprint, sizes, known, shapes)
    allocation_ = allocate(
        blueprint.layers,
        None if local is None else local.layers,
        sizes,
        budget,
        unit,
        value=value,
        local_value=local_value,
        trust=trust,
        validity=1.0 if groups is not None else validity_of(verdict),
        groups=groups,
        copies=copies,
    )
    fractions = {layer.id: part for layer, part in zip(blueprint.layers, allocation_.fractions, strict=True)}
    chosen: dict[str, _Chosen] = {}
    if unit != "layer":
        rank = score if callable(score) else known.score(score or DEFAULT_SCORE, seed)
        hedged = score is None and random_share is None
        for name, shape in sorted(shapes.items()):
            layer = next((prefix for prefix in prefixes(name) if prefix in fractions), None)
            if layer is None or not 0 < fractions[layer] < 1:
                continue
            at_random = known.hedge(name) if hedged else (random_share or 0.0)
            found = _choose(name, shape, fractions[layer], unit, rank, at_random, temperature, seed)
            if found is not None:
                chosen[name] = found
    return Selection(
        model_id=blueprint.model_id,
        training_checkpoint=blueprint.training_checkpoint,
        blueprint_digest=blueprint.digest,
        unit=unit,
        criterion=named if isinstance(named, str) else getattr(named, "__name__", "custom"),
        score="whole layers" if unit == "layer" else _name(score or DEFAULT_SCORE, temperature),
        trust=allocation_.trust,
        validity=known.validity,
        seed=seed,
        copies=copies,
        exact=allocation_.exact,
        layers=tuple(
            SelectedLayer(layer.id, size, fraction, share, _retained(layer.id, fraction, chosen))
            for layer, size, fraction, share in zip(
                blueprint.layers, sizes, allocation_.fractions, allocation_.shares, strict=True
            )
        ),
        parts={name: found.parts for name, found in chosen.items()},
    )


@dataclass(frozen=True)
class _Known:
    """What there is to go on within tensors."""

    factors: Factors
    statistics: LocalStatistics
    trust: float | None
    validity: float

    def score(self, name: ScoreName, seed: int) -> Score:
        """The score of that name."""
        ours, theirs = published_factors(self.factors), local_gradient(self.statistics.mean)
        weight = self.validity / (1 + self.validity) if self.trust is None else self.trust
        match name:
            case "empirical_bayes":
                return empirical_bayes(self.factors, self.statistics, self.validity, self.trust)
            case "blend":
                return blended((weight, ours), (1 - weight, theirs))
            case "factors":
                return ours
            case "mean_gradient":
                return theirs
            case "rms":
                return local_rms(self.statistics)
            case "local_factors":
                return published_factors(self.statistics.factors())
            case "random":
                return random_coordinates(seed)

    def hedge(self, name: str) -> float:
        """Share of a tensor's budget for which neither side vouches."""
        published = self.validity if name in self.factors else 0.0
        sequences = self.statistics.sequences
        if name not in self.statistics.mean:
            return 1 - published
        return 0.0 if sequences is None else (1 - published) * max(0.0, 1 - sequences / FEWEST_SEQUENCES)


@dataclass(frozen=True)
class _Chosen:
    parts: Indices
    entries: int
    retained: float


def _choose(
    name: str,
    shape: Shape,
    fraction: float,
    unit: Unit,
    score: Score,
    at_random: float,
    temperature: float,
    seed: int,
) -> _Chosen | None:
    """The chosen parts of a tensor and the share of the score that they keep; None where nothing is known of it."""
    scores = score(name, shape)
    if scores is None:
        return None
    width = width_of(unit, shape)
    if scores.size != int(np.prod(shape)):
        raise ConfigurationError(f"the score of {name} has {scores.size} values for the shape {shape}")
    scores = np.asarray(scores, np.float32).ravel()
    total = float(scores.sum(dtype=np.float64))
    if not np.isfinite(total):
        raise ConfigurationError(f"the gradient or the factors of {name} are not finite")
    if total == 0:  # unused in the sample: nothing tells its coordinates apart
        return None
    by_part = scores if width == 1 else row_scores(scores, width)
    if temperature > 0:
        by_part = drawn(by_part, temperature, name, seed)
    parts = best(by_part, parts_of(fraction, shape, width), name, seed, at_random)
    kept = scores.reshape(-1, width)[parts].sum(dtype=np.float64)
    return _Chosen(parts, len(parts) * width, float(kept) / total)


def _retained(layer: str, fraction: float, chosen: Mapping[str, _Chosen]) -> float | None:
    if fraction in (0.0, 1.0):
        return fraction
    kept = [found for name, found in chosen.items() if layer in prefixes(name)]
    total = sum(found.entries for found in kept)
    return sum(found.entries * found.retained for found in kept) / total if total else None


def _shapes(model: nn.Module | None, known: _Known) -> dict[str, Shape]:
    """Shapes of the tensors that may be ranked."""
    if model is not None:
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = {
        name: tuple(tensor.shape) for name, tensor in {**known.statistics.square, **known.statistics.mean}.items()
    }
    for name, sides in known.factors.items():
        row, column = sides["row"], sides.get("column")
        shapes.setdefault(name, tuple(row.shape) if column is None else (*row.shape, column.shape[-1]))
    return shapes


def _layer_sizes(blueprint: Blueprint, shapes: Mapping[str, Shape], *, counts: bool) -> list[int]:
    """Parameters per layer: counted in the model, else as the blueprint says, else counted in what was measured."""
    counted: dict[str, int] = {}
    ids = {layer.id for layer in blueprint.layers}
    for name, shape in shapes.items():
        owner = next((prefix for prefix in prefixes(name) if prefix in ids), None)
        if owner is not None:
            counted[owner] = counted.get(owner, 0) + int(np.prod(shape))
    sizes = [
        counted.get(layer.id, layer.parameters) if counts or layer.parameters is None else layer.parameters
        for layer in blueprint.layers
    ]
    unknown = [layer.id for layer, size in zip(blueprint.layers, sizes, strict=True) if size is None]
    if unknown:
        raise ConfigurationError(
            f"the blueprint does not say how many parameters {unknown[0]!r} has "
            f"({len(unknown)} such layers): pass model=, or profile with a profiler that counts them"
        )
    return [size for size in sizes if size is not None]


def _values(
    criterion: str | LayerValue,
    blueprint: Blueprint,
    sizes: Sequence[int],
    known: _Known,
    shapes: Mapping[str, Shape],
) -> tuple[LayerValue, LayerValue]:
    """What the published and the local side say that a layer is worth."""
    if callable(criterion):
        return criterion, criterion
    by_id = {layer.id: size for layer, size in zip(blueprint.layers, sizes, strict=True)}
    if Criterion(criterion) is not Criterion.ABSOLUTE:
        value = criterion_value(Criterion(criterion), by_id)
        return value, value
    ours = _sums(blueprint, published_factors(known.factors), shapes)
    theirs = _sums(blueprint, local_gradient(known.statistics.mean), shapes)
    return (lambda layer: ours.get(layer.id, theirs.get(layer.id))), (lambda layer: theirs.get(layer.id))


def _sums(blueprint: Blueprint, score: Score, shapes: Mapping[str, Shape]) -> dict[str, float]:
    """Σ|g| per layer of the blueprint, of the tensors that the score knows."""
    ids = {layer.id for layer in blueprint.layers}
    sums: dict[str, float] = {}
    for name, shape in shapes.items():
        owner = next((prefix for prefix in prefixes(name) if prefix in ids), None)
        found = score(name, shape) if owner is not None else None
        if owner is not None and found is not None:
            sums[owner] = sums.get(owner, 0.0) + float(found.sum(dtype=np.float64))
    return sums


def _name(score: ScoreName | Score, temperature: float) -> str:
    name: str = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    return f"{name}, drawn at temperature {temperature:g}" if temperature else name
