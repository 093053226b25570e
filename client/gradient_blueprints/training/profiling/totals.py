"""What one batch adds to a domain: taken in parameter by parameter, held apart until it is known to be finite."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradient_blueprints.training.blocks import blocks, square_sums
from gradient_blueprints.training.profiling.histograms import Counts, MagnitudeHistogram
from gradient_blueprints.training.profiling.layers import Group
from gradient_blueprints.training.profiling.state import DomainState, Factors

Place = Literal["host", "device"] | Path
"""Where sums over batches live: host memory, the device that computed them, or files in a folder."""

_BLOCK = 1 << 17  # elements


def placed(tensor: Tensor, place: Place) -> Tensor:
    """The tensor at its place; the same one where it is there already."""
    if place == "device":
        return tensor
    if place == "host" or not tensor.numel():
        return tensor.cpu()
    with tempfile.NamedTemporaryFile(dir=place) as file:  # the mapping outlives the name, the space ends with it
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


class BatchTotals:
    """The histograms, factors and summed gradient of one batch.

    Nothing reaches the domain before `commit`, so a batch that turns out to be non-finite, or that
    starts again with smaller micro-batches, leaves the domain's sums as they were, to the bit.
    """

    def __init__(
        self, layers: Sequence[Group], layer_of: Mapping[str, int], domain: DomainState, place: Place, *, squares: bool
    ) -> None:
        self.place = place
        self._layers, self._layer_of, self._domain, self._squares = layers, layer_of, domain, squares
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self._histograms = [MagnitudeHistogram() for _ in self._layers]
        self._factors: dict[str, Factors] = {}
        self._totals: dict[str, Tensor] = {}

    def take(self, name: str, total: Tensor, examples: int) -> None:
        """Take in the finite sum of the examples' gradients of one parameter."""
        total = (total if self.place == "device" else total.cpu()).contiguous()  # autograd keeps a parameter's strides
        layer = self._layer_of[name]
        floor = self._domain.histograms[layer].floor if self._domain.histograms else 0.0
        histogram = MagnitudeHistogram.of(total, scale=1 / examples, floor=floor)
        self._histograms[layer] = self._histograms[layer].merged(histogram)
        self._factors[name] = factors_of(total.flatten(1) if total.dim() == 4 else total)  # a filter's places: columns
        self._totals[name] = placed(total, self.place)

    def commit(self) -> list[tuple[int, Counts]]:
        """Add the batch to its domain; returns its own counts: per layer the first bin that holds some, and bins."""
        domain = self._domain
        if not domain.histograms:
            domain.histograms = [MagnitudeHistogram() for _ in self._layers]
        found = []
        for index, group in enumerate(self._layers):
            histogram = self._histograms[index]
            histogram.counts[0] += group.size - histogram.entries  # parameters that no gradient reached
            domain.histograms[index] = domain.histograms[index].merged(histogram)
            held = np.flatnonzero(histogram.counts)
            found.append((int(held[0]), histogram.counts[held[0] : held[-1] + 1].astype(np.int64)))
        for name, factors in self._factors.items():
            domain.factors[name] = factors if name not in domain.factors else domain.factors[name].merged(factors)
        if self._squares:
            domain.squared += 1
        else:
            domain.squared, domain.squares = 0, {}
        while self._totals:
            self._add(*self._totals.popitem())
        self.clear()
        return found

    def _add(self, name: str, total: Tensor) -> None:
        sums, squares = self._domain.sums, self._domain.squares
        if self._squares and name not in squares:
            squares[name] = placed(torch.zeros_like(total), self.place)
        if self._squares:
            for squared, block in _beside(squares[name], total):
                squared.addcmul_(block, block)
        if name in sums:
            for held, block in _beside(sums[name], total):
                held.add_(block)
        else:
            sums[name] = total


def _beside(one: Tensor, two: Tensor) -> zip[tuple[Tensor, Tensor]]:
    return zip(blocks(one, _BLOCK), blocks(two.contiguous(), _BLOCK), strict=True)


def factors_of(matrix: Tensor) -> Factors:
    """Row and column sums of the squares, by blocks that fit the cache."""
    if matrix.dim() < 2:
        return Factors(matrix.square().double().cpu(), None)
    row, column = square_sums(matrix, _BLOCK)
    return Factors(row.double().cpu(), column.cpu())
