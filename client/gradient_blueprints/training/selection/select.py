"""`select`: from a blueprint, a local sample and a budget to a selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from gradient_blueprints import allocation
from gradient_blueprints.allocation import LayerValue, allocate, criterion_value, validity_of
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Layer
from gradient_blueprints.selection_models import Criterion, SelectionUnit
from gradient_blueprints.statistics_models import Staleness
from gradient_blueprints.training.selection.chosen import SelectedLayer, Selection, parts_of, width_of
from gradient_blueprints.training.selection.indices import Indices, best, drawn, narrow
from gradient_blueprints.training.selection.listed_tensors import (
    ListedTensor,
    ModelTensors,
    listing,
    some,
    tensors_of,
    warn_of_other_sizes,
)
from gradient_blueprints.training.selection.local import LocalStatistics
from gradient_blueprints.training.selection.moments import Shape
from gradient_blueprints.training.selection.scores import (
    Factors,
    Score,
    blended,
    empirical_bayes,
    local_gradient,
    local_rms,
    of_domain,
    published_factors,
    random_coordinates,
    row_scores,
    weight_of_published,
)

Unit = SelectionUnit
ScoreName = Literal["empirical_bayes", "blend", "factors", "mean_gradient", "rms", "local_factors", "random"]
DEFAULT_SCORE: ScoreName = "empirical_bayes"
"""The one place that says by what coordinates are chosen where factors or a local sample are given. Without them they
are drawn at random. What either was measured to be worth: docs/evidence.md."""


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
    fractions: allocation.Fractions = "k_star",
    random_share: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
    also_train: Sequence[str] = (),
) -> Selection:
    """Choose what to train (Algorithm 1): blend, rank, pick.

    1. Between layers as `allocation.allocate` says: shares of the criterion blended by `trust` (the paper's α), then
       whole layers by an exact 0/1 knapsack (`unit="layer"`), or a fraction of every layer.
    2. Within each tensor coordinates (`"coordinate"`), or rows (`"row"`, see `width_of`), by their `score`. The default
       weighs the published factors against the local sample by how noisy that is, and leaves factors away that the
       sample does not fit (`empirical_bayes`). The largest scores are taken; with a `temperature` they are drawn with
       chances that grow with score^(1/`temperature`). A tensor for which nothing is known gets random parts, the same
       ones each time for one `seed`: a rival hard to beat.

    Args:
        local: a blueprint of the local sample (`GradientProfiler`).
        budget: a fraction such as 0.1, or a `Budget` in parameters or bytes of training memory, or of a device.
        factors: as `GradientProfiler.factors()` or a blueprint's attachment holds them, `{domain}/{tensor}/row` and
            `.../column`, of the adapter's own domain; `domain` names it when they hold several.
        trust: weight of the published side against the local one, between layers and within tensors, times what
            `staleness` leaves of it. Else `default_trust` between layers, and within tensors as well as the factors fit
            the local sample. Where a tensor has one side alone that side decides.
        criterion: what a layer is worth: a name, or a function of a `Layer`. `absolute` is Σ|g|, from factors and
            local gradients; either has to cover every layer.
        score: a name, or a function (tensor name, shape) → array or tensor, at least 0, that `scores` describes.
        statistics: of the local sample, `LocalStatistics.gather`; `gradients` is its mean alone, noise unknown.
        staleness: of `client.check_staleness`. Stale: the published side has no say, not even its factors; where a
            coarser level holds, its norms have one between the groups of that level.
        model: what it has of the blueprint's layers and may be trained is chosen from: no layer that it lacks (with a
            warning, as where its layers are of other sizes), no tied tensor twice, nothing that you froze
            (`requires_grad`, see `apply_selection`), no integers. It knows the tensors' shapes and precision; needed
            for a score of your own.
        groups: layer ids by group, the `groups` of a staleness check: the published ranks hold between these groups
            and not within them, so that within a group the published side tells no layer from another. A member stands
            for the layers below it too; layers outside every group make up one more.
        fractions: of the layers, where they are trained in part: more where `k_star` is larger, or `"even"`, which was
            better on two small models and worse on SmolLM2 (docs/adapting.md).
        random_share: share of each tensor's budget drawn at random among the others.
        temperature: 0 takes the largest scores, more spreads the choice, towards chance.
        also_train: tensors or modules of the model (`"score"`, `"*.norm"`) that are trained whole, beside the budget: a
            new head, which no blueprint lists.

    Raises ConfigurationError when a layer's parameter count is unknown, a tensor's shape does not fit, factors, sample
    or score know none of the tensors, a score or criterion is negative or not finite, the budget pays for nothing, or
    the model has adapters of peft.
    """
    budget = budget if isinstance(budget, allocation.Budget) else allocation.Budget.fraction(budget)
    if unit not in get_args(SelectionUnit):
        raise ConfigurationError(f"a selection is by coordinate, row or layer, not by {unit!r}")
    if isinstance(score, str) and score not in get_args(ScoreName):
        raise ConfigurationError(f"there is no score {score!r}: {', '.join(get_args(ScoreName))}, or a function")
    if trust is not None and not 0 <= trust <= 1:
        raise ConfigurationError(f"trust is a weight in [0, 1], got {trust}")
    if fractions not in get_args(allocation.Fractions):
        raise ConfigurationError(f"fractions are {' or '.join(get_args(allocation.Fractions))}, not {fractions!r}")
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(f"a temperature is 0 (the largest scores) or a positive number, got {temperature}")
    if not 0 <= random_share <= 1:
        raise ConfigurationError(f"random_share is a share in [0, 1], got {random_share}")
    if not callable(criterion) and criterion not in list(Criterion):
        raise ConfigurationError(f"there is no criterion {criterion!r}: {', '.join(Criterion)}, or a function")
    if also_train and model is None:
        raise ConfigurationError("also_train names tensors of a model: pass model=")
    verdict = None if staleness is None else staleness.verdict
    known = _Known(
        of_domain(factors, domain),
        statistics or LocalStatistics(mean=dict(gradients or {}), sequences=None if gradients else 0),
        trust,
        validity_of(verdict),
    )
    if staleness is not None and groups is None:
        groups = staleness.groups
    ids = {layer.id for layer in blueprint.layers}
    if model is None:
        held = known.tensors(ids)
    else:
        held = tensors_of(model, ids, also_train)
        warn_of_other_sizes(model, blueprint.layers)
    tensors = held.listed
    layers = list(blueprint.layers)
    if model is not None:
        with_tensors = {tensor.layer for tensor in tensors.values()}
        layers = [layer for layer in layers if layer.id in with_tensors]
    sizes = _layer_sizes(layers, tensors, counts=model is not None)
    sampled = statistics is not None or gradients is not None
    known.check(tensors, None if unit == "layer" else score or (DEFAULT_SCORE if sampled else None))
    sides = _sides(criterion, layers, sizes, known, tensors, None if local is None else local.layers)
    if sides.published_is_local:
        trust = 0.0

    def spend(budget: allocation.Budget) -> allocation.Allocation:
        return allocate(
            layers,
            sides.local,
            sizes,
            budget,
            unit,
            value=sides.value,
            local_value=sides.local_value,
            trust=trust,
            validity=1.0 if groups is not None else validity_of(verdict),
            groups=groups,
            copies=held.copies,
            fractions=fractions,
        )

    spent = spend(budget)
    trained = _trained(layers, sizes, spent.fractions, tensors, unit)
    if not any(count != 0 for count in trained):
        least = f"parameters({(parameters := _least_budget(layers, sizes, tensors, unit, spend))})"
        if budget.measure == "bytes":
            least = f"bytes({parameters * allocation.bytes_each(unit, copies=held.copies)})"
        raise ConfigurationError(
            f"the budget of {budget.amount:g} ({budget.measure}) does not pay for one {unit} anywhere, each layer's "
            f"part being rounded down: the least that does is Budget.{least}"
        )
    dealt = {layer.id: part for layer, part in zip(layers, spent.fractions, strict=True)}
    partial = {name: tensor for name, tensor in sorted(tensors.items()) if 0 < dealt[tensor.layer] < 1}
    chosen: dict[str, _Chosen] = {}
    if unit != "layer":
        rank = score if callable(score) else known.score(score or DEFAULT_SCORE, seed)
        for name, tensor in sorted(partial.items(), key=lambda each: -math.prod(each[1].shape)):
            # the largest first, which takes the most memory, while no others' choices are held beside it
            found = _choose(name, tensor.shape, dealt[tensor.layer], unit, rank, random_share, temperature, seed)
            if found is not None:
                chosen[name] = found
        if callable(score) and not chosen and any(0 < fraction < 1 for fraction in spent.fractions):
            raise ConfigurationError(
                f"{_name(score, 0)} ranks none of the tensors that are trained in part"
                + ("" if model is not None else ": pass model=, which knows their names and shapes")
            )
    decided = [
        SelectedLayer(layer.id, size, fraction, share, _retained_score(layer.id, fraction, tensors, chosen), count)
        for layer, size, fraction, share, count in zip(
            layers, sizes, spent.fractions, spent.shares, trained, strict=True
        )
    ]
    parts = {tensors[name].listed_as: chosen[name].parts for name in partial if name in chosen}
    selection = Selection(
        model_id=blueprint.model_id,
        training_checkpoint=blueprint.training_checkpoint,
        blueprint_digest=blueprint.digest,
        unit=unit,
        criterion=getattr(criterion, "__name__", "custom") if callable(criterion) else str(Criterion(criterion)),
        score="whole layers" if unit == "layer" else _name(score or DEFAULT_SCORE, temperature),
        trust=spent.trust,
        validity=known.validity,
        seed=int(seed),
        copies=held.copies,
        exact=spent.exact,
        layers=(*decided, *(SelectedLayer(name, size, 1.0, 0.0, 1.0, size) for name, size in held.also.items())),
        parts=parts | {name: np.empty(0, np.int64) for name in held.fixed},
        random_tensors=None if model is None else len(partial.keys() - chosen.keys()),
        columns={tensors[name].listed_as: width_of("row", tensors[name].shape) for name in partial if name in chosen},
    )
    mean = known.statistics.mean
    return _with_retained_gradient(selection, tensors, mean) if mean else selection


@dataclass(frozen=True)
class _Known:
    """What there is to go on within tensors."""

    factors: Factors
    statistics: LocalStatistics
    trust: float | None
    validity: float

    def tensors(self, layers: Set[str]) -> ModelTensors:
        """The tensors in these layers, as far as they were measured."""
        shapes = {
            name: tuple(tensor.shape) for name, tensor in {**self.statistics.square, **self.statistics.mean}.items()
        }
        for name, sides in (*self.factors.items(), *self.statistics.factors().items()):
            row, column = sides["row"], sides.get("column")
            shapes.setdefault(name, tuple(row.shape) if column is None else (*row.shape, column.shape[-1]))
        listed = {
            name: ListedTensor(found[1], name, shape)
            for name, shape in shapes.items()
            if (found := listing([name], layers)) is not None
        }
        return ModelTensors(listed, fixed=(), also={}, copies=False)

    def check(self, tensors: Mapping[str, ListedTensor], score: ScoreName | Score | None) -> None:
        """Raise ConfigurationError for what was given, or a score that was named, and knows none of the tensors."""
        measured = {**self.statistics.row, **self.statistics.square, **self.statistics.mean}
        for what, names in (("factors", self.factors.keys()), ("local statistics", measured.keys())):
            if names and not names & tensors.keys():
                raise ConfigurationError(
                    f"the {what} know no tensor of the blueprint's layers: they have {some(sorted(names))}"
                )
        sources: dict[ScoreName, Set[str]] = {
            "empirical_bayes": self.factors.keys() | self.statistics.mean.keys(),
            "blend": self.factors.keys() | self.statistics.mean.keys(),
            "factors": self.factors.keys(),
            "mean_gradient": self.statistics.mean.keys(),
            "rms": self.statistics.square.keys(),
            "local_factors": self.statistics.row.keys(),
        }
        if isinstance(score, str) and score != "random" and not sources[score] & tensors.keys():
            raise ConfigurationError(
                f"the score {score!r} knows no tensor: give it factors, or statistics that hold what it reads "
                "(LocalStatistics.gather(..., keep='mean'), 'square' for 'rms'; 'local_factors' reads either); "
                "score='random' draws by chance"
            )

    def score(self, name: ScoreName, seed: int) -> Score:
        """The score of that name."""
        ours, theirs = published_factors(self.factors), local_gradient(self.statistics.mean)
        weight = weight_of_published(self.validity, self.trust)
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


@dataclass(frozen=True)
class _Chosen:
    parts: Indices
    retained: float
    mass: float
    """Sum of the score over the whole tensor."""


def _choose(
    name: str,
    shape: Shape,
    fraction: float,
    unit: Unit,
    score: Score,
    random_share: float,
    temperature: float,
    seed: int,
) -> _Chosen | None:
    """The chosen parts of a tensor and the share of the score that they keep; None where nothing is known of it."""
    given: Any = score(name, shape)
    if given is None:
        return None
    width = width_of(unit, shape)
    if isinstance(given, Tensor):
        given = given.detach().float().cpu().numpy()
    scores = np.asarray(given, np.float32).ravel()
    if scores.size != int(np.prod(shape)):
        raise ConfigurationError(f"the score of {name} has {scores.size} values for the shape {shape}")
    total = float(scores.sum(dtype=np.float64))
    if not np.isfinite(total):
        raise ConfigurationError(f"the gradient or the factors of {name} are not finite")
    if scores.size and scores.min() < 0:
        raise ConfigurationError(
            f"the score of {name} has negative values, down to {scores.min():g}: a score is 0 where nothing speaks for "
            "a coordinate and more where something does; subtract the least, which keeps the order"
        )
    if total == 0:  # unused in the sample: nothing tells its coordinates apart
        return None
    by_part = scores if width == 1 else row_scores(scores, width)
    if temperature > 0:
        by_part = drawn(by_part, temperature, name, seed)
    parts = best(by_part, parts_of(fraction, shape, width), name, seed, random_share)
    kept = scores.reshape(-1, width)[parts].sum(dtype=np.float64)
    return _Chosen(narrow(parts), float(kept) / total, total)


def _retained_score(
    layer: str, fraction: float, tensors: Mapping[str, ListedTensor], chosen: Mapping[str, _Chosen]
) -> float | None:
    """Of the layer's ranked tensors together."""
    if fraction in (0.0, 1.0):
        return fraction
    ranked = [found for name, found in chosen.items() if tensors[name].layer == layer]
    return (
        sum(found.retained * found.mass for found in ranked) / sum(found.mass for found in ranked) if ranked else None
    )


