"""How results are told: each is a list of ratios against a reference of the same run, with the ratio to reach."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = "BENCHMARK_RESULTS"
"""The variable that names a file to which results are added, a JSON object a line."""


@dataclass(frozen=True)
class Ratio:
    """One row of the table."""

    work: str
    reference: str
    ratios: tuple[float, ...]  # one a round
    bound: float | None = None
    at_least: bool = False
    """Whether `bound` is to be reached from below (a speed) or not to be passed (a cost)."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool | None:
        if self.bound is None:
            return None
        return self.median >= self.bound if self.at_least else self.median <= self.bound

    def line(self) -> str:
        """Work, reference, median and spread, what was to be reached, and whether it was."""
        spread = f"{self.median:.3g} [{min(self.ratios):.3g}, {max(self.ratios):.3g}] of {len(self.ratios)}"
        bound = "" if self.bound is None else f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        verdict = {None: "", True: "reached", False: "missed"}[self.reached]
        return f"| {self.work} | {self.reference} | {spread} | {bound} | {verdict} | {self.note} |"


HEADER = "| Work | Reference | Ratio: median [least, most] of rounds | To reach | | |\n|---|---|---|---|---|---|"


def publish(rows: Sequence[Ratio]) -> None:
    """Print the rows, and keep them where `python -m benchmarks` gathers them."""
    print(HEADER)
    for row in rows:
        print(row.line())
    if path := os.environ.get(RESULTS):
        with Path(path).open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def seconds(work: Callable[[], object]) -> float:
    """By the wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def processor_seconds(work: Callable[[], object], times: int = 1) -> float:
    """Of this process, per call: a busy machine disturbs it less."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times


def interleaved(rounds: int, **works: Callable[[], float]) -> dict[str, list[float]]:
    """What each work measures in each round, so that a slow moment of the machine meets them all.

    Every other round goes backwards: whoever follows a heavy neighbour does so only half the time.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(works[name]())
    return found


def ratios(found: dict[str, list[float]], work: str, reference: str) -> tuple[float, ...]:
    return tuple(mine / theirs for mine, theirs in zip(found[work], found[reference], strict=True))
