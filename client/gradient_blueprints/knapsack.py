"""The exact 0/1 knapsack that chooses whole layers (needs numpy: the service and the extra [torch] have it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MOST_WORK = 20_000_000
"""States looked at over all items, at most: some seconds and 100 MB. Layers of real models need a thousandth of it."""


class Packing(NamedTuple):
    taken: list[bool]
    exact: bool
    """False where states had to be dropped: the packing fits, and a better one may exist."""


def knapsack(values: Sequence[float], sizes: Sequence[int], capacity: int, most_work: int = MOST_WORK) -> Packing:
    """Which items to take so that Σ values is largest within `capacity`.

    Greedy by density crowds out the large pieces (embedding, head) that matter most. Items are added one by one to
    the set of undominated (size, value) states (Nemhauser and Ullmann 1969), and a state is dropped when even
    filling its room with fractions of the remaining items (Dantzig's bound) cannot reach the best known whole
    solution. Exact; fast since layers have few distinct sizes. The problem is NP-hard, so that sizes made for it could
    take for ever: beyond `most_work` the states of the best bounds are kept, which is then no longer exact.

    >>> knapsack([6.0, 5.0, 5.0], [6, 5, 5], 10)
    Packing(taken=[False, True, True], exact=True)
    """
    usable = [index for index in range(len(values)) if values[index] > 0 and sizes[index] <= capacity]
    usable.sort(key=lambda index: (-values[index] / max(sizes[index], 1e-12), index))
    value = np.array([values[index] for index in usable])
    size = np.array([sizes[index] for index in usable], np.int64)
    value_before, size_before = np.append(0.0, value.cumsum()), np.append(0, size.cumsum())
    slack = 1e-12 * (value_before[-1] if usable else 0.0)  # rounding of sums must not prune the best

    def bound(room: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.float64]:
        end = np.searchsorted(size_before, size_before[start] + room, side="right") - 1
        whole = value_before[end] - value_before[start]
        rest = room - (size_before[end] - size_before[start])
        next_item = np.minimum(end, len(usable) - 1)
        part = np.where(end < len(usable), rest * value[next_item] / np.maximum(size[next_item], 1), 0.0)
        return np.asarray(whole + part, np.float64)

    most_states = max(100, most_work // max(1, len(usable)))
    exact = True
    used, gained = np.zeros(1, np.int64), np.zeros(1)
    by_density = _greedy(size, capacity)
    best = greedy = float(value[by_density].sum())
    history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []  # per item: parent state, taken
    for item in range(len(usable)):
        fits = np.flatnonzero(used + size[item] <= capacity)
        new_used = np.concatenate([used, used[fits] + size[item]])
        new_gained = np.concatenate([gained, gained[fits] + value[item]])
        parents = np.concatenate([np.arange(len(used)), fits])
        taken = np.arange(len(new_used)) >= len(used)
        order = np.lexsort((taken, -new_gained, new_used))
        ahead = np.append(-np.inf, np.maximum.accumulate(new_gained[order])[:-1])
        order = order[new_gained[order] > ahead]
        best = max(best, float(new_gained[order].max()))
        reach = new_gained[order] + bound(capacity - new_used[order], item + 1)
        order = order[reach >= best - slack]
        if len(order) > most_states:
            exact = False
            promising = np.argpartition(-reach[reach >= best - slack], most_states)[:most_states]
            largest = int(new_gained[order].argmax())
            order = order[np.union1d(promising, [largest])]
            best = float(new_gained[order].max())  # what no kept state reaches must not prune them
        used, gained = new_used[order], new_gained[order]
        history.append((parents[order].astype(np.int32), taken[order]))
    chosen = [False] * len(values)
    if gained.max() < greedy - slack:
        for item in by_density:
            chosen[usable[item]] = True
        return Packing(chosen, exact)
    state = int(gained.argmax())
    for item in reversed(range(len(usable))):
        parents_of, taken_of = history[item]
        chosen[usable[item]] = bool(taken_of[state])
        state = int(parents_of[state])
    return Packing(chosen, exact)


def _greedy(size: npt.NDArray[np.int64], capacity: int) -> list[int]:
    """The items in their order, each that still fits."""
    taken, room = [], capacity
    for item, needed in enumerate(size.tolist()):
        if needed <= room:
            taken.append(item)
            room -= needed
    return taken
