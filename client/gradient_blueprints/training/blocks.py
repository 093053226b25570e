"""Work on tensors a block at a time: beside an embedding's gradient there is no room for more of its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def blocks(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    """Views of a contiguous tensor's entries, `size` at a time, flat and in order."""
    return torch.split(tensor.view(-1), size)


def square_sums(matrices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Row sums (..., rows), float32 at least, and column sums (..., columns), float64, of (..., rows, columns) squared.

    About `size` entries at a time: several small matrices together, a large one by rows.
    """
    *lead, rows, columns = matrices.shape
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    row = torch.zeros(*lead, rows, dtype=dtype, device=matrices.device)
    column = torch.zeros(*lead, columns, dtype=torch.float64, device=matrices.device)
    if matrices.numel() > 0:
        stack, of_row, of_column = matrices.reshape(-1, rows, columns), row.view(-1, rows), column.view(-1, columns)
        for some, part in _parts(len(stack), rows, columns, size):
            squares = stack[some, part].to(dtype).square()
            of_row[some, part] = squares.sum(2)
            of_column[some] += squares.sum(1)
    return row, column


def _parts(count: int, rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Which matrices, and which of their rows."""
    step, at_once = max(1, size // columns), max(1, size // (rows * columns))
    for first in range(0, count, at_once):
        for begin in range(0, rows, step):
            yield slice(first, first + at_once), slice(begin, begin + step)
