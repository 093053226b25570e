"""LoRA as a blueprint would have it: a rank for every matrix, out of one budget (bridge to peft)."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.bridges.tensors import layer_of
from gradient_blueprints.training.bridges.uncalled_modules import never_called
from gradient_blueprints.training.selection import Budget, Selection
from gradient_blueprints.training.selection.chosen import parts_of, width_of
from gradient_blueprints.training.selection.listed_tensors import listing, some, tied_names

try:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import check_target_module_exists
except ImportError as missing:
    raise ImportError("LoraConfig comes from peft, which is not installed: pip install peft") from missing

DealtBy = Literal["k_star", "share"]
SCALE = 2.0
"""lora_alpha / r of every adapter: the usual alpha = 2r, kept the same however the ranks differ."""


def to_peft(
    source: Blueprint | Selection,
    model: nn.Module,
    budget: float | Budget = 0.01,
    *,
    by: DealtBy = "k_star",
    largest_rank: int = 256,
    scale: float = SCALE,
    experts: bool = True,
    **options: Any,
) -> LoraConfig:
    """A peft `LoraConfig` whose ranks follow the blueprint: `get_peft_model(model, to_peft(blueprint, model, 0.01))`.

    `budget`: parameters of all adapters together, as a fraction of the model's or `Budget.parameters(n)`; never
    exceeded, and missed by less than the smallest adapter's cost per rank unless every rank is at its largest.
    An adapter of rank r on a matrix d × p has r(d + p) parameters, which are dealt out

    - by `k_star`: in proportion to k_star·d·p, the share of the matrix worth updating (layers without one count as
      the mean of the others);
    - by `share`: in proportion to the layer's share of the gradient norm, within a layer by d·p (Algorithm 1's rank);
    - of a `Selection`: in proportion to the parameters it selects of the matrix, whatever `by`; none, no adapter.

    A module that would get less than half a rank is left out of `target_modules`; where the budget pays for no other,
    those nearest to it get a rank, as far as it goes. Every linear module (torch's, and Hugging Face's Conv1D) that a
    layer of the blueprint covers takes part, but the head, whose weight is often the embedding's, and modules whose
    weight the model uses without calling them (`never_called`), where an adapter would never train. So do fused
    experts, an E × d × p tensor with E adapters of one rank, by `target_parameters`; `experts=False` leaves them out,
    which options that peft has for modules alone (lora_dropout, use_dora) need.
    `options` go to LoraConfig; those that pick modules (exclude_modules, layers_to_transform) are heeded before ranks
    are dealt out. So is what peft cannot adapt, with a warning. Adapters, ranks and, without options, the count are
    checked on a weightless copy of the model that peft really builds.
    """
    if by not in get_args(DealtBy):
        raise ConfigurationError(f"ranks are dealt out by {' or '.join(get_args(DealtBy))}, not by {by!r}")
    known = {layer.id for layer in source.layers}
    fused = _fused_experts(model, known) if experts else {}
    modules = _matrices(model, known)
    if not modules and not fused:
        raise ConfigurationError("No linear module of the model lies in a layer of the blueprint: another model?")
    adapted = _adapted(model, modules.keys(), options)
    matrices = {name: matrix for name, matrix in modules.items() if name in adapted} | fused
    if not matrices:
        raise ConfigurationError("The options leave no linear module of the model to adapt: see exclude_modules.")
    total = sum(parameter.numel() for parameter in model.parameters())
    budget = budget if isinstance(budget, Budget) else Budget.fraction(budget)
    if budget.measure == "bytes":
        raise ConfigurationError("An adapter's budget is a fraction or a number of parameters, Budget.parameters(n).")
    capacity = budget.coordinates(total, 1)
    if isinstance(source, Selection):
        weights = _selected(source, matrices, model)
    else:
        weights = _adapter_weights(source, matrices, by)
    if not any(weights.values()):
        raise ConfigurationError(
            "The selection trains none of the model's linear modules."
            if isinstance(source, Selection)
            else f"The blueprint tells nothing apart by {by!r}: it is 0 in every linear module. The other `by` may."
        )
    ranks = _ranks(matrices, weights, capacity, largest_rank)
    if not ranks:
        raise ConfigurationError(f"{capacity:,} parameters pay for no adapter of rank 1: raise the budget.")
    parameters = sorted(ranks.keys() & fused.keys())
    usual = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=usual,
        lora_alpha=_alpha(usual, scale),
        target_modules=sorted(ranks.keys() - fused.keys()),
        rank_pattern={name: rank for name, rank in sorted(ranks.items()) if rank != usual},
        alpha_pattern={name: _alpha(rank, scale) for name, rank in sorted(ranks.items()) if rank != usual},
        **({"target_parameters": parameters} if parameters else {}),  # which peft below 0.17 does not know
        **options,
    )
    built = _built(model, config)
    if wrong := sorted(name for name, _ in _ranks_built(built).items() ^ ranks.items()):
        raise ConfigurationError(f"peft builds other adapters than were meant, {some(wrong)}; please report this.")
    wanted, trained = sum(rank * matrices[name].cost for name, rank in ranks.items()), _trainable(built)
    if trained != wanted and not options:  # such as bias or use_dora, which train more
        raise ConfigurationError(f"peft builds {trained:,} parameters where {wanted:,} were meant; please report this.")
    return config


def adapter_parameters(model: nn.Module, config: LoraConfig) -> int:
    """How many parameters peft makes trainable for this configuration, on a copy of the model without its weights."""
    return _trainable(_built(model, config))


def _built(model: nn.Module, config: LoraConfig) -> nn.Module:
    """What peft makes of a copy of the model without its weights, by a copy of the configuration, which it edits."""
    weightless: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta"), tensor.requires_grad) for tensor in model.parameters()
    }
    weightless |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}  # spectral_norm multiplies by its own
    adapted: nn.Module = get_peft_model(copy.deepcopy(model, weightless), copy.deepcopy(config), low_cpu_mem_usage=True)
    return adapted


def _ranks_built(adapted: nn.Module) -> dict[str, int]:
    """Rank by the name, in the model, of every module and every tensor of experts with an adapter."""
    ranks = {}
    for name, module in adapted.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            target = name.removeprefix("base_model.model.")
            if isinstance(module, ParamWrapper):  # one around the other, where a module has several such tensors
                target = f"{target.replace('.base_layer', '')}.{module.parameter_name}"
            ranks[target] = int(module.r["default"])
    return ranks


def _adapted(model: nn.Module, modules: Set[str], options: Mapping[str, Any]) -> Set[str]:
    """Those of the modules that peft gives adapters of their own: it is tried, since its rules are many.

    peft refuses some (`out_proj` of Mamba); in models whose experts transformers 5 fused, of names like DeepSeek's, it
    takes every `down_proj` for the experts' one (`_convert_peft_config_moe`). What `exclude_modules` and the like keep
    out is left out in silence, all else with a warning.
    """
    if not modules:
        return modules
    ends = LoraConfig(target_modules=sorted({name.rpartition(".")[2] for name in modules}), **options)
    asked = {name for name in modules if check_target_module_exists(ends, name)}
    adapted, _ = _tried(model, asked, options)
    if adapted == asked:
        return asked
    alike: dict[str, set[str]] = {}  # peft's rules go by the last part of a name
    for name in asked:
        alike.setdefault(name.rpartition(".")[2], set()).add(name)
    trials = [_tried(model, names, options) for _, names in sorted(alike.items())]
    adapted = set().union(*(found for found, _ in trials))
    refusals = [refusal for _, refusal in trials if refusal is not None]
    if refusals and not adapted:
        raise refusals[0]
    reasons = f" ({' '.join(dict.fromkeys(map(str, refusals)))})" if refusals else ""
    warnings.warn(
        f"peft can give no adapters of their own to {some(sorted(asked - adapted))}; they are left out{reasons}",
        stacklevel=3,
    )
    return adapted


def _tried(model: nn.Module, names: Set[str], options: Mapping[str, Any]) -> tuple[Set[str], ValueError | None]:
    """Which of these modules peft adapts when all are named, or why it refuses."""
    if not names:
        return names, None
    try:
        with warnings.catch_warnings(action="ignore"):  # what it warns of is said of the configuration in the end
            built = _built(model, LoraConfig(r=1, target_modules=sorted(names), **options))
    except ValueError as refusal:
        return set(), refusal
    return names & _ranks_built(built).keys(), None


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class _Matrix:
    """A linear module, or experts fused into one tensor: its layer in the blueprint and its shape."""

    layer: str
    rows: int
    columns: int
    experts: int = 1

    @property
    def size(self) -> int:
        return self.experts * self.rows * self.columns

    @property
    def cost(self) -> int:
        """Parameters of its adapters, per rank."""
        return self.experts * (self.rows + self.columns)


def _matrices(model: nn.Module, known: Set[str]) -> dict[str, _Matrix]:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    found = {}
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        takes_part = linear and module is not head and not never_called(model, name)
        layer = layer_of(f"{name}.weight", known) if takes_part else None
        if layer is not None:
            found[name] = _Matrix(layer, *_shape(module))
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    """Read off a linear module without its weight: reading that moves the vectors of torch's spectral_norm."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # for mypy, to which it may be a module
    return weight.shape[0], weight.shape[1]