def _with_retained_gradient(
    selection: Selection, tensors: Mapping[str, ListedTensor], mean: Mapping[str, Tensor]
) -> Selection:
    """Each layer with the share of Σ|mean gradient| that it trains, None where a tensor of it was not measured."""
    held = {layer.id: [0.0, 0.0] for layer in selection.layers}
    magnitudes_of = local_gradient(mean)
    for name, tensor in tensors.items():
        kept, total = math.nan, math.nan
        if (magnitudes := magnitudes_of(name, tensor.shape)) is not None:
            indices = selection.indices(tensor.listed_as, tensor.shape)
            total = float(magnitudes.sum(dtype=np.float64))
            kept = total if indices is None else float(magnitudes[indices].sum(dtype=np.float64))
        held[tensor.layer][0] += kept
        held[tensor.layer][1] += total

    def of(layer: SelectedLayer) -> float | None:
        if layer.fraction in (0.0, 1.0):
            return layer.fraction
        kept, total = held[layer.id]
        return kept / total if total > 0 else None

    layers = tuple(replace(layer, retained=of(layer)) for layer in selection.layers)
    return replace(selection, layers=layers, retained_of="gradient")


def _trained(
    layers: Sequence[Layer],
    sizes: Sequence[int],
    fractions: Sequence[float],
    tensors: Mapping[str, ListedTensor],
    unit: Unit,
) -> list[int | None]:
    """Parameters per layer in whole parts of its tensors; None where parts are chosen and not all shapes are known."""
    shapes: dict[str, list[Shape]] = {}
    for tensor in tensors.values():
        shapes.setdefault(tensor.layer, []).append(tensor.shape)

    def of_layer(layer: str, size: int, fraction: float) -> int | None:
        known = shapes.get(layer, [])
        if fraction in (0.0, 1.0):
            return int(fraction) * size
        if sum(map(math.prod, known)) != size:
            return None if allocation.count(fraction, size) else 0
        widths = [width_of(unit, shape) for shape in known]
        return sum(parts_of(fraction, shape, width) * width for shape, width in zip(known, widths, strict=True))

    return [of_layer(layer.id, size, fraction) for layer, size, fraction in zip(layers, sizes, fractions, strict=True)]


