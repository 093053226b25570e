"""Algorithm 1 between layers: blend the published and the local side, spend a budget. Shared by service and SDK.

Without torch; numpy only through the knapsack, so the base client does not import this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import median
from typing import Literal, Self

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.knapsack import MOST_WORK, knapsack
from gradient_blueprints.models import Layer
from gradient_blueprints.selection_models import BudgetMeasure, Criterion, SelectionUnit
from gradient_blueprints.statistics_models import Verdict

BYTES_PER_COORDINATE = 16
"""Training memory of one selected coordinate: two float32 moments, its float32 gradient, an int32 index."""
BYTES_PER_DENSE_PARAMETER = 12
"""The same where whole rows or tensors are trained: no index is kept. Full AdamW holds as much for every parameter."""
BYTES_PER_COPY = 4
"""More for each trained weight of lower precision: its float32 copy."""
Fractions = Literal["k_star", "even"]
"""Of layers that are trained in part: more where k_star is larger, or the same for all."""
K_STAR_RANGE = (0.5, 2.0)
"""Of a layer's weight over the mean of the layers': every matrix has to take part (pilot: ranking across matrices
instead of within each loses 6 to 10 points of the gain). Over the even fraction it is less, or more, where the largest
layers weigh more, or less, than most: fractions are scaled to the budget, at the utmost to a quarter or four times."""
INDETERMINATE_VALIDITY = 0.5
"""What an indeterminate check leaves of the published side: nobody can tell."""
WIDEST = 1e300
"""Relative width of an interval that says nothing: over the smallest norms a width is no finite number."""

LayerValue = Callable[[Layer], float | None]
"""A layer's value, not negative, or None where it is not known."""


@dataclass(frozen=True)
class Budget:
    """How much may be trained.

    >>> Budget.fraction(0.1).coordinates(1_000, BYTES_PER_COORDINATE)
    100
    >>> Budget.bytes(1_600).coordinates(1_000, BYTES_PER_COORDINATE)
    100
    """

    amount: float
    measure: Literal["fraction", "parameters", "bytes"] | BudgetMeasure = "fraction"

    def __post_init__(self) -> None:
        if self.measure not in list(BudgetMeasure):
            raise ConfigurationError(f"a budget is in {', '.join(BudgetMeasure)}; not in {self.measure!r}")
        amount: object = self.amount
        if not isinstance(amount, Real):
            raise ConfigurationError(f"a budget is a number, a tenth 0.1; got {amount!r}")
        if not 0 < self.amount < float("inf") or (self.measure == "fraction" and self.amount > 1):
            raise ConfigurationError(f"a budget is a positive number, a fraction at most 1; got {self}")

    @classmethod
    def fraction(cls, share: float) -> Self:
        """A share of the parameters, in (0, 1]."""
        return cls(share, "fraction")

    @classmethod
    def parameters(cls, count: int) -> Self:
        return cls(count, "parameters")

    @classmethod
    def bytes(cls, count: float) -> Self:
        """Bytes held through training beyond the weights and activations: moments, gradients, indices, copies."""
        return cls(count, "bytes")

    def coordinates(self, total: int, bytes_each: int) -> int:
        """How many of `total` parameters it pays for, at `bytes_each` of training memory."""
        if self.measure == "fraction":
            wanted = self.amount * total
        else:
            wanted = self.amount if self.measure == "parameters" else self.amount / bytes_each
        return min(total, int(wanted + 1e-9))  # 0.3 * 10 is 2.999...


def bytes_each(unit: SelectionUnit, *, copies: bool) -> int:
    """Training memory of one selected parameter, in bytes; `copies`: the weights are below float32."""
    held = BYTES_PER_COORDINATE if unit == "coordinate" else BYTES_PER_DENSE_PARAMETER
    return held + BYTES_PER_COPY * copies


@dataclass(frozen=True)
class Allocation:
    """What every layer gets, in the order of the published layers."""

    trust: float
    shares: list[float]
    """G' of Algorithm 1; they sum to 1."""
    fractions: list[float]
    exact: bool = True
    """Whether no better choice of whole layers exists."""


