"""Several processes: each profiles its own batches, on a whole model or on one whose weights FSDP2 shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.profiling.state import ProfileState, merge


def gather_states(state: ProfileState) -> ProfileState:
    """The state of all processes' batches together, in every process of the default group.

    `profiler.absorb` is for states at hand; this is `merge` over torch.distributed, with sums
    over batches reduced one parameter at a time. Every process must call it; keys must not repeat.
    """
    small = ProfileState(
        state.layers, {name: replace(part, sums={}, squares={}) for name, part in state.domains.items()}
    )
    shapes = {
        (domain, kind, name): (tensor.shape, tensor.dtype)
        for domain, part in state.domains.items()
        for kind in ("sums", "squares")
        for name, tensor in getattr(part, kind).items()
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (small, shapes))
    merged = merge([each for each, _ in gathered])
    merged.domains = {name: replace(part, sums={}, squares={}) for name, part in merged.domains.items()}
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    for (domain, kind, name), (shape, dtype) in sorted({k: v for _, each in gathered for k, v in each.items()}.items()):
        if kind == "squares" and not merged.domains[domain].squared:  # some process has none
            continue
        held: Tensor | None = getattr(state.domains.get(domain), kind, {}).get(name)
        total = torch.zeros(shape, dtype=dtype, device=device) if held is None else held.to(device, copy=True)
        dist.all_reduce(total)
        getattr(merged.domains[domain], kind)[name] = total.cpu()
    return merged


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose reducer waits for gradients that parameters do not get, and the
    one inside `torch.compile(model)`, which renames its parameters."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


class Ranks:
    """The processes that hold parts of one model's parameters (FSDP2): they must run in step, or wait for ever."""

    def __init__(self, model: nn.Module) -> None:
        self.together = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        self._sharded = [m for m in model.modules() if self.together and hasattr(m, "set_requires_gradient_sync")]

    def reshard(self) -> None:
        """Put the sharded parameters, whose flags last, back into the modules."""
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]  # of FSDPModule

    def agree(self, what: str, value: int) -> None:
        """ConfigurationError unless every rank has the same number."""
        if not self.together:
            return
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise ConfigurationError(f"Ranks that share a model's parameters must run in step, but {what}: {values}.")

    def any(self, value: bool) -> bool:
        """Whether it is so on some rank."""
        if not self.together:
            return value
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return any(values)

    def of_first(self, value: Any) -> Any:
        """The first rank's value."""
        if not self.together:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
