"""The page that the demo leaves: what was found, as pictures and tables in one file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from demo.adapting import Outcome
from demo.findings import UNTUNED, Adapted, Findings, agreement_text
from demo.screen import megabytes
from gradient_blueprints import Blueprint
from gradient_blueprints.allocation import spearman

INK, MUTED, ACCENT, RIVAL, FULL = "#1f2933", "#7b8794", "#0f766e", "#c2410c", "#1f2933"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "demo",
}
CSS = """
:root { color-scheme: light }
body { font: 15px/1.55 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; color: #1f2933;
       background: #f5f7fa; margin: 0 }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px }
header p { color: #52606d; max-width: 70ch }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 8px; letter-spacing: -.01em }
h2 { font-size: 19px; margin: 0 0 4px } h3 { font-size: 15px; margin: 20px 0 4px }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 22px 26px; margin: 18px 0 }
p { margin: 6px 0 10px } .small, figcaption { color: #616e7c; font-size: 13px }
figure { margin: 12px 0 0 } figure svg { width: 100%; height: auto; display: block }
.numbers { display: flex; flex-wrap: wrap; gap: 14px; margin: 20px 0 }
.numbers div { flex: 1 1 190px; background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 14px 18px }
.numbers b { display: block; font-size: 25px; color: #0f766e; letter-spacing: -.02em }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
table { font-size: 14px }
th, td { padding: 6px 8px; border-bottom: 1px solid #edf0f3; text-align: right; white-space: nowrap }
th { color: #616e7c; font-weight: 600; font-size: 13px } th.text, td.text { text-align: left }
tr.ours td:first-child { color: #0f766e; font-weight: 600 } tr.base td { color: #7b8794 }
code, pre { font: 13px/1.5 ui-monospace, 'DejaVu Sans Mono', monospace }
pre { background: #f5f7fa; border-radius: 8px; padding: 12px 14px; overflow-x: auto }
.verdict { display: inline-block; border-radius: 999px; padding: 1px 12px; font-weight: 600; font-size: 13px }
.stale { background: #ffedd5; color: #9a3412 } .fresh { background: #ccfbf1; color: #115e59 }
"""


def write(path: Path, found: Findings) -> None:
    """One self-contained page."""
    with mpl.rc_context(STYLE):
        sections = [_registry(found), _checkpoints(found)]
        if found.domains is not None:
            sections.append(_domains(found.domains))
        sections += [_adaptation(adapted) for adapted in found.adaptations]
    sections.append(_caution())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gradient blueprints: a run of the demo</title><style>{CSS}</style></head><body><main>
<header><h1>Where a model learns, and what it takes to train only there</h1>
<p>A lab submitted checkpoints, the registry's worker profiled their gradients, a second lab added its own view, and
an adapter fetched the blueprints and trained a fraction of the parameters. Every number here was computed by this run
of <code>python -m demo</code>, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p></header>
<div class="numbers">{"".join(_headline(adapted) for adapted in found.adaptations)}</div>
{"".join(sections)}
</main></body></html>
""",
        encoding="utf-8",
    )


def _headline(adapted: Adapted) -> str:
    ours = adapted.outcomes[0]
    less = adapted.full.training_bytes / ours.training_bytes
    name = f"{adapted.blueprint.model_id} → {adapted.domain}"
    untuned = "" if adapted.rates_tuned else f" after {adapted.steps} steps at untuned learning rates"
    return (
        f"<div><b>{adapted.share_of_gain(ours):.0%}</b>of full fine-tuning’s gain{untuned}, <br>{escape(name)}</div>"
        f"<div><b>1/{less:.0f}</b>of its optimizer and gradient memory: {megabytes(ours.training_bytes)} "
        f"instead of {megabytes(adapted.full.training_bytes)}</div>"
    )


def _registry(found: Findings) -> str:
    columns = ("model", "checkpoint", "version", "lab", "layers", "size", "digest")
    rows = [(*row[:-1], row[-1][:19] + "…") for row in found.versions]
    return f"""<section><h2>What the registry holds</h2>
<p>Version 1 of each checkpoint is the owner’s, from a profiling job. A second lab’s uploads stand beside it under
its own name; a plain fetch still answers the owner’s.</p>{_table(columns, rows, text=(0, 3, 6))}</section>"""


def _checkpoints(found: Findings) -> str:
    first = found.checkpoints[0]
    ids = [layer.id for layer in first.layers]
    norms = np.array([[blueprint.layer(name).gradient_norm for blueprint in found.checkpoints] for name in ids])
    labels = [f"{blueprint.training_checkpoint:.0%}" for blueprint in found.checkpoints]
    return f"""<section><h2>{escape(first.model_id)}: gradient norm per layer, over its training</h2>
<p>Mean norm of the batch gradient on held-back English, on a logarithmic scale. {_change(found.checkpoints)}</p>
<figure>{_heatmap(norms, [_short(name) for name in ids], labels, "share of training done")}
<figcaption>{_learning(found.pretraining)}</figcaption></figure></section>"""


def _change(checkpoints: Sequence[Blueprint]) -> str:
    first, last = checkpoints[0], checkpoints[-1]
    correlation = spearman(*([layer.gradient_norm for layer in blueprint.layers] for blueprint in (first, last)))
    if correlation is None:
        return ""
    return (
        f"Layer ranks at {first.training_checkpoint:.0%} and at {last.training_checkpoint:.0%} of training correlate "
        f"{correlation:.2f}."
    )


def _learning(losses: Sequence[float]) -> str:
    end = max(1, len(losses) // 20)
    return (
        f"Pre-trained in this run: {len(losses)} steps, training loss {losses[0]:.2f} at the first step, "
        f"{np.mean(losses[-end:]):.2f} over the last {end}."
    )


def _domains(blueprint: Blueprint) -> str:
    blocks = [layer for layer in blueprint.layers if layer.domain_norms]
    tags = sorted(
        {tag for layer in blocks for tag in layer.domain_norms or {}}, key=lambda tag: (tag != "general", tag)
    )
    kinds = ["attention", "feed_forward"]
    columns = [(kind, tag) for kind in kinds for tag in tags]
    depths = sorted({layer.depth for layer in blocks if layer.depth is not None})
    norms = np.full((len(columns), len(depths)), np.nan)
    for layer in blocks:
        for index, (kind, tag) in enumerate(columns):
            if layer.kind == kind and layer.depth is not None and layer.domain_norms:
                norms[index, depths.index(layer.depth)] = layer.domain_norms.get(tag, np.nan)
    if not columns or not depths or np.isnan(norms).all():
        return ""
    provenance = blueprint.provenance
    loss = provenance.loss if provenance is not None else None
    losses = ", ".join(f"{name} {value:.2f}" for name, value in sorted((loss or {}).items()))
    notes = escape(provenance.notes or "") if provenance is not None else ""
    labels = [f"{kind.replace('_', ' ')}, {tag}" for kind, tag in columns]
    return f"""<section><h2>{escape(blueprint.model_id)}: the same model reads two domains</h2>
<p>Gradient norms of real pretrained weights per block and domain. Validation loss in nats per token: {losses}.</p>
<figure>{_heatmap(norms, labels, [str(depth) for depth in depths], "block", every=3)}
<figcaption>{notes}.</figcaption></figure></section>"""


def _adaptation(adapted: Adapted) -> str:
    columns = (
        "trained",
        "parameters",
        "rate",
        "held-out loss",
        "of gain",
        "optimizer",
        "+ gradients",
        "time",
    )
    rows = [("nothing", "0", "", f"{adapted.base_loss:.3f}", "0%", "", "", ""), *map(_row(adapted), _all(adapted))]
    classes = ["base", *("ours" if _ours(outcome) else "" for outcome in _all(adapted))]
    verdict = adapted.staleness.verdict
    largest = max(outcome.largest_gradient_bytes for outcome in adapted.outcomes)
    untuned = "" if adapted.rates_tuned else f" {UNTUNED}"
    return f"""<section><h2>{escape(adapted.blueprint.model_id)} adapted to {escape(adapted.domain)} text</h2>
<p><span class="verdict {verdict}">{verdict} here</span> {escape(agreement_text(adapted.staleness))}.
{adapted.steps} steps, the same batches for all.{untuned}</p>
<figure>{_loss_against_memory(adapted)}</figure>
{_table(columns, rows, text=(0,), classes=classes)}
<p class="small">Memory is measured: moments and indices, then with the gradients that are held when the optimizer
steps. A selection’s backward pass also holds one tensor’s whole gradient for a moment, at most {megabytes(largest)}.
Weights and activations are the same for all.</p>
<h3>What was selected</h3><pre>{escape(adapted.selection.summary(top=8))}</pre></section>"""


def _all(adapted: Adapted) -> list[Outcome]:
    return [adapted.full, *adapted.outcomes]


def _ours(outcome: Outcome) -> bool:
    return outcome.name.startswith(("published", "local"))


def _row(adapted: Adapted) -> Any:
    def row(outcome: Outcome) -> tuple[str, ...]:
        return (
            outcome.name,
            f"{outcome.trained:,}",
            f"{outcome.learning_rate:g}",
            f"{outcome.loss:.3f}",
            f"{adapted.share_of_gain(outcome):.0%}",
            megabytes(outcome.optimizer_bytes),
            megabytes(outcome.training_bytes),
            f"{outcome.seconds:.0f} s",
        )

    return row


def _caution() -> str:
    return """<section><h2>How to read this</h2>
<p>Small models, short training, one seed: differences of about 0.02 in loss mean nothing. What a selection saves is
memory. It saves little time, since the whole forward and most of the backward pass still run. Random coordinates are
a rival hard to beat at generous budgets; the choice matters most where the budget is small.</p></section>"""


# --- pictures


def _heatmap(norms: np.ndarray, rows: Sequence[str], columns: Sequence[str], xlabel: str, every: int = 1) -> str:
    """Rows × columns of norms, log colour."""
    figure = Figure(figsize=(9.4, 0.9 + 0.23 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    positive = norms[norms > 0]
    norm = mpl.colors.LogNorm(positive.min(), positive.max()) if positive.size else None
    image = axes.imshow(norms, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows)
    shown = range(0, len(columns), every)
    axes.set_xticks(shown, [columns[index] for index in shown])
    axes.set_xlabel(xlabel)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if norms.shape[1] <= 6 and positive.size:
        middle = float(np.sqrt(positive.min() * positive.max()))
        for (row, column), value in np.ndenumerate(norms):
            axes.text(
                column, row, f"{value:.3g}", ha="center", va="center", fontsize=7.5,
                color="white" if value > middle else INK,
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    bar.set_label("gradient norm")
    bar.outline.set_visible(False)
    return _svg(figure)


def _loss_against_memory(adapted: Adapted) -> str:
    figure = Figure(figsize=(9.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(adapted.full.loss, color=MUTED, linewidth=0.8, linestyle=":")
    way = adapted.outcomes[0].name.split(",")[0]
    selected = [outcome for outcome in adapted.outcomes if outcome.name.startswith(way)]
    axes.plot(
        [outcome.training_bytes / 1e6 for outcome in selected],
        [outcome.loss for outcome in selected],
        color=ACCENT, linewidth=1.2, alpha=0.5,
    )  # fmt: skip
    outcomes = sorted(_all(adapted), key=lambda outcome: outcome.loss)
    # The loss before training is far above all of them: a frame down to it would hide their differences.
    best, worst = outcomes[0].loss, outcomes[-1].loss
    span = max(1.15 * (worst - best), 0.25 * (adapted.base_loss - best))
    heights = _apart([outcome.loss for outcome in outcomes], 0.085 * span)
    for outcome, height in zip(outcomes, heights, strict=True):
        color = FULL if outcome is adapted.full else ACCENT if _ours(outcome) else RIVAL
        x = outcome.training_bytes / 1e6
        axes.plot(x, outcome.loss, "o", color=color, markersize=6)
        axes.annotate(
            f"{outcome.name}  {outcome.loss:.3f}", (x, outcome.loss), (x * 1.09, height),
            color=color, va="center", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
    axes.text(
        0.005, 0.97, f"before training: {adapted.base_loss:.3f}, above this frame",
        transform=axes.transAxes, color=MUTED, va="top",
    )  # fmt: skip
    axes.set_xscale("log")
    smallest, largest = (f(outcome.training_bytes / 1e6 for outcome in outcomes) for f in (min, max))
    axes.set_xlim(smallest * 0.8, largest * (largest / smallest) ** 0.28)
    ticks = [1, 2, 5]
    places = [tick * 10.0**power for power in range(-3, 6) for tick in ticks]
    places = [place for place in places if smallest * 0.8 <= place <= largest * 1.3]
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(best - 0.08 * span, max(best + 1.12 * span, heights[-1] + 0.12 * span))
    axes.set_xlabel("optimizer state and gradients, MB (measured, logarithmic)")
    axes.set_ylabel("held-out loss, nats per token")
    return _svg(figure)


def _apart(values: Sequence[float], least: float) -> list[float]:
    """Ascending values moved up until each is `least` above the one before, so that labels do not meet."""
    moved: list[float] = []
    for value in values:
        moved.append(max(value, moved[-1] + least) if moved else value)
    return moved


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _short(layer: str) -> str:
    return layer.removeprefix("model.").removeprefix("layers.")


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int], classes: Sequence[str] = ()
) -> str:
    def cell(tag: str, index: int, value: str) -> str:
        kind = ' class="text"' if index in text else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    head = "".join(cell("th", index, column) for index, column in enumerate(columns))
    body = "".join(
        f'<tr class="{classes[number] if classes else ""}">'
        + "".join(cell("td", index, value) for index, value in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