def _least_budget(
    layers: Sequence[Layer],
    sizes: Sequence[int],
    tensors: Mapping[str, ListedTensor],
    unit: Unit,
    spend: Callable[[allocation.Budget], allocation.Allocation],
) -> int:
    """The fewest parameters with which something is chosen."""
    too_few, enough = 0, sum(sizes)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        fractions = spend(allocation.Budget.parameters(count)).fractions
        if any(trained != 0 for trained in _trained(layers, sizes, fractions, tensors, unit)):
            enough = count
        else:
            too_few = count
    return enough


def _layer_sizes(layers: Sequence[Layer], tensors: Mapping[str, ListedTensor], *, counts: bool) -> list[int]:
    """Parameters per layer: counted in the model, else as the blueprint says, else counted in what was measured."""
    counted: dict[str, int] = {}
    for tensor in tensors.values():
        counted[tensor.layer] = counted.get(tensor.layer, 0) + math.prod(tensor.shape)
    sizes = [counted.get(layer.id) if counts or layer.parameters is None else layer.parameters for layer in layers]
    unknown = [layer.id for layer, size in zip(layers, sizes, strict=True) if size is None]
    if unknown:
        raise ConfigurationError(
            f"the blueprint does not say how many parameters {unknown[0]!r} has "
            f"({len(unknown)} such layers): pass model=, or profile with a profiler that counts them"
        )
    return [size for size in sizes if size is not None]


