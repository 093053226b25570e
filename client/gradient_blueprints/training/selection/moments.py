"""The second moment of a tensor that its row and column factors stand for, made in parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.selection.local import as_matrix

Shape = tuple[int, ...]
TINY = float(torch.finfo(torch.float32).tiny)


class Moment:
    """row_i · column_j / mean(row) at any of a tensor's entries, float32: whole it would take as much as a gradient.

    A vector has its second moment as row alone; a stack of matrices (experts) has factors for each.
    """

    def __init__(self, factor: Mapping[str, Tensor], name: str, shape: Shape, device: torch.device) -> None:
        _check_shape(factor, name, shape)
        row = factor["row"].detach().to(device, torch.float32).abs()
        self._column: Tensor | None = None
        if "column" in factor:
            row = row / row.mean(-1, keepdim=True).clamp_min(TINY)
            column = factor["column"].detach().to(device, torch.float32).abs()
            self._column = column.reshape(-1, column.shape[-1])
            self._rows = row.shape[-1]
            self.mean = float((row.mean(-1) * column.mean(-1)).mean())
        else:
            self.mean = float(row.mean())
        self._row = row.flatten()

    def over_its_mean(self) -> Moment:
        """The same, with a mean of 1."""
        scaled = copy(self)
        scaled._row = self._row / max(self.mean, TINY)
        scaled.mean = self.mean / max(self.mean, TINY)
        return scaled

    def between(self, first: int, last: int) -> Tensor:
        """Of the flat entries from `first` on, up to `last`."""
        if self._column is None:
            return self._row[first:last]
        width = self._column.shape[-1]
        row, last_row = first // width, (last - 1) // width
        if row == last_row:  # of a wide matrix a part of one row, or of two
            start = row * width
            return self._row[row] * self._column[row // self._rows, first - start : last - start]
        if row + 1 == last_row:
            middle = last_row * width
            return torch.cat([self.between(first, middle), self.between(middle, last)])
        rows = torch.arange(row, last_row + 1, device=self._row.device)
        column = self._column if len(self._column) == 1 else self._column[rows // self._rows]
        return (self._row[rows, None] * column).flatten()[first - row * width : last - row * width]

    def at(self, entries: Tensor) -> Tensor:
        """Of flat entries, (n,) integers."""
        if self._column is None:
            return self._row[entries]
        rows, width = entries // self._column.shape[-1], self._column.shape[-1]
        return self._row[rows] * self._column[rows // self._rows, entries % width]


def _check_shape(factor: Mapping[str, Tensor], name: str, shape: Shape) -> None:
    """ConfigurationError for factors of a tensor of another shape, though it may be of the same size."""
    matrix = tuple(as_matrix(torch.empty(shape, device="meta")).shape)
    row, column = tuple(factor["row"].shape), tuple(factor["column"].shape) if "column" in factor else ()
    fits = (row, column) == (matrix[:-1], matrix[:-2] + matrix[-1:]) if column else math.prod(row) == math.prod(shape)
    if not fits:
        raise ConfigurationError(
            f"{name} is {tuple(shape)}, and its factors are of a tensor of another shape, rows {row}, columns "
            f"{column or 'none'}: they are of another model, or of one that holds its matrices transposed (Conv1D)"
        )
