"""Which layer of a blueprint a model's tensor lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from torch import nn

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.selection.listed_tensors import listing, tied_names


def layer_of(parameter: str, layers: Set[str]) -> str | None:
    """The blueprint's layer that holds a tensor: the tensor itself, its module, its block, whichever is listed."""
    found = listing([parameter], layers)
    return None if found is None else found[1]


def tensor_shares(blueprint: Blueprint, model: nn.Module) -> dict[str, float]:
    """Share of the gradient norm per tensor, a layer's spread by size; 0 outside the blueprint.

    By the names of `named_parameters`; the blueprint may list a tied tensor by any of its names.
    """
    norms = {layer.id: layer.gradient_norm for layer in blueprint.layers}
    owner: dict[str, str] = {}
    sizes: dict[str, int] = {}
    held: Counter[str] = Counter()
    for names, parameter in tied_names(model):
        sizes[names[0]] = parameter.numel()
        found = listing(names, norms.keys())
        if found is not None:
            owner[names[0]] = found[1]
            held[found[1]] += parameter.numel()
    total = sum(norms.values()) or 1.0
    return {
        name: norms[layer] / total * size / held[layer] if (layer := owner.get(name)) is not None else 0.0
        for name, size in sizes.items()
    }
