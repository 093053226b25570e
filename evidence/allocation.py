"""How a budget is dealt to the tensors; within each its coordinates are ranked (evidence.scores)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from evidence.scores import Knowledge


def shares(model: nn.Module, share: float, rules: Sequence[str], known: Knowledge) -> dict[str, float]:
    """Share of each tensor that is trained, by name; the sum over all parameters is `share` of them.

    Without rules every tensor gives the same. `vectors` trains vectors whole, which take no more than a thousandth of a
    model, and matrices a little less. `linear` gives embeddings (a tied head with them) and vectors nothing and the
    matrices of linear layers more. `balanced0.5` gives a tensor a share that grows with the root of its gradients'
    size, and so on with other exponents.
    """
    tensors = dict(model.named_parameters())
    budget = share * sum(each.numel() for each in tensors.values())
    weights = dict.fromkeys(tensors, 1.0)
    for rule in rules:
        if rule.startswith("balanced"):
            weights = {name: _size(known, name) ** float(rule.removeprefix("balanced")) for name in tensors}
    found = {}
    if "vectors" in rules:
        found = {name: 1.0 for name, each in tensors.items() if each.dim() < 2}
        budget -= sum(tensors[name].numel() for name in found)
    if "linear" in rules:
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        found = {name: 0.0 for name, each in tensors.items() if each.dim() < 2 or each in embeddings}
    rest = [name for name in tensors if name not in found]
    while rest:  # a tensor that would give more than all of itself gives all, and the others share what is left
        scale = budget / sum(weights[name] * tensors[name].numel() for name in rest)
        whole = [name for name in rest if scale * weights[name] >= 1]
        if not whole:
            return found | {name: scale * weights[name] for name in rest}
        found |= dict.fromkeys(whole, 1.0)
        budget -= sum(tensors[name].numel() for name in whole)
        rest = [name for name in rest if name not in found]
    return found


def _size(known: Knowledge, name: str) -> float:
    """Root mean square of a tensor's gradient."""
    if known.published is not None:
        return math.sqrt(float(known.published.row[name].mean()))
    assert known.local is not None, "balancing needs a gradient"
    return math.sqrt(float(known.local.square[name].mean()))
