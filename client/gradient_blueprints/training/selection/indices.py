"""Index sets: the best of a tensor, ties and randomness that are the same everywhere, and few bits each in a file."""

from __future__ import annotations

import hashlib
import math
import zlib

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

Indices = npt.NDArray[np.int32 | np.int64]
Scores = npt.NDArray[np.float32]
NOT_WHOLE = (SafetensorError, zlib.error, AttributeError, LookupError, TypeError, ValueError)
"""What reading a damaged file of packed indices and their header raises."""
INT32_ENTRIES = 2**31 - 1
_ESCAPE = 255
_CHUNK = 1 << 18
"""Entries hashed, or drawn for, at a time: 64-bit numbers for all of an embedding take more memory than the choice."""


def best(scores: Scores, count: int, name: str, seed: int, random_share: float = 0.0) -> Indices:
    """Indices of the `count` largest, ascending; ties are broken at random but always alike.

    `random_share` of the count is drawn at random from the others.
    """
    drawn = round(random_share * count)
    top = _largest(scores, count - drawn, name, seed)
    if drawn == 0 or count >= len(scores):
        return top if count < len(scores) else np.arange(len(scores))
    lots = random_scores(name, len(scores), seed)
    lots[top] = -1.0
    return np.sort(np.concatenate([top, _largest(lots, drawn, name, seed)]))


def drawn(scores: Scores, temperature: float, name: str, seed: int) -> Scores:
    """Keys whose largest are a draw without replacement, with chances that grow with score^(1/temperature).

    Gumbel noise on the logarithm (Kool, van Hoof and Welling 2019). A score of 0 comes after all others.
    """
    keys = np.empty(len(scores), np.float32)
    with np.errstate(divide="ignore"):
        for first in range(0, len(scores), _CHUNK):
            part = slice(first, min(first + _CHUNK, len(scores)))
            uniform = _lots(f"{name}#drawn", range(part.start, part.stop), seed).astype(np.float64) + 2.0**-25
            keys[part] = np.log(scores[part]) - temperature * np.log(-np.log(uniform))
    return keys


def narrow(chosen: Indices) -> Indices:
    """Ascending indices in 4 bytes each, or in 8 where the last of them needs it; their own memory where it can be."""
    return chosen.astype(np.int32 if len(chosen) == 0 or chosen[-1] < INT32_ENTRIES else np.int64, copy=False)


def _largest(scores: Scores, count: int, name: str, seed: int) -> Indices:
    if count >= len(scores):
        return np.arange(len(scores))
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > threshold)
    # Of the tied at least one is wanted: the threshold itself is among the largest.
    return np.sort(np.concatenate([above, _drawn_of(scores == threshold, count - len(above), name, seed)]))


def _drawn_of(tied: npt.NDArray[np.bool_], count: int, name: str, seed: int) -> Indices:
    """The `count` of the tied with the lowest lots, 1 to all of them, without a lot kept for each."""
    share = count / (among := np.count_nonzero(tied))
    if share == 1:
        return np.flatnonzero(tied)
    for limit in (share + 6 * math.sqrt(share / among), 1.0):  # below the first are nearly always enough of them
        found, lots = [], []
        for first in range(0, len(tied), _CHUNK):
            indices = np.flatnonzero(tied[first : first + _CHUNK]) + first
            theirs = _lots(name, indices, seed)
            found.append(indices[theirs < limit])
            lots.append(theirs[theirs < limit])
        if sum(map(len, found)) >= count:
            break
    return np.concatenate(found)[lowest(np.concatenate(lots), count)]


def lowest(lots: Scores, count: int) -> npt.NDArray[np.bool_]:
    """Which are the `count` lowest, 1 to all of them; of equal ones the first.

    By a partition: where most of an embedding never occurs its scores are 0, and to sort them all costs too much.
    """
    cut = np.partition(lots, count - 1)[count - 1]
    found: npt.NDArray[np.bool_] = lots < cut
    found[np.flatnonzero(lots == cut)[: count - np.count_nonzero(found)]] = True
    return found


def random_scores(name: str, size: int, seed: int) -> Scores:
    """Uniform in [0, 1) by hashing (name, seed, index): the same on every machine and version of every library."""
    return _lots(name, range(size), seed)


def _lots(name: str, indices: Indices | range, seed: int) -> Scores:
    """The random scores of these indices."""
    start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    lots = np.empty(len(indices), np.float32)
    with np.errstate(over="ignore"):  # splitmix64 works modulo 2**64
        for first in range(0, len(indices), _CHUNK):
            part = indices[first : first + _CHUNK]
            z = np.arange(part.start, part.stop, dtype=np.uint64) if isinstance(part, range) else part.astype(np.uint64)
            z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            lots[first : first + _CHUNK] = (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return lots


def pack(chosen: Indices) -> npt.NDArray[np.uint8]:
    """Ascending indices as gaps of a byte each (255 adds 255 and goes on), Huffman-coded with runs put together.

    Within 2 % of the entropy of a random subset up to a quarter of the tensor, where a deflated bitmap takes 3 to 60 %
    more; whole rows are runs and take next to nothing. Longer matches are not looked for: among random gaps they cost.
    """
    gaps = np.diff(chosen, prepend=-1) - 1
    ends = np.cumsum(gaps // _ESCAPE + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, _ESCAPE, np.uint8)
    coded[ends] = gaps % _ESCAPE
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)
    return np.frombuffer(deflate.compress(coded.tobytes()) + deflate.flush(), np.uint8)


def unpack(packed: npt.NDArray[np.uint8]) -> Indices:
    """What `pack` was given."""
    coded = np.frombuffer(zlib.decompress(packed.tobytes()), np.uint8)
    ends = np.flatnonzero(coded != _ESCAPE)
    return np.cumsum(coded, dtype=np.int64)[ends] + np.arange(len(ends))


def prefixes(parameter: str) -> list[str]:
    """The ids under which a blueprint may list a tensor, the narrowest first: itself, its module, its block.

    >>> prefixes("h.0.attn.weight")
    ['h.0.attn.weight', 'h.0.attn', 'h.0', 'h']
    """
    parts = parameter.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
