"""Plots of capability over resource: the runs of a leaderboard's group with their front, and the curve of one run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from app.web import pictures
from gradient_blueprints.record_models import BoardGroup, Leaderboard
from gradient_blueprints.run_models import Resource

UNITS = {
    Resource.SECONDS: "seconds",
    Resource.PROCESSOR_HOURS: "processor hours",
    Resource.ACCELERATOR_HOURS: "accelerator hours",
    Resource.ENERGY_KWH: "energy, kWh",
    Resource.CARBON_KG: "carbon, kg CO₂e",
    Resource.VRAM_GB_HOURS: "memory, GB·h",
    Resource.OPTIMIZER_GB_HOURS: "optimizer memory, GB·h",
    Resource.FLOPS: "FLOPs",
    Resource.TOKENS: "tokens",
}
_NAMED_COLOURS = [
    pictures.kind_colour(kind) for kind in ("attention", "feed_forward", "normalization", "embedding", "head")
]
_MOST_VERTICES = 1_000
_WIDE_RANGE = 20.0  # of largest to smallest, above which an axis is logarithmic
_MANY_DECADES = 1_000.0  # of the same, above which each decade has one tick


def draw_group(board: Leaderboard, group: BoardGroup, *, narrow: bool) -> bytes:
    """Final pairs (Γ, Ψ) of every run, the best entries by name, and the Pareto front of all."""
    size = pictures.NARROW if narrow else pictures.WIDE
    figure = pictures.empty_figure(size, height=size.height + 0.6)
    axes = figure.subplots()
    for entry in reversed(group.entries):  # so that the first ones lie on top
        named = entry.rank <= len(_NAMED_COLOURS)
        axes.plot(
            [run.gamma for run in entry.runs],
            [run.psi for run in entry.runs],
            "o" if named else ".",
            color=_NAMED_COLOURS[entry.rank - 1] if named else pictures.UNCLEAR,
            label=f"{entry.rank}. {entry.model_id}" if named else None,
            markersize=6 if named else 4,
        )
    front_line = {"color": pictures.QUIET, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    axes.plot([gamma for gamma, _ in group.front], [psi for _, psi in group.front], label="front", **front_line)
    _scale([run.gamma for entry in group.entries for run in entry.runs], axes)
    _name_axes(axes, board.resource, board.metric or "Ψ")
    handles, labels = axes.get_legend_handles_labels()
    by_rank = sorted(zip(labels, handles, strict=True), key=lambda pair: (pair[0] == "front", pair[0]))
    figure.legend(
        [handle for _, handle in by_rank],
        [label for label, _ in by_rank],
        loc="outside lower center",
        ncols=1 if narrow else 3,
    )
    return pictures.to_svg(figure)


def draw_curve(curve: Sequence[tuple[float, float]], resource: Resource, metric: str, *, narrow: bool) -> bytes:
    """Ψ over Γ of one run as it was told, [(Γ, Ψ)...] in the order of training."""
    figure = pictures.empty_figure(pictures.NARROW if narrow else pictures.WIDE)
    axes = figure.subplots()
    stride = max(1, len(curve) // _MOST_VERTICES)
    shown = [*curve[:-1:stride], curve[-1]]
    axes.plot(
        [gamma for gamma, _ in shown],
        [psi for _, psi in shown],
        color=_NAMED_COLOURS[0],
        marker="o" if len(shown) <= 60 else None,
        markersize=3,
    )
    _scale([gamma for gamma, _ in shown], axes)
    _name_axes(axes, resource, metric)
    return pictures.to_svg(figure)


def _scale(gammas: Sequence[float], axes: Axes) -> None:
    if min(gammas) > 0 and max(gammas) / min(gammas) > _WIDE_RANGE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(gammas) / min(gammas) < _MANY_DECADES else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter())


def _name_axes(axes: Axes, resource: Resource, metric: str) -> None:
    axes.set_xlabel(UNITS[resource])
    axes.set_ylabel(metric)
    axes.grid(visible=True)
