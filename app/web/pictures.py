"""Pictures as SVG, in one look for all pages: matplotlib draws, the browser chooses light or dark and the typeface.

A page shows a picture as an image beside a text alternative. The colours stand in the file as variables, so that
one file serves both colour schemes, and text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import matplotlib
from fastapi import Response
from matplotlib.figure import Figure
from sqlalchemy.ext.asyncio import AsyncSession

from app.web.rendering import in_thread

INK, QUIET, LINE = "#1d2227", "#5b6571", "#dfe2e5"
GOOD, BAD, UNCLEAR = "#2c8a50", "#b5382f", "#a3abb3"
# name: (light, dark); the light one stands for it while drawing, so each is used once.
_COLOURS = {
    "ink": (INK, "#e3e6e8"),
    "quiet": (QUIET, "#9aa5af"),
    "line": (LINE, "#2f373e"),
    "good": (GOOD, "#6fc48c"),
    "bad": (BAD, "#ef8a81"),
    "unclear": (UNCLEAR, "#59646e"),
    "attention": ("#0072b2", "#62b7ec"),
    "feed_forward": ("#d0560b", "#f3995c"),
    "normalization": ("#118a68", "#4cc9a0"),
    "embedding": ("#7f56b3", "#c1a4ee"),
    "head": ("#a07800", "#e0b64a"),
    "other": ("#6b7683", "#a9b3bd"),
}
_SERIES = [light for light, _ in list(_COLOURS.values())[6:]]
_MARKERS = {"attention": "o", "feed_forward": "s", "normalization": "^", "embedding": "D", "head": "v"}
STEPS = 12
"""Shades of a heatmap, from the smallest to the largest value."""
_SHADES = (((234, 241, 246), (6, 52, 84)), ((30, 42, 51), (190, 229, 250)))  # ends, light and dark

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "gradient blueprints",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": QUIET,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.axisbelow": True,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handletextpad": 0.3,
        "legend.columnspacing": 1.2,
        "lines.linewidth": 1.5,
        "lines.markersize": 4,
        "axes.prop_cycle": matplotlib.cycler(color=_SERIES),
    }
)


@dataclass(frozen=True)
class Size:
    """Inches, of 96 CSS pixels: as wide as the page, and as a phone, so that text keeps its size on both."""

    width: float
    height: float


WIDE, NARROW = Size(12.2, 3.1), Size(3.6, 3.1)


def series_colour(index: int) -> str:
    """Of the series at `index` where no kind tells them apart."""
    return _SERIES[index % len(_SERIES)]


def kind_colour(kind: str | None) -> str:
    return _COLOURS.get(kind or "other", _COLOURS["other"])[0]


def kind_marker(kind: str | None) -> str:
    return _MARKERS.get(kind or "other", "x")


def shades() -> list[str]:
    """The colours of a heatmap, smallest value first."""
    return [_shade(step, 0) for step in range(STEPS)]


def _shade(step: int, scheme: int) -> str:
    low, high = _SHADES[scheme]
    red, green, blue = (round(a + (b - a) * step / (STEPS - 1)) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def empty_figure(size: Size, *, height: float | None = None) -> Figure:
    return Figure(figsize=(size.width, height or size.height), layout="constrained")


def to_svg(figure: Figure) -> bytes:
    """The figure in the colours and the typeface of the page that shows it."""
    written = io.StringIO()
    figure.savefig(
        written, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    _, _, drawing = written.getvalue().partition("<svg")
    pairs = dict(_COLOURS)
    pairs |= {f"shade{step}": (_shade(step, 0), _shade(step, 1)) for step in range(STEPS)}
    for name, (light, _) in pairs.items():
        drawing = drawing.replace(light, f"var(--{name})")
    opening, _, rest = drawing.partition(">")
    light_values, dark_values = (
        "".join(f"--{name}:{pair[scheme]};" for name, pair in pairs.items() if f"--{name})" in rest)
        for scheme in (0, 1)
    )
    style = (
        f"svg{{{light_values}}}@media (prefers-color-scheme:dark){{svg{{{dark_values}}}}}"
        'text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif!important}'
    )
    return f"<svg{opening}><style>{style}</style>{rest}".encode()


# One at a time: drawing holds the interpreter, and the API has the same one.
_drawing = anyio.CapacityLimiter(1)


async def answer(session: AsyncSession, draw: Callable[[], bytes], *, cache_control: str) -> Response:
    """Draw in a thread, and answer with a policy under which the file can do nothing when it is opened by itself."""
    body = await in_thread(session, draw, limiter=_drawing)
    return Response(
        body,
        media_type="image/svg+xml",
        headers={
            "Cache-Control": cache_control,
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        },
    )


def legend_below(figure: Figure, columns: Sequence[object], *, narrow: bool) -> None:
    """The names of the series under the figure, where they hide nothing."""
    if columns:
        figure.legend(loc="outside lower center", ncols=min(len(columns), 2 if narrow else 6))
