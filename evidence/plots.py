"""The plots of the document, as SVG that is the same for the same runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.figure import Figure

from evidence.findings import Finding, find_all, name_of, pick
from evidence.plan import LOCAL_SIZES, Cell, ablated, at_random, by_factors, by_local, cells_of, linear_only, ours
from evidence.runs import Choice, Store

SHARES = (0.01, 0.05, 0.1, 0.25)
LABEL_WIDTH = 48
"""Signs of an arm's name beside its point; longer ones are wrapped."""
Lines = dict[str, dict[float, Finding | None]]
NAMES = tuple(f"{kind}-{model}.svg" for model in ("gpt", "smollm2") for kind in ("budgets", "arms", "local"))
mpl.rcParams["svg.hashsalt"] = "evidence"


def draw(plan: Sequence[Cell], store: Store, folder: Path) -> list[str]:
    """Write the plots for which there is anything to show; answers the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for model in ("gpt", "smollm2"):
        for name, figure in (
            (f"budgets-{model}", _budgets(model, plan, store)),
            (f"arms-{model}", _arms(model, plan, store)),
            (f"local-{model}", _local(model, plan, store)),
        ):
            if figure is not None:
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                drawn.append(f"{name}.svg")
    return drawn


def _lines(title: str, label: str, lines: Lines) -> Figure | None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    drawn = 0
    for name, found in lines.items():
        known = {x: finding for x, finding in found.items() if finding is not None}
        if not known:
            continue
        means = [100 * finding.share for finding in known.values()]
        bars = [_bar(finding) for finding in known.values()]
        axes.errorbar(
            list(known), means, yerr=[[b[0] for b in bars], [b[1] for b in bars]], label=name, marker="o", capsize=2
        )
        drawn += len(known) > 1
    if not drawn:
        return None
    axes.set(title=title, xlabel=label, ylabel="share of full fine-tuning's gain, %", xscale="log")
    places = sorted({x for found in lines.values() for x in found})
    axes.set_xticks(places, labels=[f"{x:g}" for x in places])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _bar(finding: Finding) -> tuple[float, float]:
    low, high = finding.share_interval or (finding.share, finding.share)
    return 100 * (finding.share - low), 100 * (high - finding.share)


def _budgets(model: str, plan: Sequence[Cell], store: Store) -> Figure | None:
    arms: dict[str, Callable[[float], Choice]] = {
        "ours": ours,
        "ours, linear layers alone": lambda share: linear_only(ours(share)),
        "published factors": by_factors,
        "local mean gradient": by_local,
        "random coordinates": at_random,
        "LoRA": lambda share: Choice("lora", share=share),
        "layers by norm": lambda share: Choice("layers", "norm", share, 0, "code"),
    }
    lines: Lines = {
        name: {100 * share: pick(arm(share), model, plan, store) for share in SHARES} for name, arm in arms.items()
    }
    return _lines(f"{model}, code: gain by budget", "parameters trained, %", lines)


def _local(model: str, plan: Sequence[Cell], store: Store) -> Figure | None:
    share = ablated(model)[0]
    by_size: dict[str, Callable[[int], Choice]] = {
        "published factors and local sample": lambda size: ours(share, "code", size),
        "local sample alone": lambda size: by_local(share, size),
        "published factors alone": lambda size: by_factors(share),
        "random": lambda size: at_random(share),
    }
    lines: Lines = {
        name: {size: pick(choice(size), model, plan, store) for size in LOCAL_SIZES} for name, choice in by_size.items()
    }
    if sum(each is not None for each in lines["local sample alone"].values()) < 2:
        return None
    return _lines(f"{model}, code, {share:.0%}: what a blueprint adds to a local sample", "local sequences", lines)


def _arms(model: str, plan: Sequence[Cell], store: Store) -> Figure | None:
    found = find_all(cells_of("10 %", model, "code", plan), plan, store)
    if len(found) < 2:
        return None
    found.sort(key=lambda finding: finding.share)
    figure = Figure(figsize=(9, 1 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    bars = [_bar(finding) for finding in found]
    axes.errorbar(
        [100 * each.share for each in found],
        [fill(name_of(each.cell.choice), LABEL_WIDTH) for each in found],
        xerr=[[b[0] for b in bars], [b[1] for b in bars]],
        fmt="o",
        capsize=2,
    )
    axes.axvline(100, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(title=f"{model}, code, 10 % of the parameters", xlabel="share of full fine-tuning's gain, %")
    return figure
