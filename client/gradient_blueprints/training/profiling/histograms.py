"""A mergeable logarithmic histogram of magnitudes, 8 bins an octave, with its largest entries exact.

Bins are read off the bits of a float32: the exponent and the top three bits of the mantissa. Counting
goes through 128 bins an octave first, so that the sum of a bin is right to about 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS_PER_OCTAVE = 8
TOP = 4_096
"""Largest entries that are kept exactly."""

_BINS = 1 << 11  # 8 exponent bits, 3 mantissa bits
_FINE = 1 << 15
_BLOCK = 1 << 16  # elements counted at once, small enough for the cache

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def _edges(bins: int) -> Floats:
    """Lower edges of the bins and the upper edge of the last."""
    bits = np.arange(bins + 1, dtype=np.uint32) << np.uint32(31 - (bins.bit_length() - 1))
    with np.errstate(invalid="ignore"):
        return bits.view(np.float32).astype(np.float64)


EDGES = _edges(_BINS)
_FINE_EDGES = _edges(_FINE)
_MIDDLES = np.nan_to_num((_FINE_EDGES[1:] + _FINE_EDGES[:-1]) / 2, nan=0.0, posinf=0.0)


@dataclass(slots=True)
class MagnitudeHistogram:
    """Counts and sums of |x| by bin; bin 0 holds the zeros (and what is below 1e-38)."""

    counts: Counts = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    sums: Floats = field(default_factory=lambda: np.zeros(_BINS))
    top: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))  # descending

    @property
    def entries(self) -> int:
        return int(self.counts.sum())

    @property
    def floor(self) -> float:
        """What an entry must exceed to be among the largest from now on."""
        return float(self.top[-1]) if len(self.top) == TOP else 0.0

    @classmethod
    def of(cls, *tensors: Tensor, scale: float = 1.0, floor: float = 0.0) -> MagnitudeHistogram:
        """Count finite tensors, multiplied by `scale`; `top` needs nothing smaller than `floor`."""
        fine = np.zeros(_FINE, np.int64)
        scaled = _Scaled(tensors, scale)
        bits = torch.empty(_BLOCK, dtype=torch.int16)
        for block in scaled:
            fine += _count(block, bits)
        sums = (fine * _MIDDLES).reshape(_BINS, -1).sum(1)
        counts = fine.reshape(_BINS, -1).sum(1)
        return cls(counts, sums, _largest(scaled, fine, floor))

    def merged(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """Both together; associative and commutative up to the rounding of float64 sums."""
        top = np.sort(np.concatenate([self.top, other.top]))[::-1][:TOP]
        return MagnitudeHistogram(self.counts + other.counts, self.sums + other.sums, top)

    # --- read from the largest entry down

    def descending(self) -> tuple[Counts, Floats, Floats, Floats]:
        """Counts, sums, lower and upper edges of the bins that hold something, largest first."""
        held = np.flatnonzero(self.counts)[::-1]
        return self.counts[held], self.sums[held], EDGES[held], EDGES[held + 1]

    def retained_mass(self, shares: Floats) -> Floats:
        """Share of the sum of magnitudes kept by the largest k of the entries, for each k; zeros if all are zero."""
        counts, sums, low, high = self.descending()
        total = sums.sum()
        if total == 0:
            return np.zeros_like(shares)
        wanted = np.asarray(shares) * self.entries
        before, mass = np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0.0], np.cumsum(sums)])
        index = np.clip(np.searchsorted(before, wanted, side="right") - 1, 0, len(counts) - 1)
        part = np.clip((wanted - before[index]) / counts[index], 0, 1)
        inside = part * sums[index] + counts[index] * part * (1 - part) * (high - low)[index] / 2
        kept = mass[index] + inside
        if len(self.top):
            exact = np.concatenate([[0.0], np.cumsum(self.top, dtype=np.float64)])
            places = np.minimum(wanted, len(self.top))
            kept = np.where(wanted <= len(self.top), np.interp(places, np.arange(len(exact)), exact), kept)
        shares_kept: Floats = np.clip(kept / total, 0, 1)
        return shares_kept


class _Scaled:
    """Blocks of tensors times a number, each in the same buffer, so that nothing leaves the cache."""

    def __init__(self, tensors: Sequence[Tensor], scale: float) -> None:
        self._flat = [tensor.detach().reshape(-1) for tensor in tensors if tensor.numel()]
        self._scale = scale

    def __iter__(self) -> Iterator[Tensor]:
        buffer = torch.empty(_BLOCK)
        for flat in self._flat:
            here = flat.device.type == "cpu" and flat.dtype == torch.float32
            for block in torch.split(flat, _BLOCK):
                part = buffer[: len(block)]
                yield torch.mul(block, self._scale, out=part) if here else part.copy_(block).mul_(self._scale)


def _count(block: Tensor, buffer: Tensor) -> Counts:
    """Fine counts of |x| of a contiguous float32 block."""
    upper = block.view(torch.int16).view(-1, 2)[:, 1]  # little endian: sign, exponent, 7 bits of mantissa
    bits = torch.bitwise_and(upper, 0x7FFF, out=buffer[: len(block)])
    counts: Counts = torch.bincount(bits, minlength=_FINE).numpy()
    return counts


def _largest(scaled: _Scaled, fine: Counts, floor: float) -> NDArray[np.float32]:
    """The TOP largest, found by the bin above which there are enough."""
    below = np.cumsum(fine[::-1])
    edge = max(0, _FINE - 1 - int(np.searchsorted(below, TOP)))
    threshold = max(floor, float(_FINE_EDGES[edge]))
    parts = []
    for block in scaled:
        lowest, highest = torch.aminmax(block)
        if max(-float(lowest), float(highest)) >= threshold:
            magnitudes = block.abs_()
            parts.append(magnitudes[magnitudes >= threshold])
    found: NDArray[np.float32] = torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)
    if len(found) > TOP:
        found = np.partition(found, len(found) - TOP)[-TOP:]
    return np.sort(found)[::-1]
