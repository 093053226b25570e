"""The plots of capability per resource."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gradient_blueprints.plots import plot_curve, plot_gain, plot_pareto


def test_a_curve_shows_where_the_rule_stopped(tmp_path: Path) -> None:
    figure = plot_curve({"a": [(1.0, 9.0), (2.0, 7.0), (4.0, 6.5)], "b": [(1.0, 8.0)]}, {"a": 1}, logarithmic=True)
    figure.savefig(tmp_path / "curve.svg")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["stop"]
    assert [list(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"] == [[2.0, 7.0]]
    assert axes.get_xscale() == "log"
    assert (tmp_path / "curve.svg").stat().st_size > 1_000


def test_the_front_joins_the_points_that_none_beats() -> None:
    figure = plot_pareto({"a": [(0.1, 0.0), (0.5, 0.3)], "b": [(0.4, 0.4), (0.1, 0.2)]})
    front = next(line for line in figure.axes[0].lines if line.get_label() == "front")
    assert sorted(map(tuple, front.get_xydata())) == [(0.1, 0.0), (0.5, 0.3)]


def test_gain_per_cost_marks_the_best_fraction_inside_and_clipped() -> None:
    figure = plot_gain({"interior": (0.5, 1, 4), "clipped": (0.6, 1, 1)})
    best = [list(line.get_xydata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert best == [[0.25, 1.25], [1.0, 1.0]]


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from gradient_blueprints import MissingExtra\n"
        "from gradient_blueprints.plots import plot_curve\n"
        "try: plot_curve({})\n"
        "except MissingExtra as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'gradient-blueprints[plots]'" in run.stdout