@dataclass(frozen=True)
class _Sides:
    """What the published and the local side say that a layer is worth."""

    value: LayerValue
    local: Sequence[Layer] | None
    local_value: LayerValue
    published_is_local: bool = False
    """There is no published side, and the local one stands in its place."""


def _sides(
    criterion: str | LayerValue,
    layers: Sequence[Layer],
    sizes: Sequence[int],
    known: _Known,
    tensors: Mapping[str, ListedTensor],
    local: Sequence[Layer] | None,
) -> _Sides:
    if callable(criterion):
        return _Sides(criterion, local, criterion)
    by_id = {layer.id: size for layer, size in zip(layers, sizes, strict=True)}
    if Criterion(criterion) is not Criterion.ABSOLUTE:
        value = criterion_value(Criterion(criterion), by_id)
        return _Sides(value, local, value)
    ours = _sums(published_factors(known.factors), tensors)
    theirs = _sums(local_gradient(known.statistics.mean), tensors)
    for what, sums in (("factors", ours), ("local gradients", theirs)):
        missing = [layer for layer in by_id if layer not in sums]
        if missing and sums:
            raise ConfigurationError(
                f"Σ|g| of every layer is needed, and the {what} lack {some(missing)}: leave them out"
            )
    if not ours and not theirs:
        raise ConfigurationError("the criterion 'absolute' is computed from factors or local gradients: give either")
    if local is None and theirs:  # of the layers themselves only the sums are the sample's
        local = [layer.model_copy(update={"k_star": None, "gradient_norm_ci": None}) for layer in layers]
    side = ours or theirs
    return _Sides(lambda layer: side.get(layer.id), local, lambda layer: theirs.get(layer.id), not ours)


def _sums(score: Score, tensors: Mapping[str, ListedTensor]) -> dict[str, float]:
    """Σ|g| per layer of the blueprint, of the tensors that the score knows."""
    sums: dict[str, float] = {}
    for name, tensor in tensors.items():
        found = score(name, tensor.shape)
        if found is not None:
            sums[tensor.layer] = sums.get(tensor.layer, 0.0) + float(found.sum(dtype=np.float64))
    return sums


def _name(score: ScoreName | Score, temperature: float) -> str:
    name: str = score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__)
    return f"{name}, drawn at temperature {temperature:g}" if temperature else name
