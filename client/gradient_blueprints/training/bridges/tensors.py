"""Which layer of a blueprint a model's tensor lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.selection.indices import prefixes


def layer_of(parameter: str, layers: Set[str]) -> str | None:
    """The blueprint's layer that holds a tensor: the tensor itself, its module, its block, whichever is listed."""
    return next((name for name in prefixes(parameter) if name in layers), None)


def tensor_shares(blueprint: Blueprint, sizes: Mapping[str, int]) -> dict[str, float]:
    """Share of the gradient norm per tensor, a layer's spread by size; 0 outside the blueprint."""
    known = {layer.id for layer in blueprint.layers}
    owner = {name: layer_of(name, known) for name in sizes}
    held: Counter[str | None] = Counter()
    for name, size in sizes.items():
        held[owner[name]] += size
    norms = {layer.id: layer.gradient_norm for layer in blueprint.layers}
    total = sum(norms.values()) or 1.0
    return {
        name: norms[layer] / total * size / held[layer] if (layer := owner[name]) is not None else 0.0
        for name, size in sizes.items()
    }
