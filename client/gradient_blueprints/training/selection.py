"""What to train: Algorithm 1 of the paper, down to the coordinates within each matrix.

`select` blends a published blueprint with a local one, spends a budget, and answers a `Selection`
that `finetuning.apply_selection` puts on a model. Coordinates *within each matrix* are the default
unit: at 10 % of the parameters they kept 97 % of full fine-tuning's gain in the pilot (docs), where
whole submodules kept about 61 %, no more than submodules at random.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint, Layer
from gradient_blueprints.training.profiling.losses import with_labels
from gradient_blueprints.training.staleness import spearman

Unit = Literal["coordinate", "layer"]
Indices = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

BYTES_PER_COORDINATE = 16
"""Training memory of one selected coordinate: two float32 moments, its float32 gradient, an int32 index."""
BYTES_PER_DENSE_PARAMETER = 12
"""The same where a whole tensor is trained: no index is kept. Full AdamW holds as much for every parameter."""
K_STAR_RANGE = (0.5, 2.0)
"""No layer gets less than half or more than twice the even fraction: every matrix has to take part (pilot: ranking
across matrices instead of within each loses 6 to 10 points of the gain)."""
SELECTION_FORMAT = 1


@dataclass(frozen=True)
class Budget:
    """How much may be trained.

    >>> Budget.fraction(0.1).coordinates(1_000, BYTES_PER_COORDINATE)
    100
    >>> Budget.bytes(1_600).coordinates(1_000, BYTES_PER_COORDINATE)
    100
    """

    amount: float
    measure: Literal["fraction", "parameters", "bytes"] = "fraction"

    def __post_init__(self) -> None:
        if not 0 < self.amount < float("inf") or (self.measure == "fraction" and self.amount > 1):
            raise ConfigurationError(f"a budget is a positive number, a fraction at most 1; got {self}")

    @classmethod
    def fraction(cls, share: float) -> Budget:
        """A share of the parameters, in (0, 1]."""
        return cls(share, "fraction")

    @classmethod
    def parameters(cls, count: int) -> Budget:
        return cls(count, "parameters")

    @classmethod
    def bytes(cls, count: float) -> Budget:
        """Bytes held through training beyond the weights and activations: moments, gradients, indices."""
        return cls(count, "bytes")

    def coordinates(self, total: int, bytes_each: int) -> int:
        """How many of `total` parameters it pays for, at `bytes_each` of training memory."""
        wanted = {
            "fraction": self.amount * total,
            "parameters": self.amount,
            "bytes": self.amount / bytes_each,
        }[self.measure]
        return min(total, int(wanted + 1e-9))  # 0.3 * 10 is 2.999...


@dataclass(frozen=True)
class SelectedLayer:
    """What was decided for one layer of the blueprint."""

    id: str
    parameters: int
    fraction: float
    """Share of each of its tensors that is trained, in [0, 1]."""
    share: float
    """Blended share of the gradient norm, G' of Algorithm 1; they sum to 1 over the layers."""
    retained: float | None
    """Share of the score's mass (local gradient, factors) within the chosen; None where nothing was known."""

    @property
    def selected(self) -> int:
        return _count(self.fraction, self.parameters)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which parameters to train: immutable, deterministic, a small file.

    `coordinates` holds the chosen flat indices of tensors that were ranked. A tensor without an entry is trained
    whole where its layer's fraction is 1, else at the coordinates that `indices` derives from `seed` and its name.
    """

    model_id: str
    training_checkpoint: float
    blueprint_digest: str
    unit: Unit
    trust: float
    seed: int
    layers: tuple[SelectedLayer, ...]
    coordinates: Mapping[str, Indices]

    def __post_init__(self) -> None:
        frozen = {name: chosen.view() for name, chosen in sorted(self.coordinates.items())}
        for chosen in frozen.values():
            chosen.flags.writeable = False
        object.__setattr__(self, "coordinates", MappingProxyType(frozen))

    def indices(self, parameter: str, size: int) -> Indices | None:
        """Chosen flat indices of a tensor of `size` entries, ascending; None means all of them."""
        layer = self._layer_of(parameter)
        if layer is None or layer.fraction == 0:
            return np.empty(0, np.int64)
        if layer.fraction == 1:
            return None
        ranked = self.coordinates.get(parameter)
        if ranked is not None:
            if len(ranked) and ranked[-1] >= size:
                raise ConfigurationError(f"{parameter} has {size} entries, fewer than the selection was made for")
            return ranked
        return _top(_random_scores(parameter, size, self.seed), _count(layer.fraction, size), parameter, self.seed)

    def _layer_of(self, parameter: str) -> SelectedLayer | None:
        by_id = {layer.id: layer for layer in self.layers}
        return next((by_id[name] for name in _prefixes(parameter) if name in by_id), None)

    @property
    def parameters(self) -> int:
        """Parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def selected(self) -> int:
        """Parameters that are trained; an exact count may be lower by less than one per tensor."""
        return sum(layer.selected for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """Moments, gradients and indices while training it; `SelectedAdamW.training_bytes` measures them."""
        return sum(
            layer.selected * (BYTES_PER_DENSE_PARAMETER if layer.fraction == 1 else BYTES_PER_COORDINATE)
            for layer in self.layers
        )

    def summary(self, top: int = 8) -> str:
        """The decision as a table for people: the totals and the `top` layers by selected parameters."""
        dense = self.parameters * BYTES_PER_DENSE_PARAMETER
        chosen = sorted((layer for layer in self.layers if layer.selected), key=lambda layer: -layer.selected)
        share = _percent(self.selected / max(1, self.parameters))
        lines = [
            f"{self.model_id} at {self.training_checkpoint:g}, by {self.unit}",
            f"{self.selected:,} of {self.parameters:,} parameters ({share})",
            f"in {len(chosen)} of {len(self.layers)} layers, trust in the published side {self.trust:.2f}",
            f"training memory {self.training_bytes / 1e6:,.1f} MB, a full AdamW update {dense / 1e6:,.1f} MB",
            f"{'layer':<44}{'parameters':>12}{'fraction':>10}{'norm share':>12}{'kept':>8}",
        ]
        for layer in chosen[:top]:
            kept = "–" if layer.retained is None else _percent(layer.retained)
            lines.append(
                f"{layer.id[-43:]:<44}{layer.parameters:>12,}{_percent(layer.fraction):>10}"
                f"{_percent(layer.share):>12}{kept:>8}"
            )
        if len(chosen) > top:
            lines.append(f"and {len(chosen) - top} more layers")
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file: a header and a compressed bitmap per ranked tensor."""
        header = {
            "format": SELECTION_FORMAT,
            "model_id": self.model_id,
            "training_checkpoint": self.training_checkpoint,
            "blueprint_digest": self.blueprint_digest,
            "unit": self.unit,
            "trust": self.trust,
            "seed": self.seed,
            "layers": [asdict(layer) for layer in self.layers],
        }
        bitmaps = {name: _to_bitmap(chosen) for name, chosen in self.coordinates.items()}
        save_file(bitmaps, path, metadata={"selection": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote."""
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["selection"])
            coordinates = {name: _from_bitmap(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        if header.pop("format") != SELECTION_FORMAT:
            raise ConfigurationError(f"{path} was written by another version of this package")
        header["layers"] = tuple(SelectedLayer(**layer) for layer in header["layers"])
        return cls(**header, coordinates=coordinates)


def select(
    blueprint: Blueprint,
    local: Blueprint | None = None,
    budget: float | Budget = 0.1,
    unit: Unit = "coordinate",
    factors: Mapping[str, torch.Tensor] | None = None,
    trust: float | None = None,
    *,
    gradients: Mapping[str, torch.Tensor] | None = None,
    domain: str | None = None,
    model: nn.Module | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Selection:
    """Choose what to train (Algorithm 1): blend, rank, pick.

    1. Norms become shares of their sum, published Ḡ and local G̃, and are blended: G' = trust·Ḡ + (1 − trust)·G̃.
       `trust` (the paper's blend weight α) defaults to `default_trust`; without `local` it is 1.
    2. `unit="layer"`: the whole layers with the largest sum of G' that fit, by an exact 0/1 knapsack.
       `unit="coordinate"`: every layer gets the budget's fraction, more where its k_star (blended too) is larger,
       within `K_STAR_RANGE`; a layer with G' = 0 gets none.
    3. Within each tensor the coordinates with the largest score: |mean local gradient| from `gradients`
       (see `mean_gradients`), or √(row × column) from `factors`, or both as shares blended by `trust`. A tensor for
       which neither is known gets random coordinates, the same ones each time for one `seed`: a rival hard to beat,
       and safer than statistics of a wrong domain, which choose worse than chance.

    Args:
        budget: a fraction such as 0.1, or a `Budget` in parameters or bytes of training memory.
        factors: as `GradientProfiler.factors()` or a blueprint's attachment holds them, `{domain}/{tensor}/row` and
            `.../column`, of the adapter's own domain; `domain` names it when they hold several.
        model: counts parameters where the blueprint does not say how many a layer has.
        groups: layer ids by group, the `groups` of a staleness check: the published ranks hold between these groups
            and not within them, so that within a group the published side tells no layer from another.

    Raises ConfigurationError when a layer's parameter count is unknown or a tensor's shape does not fit.
    """
    budget = budget if isinstance(budget, Budget) else Budget.fraction(budget)
    if trust is None:
        trust = default_trust(blueprint, local) if local is not None else 1.0
    if not 0 <= trust <= 1:
        raise ConfigurationError(f"trust is a weight in [0, 1], got {trust}")
    sizes = _layer_sizes(blueprint, gradients, model)
    published = blueprint if groups is None else _between_groups(blueprint, groups, sizes)
    shares = _blended_shares(published, local, trust)
    if unit == "layer":
        capacity = budget.coordinates(sum(sizes), BYTES_PER_DENSE_PARAMETER)
        fractions = [float(taken) for taken in knapsack(shares, sizes, capacity)]
        ranked: dict[str, tuple[Indices, float]] = {}
    else:
        capacity = budget.coordinates(sum(sizes), BYTES_PER_COORDINATE)
        k_weights = _k_weights(published, local, trust)
        weights = [weight if share > 0 else 0.0 for weight, share in zip(k_weights, shares, strict=True)]
        fractions = spread(capacity, sizes, weights)
        by_layer = {layer.id: fraction for layer, fraction in zip(blueprint.layers, fractions, strict=True)}
        ranked = dict(_rank_coordinates(by_layer, gradients, _of_domain(factors, domain), trust, seed))
    layers = tuple(
        SelectedLayer(layer.id, size, fraction, share, _retained(layer.id, fraction, ranked))
        for layer, size, fraction, share in zip(blueprint.layers, sizes, fractions, shares, strict=True)
    )
    return Selection(
        model_id=blueprint.model_id,
        training_checkpoint=blueprint.training_checkpoint,
        blueprint_digest=blueprint.digest,
        unit=unit,
        trust=trust,
        seed=seed,
        layers=layers,
        coordinates={name: chosen for name, (chosen, _) in ranked.items()},
    )


def default_trust(blueprint: Blueprint, local: Blueprint) -> float:
    """The weight of the published norms: how well they agree with the local ones × how much surer they are.

    trust = max(0, ρ) · p̄ / (p̄ + p̃), with ρ the Spearman correlation of the two over common layers and p the
    precision 1/width² of a side, width being the median relative width of its confidence intervals; without
    intervals on both sides the second factor is 1/2. A blueprint of another domain so loses its say by ρ, a local
    sample of few batches by its wide intervals. 0 when fewer than 3 layers are common.
    """
    local_norms = {layer.id: layer.gradient_norm for layer in local.layers}
    common = [layer for layer in blueprint.layers if layer.id in local_norms]
    agreement = spearman([layer.gradient_norm for layer in common], [local_norms[layer.id] for layer in common])
    published_width, local_width = _relative_width(blueprint), _relative_width(local)
    surer = 0.5
    if published_width and local_width:
        surer = local_width**2 / (published_width**2 + local_width**2)
    return max(0.0, agreement or 0.0) * surer


def mean_gradients(model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean gradient of the local batches' losses, by tensor name, in float32.

    Holds one gradient of the model for as long as the selection is made, as ordinary training does at each step;
    where that is too much, `GradientProfiler.factors()` of the local sample needs a few numbers per row.
    Labels default to the input ids with padding masked. Modes and random state of the model stay as they are.
    """
    total: dict[str, torch.Tensor] = {}

    def add(name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float() / len(batches)
            total[name] = total[name] + gradient if name in total else gradient
            parameter.grad = None

        return take

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(parameter.grad is not None for _, parameter in trained):
        raise ConfigurationError("the model holds gradients: call model.zero_grad() before mean_gradients")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    hooks = [
        parameter.register_post_accumulate_grad_hook(add(name))  # type: ignore[no-untyped-call]  # torch has no types
        for name, parameter in trained
    ]
    try:
        for batch in batches:
            model(**with_labels(batch, None)).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return total


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


def knapsack(values: Sequence[float], sizes: Sequence[int], capacity: int) -> list[bool]:
    """Which items to take so that Σ values is largest within `capacity`: exact 0/1 knapsack.

    Greedy by density crowds out the large pieces (embedding, head) that matter most. Items are added one by one to
    the set of undominated (size, value) states (Nemhauser and Ullmann 1969), and a state is dropped when even
    filling its room with fractions of the remaining items (Dantzig's bound) cannot reach the best known whole
    solution. Exact; fast since layers have few distinct sizes.

    >>> knapsack([6.0, 5.0, 5.0], [6, 5, 5], 10)
    [False, True, True]
    """
    usable = [index for index in range(len(values)) if values[index] > 0 and sizes[index] <= capacity]
    usable.sort(key=lambda index: (-values[index] / max(sizes[index], 1e-12), index))
    value = np.array([values[index] for index in usable])
    size = np.array([sizes[index] for index in usable], np.int64)
    value_before, size_before = np.append(0.0, value.cumsum()), np.append(0, size.cumsum())
    slack = 1e-12 * (value_before[-1] if usable else 0.0)  # rounding of sums must not prune the best

    def bound(room: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.float64]:
        end = np.searchsorted(size_before, size_before[start] + room, side="right") - 1
        whole = value_before[end] - value_before[start]
        rest = room - (size_before[end] - size_before[start])
        next_item = np.minimum(end, len(usable) - 1)
        part = np.where(end < len(usable), rest * value[next_item] / np.maximum(size[next_item], 1), 0.0)
        return np.asarray(whole + part, np.float64)

    used, gained = np.zeros(1, np.int64), np.zeros(1)
    best = _greedy_value(value, size, capacity)
    history: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]] = []  # per item: parent state, taken
    for item in range(len(usable)):
        fits = np.flatnonzero(used + size[item] <= capacity)
        new_used = np.concatenate([used, used[fits] + size[item]])
        new_gained = np.concatenate([gained, gained[fits] + value[item]])
        parents = np.concatenate([np.arange(len(used)), fits])
        taken = np.arange(len(new_used)) >= len(used)
        order = np.lexsort((taken, -new_gained, new_used))
        ahead = np.append(-np.inf, np.maximum.accumulate(new_gained[order])[:-1])
        order = order[new_gained[order] > ahead]
        best = max(best, float(new_gained[order].max()))
        order = order[new_gained[order] + bound(capacity - new_used[order], item + 1) >= best - slack]
        used, gained = new_used[order], new_gained[order]
        history.append((parents[order], taken[order]))
    chosen = [False] * len(values)
    state = int(gained.argmax())
    for item in reversed(range(len(usable))):
        parents, taken = history[item]
        chosen[usable[item]] = bool(taken[state])
        state = int(parents[state])
    return chosen


def _greedy_value(value: npt.NDArray[np.float64], size: npt.NDArray[np.int64], capacity: int) -> float:
    total, room = 0.0, capacity
    for gain, needed in zip(value.tolist(), size.tolist(), strict=True):
        if needed <= room:
            total, room = total + gain, room - needed
    return total


# --- what the blueprints say


def _blended_shares(blueprint: Blueprint, local: Blueprint | None, trust: float) -> list[float]:
    """G' per layer of the blueprint; a layer that the local blueprint lacks keeps its published share."""
    published = _shares([layer.gradient_norm for layer in blueprint.layers])
    if local is None:
        return published
    norms = {layer.id: layer.gradient_norm for layer in local.layers}
    seen = [index for index, layer in enumerate(blueprint.layers) if layer.id in norms]
    # The local side speaks for as much of the whole as the layers that it saw have in the published one.
    weight = sum(published[index] for index in seen)
    local_shares = dict(zip(seen, _shares([norms[blueprint.layers[index].id] for index in seen], weight), strict=True))
    return [trust * share + (1 - trust) * local_shares.get(index, share) for index, share in enumerate(published)]


def _between_groups(blueprint: Blueprint, groups: Mapping[str, Sequence[str]], sizes: Sequence[int]) -> Blueprint:
    """The blueprint with what it says within each group taken back.

    A group keeps its norm √Σ v², spread as if every parameter in it had the same: v_i = group · √(n_i / Σ n). Its
    layers share the mean k_star. Layers outside every group stay as they are.
    """
    position = {layer.id: index for index, layer in enumerate(blueprint.layers)}
    layers = list(blueprint.layers)
    for members in groups.values():
        found = [position[name] for name in members if name in position]
        parameters = sum(sizes[index] for index in found)
        norm = math.sqrt(sum(layers[index].gradient_norm ** 2 for index in found))
        known = [k for index in found if (k := layers[index].k_star) is not None]
        k_star = sum(known) / len(known) if known else None
        for index in found:
            share = math.sqrt(sizes[index] / parameters) if parameters else 0.0
            layers[index] = layers[index].model_copy(update={"gradient_norm": norm * share, "k_star": k_star})
    return blueprint.model_copy(update={"layers": tuple(layers)})


def _shares(values: Sequence[float], whole: float = 1.0) -> list[float]:
    total = sum(values)
    if total == 0:  # nothing to tell the layers apart
        return [whole / len(values)] * len(values) if values else []
    return [whole * value / total for value in values]


def _k_weights(blueprint: Blueprint, local: Blueprint | None, trust: float) -> list[float]:
    """Relative fraction per layer: blended k_star over its mean, within `K_STAR_RANGE`; 1 where it is not known."""
    local_layers = {layer.id: layer for layer in local.layers} if local is not None else {}
    blended = [_blend(layer.k_star, _k_star(local_layers.get(layer.id)), trust) for layer in blueprint.layers]
    known = [k for k in blended if k]
    if not known:
        return [1.0] * len(blended)
    mean = sum(known) / len(known)
    low, high = K_STAR_RANGE
    return [min(high, max(low, k / mean)) if k else 1.0 for k in blended]


def _k_star(layer: Layer | None) -> float | None:
    return layer.k_star if layer is not None else None


def _blend(published: float | None, local: float | None, trust: float) -> float | None:
    if published is None or local is None:
        return local if published is None else published
    return trust * published + (1 - trust) * local


def _relative_width(blueprint: Blueprint) -> float | None:
    widths = [
        (layer.gradient_norm_ci[1] - layer.gradient_norm_ci[0]) / layer.gradient_norm
        for layer in blueprint.layers
        if layer.gradient_norm_ci is not None and layer.gradient_norm > 0
    ]
    return float(np.median(widths)) if widths else None


def _layer_sizes(
    blueprint: Blueprint, gradients: Mapping[str, torch.Tensor] | None, model: nn.Module | None
) -> list[int]:
    counted: dict[str, int] = {}
    ids = {layer.id for layer in blueprint.layers}
    tensors = dict(model.named_parameters()) if model is not None else (gradients or {})
    for name, tensor in tensors.items():
        owner = next((prefix for prefix in _prefixes(name) if prefix in ids), None)
        if owner is not None:
            counted[owner] = counted.get(owner, 0) + tensor.numel()
    sizes = [counted.get(layer.id, layer.parameters) for layer in blueprint.layers]
    unknown = [layer.id for layer, size in zip(blueprint.layers, sizes, strict=True) if size is None]
    if unknown:
        raise ConfigurationError(
            f"the blueprint does not say how many parameters {unknown[0]!r} has "
            f"({len(unknown)} such layers): pass model=, or profile with a profiler that counts them"
        )
    return [size for size in sizes if size is not None]


# --- coordinates within a tensor


def _rank_coordinates(
    fractions: Mapping[str, float],
    gradients: Mapping[str, torch.Tensor] | None,
    factors: Mapping[str, dict[str, torch.Tensor]],
    trust: float,
    seed: int,
) -> Iterator[tuple[str, tuple[Indices, float]]]:
    """(tensor, (chosen indices, share of the score kept)) for each tensor that something is known of."""
    gradients = gradients or {}
    for name in sorted({*gradients, *factors}):
        layer = next((prefix for prefix in _prefixes(name) if prefix in fractions), None)
        if layer is None or not 0 < fractions[layer] < 1:
            continue
        published = _factor_scores(factors[name]) if name in factors else None
        local = gradients[name].detach().float().abs().flatten().cpu().numpy() if name in gradients else None
        scores = _blend_scores(published, local, trust, name)
        total = float(scores.sum(dtype=np.float64))
        if not np.isfinite(total):
            raise ConfigurationError(f"the gradient or the factors of {name} are not finite")
        if total == 0:  # unused in the sample: nothing tells its coordinates apart
            continue
        chosen = _top(scores, _count(fractions[layer], len(scores)), name, seed)
        yield name, (chosen, float(scores[chosen].sum(dtype=np.float64)) / total)


def _factor_scores(factor: Mapping[str, torch.Tensor]) -> Scores:
    """RMS gradient that the factors of the second moment stand for: sqrt(row_i · column_j / mean(row)).

    A vector has its second moment as row alone; a stack of matrices (experts) has factors for each.
    """
    row = factor["row"].detach().float()
    if "column" in factor:
        column = factor["column"].detach().float()
        mean = row.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        row = (row / mean)[..., :, None] * column[..., None, :]
    return row.abs().sqrt().flatten().cpu().numpy()


def _blend_scores(published: Scores | None, local: Scores | None, trust: float, name: str) -> Scores:
    if published is None or local is None:
        scores = local if published is None else published
        assert scores is not None
        return scores
    if len(published) != len(local):
        raise ConfigurationError(f"{name} has {len(local)} entries, its published factors stand for {len(published)}")
    total_published, total_local = published.sum(dtype=np.float64), local.sum(dtype=np.float64)
    if total_published == 0 or total_local == 0:
        return local if total_published == 0 else published
    return np.asarray(published * (trust / total_published) + local * ((1 - trust) / total_local), np.float32)


def _of_domain(factors: Mapping[str, torch.Tensor] | None, domain: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """{tensor: {"row": ..., "column": ...}} of the domain asked for."""
    parsed: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
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
            "domain choose worse than chance, so leave them out when yours is not there"
        )
    return parsed[domain]


def _top(scores: Scores, count: int, name: str, seed: int) -> Indices:
    """Indices of the `count` largest, ascending; ties are broken at random but always alike."""
    if count >= len(scores):
        return np.arange(len(scores))
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    tied = np.flatnonzero(scores == threshold)
    order = np.argsort(_random_scores(name, len(scores), seed)[tied], kind="stable") if len(tied) > 1 else [0]
    return np.sort(np.concatenate([above, tied[order][: count - len(above)]]))


def _random_scores(name: str, size: int, seed: int) -> Scores:
    """Uniform in [0, 1) by hashing (name, seed, index): the same on every machine and version of every library."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):  # splitmix64 works modulo 2**64
        z = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.asarray((z >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def _retained(layer: str, fraction: float, ranked: Mapping[str, tuple[Indices, float]]) -> float | None:
    if fraction in (0.0, 1.0):
        return fraction
    kept = [(len(chosen), share) for name, (chosen, share) in ranked.items() if layer in _prefixes(name)]
    total = sum(count for count, _ in kept)
    return sum(count * share for count, share in kept) / total if total else None


def _count(fraction: float, size: int) -> int:
    """Rounded down, so that a budget is never exceeded."""
    return min(size, int(fraction * size + 1e-6))


def _prefixes(parameter: str) -> list[str]:
    """The ids under which a blueprint may list a tensor, the narrowest first: itself, its module, its block.

    >>> _prefixes("h.0.attn.weight")
    ['h.0.attn.weight', 'h.0.attn', 'h.0', 'h']
    """
    parts = parameter.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _to_bitmap(chosen: Indices) -> npt.NDArray[np.uint8]:
    bits = np.zeros(int(chosen[-1]) + 1 if len(chosen) else 0, np.bool_)
    bits[chosen] = True
    return np.frombuffer(zlib.compress(np.packbits(bits).tobytes(), 6), np.uint8)


def _from_bitmap(packed: npt.NDArray[np.uint8]) -> Indices:
    bits = np.frombuffer(zlib.decompress(packed.tobytes()), np.uint8)
    return np.flatnonzero(np.unpackbits(bits))


def _percent(share: float) -> str:
    return f"{share:.1%}"