def _fused_experts(model: nn.Module, known: Set[str]) -> dict[str, _Matrix]:
    """Tensors (experts, ·, ·) as transformers has them since version 5, by parameter name."""
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            layer = layer_of(name, known)
            if layer is not None and parameter.dim() == 3 and getattr(module, "num_experts", None) == len(parameter):
                experts, rows, columns = parameter.shape
                found[name] = _Matrix(layer, rows, columns, experts)
    return found


def _selected(selection: Selection, matrices: Mapping[str, _Matrix], model: nn.Module) -> dict[str, float]:
    """Parameters of each matrix that the selection trains, as `Selection.units` has them, but none is drawn."""
    fractions = {layer.id: layer.fraction for layer in selection.layers}
    listed = {
        name.removesuffix(".weight"): found
        for names, _ in tied_names(model)
        if (found := listing(names, fractions.keys())) is not None
        for name in names
    }
    selected = {}
    for name, matrix in matrices.items():
        tensor, layer = listed.get(name, (name, matrix.layer))
        shape = (matrix.experts, matrix.rows, matrix.columns)
        width = width_of(selection.unit, shape)
        ranked = selection.parts.get(tensor)
        selected[name] = float(width * (parts_of(fractions[layer], shape, width) if ranked is None else len(ranked)))
    return selected