def allocate(
    published: Sequence[Layer],
    local: Sequence[Layer] | None,
    sizes: Sequence[int],
    budget: Budget,
    unit: SelectionUnit,
    *,
    value: LayerValue,
    local_value: LayerValue | None = None,
    trust: float | None = None,
    validity: float = 1.0,
    groups: Mapping[str, Sequence[str]] | None = None,
    copies: bool = False,
    fractions: Fractions = "k_star",
    most_work: int = MOST_WORK,
) -> Allocation:
    """Blend, rank, pick (Algorithm 1).

    1. Values become shares of their sum, published Ḡ and local G̃, and are blended: G' = trust·Ḡ + (1 − trust)·G̃.
       A layer that the local side lacks keeps its published share. Without a local side G̃ is the layers' sizes: what
       is not known of any layer is spread evenly.
    2. Whole layers: the largest sum of G' that fits, by an exact 0/1 knapsack. Else every layer gets the budget's
       fraction, more where its k_star (blended too) is larger, within `K_STAR_RANGE`, unless `fractions` is "even". Of
       G' nothing counts there but whether it is 0: such a layer gets none, as where `first_order` is negative.

    A budget in bytes is spent at one price for every parameter, that of the unit and of the model's lowest precision
    (`copies`), but buys everything where it pays for a full AdamW update.

    `sizes`: parameters per published layer. `trust`: as `default_trust` unless given, then times the `validity`, since
    a stale side has no say. `groups`: see `between_groups`. Raises ConfigurationError when the two sides have no layer
    in common.
    """
    values = _known(published, value)
    if local is not None and not {layer.id for layer in published} & {layer.id for layer in local}:
        raise ConfigurationError(
            f"the local side has no layer of the published one ({_some(local)} against {_some(published)}): "
            "measure it by the same layers"
        )
    if trust is None:
        trust = default_trust(published, local, value, local_value or value, validity)
    elif not 0 <= trust <= 1:
        raise ConfigurationError(f"trust is a weight in [0, 1], got {trust}")
    else:
        trust *= validity
    k_stars = [layer.k_star for layer in published]
    if groups is not None:
        values, k_stars = between_groups(published, values, k_stars, groups, sizes)
    shares = _blended_shares(published, values, local, local_value or value, sizes, trust)
    capacity = budget.coordinates(sum(sizes), bytes_each(unit, copies=copies))
    if unit == "layer":
        packing = knapsack(shares, sizes, capacity, most_work)
        return Allocation(trust, shares, [float(taken) for taken in packing.taken], packing.exact)
    k_weights = [1.0] * len(sizes) if fractions == "even" else _k_weights(published, k_stars, local, trust)
    weights = [weight if share > 0 else 0.0 for weight, share in zip(k_weights, shares, strict=True)]
    if _pays_for_all(budget, sizes, weights, copies=copies):
        return Allocation(trust, shares, [float(weight > 0) for weight in weights])
    return Allocation(trust, shares, spread(capacity, sizes, weights))


