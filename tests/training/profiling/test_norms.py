"""Every (parameter, example) norm and every batch norm, against looped float64 autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.contributions import Outer, square
from tests.training.profiling.small_models import (
    ARCHITECTURES,
    Batch,
    batch,
    batch_gradients,
    build,
    looped_gradients,
)

TOLERANCE = 1e-5


def assert_norms_match(
    model: nn.Module, values: Batch, tolerance: float = TOLERANCE, **options: object
) -> GradientProfiler:
    """Per-example and batch norms of every parameter agree with the oracle."""
    looped = looped_gradients(model, values)
    whole = batch_gradients(model, values)
    with GradientProfiler(model, groups="tensor", **options) as profiler:  # type: ignore[arg-type]
        profiler.step(values)
    table = profiler.table()
    norms = profiler.domain().records[0].norms
    assert norms is not None
    for index, layer in enumerate(profiler.layers):
        name = layer.id
        expected = [float(gradients[name].norm()) for gradients in looped]
        # a key's bias has no gradient but rounding: softmax does not see it
        noise = 1e-7 * max(float(gradients[name].abs().max()) for gradients in looped for name in gradients)
        np.testing.assert_allclose(table[index], expected, rtol=tolerance, atol=noise, err_msg=name)
        np.testing.assert_allclose(norms[index], float(whole[name].norm()), rtol=tolerance, atol=noise, err_msg=name)
    return profiler


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_equal_looped_autograd(architecture: str) -> None:
    assert_norms_match(build(architecture), batch())


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "opt"])
def test_norms_are_exact_to_double_precision_when_the_model_is_double(architecture: str) -> None:
    assert_norms_match(build(architecture).double(), batch(padded=False), tolerance=1e-9)


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "mixtral", "opt"])
@pytest.mark.parametrize("sizes", [[(4, 9), (3, 12), (1, 8), (5, 5)], [(1, 9), (4, 9), (4, 8)], [(1, 6), (8, 8)]])
def test_batches_of_any_size_and_length_follow_each_other(architecture: str, sizes: list[tuple[int, int]]) -> None:
    """Position embeddings are shared by a batch, whatever its length; 8 examples of 8 tokens look alike."""
    model = build(architecture)
    batches = [batch(examples, length, seed=index) for index, (examples, length) in enumerate(sizes)]
    with GradientProfiler(model, groups="tensor") as profiler:
        for values in batches:
            profiler.step(values)
        assert profiler.one_by_one is None
    looped = [gradients for values in batches for gradients in looped_gradients(model, values)]
    largest = max(float(gradient.norm()) for gradient in looped[0].values())
    for row, layer in zip(profiler.table(), profiler.layers, strict=True):
        expected = [float(gradients[layer.id].norm()) for gradients in looped]
        np.testing.assert_allclose(row, expected, rtol=TOLERANCE, atol=1e-6 * largest, err_msg=layer.id)


@pytest.mark.parametrize("architecture", ["llama", "untied_llama", "gpt2", "bert", "mixtral", "opt", "albert"])
def test_one_pass_measures_the_whole_batch(architecture: str) -> None:
    with GradientProfiler(build(architecture)) as profiler:
        profiler.step(batch())
        assert profiler.one_by_one is None


@pytest.mark.parametrize("positions", [8, 33, 64])
def test_squares_out_of_gram_matrices_are_those_of_the_gradients_written_out(positions: int) -> None:
    """From 32 positions on the matrices are put together from halves, of an odd number unequal ones."""
    generator = torch.Generator().manual_seed(positions)
    inputs = torch.randn(3, positions, 300, generator=generator)
    gradients = torch.randn(3, positions, 200, generator=generator)
    outer = Outer(inputs, gradients, torch.Size((200, 300)))
    assert outer.ghost_is_cheaper()
    written_out = torch.stack([square(outer.gradient(example)) for example in range(3)])
    torch.testing.assert_close(outer.squares(), written_out, rtol=1e-5, atol=0)
