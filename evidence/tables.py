"""Markdown tables and what stands in them."""

from __future__ import annotations

from collections.abc import Sequence

from evidence.findings import percent
from evidence.statistics import interval


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    if not rows:
        return "Not run yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(shares: Sequence[float]) -> str:
    """The mean of the seeds' shares in per cent, with its 95 % interval where there are two."""
    mean = percent(sum(shares) / len(shares))
    if len(shares) < 2:
        return mean
    low, high = interval(shares)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"
