"""Weights that accelerate keeps on disk or on the host and lends to a module for its forward pass.

Outside that pass the module's parameters are on the meta device, and every loan is a new tensor. Two
things follow: autograd would keep each lent weight until the backward pass, so that the whole model is
on the device after all; and gradients of parameters land on tensors that nobody can name any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradient_blueprints.errors import ConfigurationError


def lender_of(module: nn.Module) -> Any | None:
    """The accelerate hook that lends the module its own weights."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):  # a SequentialHook holds several
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by local name, read from where they are kept."""
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:
            lender = lender_of(module)
            if lender is None:
                raise ConfigurationError(f"{type(module).__name__}.{name} is on the meta device and nothing lends it.")
            found[name] = lender.weights_map[name].to(lender.execution_device, parameter.dtype)
        else:
            found[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()
    return found


@dataclass(slots=True)
class _Note:
    """In place of a weight that autograd wants to keep: where to read it again."""

    lender: Any
    name: str
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        weight: Tensor = self.lender.weights_map[self.name].to(self.lender.execution_device, self.dtype)
        return weight.as_strided(self.size, self.stride, self.offset)


class OffloadedWeights:
    """Watches the loans of a model until `close`; does nothing for a model that is all in memory."""

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self._lent: dict[int, tuple[Any, str]] = {}  # by address, while a module has them
        self._leaves: dict[str, list[Tensor]] = {}
        self._lenders: list[Any] = []
        for path, module in model.named_modules():
            lender = lender_of(module)
            if lender is not None:
                paths = {n: f"{path}.{n}" if path else n for n, _ in module.named_parameters()}
                self._watch(lender, {n: names[full] for n, full in paths.items() if full in names})

    def close(self) -> None:
        for lender in self._lenders:
            del lender.pre_forward, lender.post_forward
        self._lenders.clear()

    def _watch(self, lender: Any, names: Mapping[str, str]) -> None:
        lend: Callable[..., Any] = lender.pre_forward
        take_back: Callable[..., Any] = lender.post_forward

        def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            lent = lend(module, *args, **kwargs)
            for name, weight in module.named_parameters(recurse=lender.place_submodules):
                self._lent[weight.untyped_storage().data_ptr()] = (lender, name)
                if weight.requires_grad and name in names:
                    self._leaves.setdefault(names[name], []).append(weight)
            return lent

        def post_forward(module: nn.Module, output: Any) -> Any:
            for _, weight in module.named_parameters(recurse=lender.place_submodules):
                self._lent.pop(weight.untyped_storage().data_ptr(), None)
            return take_back(module, output)

        lender.pre_forward, lender.post_forward = pre_forward, post_forward
        self._lenders.append(lender)

    @contextmanager
    def not_kept(self) -> Iterator[None]:
        """Around a forward pass: its backward pass reads lent weights again instead of keeping them."""
        if not self._lenders:
            yield
            return

        def pack(tensor: Tensor) -> Any:
            lent = self._lent.get(tensor.untyped_storage().data_ptr())
            if lent is None:
                return tensor
            return _Note(*lent, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

        with saved_tensors_hooks(pack, lambda kept: kept.read() if isinstance(kept, _Note) else kept):
            yield

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the loans that required one, by the parameter's name."""
        found: dict[str, Tensor] = {}
        for name, leaves in self._leaves.items():
            for gradient in {id(leaf): leaf.grad for leaf in leaves}.values():
                if gradient is not None:
                    found[name] = found[name] + gradient if name in found else gradient
        return found

    def forget(self) -> None:
        """Let go of the loans that required a gradient."""
        self._leaves.clear()
