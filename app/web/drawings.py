"""The figures of the reading pages: plain values in, SVG out. Each is remembered for as long as its values recur."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from app.registry.evidence import Week
from app.web.pictures import (
    BAD,
    GOOD,
    INK,
    NARROW,
    QUIET,
    UNCLEAR,
    WIDE,
    empty_figure,
    kind_colour,
    kind_marker,
    legend_below,
    shades,
    to_svg,
)
from gradient_blueprints.models import Layer, LayerKind
from gradient_blueprints.statistics_models import ConsensusLayer

MOST_POINTS = 1_500
"""Points of a figure: of a larger document the largest layers are drawn."""
MOST_BLOCKS = 400
"""Blocks of a heatmap; with more of them its cells could not be seen."""
_REMEMBERED = 32
_LOGARITHMIC_FROM = 20  # ratio of largest to smallest value
_KINDS = [*LayerKind, None]


@dataclass(frozen=True)
class Bar:
    """One layer: where it stands, its norm, and the interval around it if there is one; all drawable."""

    kind: str | None
    depth: int | None
    position: int  # in the document
    norm: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, position: int, layer: Layer | ConsensusLayer, interval: tuple[float, float] | None) -> Bar:
        low, high = map(drawable, interval) if interval else (None, None)
        return cls(layer.kind, layer.depth, position, drawable(layer.gradient_norm), low, high)


def drawable(value: float) -> float:
    """Beyond these bounds the arithmetic of axes leaves float64; the tables have the value as it is."""
    return min(max(value, 1e-100), 1e100) if value > 0 else 0.0


def largest(bars: Iterable[Bar]) -> tuple[Bar, ...]:
    return tuple(sorted(bars, key=lambda bar: -bar.norm)[:MOST_POINTS])


@lru_cache(_REMEMBERED)
def draw_norms(bars: tuple[Bar, ...], label: str, *, narrow: bool) -> bytes:
    """Norms with their intervals over depth, a marker and a colour for each kind."""
    figure = empty_figure(NARROW if narrow else WIDE, height=3.6)
    axes = figure.subplots()
    places = _places(bars)
    kinds = [kind for kind in _KINDS if any(bar.kind == kind for bar in bars)]
    for index, kind in enumerate(kinds):
        mine = [bar for bar in bars if bar.kind == kind]
        shift = (index - (len(kinds) - 1) / 2) * 0.16  # kinds of one depth stand side by side
        x = [places[bar] + shift for bar in mine]
        below = [bar.norm - (bar.norm if bar.low is None else min(bar.low, bar.norm)) for bar in mine]
        above = [(bar.norm if bar.high is None else max(bar.high, bar.norm)) - bar.norm for bar in mine]
        axes.errorbar(
            x,
            [bar.norm for bar in mine],
            yerr=[below, above],
            fmt=kind_marker(kind),
            color=kind_colour(kind),
            markersize=3.4,
            elinewidth=1.1,
            capsize=2,
            label=kind_name(kind),
        )
    _scale(axes, [bar.norm for bar in bars])
    axes.set_ylabel(label)
    axes.set_xlabel("depth (block)" if any(bar.depth is not None for bar in bars) else "position in the document")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
    axes.grid(axis="y")
    if kinds != [None]:
        legend_below(figure, kinds, narrow=narrow)
    return to_svg(figure)


def _places(bars: Sequence[Bar]) -> dict[Bar, float]:
    """Blocks at their depth; what stands outside the blocks before the first or behind the last one."""
    depths = [bar.depth for bar in bars if bar.depth is not None]
    if not depths:
        return {bar: bar.position for bar in bars}
    first_block = min(bar.position for bar in bars if bar.depth is not None)
    before, behind = min(depths) - 1, max(depths) + 1
    return {
        bar: bar.depth if bar.depth is not None else before if bar.position < first_block else behind for bar in bars
    }


def kind_name(kind: str | None) -> str:
    return "kind not given" if kind is None else str(kind).replace("_", " ")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values spread far; zeros keep it linear, as a logarithm has no place for them."""
    if values and 0 < min(values) <= max(values) / _LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if min(values) > max(values) / 1_000 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


@lru_cache(_REMEMBERED)
def draw_heatmap(bars: tuple[Bar, ...], *, narrow: bool) -> bytes:
    """Depth by kind: the norm of all layers of a cell together, which is the root of the sum of their squares."""
    cells: dict[tuple[str, int], float] = {}
    for bar in bars:
        if bar.kind is not None and bar.depth is not None:
            cell = (bar.kind, bar.depth)
            cells[cell] = math.hypot(cells.get(cell, 0.0), bar.norm)
    kinds = [kind for kind in LayerKind if any(name == kind for name, _ in cells)]
    depths = sorted({depth for _, depth in cells})
    grid = np.array([[cells.get((kind, depth), math.nan) for depth in depths] for kind in kinds])
    figure = empty_figure(NARROW if narrow else WIDE, height=0.95 + 0.32 * len(kinds) + (0.45 if narrow else 0))
    axes = figure.subplots()
    positive = grid[grid > 0]
    spread_far = positive.size and positive.min() <= positive.max() / _LOGARITHMIC_FROM
    norm = LogNorm(positive.min(), positive.max()) if spread_far else Normalize(0, np.nanmax(grid) or 1)
    mesh = axes.pcolormesh(
        np.arange(len(depths) + 1) - 0.5,
        np.arange(len(kinds) + 1) - 0.5,
        np.ma.masked_invalid(grid) if not spread_far else np.ma.masked_where(~(grid > 0), grid),
        cmap=ListedColormap(shades()),
        norm=norm,
    )
    axes.set_yticks(range(len(kinds)), [kind_name(kind) for kind in kinds], color=INK)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("depth (block)")
    step = max(1, len(depths) // (6 if narrow else 15))
    axes.set_xticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]])
    bar = figure.colorbar(
        mesh,
        ax=axes,
        orientation="horizontal" if narrow else "vertical",
        format=FuncFormatter(lambda value, _: f"{value:.3g}"),
        pad=0.03,
        aspect=30 if narrow else 12,
    )
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.set_label("gradient norm")
    return to_svg(figure)


