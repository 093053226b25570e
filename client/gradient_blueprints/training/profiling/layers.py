"""Which parameters make up a layer of the blueprint, and what kind of layer it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Granularity, LayerKind

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|ff$|DenseReluDense|intermediate|experts?|moe|(^|\.)fc_?\d|(^|\.)output(\.|$)", re.IGNORECASE
)
_NORMALIZATION = re.compile(r"norm|(^|[._])ln(_|$|\d)", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)(lm_head|head|cls|classifier|score|predictions|qa_outputs|generator_lm_head)(\.|$)")
_EMBEDDING = re.compile(r"embed|(^|\.)w[tp]e(\.|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Group:
    """A layer: its id, the names of its parameters, and what it is."""

    id: str
    parameters: tuple[str, ...]
    size: int
    kind: LayerKind
    depth: int | None


def parameter_names(model: nn.Module) -> dict[str, str]:
    """The name of every parameter with entries by each path to it: the first by which the model lists it."""
    first: dict[int, str] = {}
    names = {
        path: first.setdefault(id(parameter), path)
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel()
    }
    if any(parameter.is_meta for parameter in model.parameters()):  # accelerate offloads tied weights each for itself
        for target, source in _tied(model):
            if target in names and source in names:
                kept = next(name for name in names.values() if name in (names[target], names[source]))
                gone = {names[target], names[source]}
                names = {path: kept if name in gone else name for path, name in names.items()}
    return names


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter with entries once, in the model's order."""
    return {name: model.get_parameter(name) for name in parameter_names(model).values()}


def check_names(names: Iterable[str]) -> None:
    """ConfigurationError for names that `torch.compile(module)` gave."""
    renamed = next((name for name in names if "_orig_mod" in name.split(".")), None)
    if renamed is not None:
        raise ConfigurationError(
            f"torch.compile(module) renamed a tensor to {renamed}: compile in place, module.compile(), or give the "
            "model as it was before"
        )


def _tied(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of one weight, as transformers keeps them."""
    found = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        ties: dict[str, str] = module.__dict__.get("all_tied_weights_keys") or {}
        found += [(prefix + target, prefix + source) for target, source in ties.items()]
    return found


def group_parameters(model: nn.Module, granularity: Granularity) -> list[Group]:
    """The layers of a model in its own order.

    `tensor`: one per parameter. `submodule`: attention, feed-forward and norms of each block
    (`model.layers.3.self_attn`), and every module outside the blocks. `block`: `model.layers.3`.
    Raises ConfigurationError for a block that `torch.compile(block)` took the place of.
    """
    named_once = named_parameters(model)
    check_names(named_once)
    modules = dict(model.named_modules())
    members: dict[str, list[tuple[str, Tensor]]] = {}
    for name, parameter in named_once.items():
        members.setdefault(_layer_of(name, modules, granularity), []).append((name, parameter))
    head = _untied_head(model)
    return [
        Group(
            id=layer,
            parameters=tuple(name for name, _ in named),
            size=sum(parameter.numel() for _, parameter in named),
            kind=_kind(layer, named, modules, head, granularity),
            depth=_depth(named[0][0], modules),
        )
        for layer, named in members.items()
    ]


def _layer_of(parameter: str, modules: dict[str, nn.Module], granularity: Granularity) -> str:
    if granularity == "tensor":
        return parameter
    path = parameter.split(".")
    owner = path[:-1]
    block = _block_length(owner, modules)
    if block is None:
        return ".".join(owner) or parameter
    if granularity == "block":
        return ".".join(owner[:block])
    length = block
    while length + 1 < len(owner) and isinstance(modules[".".join(owner[: length + 1])], nn.ModuleList):
        length += 2  # T5 keeps the parts of a block in a list: block.0.layer.1.DenseReluDense
    return ".".join(owner[: length + 1])


def _block_length(owner: list[str], modules: dict[str, nn.Module]) -> int | None:
    """Components up to and with the index of the outermost list of blocks."""
    for index, part in enumerate(owner):
        if part.isdigit() and isinstance(modules[".".join(owner[:index])], nn.ModuleList | nn.Sequential):
            return index + 1
    return None


def _depth(parameter: str, modules: dict[str, nn.Module]) -> int | None:
    owner = parameter.split(".")[:-1]
    block = _block_length(owner, modules)
    return None if block is None else int(owner[block - 1])


def _untied_head(model: nn.Module) -> int | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return id(head) if isinstance(head, nn.Module) else None


def _kind(
    layer: str,
    named: list[tuple[str, Tensor]],
    modules: dict[str, nn.Module],
    head: int | None,
    granularity: Granularity,
) -> LayerKind:
    owners = [modules[name.rpartition(".")[0]] for name, _ in named]
    first = named[0][0].split(".")[:-1]
    block = _block_length(first, modules)
    if block is None:
        if any(id(owner) == head for owner in owners) or _HEAD.search(layer):
            return LayerKind.HEAD
        if all(isinstance(owner, nn.Embedding) for owner in owners):
            return LayerKind.EMBEDDING
        if all(parameter.dim() == 1 for _, parameter in named) and _NORMALIZATION.search(".".join(first)):
            return LayerKind.NORMALIZATION
        return LayerKind.EMBEDDING if _EMBEDDING.search(layer) else LayerKind.OTHER
    if granularity == "block":
        return LayerKind.OTHER
    inside = ".".join(first[block:])
    if all(parameter.dim() == 1 for _, parameter in named) and _NORMALIZATION.search(inside):
        return LayerKind.NORMALIZATION
    if _ATTENTION.search(inside):
        return LayerKind.ATTENTION
    return LayerKind.FEED_FORWARD if _FEED_FORWARD.search(inside) else LayerKind.OTHER
