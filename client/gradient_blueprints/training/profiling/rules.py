"""Which per-example gradients a module's input and output gradient give, one rule per kind of layer.

A rule takes one finished call of a module and returns a contribution per parameter. Modules without a
rule of their own go through `recomputed`, which differentiates the module again, example by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from gradient_blueprints.training.profiling.contributions import Computed, Contribution, Dense, Lookup, Outer
from gradient_blueprints.training.profiling.offload import weights_of

Nested = Any  # tensors (or operands) inside tuples, lists and dicts


@dataclass(slots=True)
class Operand:
    """A tensor of a call and the leading rows that belong to one example; None when all examples share it."""

    tensor: Tensor
    rows: int | None

    def of_example(self, example: int) -> Tensor:
        return self.tensor if self.rows is None else self.tensor[example * self.rows : (example + 1) * self.rows]


@dataclass(slots=True)
class Call:
    """One call of a module: what went in, and the gradient of each floating output, in order."""

    module: nn.Module
    args: Nested  # of operands
    kwargs: Nested
    gradients: list[Operand | None]
    examples: int

    @property
    def input(self) -> Operand:
        first: Operand = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return first

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def gradient(self) -> Operand:
        gradient = self.gradients[0]
        assert gradient is not None
        return gradient

    def by_example(self, operand: Operand, tensor: Tensor | None = None) -> Tensor:
        """(examples, rows, features): batched, flattened and shared tensors alike."""
        tensor = operand.tensor if tensor is None else tensor
        if operand.rows is None:
            return tensor.reshape(1, -1, tensor.shape[-1]).expand(self.examples, -1, -1)
        return tensor.reshape(self.examples, -1, tensor.shape[-1])


Rule = Callable[[Call], Mapping[str, Contribution]]


def rule_for(module: nn.Module) -> Rule:
    """The rule of a module with parameters of its own."""
    if type(module) in _RULES:
        return _RULES[type(module)]
    if type(module).__name__ == "Conv1D" and _is_transposed_linear(module):
        return transposed_linear
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros" and module.groups == 1:
        return convolution
    if _may_be_elementwise(module):
        return Elementwise()
    return recomputed


def linear(call: Call) -> dict[str, Contribution]:
    """y = x W^T + b: g_W = G^T X, g_b = sum_t G."""
    inputs, gradients = call.by_example(call.input), call.by_example(call.gradient)
    found: dict[str, Contribution] = {"weight": Outer(inputs, gradients, call.weight.shape)}
    return _with_bias(call, found, gradients)


def transposed_linear(call: Call) -> dict[str, Contribution]:
    """Hugging Face's Conv1D, y = x W + b: g_W = X^T G."""
    inputs, gradients = call.by_example(call.input), call.by_example(call.gradient)
    found: dict[str, Contribution] = {"weight": Outer(inputs, gradients, call.weight.shape, transposed=True)}
    return _with_bias(call, found, gradients)


def _with_bias(call: Call, found: dict[str, Contribution], gradients: Tensor) -> dict[str, Contribution]:
    if getattr(call.module, "bias", None) is not None:
        found["bias"] = Dense(_sum_positions(gradients))
    return found


def embedding(call: Call) -> Mapping[str, Contribution]:
    """y = W[ids]: row v collects the gradients of the positions where id is v; padding_idx collects none."""
    module = call.module
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq or module.max_norm is not None:
        return recomputed(call)
    gradients = call.by_example(call.gradient)
    ids = call.by_example(call.input, call.input.tensor.unsqueeze(-1)).squeeze(-1)  # position ids may be shared
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return {"weight": Lookup(ids, gradients, module.weight.shape)}


def layer_norm(call: Call) -> Mapping[str, Contribution]:
    """y = w * x_hat + b: g_w = sum_t x_hat * g, g_b = sum_t g."""
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        return recomputed(call)
    normalized = functional.layer_norm(call.input.tensor, module.normalized_shape, eps=module.eps)
    gradients = call.by_example(call.gradient)
    found: dict[str, Contribution] = {
        "weight": Dense(_sum_products(call.by_example(call.input, normalized), gradients))
    }
    return _with_bias(call, found, gradients)


def convolution(call: Call) -> dict[str, Contribution]:
    """A convolution is a linear layer on unfolded patches."""
    module = call.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if call.input.rows != 1 or call.gradient.rows != 1:
        return recomputed(call)
    images, gradients = call.input.tensor, call.gradient.tensor
    if images.dim() != len(module.kernel_size) + 2 or isinstance(module.padding, str):
        return recomputed(call)
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    if isinstance(module, nn.Conv1d):  # a picture of height 1
        images, gradients = images.unsqueeze(2), gradients.unsqueeze(2)
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
    patches = functional.unfold(images, kernel, dilation, padding, stride).mT  # (n, places, channels * kernel)
    gradients = gradients.flatten(2).mT  # (n, places, filters)
    found: dict[str, Contribution] = {"weight": Outer(patches, gradients, module.weight.shape)}
    return _with_bias(call, found, gradients)


class Elementwise:
    """Norm layers of any name: y = x_hat(x) * (w + constant) + b along the last dimension, known by behaviour.

    On its first call the module is run with other weights: the output must follow the formula, and no
    output may depend on a weight of another column. A module that does not is differentiated again.
    """

    def __init__(self) -> None:
        self._confirmed: bool | None = None
        self._offset = False

    def __call__(self, call: Call) -> Mapping[str, Contribution]:
        if self._confirmed is None:
            self._confirmed = self._confirm(call)
        if not self._confirmed:
            return recomputed(call)
        slope = self._run(call, 1.0)
        if self._offset:
            slope = slope - self._run(call, 0.0)
        gradients = call.by_example(call.gradient)
        found: dict[str, Contribution] = {"weight": Dense(_sum_products(call.by_example(call.input, slope), gradients))}
        return _with_bias(call, found, gradients)

    def _run(self, call: Call, weight: float | Tensor, bias: Tensor | None = None) -> Tensor:
        """The module's output at another weight; at bias 0 unless told."""
        none = torch.zeros(call.weight.shape, dtype=call.weight.dtype, device=call.gradient.tensor.device)
        values = {"weight": none + weight}
        if getattr(call.module, "bias", None) is not None:
            values["bias"] = none if bias is None else bias
        output: Tensor = _run(call.module, values, whole(call.args), whole(call.kwargs))
        return output

    def _confirm(self, call: Call) -> bool:
        shape = call.input.tensor.shape
        if len(call.gradients) != 1 or shape[-1:] != call.weight.shape:
            return False
        one, zero = self._run(call, 1.0), self._run(call, 0.0)
        if one.shape != shape:
            return False
        self._offset = bool(zero.ne(0).any())
        columns = torch.arange(one.shape[-1], device=one.device, dtype=torch.float32)
        weight, bias = torch.sin(3 * columns + 1).to(one.dtype), torch.cos(5 * columns).to(one.dtype)
        expected = zero + (one - zero) * weight
        if getattr(call.module, "bias", None) is not None:
            expected = expected + bias
        found = self._run(call, weight.to(call.weight.dtype), bias.to(call.weight.dtype))
        tolerance = 8 * torch.finfo(one.dtype).eps * float(one.abs().max() + zero.abs().max() + 1)
        return bool(((found - expected).abs() <= tolerance).all())


def recomputed(call: Call) -> dict[str, Contribution]:
    """Any other module: run it again for each example on its own rows and differentiate by its parameters.

    Right whenever the module treats the examples apart and always in the same way, which the
    profiler's first step verifies against autograd.
    """
    parameters = weights_of(call.module)
    cached: dict[int, dict[str, Tensor]] = {}

    def gradients_of(example: int) -> dict[str, Tensor]:
        if example not in cached:
            cached.clear()  # one example at a time: a parameter may be as large as all the experts of a layer
            cached[example] = _differentiate(call, parameters, example)
        return cached[example]

    def one(name: str) -> Callable[[int], Tensor]:
        return lambda example: gradients_of(example)[name]

    if sum(p.numel() for p in parameters.values()) * call.examples <= _SMALL:
        each = [_differentiate(call, parameters, i) for i in range(call.examples)]
        return {name: Dense(torch.stack([gradients[name] for gradients in each])) for name in parameters}
    return {name: Computed(one(name), call.examples, parameter.shape) for name, parameter in parameters.items()}


_SMALL = 1 << 22  # per-example gradients of a module that may be held at once, in elements


def _differentiate(call: Call, parameters: Mapping[str, Tensor], example: int) -> dict[str, Tensor]:
    def rows(value: Nested) -> Nested:
        return map_leaves(lambda operand: operand.of_example(example), value, Operand)

    with torch.enable_grad():
        values = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        outputs = floating(_run(call.module, values, rows(call.args), rows(call.kwargs)))
        pairs = [
            (output, gradient.of_example(example))
            for output, gradient in zip(outputs, call.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(values.values()),
            [gradient.to(output.dtype).view_as(output) for output, gradient in pairs],
            allow_unused=True,
        )
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(values.items(), found, strict=True)
    }


class _Bare(nn.Module):
    """A module without the hooks of those who move its weights around (accelerate, FSDP)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, "_old_forward", self.inner.forward)(*args, **kwargs)


def _run(module: nn.Module, values: Mapping[str, Tensor], args: Nested, kwargs: Nested) -> Any:
    """The module's forward with other values of its own parameters."""
    return functional_call(_Bare(module), {f"inner.{name}": value for name, value in values.items()}, args, kwargs)


def map_leaves(function: Callable[[Any], Any], value: Nested, kind: type = Tensor) -> Nested:
    """The same structure with every leaf of that kind replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, item, kind) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(function, item, kind) for item in value)
    if type(value) is dict:
        return {key: map_leaves(function, item, kind) for key, item in value.items()}
    return value


def whole(value: Nested) -> Nested:
    """The structure with the operands' tensors in their places."""
    return map_leaves(lambda operand: operand.tensor, value, Operand)


def floating(value: Nested) -> list[Tensor]:
    """The floating-point tensors of a structure, in order."""
    found: list[Tensor] = []
    map_leaves(lambda tensor: found.append(tensor) if tensor.is_floating_point() else None, value)
    return found


def _sum_positions(gradients: Tensor) -> Tensor:
    wide = gradients if gradients.dtype == torch.float64 else gradients.float()
    return wide.sum(1)  # (n, p)


def _sum_products(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype != torch.float64:
        left, right = left.float(), right.float()
    return torch.einsum("ntd,ntd->nd", left, right)


def _is_transposed_linear(module: nn.Module) -> bool:
    weight, outputs = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == outputs


def _may_be_elementwise(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and set(parameters) <= {"weight", "bias"}
        and all(parameter.shape == weight.shape for parameter in parameters.values())
        and not list(module.children())
        and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    )


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
}
