"""Plots of capability per resource (extra [plots]): Ψ over Γ with the stopping point, Pareto fronts, gain per cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gradient_blueprints.errors import MissingExtra
from gradient_blueprints.theory import best_fraction, gain_per_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (6.4, 4.0)  # inches


def plot_curve(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    stops: Mapping[str, int | None] | None = None,
    *,
    psi: str = "Ψ",
    gamma: str = "Γ",
    logarithmic: bool = False,
) -> Figure:
    """Ψ over Γ, a line for each name: [(Γ, Ψ)…]; `stops[name]` is the index of the check at which a rule stopped.

    >>> # plot_curve({"cosine": [(1.0, 9.0), (2.0, 7.0)]}, {"cosine": 1}).savefig("curve.svg")
    """
    figure, axes = _empty(gamma, psi)
    for name, points in curves.items():
        (line,) = axes.plot([point[0] for point in points], [point[1] for point in points], label=name)
        stopped = (stops or {}).get(name)
        if stopped is not None:
            at = points[stopped]
            axes.plot(*at, "o", color=line.get_color())
            axes.annotate("stop", at, textcoords="offset points", xytext=(6, 6))
    if logarithmic:
        axes.set_xscale("log")
    axes.legend()
    return figure


def plot_pareto(
    choices: Mapping[str, Sequence[tuple[float, float]]], *, x: str = "share of Γ saved", y: str = "Ψ lost"
) -> Figure:
    """Points (gain, loss) by group, with the front of all of them: those that none beats in both."""
    figure, axes = _empty(x, y)
    for name, points in choices.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], "o", label=name)
    front: list[tuple[float, float]] = []
    for point in sorted({point for points in choices.values() for point in points}, key=lambda p: (-p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    axes.plot([point[0] for point in front], [point[1] for point in front], color="0.5", zorder=0, label="front")
    axes.legend()
    return figure


def plot_gain(settings: Mapping[str, tuple[float, float, float]]) -> Figure:
    """G(k)/G(1) for each name's (gamma, fixed, variable), with its best fraction k* (paper eq. 12 to 19)."""
    figure, axes = _empty("share k of the parameters trained", "gain per cost, G(k) / G(1)")
    shares = [number / 200 for number in range(1, 201)]
    for name, (gamma, fixed, variable) in settings.items():
        full = gain_per_cost(1, gamma, fixed, variable)
        (line,) = axes.plot(shares, [gain_per_cost(k, gamma, fixed, variable) / full for k in shares], label=name)
        best = best_fraction(gamma, fixed, variable).fraction
        axes.plot(best, gain_per_cost(best, gamma, fixed, variable) / full, "o", color=line.get_color())
    axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.legend()
    return figure


def _empty(x: str, y: str) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise MissingExtra("plots", "Plotting") from missing
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes
