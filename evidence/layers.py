"""Which whole layers to train: the paper's rule and its rivals, each within the same number of parameters."""

from __future__ import annotations

import random
import re

import numpy as np
import torch
from torch import nn

from evidence.gradients import Factors
from gradient_blueprints.knapsack import knapsack
from gradient_blueprints.training.profiling.layers import Group, group_parameters


def choose(model: nn.Module, rule: str, share: float, factors: Factors | None, seed: int) -> set[str]:
    """Names of the chosen tensors: a layer is a single tensor here, so that every rule can use up its budget."""
    groups = group_parameters(model, "tensor")
    capacity = round(share * sum(group.size for group in groups))
    if rule == "norm":
        assert factors is not None, "layers are ranked by published factors"
        taken = knapsack(
            [norm(group, model, factors) for group in groups], [group.size for group in groups], capacity
        ).taken
        chosen = [group for group, take in zip(groups, taken, strict=True) if take]
    else:
        chosen = _fill(_order(model, groups, rule, seed), capacity)
    return {name for group in chosen for name in group.parameters}


def norm(group: Group, model: nn.Module, factors: Factors) -> float:
    """√E‖g‖² of the layer, the paper's plain norm, from the published second moment."""
    tensors = dict(model.named_parameters())
    return float(np.sqrt(sum(float(factors.row[name].mean()) * tensors[name].numel() for name in group.parameters)))


def _order(model: nn.Module, groups: list[Group], rule: str, seed: int) -> list[Group]:
    if rule == "random":
        return random.Random(seed).sample(groups, len(groups))  # noqa: S311 - no secret
    if rule == "spectrum":
        return _by_spectrum(model, groups)
    blocks = [group for group in groups if _block(group.id) is not None]
    last_first = sorted(blocks, key=lambda group: -(_block(group.id) or 0))
    if rule == "last":
        return last_first
    assert rule == "last_and_head", rule
    return [group for group in groups if re.search("lm_head|embed", group.id)] + last_first


def _block(layer: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f"{layer}.")
    return None if found is None else int(found[1])


def _fill(order: list[Group], capacity: int) -> list[Group]:
    """In order, each layer that still fits."""
    chosen = []
    for group in order:
        if group.size <= capacity:
            chosen.append(group)
            capacity -= group.size
    return chosen


def _by_spectrum(model: nn.Module, groups: list[Group]) -> list[Group]:
    """Spectrum (Hartford et al. 2024): by signal-to-noise ratio within each kind of matrix, an equal share of each.

    Here the first of every kind, then the second of every kind, until the budget is spent.
    """
    tensors = dict(model.named_parameters())
    kinds: dict[str, list[tuple[float, Group]]] = {}
    for group in groups:
        matrices = [tensors[name] for name in group.parameters if tensors[name].dim() == 2]
        if matrices and _block(group.id) is not None:
            kind = re.sub(r"\.\d+\.", ".", group.id)
            kinds.setdefault(kind, []).append((signal_to_noise(matrices[0].detach()), group))
    ranked = [
        (place, -ratio, group.id, group)
        for members in kinds.values()
        for place, (ratio, group) in enumerate(sorted(members, key=lambda each: -each[0]))
    ]
    return [group for *_, group in sorted(ranked, key=lambda each: each[:3])]


def signal_to_noise(weight: torch.Tensor) -> float:
    """Σ of the singular values above the Marchenko–Pastur edge over Σ of those below, over the largest one.

    The edge is σ(1 + √β), β the matrix's shorter over its longer side, σ the singular values' interquartile range
    over 1.349, as Spectrum's published program has it.
    """
    values = torch.linalg.svdvals(weight.float())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75]))
    sigma = float(quartiles[1] - quartiles[0]) / 1.349
    rows, columns = weight.shape
    edge = sigma * (1 + (min(rows, columns) / max(rows, columns)) ** 0.5)
    above = values > edge
    noise = float(values[~above].sum()) if bool((~above).any()) else 1.0
    return float(values[above].sum()) / noise / float(values[0])
