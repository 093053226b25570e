"""Fine-tuning a selection: AdamW whose state, and whose gradients, exist for the chosen coordinates alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.selection import Selection

INT32_ENTRIES = 2**31 - 1


@dataclass(frozen=True, eq=False)
class SelectedParameter:
    """A tensor of the model and the flat indices of it that are trained; None means all."""

    name: str
    parameter: nn.Parameter
    indices: torch.Tensor | None

    @property
    def selected(self) -> int:
        return self.parameter.numel() if self.indices is None else self.indices.numel()


def apply_selection(model: nn.Module, selection: Selection) -> list[SelectedParameter]:
    """Freeze what is not selected; what is, is returned for `SelectedAdamW`.

    A tensor of which some coordinates are selected keeps `requires_grad`: its gradient is computed whole, as it has
    to be, and freed as soon as the chosen entries are read off. Raises ConfigurationError when the selection names
    nothing of this model.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        indices = selection.indices(name, tuple(parameter.shape))
        parameter.requires_grad_(indices is None or len(indices) > 0)
        if not parameter.requires_grad:
            continue
        if indices is not None and not parameter.is_contiguous():
            raise ConfigurationError(f"{name} is not contiguous in memory: its coordinates cannot be updated in place")
        dtype = torch.int32 if parameter.numel() <= INT32_ENTRIES else torch.int64
        chosen.append(
            SelectedParameter(
                name,
                parameter,
                None if indices is None else torch.tensor(indices, dtype=dtype, device=parameter.device),
            )
        )
    if not chosen:
        raise ConfigurationError(
            f"the selection for {selection.model_id} selects nothing in this model: are its tensors named otherwise?"
        )
    return chosen


class SelectedAdamW(torch.optim.Optimizer):
    """AdamW over selected coordinates, equal to dense AdamW whose gradients and decay are masked to them.

    >>> # optimizer = SelectedAdamW(apply_selection(model, selection), lr=1e-3)
    >>> # loss.backward(); optimizer.step(); optimizer.zero_grad()

    During `backward` a hook reads the chosen entries off each tensor's gradient as soon as it is accumulated and
    frees the rest, so no more than one full gradient of one tensor exists at a time. `parameter.grad` is therefore
    None after `backward`: `torch.nn.utils.clip_grad_norm_` would silently do nothing. Give `max_norm` instead, which
    clips by the global norm of the selected gradient, as clipping masked gradients would. Several backward passes
    before a step add up. State is float32 or wider; of weights of lower precision a float32 copy of the chosen is kept.
    Not for use with `torch.amp.GradScaler` (its unscaling needs `parameter.grad`); bfloat16 needs no scaler.
    """

    def __init__(
        self,
        selected: Iterable[SelectedParameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
    ) -> None:
        self.selected = list(selected)
        self.max_norm = max_norm
        self.last_norm: float | None = None
        """Norm of the selected gradient at the last step, before clipping; measured only with `max_norm`."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([entry.parameter for entry in self.selected], defaults)
        self._by_parameter = {entry.parameter: entry for entry in self.selected}
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self.largest_gradient_bytes = 0
        """Largest full gradient of one tensor seen, the only one that exists at a time."""
        self._hooks = [
            entry.parameter.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]
            for entry in self.selected  # torch has no types for it
        ]

    def close(self) -> None:
        """Remove the hooks and drop the gradients; the model trains as any other again."""
        for hook in self._hooks:
            hook.remove()
        self._gradients.clear()

    def _take_gradient(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient = parameter.grad
        assert gradient is not None
        self.largest_gradient_bytes = max(self.largest_gradient_bytes, gradient.nbytes)
        chosen = _entries(gradient, self._by_parameter[parameter].indices).to(_state_dtype(parameter))
        kept = self._gradients.get(parameter)
        self._gradients[parameter] = chosen if kept is None else kept.add_(chosen)
        parameter.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One AdamW step (Loshchilov and Hutter 2019, Algorithm 2) on what the backward passes left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip = self._clip_factor()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self._gradients.get(parameter)
                if gradient is not None:
                    self._update(self._by_parameter[parameter], gradient, clip, group)
        return loss

    def _clip_factor(self) -> float:
        if self.max_norm is None or not self._gradients:
            return 1.0
        norms = torch.stack([gradient.norm() for gradient in self._gradients.values()])
        self.last_norm = float(norms.norm())
        return min(1.0, self.max_norm / (self.last_norm + 1e-6))  # 1e-6 as torch.nn.utils.clip_grad_norm_ has it

    def _update(self, entry: SelectedParameter, gradient: torch.Tensor, clip: float, group: dict[str, Any]) -> None:
        state = self.state[entry.parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
            if entry.parameter.dtype != gradient.dtype:
                state["value"] = _entries(entry.parameter.detach(), entry.indices).to(gradient.dtype)
        if clip != 1.0:
            gradient = gradient.mul_(clip)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(correction2)).add_(group["eps"])
        weights = entry.parameter.detach()
        value = state["value"] if "value" in state else _entries(weights, entry.indices)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / correction1)
        if entry.indices is None:
            weights.copy_(value.view_as(weights))
        else:
            weights.view(-1)[entry.indices] = value.to(weights.dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients taken since the last step."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

    def training_bytes(self) -> int:
        """Bytes now held: moments, float32 copies, indices, and the gradients kept for the next step."""
        gradients = sum(gradient.nbytes for gradient in self._gradients.values())
        return self.optimizer_bytes() + gradients

    def optimizer_bytes(self) -> int:
        """Bytes of state now held: moments, float32 copies, and indices."""
        indices = sum(entry.indices.nbytes for entry in self.selected if entry.indices is not None)
        return optimizer_bytes(self) + indices

    def state_dict(self) -> dict[str, Any]:
        """State by tensor name, with the number of coordinates it stands for; the selection is saved on its own."""
        return {
            "state": {
                entry.name: {"selected": entry.selected, **self.state[entry.parameter]}
                for entry in self.selected
                if self.state.get(entry.parameter)
            },
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} for group in self.param_groups
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an optimizer over the same selection."""
        entries = {entry.name: entry for entry in self.selected}
        for name, saved in state_dict["state"].items():
            if name not in entries or saved["selected"] != entries[name].selected:
                raise ConfigurationError(f"the state of {name} belongs to another selection")
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ConfigurationError("the state has another number of parameter groups")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self.state.clear()
        for name, saved in state_dict["state"].items():
            device = entries[name].parameter.device
            self.state[entries[name].parameter] = {
                key: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                for key, value in saved.items()
                if key != "selected"
            }


def _entries(tensor: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """The chosen entries of a tensor; with all chosen the tensor's own memory where it can be."""
    return tensor.flatten() if indices is None else tensor.flatten().index_select(0, indices)


def _state_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in any optimizer's state, as they are held now."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
