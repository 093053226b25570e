"""Mixtures of experts: which parameters are experts', and how many of these a token meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

ROUTED = ("num_experts_per_tok", "top_k_experts", "moe_topk")
EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")


def routed_shares(model: nn.Module) -> dict[nn.Parameter, float | None]:
    """Share of the experts that a token is routed to, of every parameter of theirs; None where nothing tells.

    Experts are the stacks of a module with `num_experts`, and whatever lies under the name `experts`.
    """
    modules = dict(model.named_modules())
    shares: dict[nn.Parameter, float | None] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            stacked = parameter.dim() == 3 and getattr(module, "num_experts", None) == len(parameter)
            if stacked or "experts" in name.split("."):
                shares[parameter] = next(filter(None, (_told(modules[around]) for around in _around(name))), None)
    return shares


def _around(name: str) -> Iterator[str]:
    """The module and those that it lies in, the nearest first: of models of several parts each is configured."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield name


def _told(module: nn.Module) -> float | None:
    """By the module's own configuration."""
    config = getattr(module, "config", None)
    routed, experts = _first(config, ROUTED), _first(config, EXPERTS)
    return routed / experts if routed and experts else None


def _first(config: Any, keys: Sequence[str]) -> int | None:
    for key in keys:
        with suppress(RuntimeError):  # of transformers, where the layers of a model differ in it
            if isinstance(told := getattr(config, key, None), int):
                return told
    return None
