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

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Shared:
    """Whether all examples share each input tensor and each floating output of a call."""

    inputs: list[bool]
    outputs: list[bool]


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

    def __init__(self, model: nn.Module, names: dict[str, str], arrive: Callable[[str, Contribution], None]) -> None:
        self._arrive = arrive
        self.examples = 0
        self.scale: Tensor | None = None
        self.uses: Counter[str] = Counter()
        self.forward_phase = False
        self.recording = False
        self._in_rule = False
        self._single: dict[tuple[str, int], tuple[list[Shape], list[Shape]]] = {}
        self._shared: dict[tuple[str, int], _Shared] = {}
        self._calls: Counter[str] = Counter()
        self._handles = []
        for path, module in model.named_modules():
            # BERT's head lists its decoder's bias once more without using it: the innermost owner uses it
            paths = {
                name: f"{path}.{name}" if path else name for name, _ in module.named_parameters(remove_duplicate=False)
            }
            here = {name: names[full] for name, full in paths.items() if full in names}
            inner = {name for local, name in here.items() if local not in module._parameters}
            own = {local: name for local, name in here.items() if local in module._parameters and name not in inner}
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
            shared = self._shared_tensors(path, inputs, outputs)
            examples, scale = self.examples, self.scale
            watched = [self._watchable(path, *pair) for pair in zip(outputs, shared.outputs, strict=True)]
            if len(watched) > 1:  # one output may be computed from another; views part what the model adds to each
                watched = [tensor.view_as(tensor) for tensor in watched]
            rows = [_rows(path, tensor, examples) for tensor in watched]
            common = iter(shared.inputs)
            kept = map_leaves(
                lambda tensor: _Kept(_keep(tensor), None if next(common) else _rows(path, tensor, examples)),
                (args, kwargs),
            )

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

    def _shared_tensors(self, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> _Shared:
        """Which of a call's tensors all examples share: those that are as large when the model runs one example.

        Learnt from the first batch, beside one example of the same length, and then kept.
        """
        shapes = [tuple(t.shape) for t in inputs], [tuple(t.shape) for t in outputs]
        key = (path, self._calls[path])
        if self.forward_phase:
            self._calls[path] += 1
        elif key not in self._single:  # recomputed by checkpointing: the order of calls says nothing
            key = (path, 0)
        if self.recording:
            self._single[key] = shapes
        if self.examples == 1:
            return _Shared([False] * len(inputs), [False] * len(outputs))
        if key not in self._shared:
            if key not in self._single:
                raise ExamplesMixed(f"{path} was not called when the model ran one example.")
            self._shared[key] = _Shared(
                *(
                    _compared(path, mine, alone, self.examples)
                    for mine, alone in zip(shapes, self._single[key], strict=True)
                )
            )
        found = self._shared[key]
        if (len(found.inputs), len(found.outputs)) != (len(inputs), len(outputs)):
            raise ExamplesMixed(f"{path} is called in several ways.")
        return found

    def _watchable(self, path: str, output: Tensor, shared: bool) -> Tensor:
        """An output whose gradient arrives, and arrives by example."""
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a leaf could not be changed in place by the model
        if shared:
            if not output.shape or output.shape[0] != 1:
                raise ExamplesMixed(f"{path} computes one output {tuple(output.shape)} for all examples.")
            output = output.expand(self.examples, *output.shape[1:])
        return output


def _compared(path: str, shapes: list[Shape], alone: list[Shape], examples: int) -> list[bool]:
    """Whether each tensor of a batch is as large as for one example; otherwise it must be so many times as long."""
    if len(shapes) != len(alone):
        raise ExamplesMixed(f"{path} is called in another way when the model runs one example.")
    for shape, single in zip(shapes, alone, strict=True):
        if shape != single and shape != (single[0] * examples, *single[1:]):
            raise ExamplesMixed(f"{path}: {shape} for {examples} examples and {single} for one; their rows are mixed.")
    return [shape == single for shape, single in zip(shapes, alone, strict=True)]


def _rows(path: str, tensor: Tensor, examples: int) -> int | None:
    """Leading rows of one example."""
    if not tensor.dim():
        return None
    if tensor.shape[0] % examples:
        raise ExamplesMixed(f"{path}: {tensor.shape[0]} rows are no multiple of {examples} examples.")
    return tensor.shape[0] // examples


def _scaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return gradient
    shaped = gradient.reshape(scale.numel(), -1)
    return (shaped * scale.to(gradient).unsqueeze(1)).view_as(gradient)


def _tensors(value: Nested) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(found.append, value)
    return found