def _adapter_weights(source: Blueprint, matrices: Mapping[str, _Matrix], by: DealtBy) -> dict[str, float]:
    """What each matrix's adapter may cost, relative to the others."""
    if by == "share":
        held = Counter({matrix.layer: 0 for matrix in matrices.values()})
        for matrix in matrices.values():
            held[matrix.layer] += matrix.size
        norms = {layer.id: layer.gradient_norm for layer in source.layers}
        return {name: norms[matrix.layer] * matrix.size / held[matrix.layer] for name, matrix in matrices.items()}
    stars = {layer.id: min(1.0, layer.k_star) for layer in source.layers if layer.k_star is not None}
    mean = sum(stars.values()) / len(stars) if stars else 1.0
    return {name: stars.get(matrix.layer, mean) * matrix.size for name, matrix in matrices.items()}


def _ranks(
    matrices: Mapping[str, _Matrix], weights: Mapping[str, float], capacity: int, largest: int
) -> dict[str, int]:
    """Whole ranks with Σ rank·cost at most `capacity`, as near `weights` as they get; without zeros.

    Shares that a full matrix cannot take go to the others; then what rounding down left goes to the largest remainders,
    those of half a rank at least, or of less where the budget pays for nothing else.
    """
    limits = {name: min(largest, matrix.rows, matrix.columns) for name, matrix in matrices.items()}
    ideal = dict.fromkeys(matrices, 0.0)
    room, waiting = float(capacity), {name for name, weight in weights.items() if weight > 0}
    while waiting:
        unit = room / sum(weights[name] for name in waiting)
        full = {name for name in waiting if unit * weights[name] >= limits[name] * matrices[name].cost}
        if not full:
            ideal |= {name: unit * weights[name] / matrices[name].cost for name in waiting}
            break
        ideal |= {name: float(limits[name]) for name in full}
        room -= sum(limits[name] * matrices[name].cost for name in full)
        waiting -= full
    ranks = {name: math.floor(rank + 1e-9) for name, rank in ideal.items()}
    left = capacity - sum(rank * matrices[name].cost for name, rank in ranks.items())
    order = sorted((name for name in ideal if ideal[name] > 0), key=lambda name: (ranks[name] - ideal[name], name))
    taking = [name for name in order if ideal[name] >= 0.5]
    if not any(ranks.values()) and all(matrices[name].cost > left for name in taking):
        taking = order
    while taking := [name for name in taking if ranks[name] < limits[name] and matrices[name].cost <= left]:
        for name in taking:
            if matrices[name].cost <= left:
                ranks[name] += 1
                left -= matrices[name].cost
    return {name: rank for name, rank in ranks.items() if rank}


def _alpha(rank: int, scale: float) -> float:
    """peft says int, and takes any number: it divides by the rank, and writes it to JSON."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha
