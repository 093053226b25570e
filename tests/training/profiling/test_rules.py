"""One kind of layer at a time, over shapes, against a loop of autograd in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gradient_blueprints.training.profiling import GradientProfiler

sizes = st.integers(1, 7)


class Toy(nn.Module):
    """A trunk between inputs of its own kind and a scalar per example; no example sees another."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.trunk(inputs)
        return output


def squared_sum(outputs: Tensor, batch: Any) -> Tensor:
    """A loss per example whose gradient differs at every output."""
    flat = outputs.flatten(1)
    return (flat * torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype))).sum(1).square()


def assert_rules_match(model: nn.Module, inputs: Tensor, *, one_pass: bool = True, tolerance: float = 1e-9) -> None:
    model = model.double().eval()
    exact = copy.deepcopy(model)
    with GradientProfiler(model, groups="tensor", loss=squared_sum, verify=False) as profiler:
        profiler.step({"inputs": inputs})
        assert (profiler.one_by_one is None) == one_pass, profiler.one_by_one
    table = profiler.table()
    norms = profiler.domain().records[0].norms
    assert norms is not None
    totals: dict[str, Any] = {name: 0 for name, _ in exact.named_parameters()}
    for example in range(len(inputs)):
        exact.zero_grad()
        row = inputs[example : example + 1]
        squared_sum(exact(inputs=row), None).sum().backward()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(profiler.layers):
            gradient = exact.get_parameter(layer.id).grad
            expected = torch.zeros(()) if gradient is None else gradient
            np.testing.assert_allclose(table[index, example], float(expected.norm()), rtol=tolerance, atol=1e-9)
            totals[layer.id] = totals[layer.id] + expected
    for index, layer in enumerate(profiler.layers):
        mean = totals[layer.id] / len(inputs)
        np.testing.assert_allclose(norms[index], float(mean.norm()), rtol=tolerance, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(1, 40), sizes, sizes, st.booleans())
def test_linear_of_any_shape(examples: int, positions: int, inputs: int, outputs: int, bias: bool) -> None:
    """Short inputs go by Gram matrices, long ones by written-out gradients."""
    torch.manual_seed(examples * positions)
    trunk = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.GELU(), nn.Linear(outputs, 30, bias=bias))
    assert_rules_match(Toy(trunk), torch.randn(examples, positions, inputs, dtype=torch.float64))


@settings(max_examples=10, deadline=None)
@given(sizes, sizes, sizes)
def test_transposed_linear(examples: int, positions: int, width: int) -> None:
    torch.manual_seed(width)
    trunk = nn.Sequential(Conv1D(2 * width, width), nn.GELU(), Conv1D(3, 2 * width))
    assert_rules_match(Toy(trunk), torch.randn(examples, positions, width, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(3, 9), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))
def test_convolutions(examples: int, side: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    torch.manual_seed(side)
    kernel = min(kernel, (side - 1) // dilation + 1)
    flat = nn.Sequential(nn.Conv1d(2, 3, kernel, stride, padding, dilation), nn.Tanh())
    assert_rules_match(Toy(flat), torch.randn(examples, 2, side, dtype=torch.float64))
    square = nn.Sequential(nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=False), nn.Tanh())
    assert_rules_match(Toy(square), torch.randn(examples, 2, side, side, dtype=torch.float64))


def test_grouped_convolution_is_differentiated_again() -> None:
    assert_rules_match(Toy(nn.Conv1d(4, 4, 3, groups=2)), torch.randn(3, 4, 8, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(sizes, sizes, st.integers(2, 9), st.integers(1, 5), st.booleans())
def test_embedding_with_repeated_ids_and_padding(
    examples: int, positions: int, rows: int, width: int, padding: bool
) -> None:
    torch.manual_seed(rows)
    trunk = nn.Sequential(nn.Embedding(rows, width, padding_idx=1 if padding else None), nn.Linear(width, 2), nn.Tanh())
    assert_rules_match(Toy(trunk), torch.randint(0, rows, (examples, positions)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm((5, 6)), nn.RMSNorm(6)])
def test_norm_layers(norm: nn.Module) -> None:
    torch.manual_seed(0)
    assert_rules_match(Toy(nn.Sequential(nn.Linear(4, 6), norm)), torch.randn(3, 5, 4, dtype=torch.float64))


class Shifted(nn.Module):
    """A norm layer of another name: its weight counts from 1, as in Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x / x.norm(dim=-1, keepdim=True) * (1 + self.weight) + self.bias
        return output


class Squaring(Shifted):
    """Looks like a norm layer and is none: the output is not linear in the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight**2 + self.bias


class Mixing(nn.Module):
    """Looks like a norm layer and is none: every output depends on every weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x * self.weight.sum()
        return output


@pytest.mark.parametrize("kind", [Shifted, Squaring, Mixing])
def test_norms_are_known_by_behaviour_and_not_by_name(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert_rules_match(Toy(nn.Sequential(nn.Linear(4, 6), kind())), torch.randn(3, 5, 4, dtype=torch.float64))


class Unusual(nn.Module):
    """Two parameters, two outputs of which one is computed from the other, and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.gain = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, *, twice: bool) -> tuple[Tensor, Tensor]:
        first = torch.sin(x @ self.mix)
        return first, first.cumsum(-1)[..., :3] * self.gain * (2 if twice else 1)


class WithUnusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.unusual = nn.Linear(4, 4), Unusual()

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.unusual(self.before(inputs), twice=True)
        return torch.cat([first.square(), second], -1)


def test_an_unknown_module_is_differentiated_again() -> None:
    torch.manual_seed(0)
    assert_rules_match(WithUnusual(), torch.randn(3, 5, 4, dtype=torch.float64))


class Tied(nn.Module):
    """One matrix as embedding, as inner layer and as head; two positions share an id."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.inner.weight = self.head.weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.inner(self.embed(inputs))))
        return output


def test_a_matrix_used_three_times_has_all_its_cross_terms() -> None:
    torch.manual_seed(0)
    assert_rules_match(Tied(), torch.randint(0, 6, (4, 5)))


class Functional(nn.Module):
    """Uses another module's weight without calling that module; hooks cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.first(inputs)), self.second.weight)


def test_a_weight_used_without_its_module_is_found_and_measured_by_autograd() -> None:
    torch.manual_seed(0)
    model, inputs = Functional().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    with GradientProfiler(model, groups="tensor", loss=squared_sum) as profiler:
        profiler.step({"inputs": inputs})
        assert profiler.one_by_one is not None
        assert "second.weight" in profiler.one_by_one
    index = [layer.id for layer in profiler.layers].index("second.weight")
    for example in range(3):
        model.zero_grad()
        squared_sum(model(inputs=inputs[example : example + 1]), None).sum().backward()  # type: ignore[no-untyped-call]
        gradient = model.second.weight.grad
        assert gradient is not None
        assert profiler.table()[index, example] == pytest.approx(float(gradient.norm()), rel=1e-9)


def test_gradients_that_a_model_holds_are_not_measured_and_stay_where_autograd_measures() -> None:
    torch.manual_seed(0)
    model, inputs = Functional(), torch.randn(3, 5, 4)
    tables = []
    for held in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if held else None
        with GradientProfiler(model, loss=squared_sum) as profiler:
            profiler.step({"inputs": inputs})
        tables.append(profiler.table())
    assert (tables[0] == tables[1]).all()
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


class Occasional(Functional):
    """Needs the weight that hooks cannot see only for batches that bring `more`."""

    def forward(self, inputs: Tensor, more: Tensor | None = None) -> Tensor:
        first = torch.tanh(self.first(inputs))
        return first if more is None else functional.linear(first + more, self.second.weight)


def test_batches_with_other_inputs_are_held_against_autograd_too() -> None:
    torch.manual_seed(0)
    model, inputs = Occasional().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    with GradientProfiler(model, groups="tensor", loss=squared_sum) as profiler:
        profiler.step({"inputs": inputs})
        before = profiler.one_by_one
        profiler.step({"inputs": inputs, "more": inputs})
        after = profiler.one_by_one
    assert before is None
    assert after is not None
    assert "second.weight" in after
    index = [layer.id for layer in profiler.layers].index("second.weight")
    assert (profiler.table()[index, :3] == 0).all()
    squared_sum(model(inputs=inputs[:1], more=inputs[:1]), None).sum().backward()  # type: ignore[no-untyped-call]
    assert model.second.weight.grad is not None
    assert profiler.table()[index, 3] == pytest.approx(float(model.second.weight.grad.norm()), rel=1e-9)


class Marked(nn.Module):
    """A bias takes the place of inputs above 9, past its module; `always`: also where there are none, to no effect."""

    def __init__(self, *, always: bool) -> None:
        super().__init__()
        self.first, self.marker, self.always = nn.Linear(4, 4), nn.Linear(4, 4), always

    def forward(self, inputs: Tensor) -> Tensor:
        marked = inputs[..., :1] > 9
        if self.always or bool(marked.any()):
            inputs = torch.where(marked, self.marker.bias, inputs)
        return torch.tanh(self.first(inputs))


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("always", [True, False])
def test_a_parameter_that_the_first_example_does_not_use_is_measured_once_another_does(
    always: bool, micro_batch: int | None
) -> None:
    torch.manual_seed(0)
    model = Marked(always=always).double().eval()
    inputs = torch.randn(6, 5, 4, dtype=torch.float64)
    inputs[[3, 5], 2, 0] = 10
    expected = []
    for example in range(6):
        model.zero_grad()
        squared_sum(model(inputs=inputs[example : example + 1]), None).sum().backward()  # type: ignore[no-untyped-call]
        expected.append(0.0 if model.marker.bias.grad is None else float(model.marker.bias.grad.norm()))
    model.zero_grad()
    with GradientProfiler(model, groups="tensor", loss=squared_sum, micro_batch=micro_batch) as profiler:
        profiler.step({"inputs": inputs[:2]})
        assert (profiler.one_by_one is None) == (not always)
        profiler.step({"inputs": inputs[2:]})
        assert profiler.one_by_one == "No rule gives the gradient of marker.bias."
    row = [layer.id for layer in profiler.layers].index("marker.bias")
    np.testing.assert_allclose(profiler.table()[row], expected, rtol=1e-9, atol=1e-12)
    assert expected[5] > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Transposing(nn.Module):
    """Works on (positions, examples, width), as torch's own transformer layers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs.transpose(0, 1)).transpose(0, 1)
        return output.tanh()


@pytest.mark.parametrize("positions", [3, 5])
def test_rows_that_are_not_in_the_order_of_examples_are_noticed(positions: int) -> None:
    """Even where as many positions as examples make the shapes look right."""
    torch.manual_seed(0)
    model, inputs = Transposing().double().eval(), torch.randn(3, positions, 4, dtype=torch.float64)
    with GradientProfiler(model, groups="tensor", loss=squared_sum) as profiler:
        profiler.step({"inputs": inputs})
        assert profiler.one_by_one is not None
    model.zero_grad()
    squared_sum(model(inputs=inputs[1:2]), None).sum().backward()  # type: ignore[no-untyped-call]
    assert model.layer.weight.grad is not None
    assert profiler.table()[0, 1] == pytest.approx(float(model.layer.weight.grad.norm()), rel=1e-9)
