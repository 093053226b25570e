"""What the profiler's studies share: how the layers of a blueprint rank, how rankings agree, how its tails fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from gradient_blueprints.models import Blueprint

STATISTICS = ("gradient_norm", "example_norm", "signal", "first_order", "alpha")
Ranking = Mapping[str, list[float | None]]
"""A statistic's value in every layer."""


def ranking(blueprint: Blueprint) -> Ranking:
    return {name: [getattr(layer, name) for layer in blueprint.layers] for name in STATISTICS}


def agreement(pairs: Iterable[tuple[Ranking, Ranking]]) -> dict[str, str]:
    """Spearman's correlation over the layers that both have, by statistic: mean of the pairs (lowest to highest)."""
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for one, two in pairs:
        for name in STATISTICS:
            both = [(a, b) for a, b in zip(one[name], two[name], strict=True) if a is not None and b is not None]
            if len(both) > 2:
                found[name].append(float(spearmanr(*np.transpose(both)).statistic))
    return {
        name: f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"
        for name, values in found.items()
    }


def print_table(title: str, rows: Mapping[str, Mapping[str, str]], columns: Iterable[str] = STATISTICS) -> None:
    """A Markdown table, a row for each key."""
    columns = list(columns)
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row[column] for column in columns)} |")


def tails(blueprint: Blueprint) -> dict[str, str]:
    """Exponents, fits and concentration of a document: median over layers, and the range or the count."""
    layers = blueprint.layers
    exponents = np.array([layer.alpha for layer in layers if layer.alpha is not None])
    profile: Any = (blueprint.extra or {})["profile"]
    binned = [tail["log_binned"] for tail in profile["tails"].values() if tail["log_binned"] is not None]
    fits = [layer.tail_fit for layer in layers if layer.tail_fit is not None]
    wins = [fit for fit in fits if (fit.versus_lognormal or 0) > 0]
    top = [dict(layer.retained_mass)[0.1] for layer in layers if layer.retained_mass]
    stars = [layer.k_star for layer in layers if layer.k_star is not None]
    return {
        "alpha, Hill, top 1 %": f"{np.median(exponents):.2f} ({exponents.min():.2f} to {exponents.max():.2f})",
        "inside (1, 2)": f"{int(((exponents > 1) & (exponents < 2)).sum())} of {len(exponents)}",
        "alpha, log-binned, top 10 %": f"{np.median(binned):.2f}",
        "power law not worse than log-normal": f"{len(wins)} of {len(fits)}",
        "and within 0.03 of the tail": f"{sum((fit.ks or 0) <= 0.03 for fit in wins)}",
        "distance of tail and fit": f"{np.median([fit.ks or 0 for fit in fits]):.3f}",
        "top 10 % keep of the sum": f"{np.median(top):.3f}",
        "k_star": f"{np.median(stars):.2f} ({min(stars):.2f} to {max(stars):.2f})",
    }


def relative_width(blueprint: Blueprint) -> str:
    """Width of the 95 % interval of `gradient_norm` over the norm: median over layers, and the widest."""
    widths = [
        (layer.gradient_norm_ci[1] - layer.gradient_norm_ci[0]) / layer.gradient_norm
        for layer in blueprint.layers
        if layer.gradient_norm_ci and layer.gradient_norm
    ]
    return f"{np.median(widths):.2f} (widest {max(widths):.2f})"
