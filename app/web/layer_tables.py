"""Tables of layers: columns to sort by, a page of rows, and intervals drawn on one scale for all rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query

ROWS_ON_A_PAGE = 250
INTERVAL_WIDTH = 180
_DIGITS = re.compile(r"(\d+)")
Interval = tuple[float, float]


@dataclass(frozen=True)
class Order:
    """What the address asks for: `?sort=alpha&order=asc&start=250`."""

    sort: str | None
    descending: bool | None
    start: int


def _order(
    sort: Annotated[str | None, Query(max_length=100)] = None,
    order: Literal["asc", "desc"] | None = None,
    start: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
) -> Order:
    return Order(sort, None if order is None else order == "desc", start)


Ordered = Annotated[Order, Depends(_order)]


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    value: Callable[[Any], float | str | None]
    form: Literal["number", "count", "percent", "text", "signed"] = "number"
    interval: Callable[[Any], Interval | None] | None = None
    drawn: bool = False  # the interval as a picture too
    about: str = ""

    @property
    def textual(self) -> bool:
        return self.form == "text"


@dataclass(frozen=True)
class Scale:
    """From values to pixels of the drawn intervals, logarithmic where the values spread far."""

    low: float
    high: float
    logarithmic: bool

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(3 + (INTERVAL_WIDTH - 6) * share, 1)


@dataclass(frozen=True)
class LayerTable:
    name: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    sort: str
    descending: bool
    start: int
    total: int
    scale: Scale | None

    @property
    def end(self) -> int:
        return self.start + len(self.rows)

    @property
    def previous(self) -> int | None:
        return max(0, self.start - ROWS_ON_A_PAGE) if self.start else None

    @property
    def following(self) -> int | None:
        return self.end if self.end < self.total else None


def arrange(
    name: str, columns: Sequence[Column], rows: Sequence[Any], order: Order, *, first: tuple[str, bool]
) -> LayerTable:
    """A page of `rows` by the wanted column, else by `first`; columns that are empty in every row are left out."""
    shown = [column for column in columns if any(column.value(row) is not None for row in rows)]
    sort, descending = first
    if order.sort is not None and any(column.key == order.sort for column in shown):
        sort = order.sort
        descending = (
            not next(c for c in shown if c.key == sort).textual if order.descending is None else order.descending
        )
    by = next((column for column in shown if column.key == sort), None)
    ordered = rows if by is None else _sorted(rows, by.value, descending=descending)
    drawn = next((column for column in shown if column.drawn), None)
    return LayerTable(
        name=name,
        columns=shown,
        rows=ordered[order.start : order.start + ROWS_ON_A_PAGE],
        sort=sort,
        descending=descending,
        start=min(order.start, len(rows)),
        total=len(rows),
        scale=None if drawn is None else _scale(drawn, rows),
    )


def _sorted(rows: Sequence[Any], value: Callable[[Any], Any], *, descending: bool) -> list[Any]:
    """What has no value comes last either way; numbers within names count as numbers."""
    known = [row for row in rows if value(row) is not None]
    known.sort(key=lambda row: _natural(value(row)), reverse=descending)
    return known + [row for row in rows if value(row) is None]


def _natural(value: float | str) -> Any:
    if not isinstance(value, str):
        return value
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in _DIGITS.split(value)]


def _scale(column: Column, rows: Iterable[Any]) -> Scale | None:
    assert column.interval is not None
    values: list[float] = []
    for row in rows:
        value = column.value(row)
        if isinstance(value, int | float):
            values += (value, *(column.interval(row) or ()))
    values = [value for value in values if value > 0]
    if not values:
        return None
    return Scale(min(values), max(values), logarithmic=min(values) < max(values) / 20)


def domain_columns(names: Iterable[str], value: Callable[[Any, str], float | None], *, most: int) -> list[Column]:
    """A column for each of the first `most` domains."""

    def column(name: str) -> Column:
        return Column(f"domain:{name}", name, lambda row: value(row, name), about=f"weight of the domain {name}")

    return [column(name) for name in list(names)[:most]]
