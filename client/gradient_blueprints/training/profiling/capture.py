"""Hooks that hand every module's inputs and output gradient to its rule during one backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from gradient_blueprints.errors import BlueprintsError
from gradient_blueprints.training.profiling.contributions import Contribution
from gradient_blueprints.training.profiling.rules import Call, Nested, Operand, Rule, floating, map_leaves, rule_for


@dataclass(slots=True)
class _Shapes:
    """Shapes of a call's input tensors and floating outputs."""

    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]

    def alike(self, other: _Shapes) -> bool:
        return len(self.inputs) == len(other.inputs) and len(self.outputs) == len(other.outputs)


class UncoveredParameter(BlueprintsError):
    """The gradient of a parameter cannot be told apart by example in one backward pass."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} Use step(batch), which then runs the examples one by one.")
        self.what = what


class ExamplesMixed(UncoveredParameter):
    """A module's rows cannot be told apart by example."""


class _Keep(torch.autograd.Function):
    """Saves a tensor the way autograd does, so that activation checkpointing drops and recomputes it too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


@dataclass(slots=True)
class _Kept:
    """An input of a call until the backward pass wants it."""

    release: Callable[[], Tensor]
    rows: int | None

    def operand(self) -> Operand:
        return Operand(self.release(), self.rows)


def _keep(tensor: Tensor) -> Callable[[], Tensor]:
    if tensor.requires_grad and torch.is_grad_enabled():
        node = _Keep.apply(tensor).grad_fn  # type: ignore[no-untyped-call]
        return lambda: node.saved_tensors[0].detach()
    tensor = tensor.detach()
    return lambda: tensor


class Capture:
    """Hooks on every module that owns parameters; live until `close`.

    `arrive(parameter name, contribution)` is called during the backward pass for each use of a
    parameter. `single` collects the shapes of a run with one example, by which later runs know
    whether the leading dimension of a tensor counts examples.
    """

    def __init__(self, model: nn.Module, names: dict[int, str], arrive: Callable[[str, Contribution], None]) -> None:
        self._arrive = arrive
        self.examples = 0
        self.scale: Tensor | None = None
        self.uses: Counter[str] = Counter()
        self.forward_phase = False
        self.recording = False
        self._in_rule = False
        self._single: dict[tuple[str, int], _Shapes] = {}
        self._calls: Counter[str] = Counter()
        self._handles = []
        for path, module in model.named_modules():
            # BERT's head lists its decoder's bias once more without using it: the innermost owner uses it
            inner = {id(p) for child in module.children() for p in child.parameters()}
            own = {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) not in inner}
            if own:
                hook = self._hook(path, own, rule_for(module))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, examples: int, *, recording: bool = False, scale: Tensor | None = None) -> None:
        """A forward pass over so many examples is about to start; `scale` multiplies each one's gradient."""
        self.examples, self.recording, self.scale = examples, recording, scale
        self.uses.clear()
        self._calls.clear()
        self.forward_phase = True

    def end(self) -> None:
        """Ignore the model's calls until the next `begin`."""
        self.examples = 0
        self.forward_phase = False

    def _hook(self, path: str, own: dict[str, str], rule: Rule) -> Callable[..., Any]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self.examples or self._in_rule:
                return None
            if self.forward_phase:
                self.uses.update(own.values())
            if not torch.is_grad_enabled():  # the first of two forward passes of reentrant checkpointing
                return None
            outputs = floating(output)
            if not outputs:
                return None
            inputs = _tensors((args, kwargs))
            single = self._single_shapes(path, inputs, outputs)
            watched = [self._watchable(path, *pair) for pair in zip(outputs, single.outputs, strict=True)]
            if len(watched) > 1:  # one output may be computed from another; views part what the model adds to each
                watched = [tensor.view_as(tensor) for tensor in watched]
            examples, scale = self.examples, self.scale
            alone = iter(single.inputs)
            kept = map_leaves(
                lambda tensor: _Kept(_keep(tensor), _rows(path, tensor.shape, next(alone), examples)), (args, kwargs)
            )
            rows = [
                _rows(path, *pair, examples) for pair in zip((t.shape for t in watched), single.outputs, strict=True)
            ]

            def after_backward(gradients: Any) -> None:
                gradients = [gradients] if isinstance(gradients, Tensor) else gradients
                if all(gradient is None for gradient in gradients):
                    return
                with torch.no_grad():
                    operands = [
                        None if gradient is None else Operand(_scaled(gradient, scale), count)
                        for gradient, count in zip(gradients, rows, strict=True)
                    ]
                    inputs, keywords = map_leaves(lambda leaf: leaf.operand(), kept, _Kept)
                    self._in_rule = True  # rules call modules again
                    try:
                        for local, contribution in rule(Call(module, inputs, keywords, operands, examples)).items():
                            if local in own:
                                self._arrive(own[local], contribution)
                    finally:
                        self._in_rule = False

            if len(watched) == 1:
                watched[0].register_hook(after_backward)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            else:
                register_multi_grad_hook(watched, after_backward)
            replaced = {id(old): new for old, new in zip(outputs, watched, strict=True)}
            return map_leaves(lambda tensor: replaced.get(id(tensor), tensor), output)

        return after_forward

    def _single_shapes(self, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> _Shapes:
        """Shapes of this call's inputs and outputs when the model runs one example."""
        shapes = _Shapes([tuple(t.shape) for t in inputs], [tuple(t.shape) for t in outputs])
        key = (path, self._calls[path])
        if self.forward_phase:
            self._calls[path] += 1
        elif key not in self._single:  # recomputed by checkpointing: the order of calls says nothing
            key = (path, 0)
        if self.recording:
            self._single[key] = shapes
        if self.examples == 1:
            return shapes
        if key not in self._single or not self._single[key].alike(shapes):
            raise ExamplesMixed(f"{path} was called in another way when the model ran one example.")
        return self._single[key]

    def _watchable(self, path: str, output: Tensor, single: tuple[int, ...]) -> Tensor:
        """An output whose gradient arrives, and arrives by example."""
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a leaf could not be changed in place by the model
        if self.examples > 1 and tuple(output.shape) == single:
            if output.shape[0] != 1:
                raise ExamplesMixed(f"{path} computes one output {tuple(output.shape)} for all examples.")
            output = output.expand(self.examples, *output.shape[1:])
        return output


def _rows(path: str, shape: tuple[int, ...], single: tuple[int, ...], examples: int) -> int | None:
    """Leading rows of one example; None when the examples share the tensor."""
    if examples == 1:
        return shape[0] if shape else None
    if tuple(shape) == single:
        return None
    if len(shape) == len(single) and shape[0] % examples == 0:
        return shape[0] // examples
    raise ExamplesMixed(f"{path}: {tuple(shape)} for {examples} examples, {single} for one: their rows are mixed.")


def _scaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return gradient
    shaped = gradient.reshape(scale.numel(), -1)
    return (shaped * scale.to(gradient.dtype).unsqueeze(1)).view_as(gradient)


def _tensors(value: Nested) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(found.append, value)
    return found
