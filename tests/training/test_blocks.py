"""Parts of tensors are those of the whole, wherever blocks begin and end."""

from __future__ import annotations

import pytest
import torch

from gradient_blueprints.training.blocks import square_sums
from gradient_blueprints.training.selection.moments import Moment

SHAPES = [(7, 5), (1, 40), (40, 1), (3, 4, 5), (2, 30, 2), (6, 2, 3, 2, 2), (0, 5), (5, 0), (0, 4, 5)]


@pytest.mark.parametrize("size", [1, 4, 12, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_squares_do_not_depend_on_the_blocks(shape: tuple[int, ...], size: int) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    row, column = square_sums(matrices, size)
    assert torch.allclose(row, matrices.square().sum(-1), rtol=1e-12)
    assert torch.allclose(column, matrices.square().sum(-2), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 12, 1000])
@pytest.mark.parametrize("shape", [(7, 5), (1, 40), (40, 1), (3, 4, 5), (2, 30, 2)])
def test_a_moment_is_the_same_in_any_parts(shape: tuple[int, ...], size: int) -> None:
    row, column = torch.rand(shape[:-1]) + 0.1, torch.rand(shape[:-2] + shape[-1:]) + 0.1
    whole = row[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]
    moment = Moment({"row": row, "column": column}, "w", shape, torch.device("cpu"))
    entries = whole.numel()
    parts = [moment.between(first, min(first + size, entries)) for first in range(0, entries, size)]
    assert torch.allclose(torch.cat(parts), whole.flatten())
    assert torch.allclose(moment.at(torch.arange(entries)), whole.flatten())
    assert moment.mean == pytest.approx(float(whole.mean()), rel=1e-5)
    scaled = moment.over_its_mean()
    assert scaled.mean == pytest.approx(1)
    assert torch.allclose(scaled.between(0, entries), (whole / whole.mean()).flatten())
    assert torch.allclose(moment.between(0, entries), whole.flatten())