Curve = tuple[str | None, tuple[tuple[float, float], ...]]


@lru_cache(_REMEMBERED)
def draw_retained_mass(curves: tuple[Curve, ...], *, narrow: bool) -> bytes:
    """The share of the sum of |g| that the largest k keep: each layer faintly, the median of each kind strongly."""
    figure = empty_figure(NARROW if narrow else WIDE, height=3.1)
    axes = figure.subplots()
    kinds = [kind for kind in _KINDS if any(name == kind for name, _ in curves)]
    for kind in kinds:
        mine = [points for name, points in curves if name == kind]
        for points in mine[: MOST_POINTS // 10]:
            axes.plot(*zip(*points, strict=True), color=kind_colour(kind), linewidth=0.6, alpha=0.18)
        shares = sorted({share for points in mine for share, _ in points if share > 0})
        middle = [
            (share, median(held))
            for share in shares
            if (held := [mass for points in mine for k, mass in points if k == share])
        ]
        axes.plot(*zip(*middle, strict=True), color=kind_colour(kind), linewidth=2, label=kind_name(kind))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("k, share of the coordinates kept")
    axes.set_ylabel("share of Σ|g| retained")
    axes.set_ylim(0, 1.02)
    axes.grid()
    if kinds != [None]:
        legend_below(figure, kinds, narrow=narrow)
    return to_svg(figure)


@lru_cache(_REMEMBERED)
def draw_evidence(weeks: tuple[Week, ...], events: tuple[tuple[float, str], ...], *, narrow: bool) -> bytes:
    """Verdicts a week, stacked; `events` are the alarms (day as an ordinal, raised or cleared)."""
    figure = empty_figure(NARROW if narrow else WIDE, height=2.5)
    axes = figure.subplots()
    days = np.array([week.monday.toordinal() + 3 for week in weeks])
    bottom = np.zeros(len(weeks))
    for name, colour in (("fresh", GOOD), ("indeterminate", UNCLEAR), ("stale", BAD)):
        heights = np.array([getattr(week, name) for week in weeks])
        axes.bar(days, heights, width=5.6, bottom=bottom, color=colour, label=name)
        bottom += heights
    top = float(bottom.max())
    for day, kind in events:
        if days[0] - 7 <= day <= days[-1] + 7:
            axes.axvline(day, color=INK, linewidth=1, linestyle="--" if kind == "raised" else ":")
            if not narrow:
                side = "left" if day < days[-1] else "right"
                axes.annotate(f" {kind} ", (day, top * 1.12), color=INK, fontsize=8, ha=side, va="center")
    axes.set_ylim(0, top * 1.22)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    step = max(1, len(weeks) // (4 if narrow else 8))
    shown = list(weeks[::step])
    axes.set_xticks([week.monday.toordinal() + 3 for week in shown], [f"{w.monday.day} {w.monday:%b}" for w in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("checks a week")
    axes.grid(axis="y")
    legend_below(figure, ["fresh", "indeterminate", "stale"], narrow=narrow)
    return to_svg(figure)


Change = tuple[float, float, str]  # base, other, and what the layer does: stays, entered, left


@lru_cache(_REMEMBERED)
def draw_comparison(changes: tuple[Change, ...], base: str, other: str, *, narrow: bool) -> bytes:
    """Each layer's norm there and here; on the line it did not change."""
    figure = empty_figure(NARROW if narrow else WIDE, height=3.6)
    axes = figure.subplots()
    positive = [value for change in changes for value in change[:2] if value > 0]
    ends = (min(positive, default=0.1), max(positive, default=1))
    axes.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--", zorder=1)
    styles = (
        ("stays", "o", QUIET),
        ("entered", "^", kind_colour("attention")),
        ("left", "v", kind_colour("feed_forward")),
    )
    names = {"stays": "other layers", "entered": "entered the top", "left": "left the top"}
    shown = []
    for name, marker, colour in styles:
        mine = [change for change in changes if change[2] == name and change[0] > 0 and change[1] > 0]
        if mine:
            shown.append(name)
            x, y, _ = zip(*mine, strict=True)
            size = 4 if name == "stays" else 6
            axes.plot(x, y, marker, color=colour, markersize=size, alpha=0.75, label=names[name], zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"gradient norm, {base}")
    axes.set_ylabel(f"gradient norm, {other}")
    axes.grid()
    legend_below(figure, shown, narrow=narrow)
    return to_svg(figure)