def _pays_for_all(budget: Budget, sizes: Sequence[int], weights: Sequence[float], *, copies: bool) -> bool:
    """Whether bytes that would not pay for every coordinate and its index pay for all of them whole."""
    wanted = sum(size for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    return budget.measure == "bytes" and budget.coordinates(wanted, bytes_each("layer", copies=copies)) == wanted


def _some(layers: Sequence[Layer]) -> str:
    return repr(layers[0].id) if layers else "none"


# --- criteria


def criterion_value(criterion: Criterion, sizes: Mapping[str, int] | None = None) -> LayerValue:
    """What a layer is worth by a criterion that a blueprint holds.

    `norm`: the gradient norm, the paper's statistic; it mostly measures size. `size_normalised`: norm/√parameters.
    `signal`: the norm of the mean gradient freed of sampling noise. `first_order`: the decrease of one Adam step, 0
    where it would rise. `absolute` is in no blueprint: `select` computes Σ|g| from factors or the local gradient.
    """

    def size_normalised(layer: Layer) -> float | None:
        size = layer.parameters if layer.parameters is not None else (sizes or {}).get(layer.id)
        return layer.gradient_norm / math.sqrt(size) if size else None

    match criterion:
        case Criterion.NORM:
            return lambda layer: layer.gradient_norm
        case Criterion.SIGNAL:
            return lambda layer: layer.signal
        case Criterion.FIRST_ORDER:
            return lambda layer: None if layer.first_order is None else max(0.0, layer.first_order)
        case Criterion.SIZE_NORMALISED:
            return size_normalised
        case Criterion.ABSOLUTE:
            raise ConfigurationError("a blueprint holds no sum of |g|: select(...) computes it, or take another")


def _known(published: Sequence[Layer], value: LayerValue) -> list[float]:
    found = [value(layer) for layer in published]
    missing = next((layer.id for layer, known in zip(published, found, strict=True) if known is None), None)
    if missing is not None:
        raise ConfigurationError(f"the blueprint does not hold what the criterion needs of {missing!r}: take 'norm'")
    return [_checked(layer, known) for layer, known in zip(published, found, strict=True) if known is not None]


def _checked(layer: Layer, value: float) -> float:
    """A plain number: criteria may answer numpy's or torch's."""
    value = float(value)
    if not 0 <= value < math.inf:
        raise ConfigurationError(
            f"the criterion gives {value} for {layer.id!r}: it has to be a finite number, 0 or more"
        )
    return value


# --- how far to believe the published side


def validity_of(verdict: Verdict | None) -> float:
    """What a staleness check leaves of the published side: all when fresh, half when nobody can tell, else nothing."""
    if verdict is None or verdict is Verdict.FRESH:
        return 1.0
    return 0.0 if verdict is Verdict.STALE else INDETERMINATE_VALIDITY


def default_trust(
    published: Sequence[Layer],
    local: Sequence[Layer] | None,
    value: LayerValue = lambda layer: layer.gradient_norm,
    local_value: LayerValue | None = None,
    validity: float = 1.0,
) -> float:
    """The weight of the published side: how well it agrees with the local one × how much surer it is × its validity.

    trust = validity · max(0, ρ) · p̄ / (p̄ + p̃), with ρ the Spearman correlation of the two over common layers and p
    the precision 1/width² of a side, width being the median relative width of its confidence intervals; without
    intervals on both sides the last factor is 1/2. A blueprint of another domain so loses its say by ρ, a local
    sample of few batches by its wide intervals. 0 when fewer than 3 layers are common; `validity` without a local side.
    """
    if local is None:
        return validity
    read = local_value or value
    local_values = {layer.id: known for layer in local if (known := read(layer)) is not None}
    common = [layer for layer in published if layer.id in local_values and value(layer) is not None]
    agreement = spearman([value(layer) or 0.0 for layer in common], [local_values[layer.id] for layer in common])
    published_width, local_width = _relative_width(published), _relative_width(local)
    surer = 0.5
    if published_width and local_width:
        published_width, local_width = _scaled([published_width, local_width])
        surer = local_width**2 / (published_width**2 + local_width**2)
    return validity * max(0.0, agreement or 0.0) * surer


def _relative_width(layers: Sequence[Layer]) -> float | None:
    widths = [
        min(WIDEST, (layer.gradient_norm_ci[1] - layer.gradient_norm_ci[0]) / layer.gradient_norm)
        for layer in layers
        if layer.gradient_norm_ci is not None and layer.gradient_norm > 0
    ]
    return median(widths) if widths else None


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation, ties by mean rank; None for fewer than 3 pairs or a constant side.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 3)
    0.8
    """
    if len(left) < 3 or min(left) == max(left) or min(right) == max(right):
        return None
    middle = (len(left) + 1) / 2
    x, y = ([rank - middle for rank in _mean_ranks(side)] for side in (left, right))
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))


def _mean_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + 1 + end) / 2
        start = end
    return ranks


# --- the blend


def _blended_shares(
    published: Sequence[Layer],
    values: Sequence[float],
    local: Sequence[Layer] | None,
    local_value: LayerValue,
    sizes: Sequence[int],
    trust: float,
) -> list[float]:
    ours = _shares(values)
    if local is None:
        known: dict[int, float] = dict(enumerate(map(float, sizes)))
    else:
        read = {layer.id: _checked(layer, value) for layer in local if (value := local_value(layer)) is not None}
        known = {i: read[layer.id] for i, layer in enumerate(published) if layer.id in read}
    # The local side speaks for as much of the whole as the layers that it saw have in the published one.
    weight = sum(ours[index] for index in known)
    theirs = dict(zip(known, _shares(list(known.values()), weight), strict=True))
    return [trust * share + (1 - trust) * theirs.get(index, share) for index, share in enumerate(ours)]


def between_groups(
    layers: Sequence[Layer],
    values: Sequence[float],
    k_stars: Sequence[float | None],
    groups: Mapping[str, Sequence[str]],
    sizes: Sequence[int],
) -> tuple[list[float], list[float | None]]:
    """Values and k_stars with what they say within each group taken back.

    A group keeps its norm √Σ v², spread as if every parameter in it had the same: v_i = group · √(n_i / Σ n), all by
    one scale. Its layers share the mean k_star. A member stands for the layers below it too (`h.0.attn` for
    `h.0.attn.q`). Layers outside every group make up one more: nothing was found of their ranks. Raises
    ConfigurationError when the groups name none of the layers.
    """
    group_of = {member: group for group, members in groups.items() for member in members}
    members_of: dict[str | None, list[int]] = {}
    for index, layer in enumerate(layers):
        members_of.setdefault(_group(layer.id, group_of), []).append(index)
    if layers and members_of.keys() == {None}:
        raise ConfigurationError(f"the groups name no layer of the blueprint, such as {layers[0].id!r}")
    values = _scaled(values)
    new_values, new_k_stars = list(values), list(k_stars)
    for found in members_of.values():
        parameters = sum(sizes[index] for index in found)
        norm = math.hypot(*(values[index] for index in found))
        known = [k for index in found if (k := k_stars[index]) is not None]
        for index in found:
            new_values[index] = norm * (math.sqrt(sizes[index] / parameters) if parameters else 0.0)
            new_k_stars[index] = sum(known) / len(known) if known else None
    return new_values, new_k_stars


def _group(layer: str, group_of: Mapping[str, str]) -> str | None:
    """The group of the layer, or of the narrowest module around it that has one."""
    while layer not in group_of:
        layer, dot, _ = layer.rpartition(".")
        if not dot:
            return None
    return group_of[layer]


def _scaled(values: Sequence[float]) -> list[float]:
    """The values over a power of two, all at most 1, so that no sum and no square overflows; nothing is rounded."""
    exponent = math.frexp(max(values, default=0.0))[1]
    return [math.ldexp(value, -exponent) for value in values]


def _shares(values: Sequence[float], whole: float = 1.0) -> list[float]:
    values = _scaled(values)
    total = sum(values)
    if total == 0:  # nothing to tell the layers apart
        return [whole / len(values)] * len(values) if values else []
    return [whole * value / total for value in values]


def _k_weights(
    published: Sequence[Layer], k_stars: Sequence[float | None], local: Sequence[Layer] | None, trust: float
) -> list[float]:
    """Relative fraction per layer: blended k_star over its mean, within `K_STAR_RANGE`; 1 where it is not known.

    A layer whose k_star the local side lacks counts there as the mean of those that it has; where it has none, as 1.
    So the published ones never say more than `trust` lets them.
    """
    ids = {layer.id for layer in published}
    theirs = {layer.id: layer.k_star for layer in local or () if layer.id in ids and layer.k_star is not None}
    even = sum(theirs.values()) / len(theirs) if theirs else None
    blended = [_blend(k, theirs.get(layer.id), even, trust) for layer, k in zip(published, k_stars, strict=True)]
    known = [k for k in blended if k]
    if not known:
        return [1.0] * len(blended)
    mean = sum(known) / len(known)
    low, high = K_STAR_RANGE
    weights = [min(high, max(low, k / mean)) if k else 1.0 for k in blended]
    return weights if theirs else [trust * weight + 1 - trust for weight in weights]


def _blend(published: float | None, local: float | None, even: float | None, trust: float) -> float | None:
    if published is None or even is None:
        return local if published is None else published
    return trust * published + (1 - trust) * (even if local is None else local)


def spread(capacity: int, sizes: Sequence[int], weights: Sequence[float]) -> list[float]:
    """Fraction per layer, proportional to `weights`, at most 1, with Σ fraction·size as near `capacity` as fits.

    >>> spread(150, [100, 100], [1.0, 9.0])
    [0.5, 1.0]
    """
    fractions = [0.0] * len(sizes)
    left = float(capacity)
    open_layers = [index for index, weight in enumerate(weights) if weight > 0 and sizes[index] > 0]
    while open_layers:
        scale = left / sum(sizes[index] * weights[index] for index in open_layers)
        full = [index for index in open_layers if scale * weights[index] >= 1 - 1e-12]
        if not full:
            for index in open_layers:
                fractions[index] = scale * weights[index]
            break
        for index in full:
            fractions[index] = 1.0
            left -= sizes[index]
        open_layers = [index for index in open_layers if fractions[index] == 0]
    return fractions


def count(fraction: float, size: int) -> int:
    """Entries that a fraction of a tensor stands for: rounded down, so that a budget is never exceeded."""
    return min(size, int(fraction * size + 1e-6))
