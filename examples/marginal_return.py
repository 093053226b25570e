"""When would it have paid to stop? Real curves of a small GPT, and stopping rules replayed on them.

    python -m examples.marginal_return train --schedule cosine
    python -m examples.marginal_return train --schedule constant-then-decay
    python -m examples.marginal_return replay [--plots docs/plots]

`train` pre-trains a GPT of 1.1 M parameters on the standard library's sources for 600 steps, about 3 minutes on an idle
core, and writes its curve to examples/curves/. `replay` prints the tables of docs/resources.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from demo.models import mean_loss, ordered_batches, random_batches, tokenize, train_tokenizer
from demo.texts import code
from gradient_blueprints.plots import plot_curve, plot_pareto
from gradient_blueprints.run_models import Resource, RunPoint
from gradient_blueprints.training.replay import Check, pareto, replay, replay_early_stopping, returns, table
from gradient_blueprints.training.resources import ResourceMeter

CURVES = Path(__file__).parent / "curves"
SCHEDULES = ("cosine", "constant-then-decay")
STEPS, EVERY, WARMUP = 600, 10, 30
PEAK = 3e-3
DECAY = 0.2  # the share of the steps in which constant-then-decay goes down to zero
GUARD = 0.5  # no stopping above this share of the peak learning rate


def learning_rate(schedule: str, step: int) -> float:
    """As a share of the peak."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress)
    return min(1.0, (1 - progress) / DECAY)


def train(schedule: str) -> None:
    torch.manual_seed(0)
    domain = code()
    tokenizer = train_tokenizer(domain.training, 2048)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tokens = tokenize(tokenizer, domain.training)
    held_out = ordered_batches(tokenize(tokenizer, domain.validation), 4, 8, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    points = []
    with ResourceMeter(model, optimizer) as meter:
        for step, batch in enumerate(random_batches(tokens, STEPS, 8, 128, seed=0), start=1):
            optimizer.param_groups[0]["lr"] = PEAK * learning_rate(schedule, step - 1)
            model.train()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % EVERY == 0:
                with meter.part("evaluation"):
                    psi = mean_loss(model, held_out)
                points.append(RunPoint(step=step, psi=round(psi, 5), gamma=meter.tally().amounts()))
                print(f"{schedule} {step:>4} loss {psi:.4f}", flush=True)
    tally = meter.tally().model_dump(mode="json", exclude={"spans", "hardware"}, exclude_defaults=True)
    curve = {"schedule": schedule, "tally": tally, "points": [point.model_dump(mode="json") for point in points]}
    CURVES.mkdir(exist_ok=True)
    (CURVES / f"{schedule}.json").write_text(json.dumps(curve, indent=1) + "\n")


def read_curve(schedule: str, gamma: Resource = Resource.FLOPS) -> list[Check]:
    """The stored curve; FLOPs, which do not depend on how busy the machine was, as Γ in units of 10^12."""
    points = [
        RunPoint.model_validate(point) for point in json.loads((CURVES / f"{schedule}.json").read_text())["points"]
    ]
    scale = 1e12 if gamma is Resource.FLOPS else 1.0
    return [
        Check(point.gamma[gamma] / scale, point.psi, learning_rate(schedule, point.step) > GUARD) for point in points
    ]


def chinchilla_65b() -> list[Check]:
    """The loss of 65 billion parameters over 1.4 trillion tokens by Hoffmann et al.'s fit (2022, section 3.3).

    A formula and not a run: the shape that the paper cites, 15 % of the compute for less than 0.01 of loss.
    """
    size = 65e9
    tokens = [number * 1e10 for number in range(2, 141)]
    return [Check(6 * size * count / 1e21, 1.69 + 406.4 / size**0.34 + 410.7 / count**0.28) for count in tokens]


def show(name: str, curve: list[Check]) -> None:
    start = next(index for index, check in enumerate(curve) if check.gamma >= 0.15 * curve[-1].gamma)
    ratios = sorted(returns(curve[start:]))
    some = [ratios[int(share * (len(ratios) - 1))] for share in (0.1, 0.25, 0.5, 0.75)]
    eta = [float(f"{ratio:.3g}") for ratio in some if ratio > 0]  # as they are printed
    last = next(check for check in curve if check.gamma >= 0.85 * curve[-1].gamma)
    print(f"\n{name}: the last 15 % of Γ bring {last.psi - curve[-1].psi:.4f}")
    rows = [*replay(curve, eta, patience=(1, 3)), *replay_early_stopping(curve)]
    print(table(rows))
    print("Pareto front:", "; ".join(f"{row.rule} ({row.saved:.0%}, {row.lost:+.4f})" for row in pareto(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "replay"))
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    parser.add_argument("--plots", type=Path, help="with replay: where to write marginal-return.svg and pareto.svg")
    options = parser.parse_args()
    if options.what == "train":
        train(options.schedule)
        return
    for schedule in SCHEDULES:
        curve = read_curve(schedule)
        show(f"{schedule}, no stopping above {GUARD:.0%} of the peak learning rate", curve)
        show(f"{schedule}, unguarded", [check._replace(decay_ahead=False) for check in curve])
    show("65 B parameters by formula", chinchilla_65b())
    if options.plots:
        plot(options.plots)


def plot(folder: Path) -> None:
    """The curves with the point where one rule stops under guard, and what a grid of rules saves and loses."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = {schedule: read_curve(schedule) for schedule in SCHEDULES}
    stops = {name: replay(curve, [0.3], [1])[0].stopped_at for name, curve in curves.items()}
    lines = {name: [(check.gamma, check.psi) for check in curve] for name, curve in curves.items()}
    plot_curve(lines, stops, psi="held-out loss", gamma="10^12 FLOPs").savefig(folder / "marginal-return.svg")
    cosine = curves["cosine"]
    rows = {
        "marginal return": replay(cosine, [0.02, 0.05, 0.1, 0.2, 0.3, 0.4], (1, 3), (3, 5)),
        "early stopping": replay_early_stopping(cosine),
    }
    points = {name: [(row.saved, row.lost) for row in of_rule] for name, of_rule in rows.items()}
    plot_pareto(points).savefig(folder / "pareto.svg")


if __name__ == "__main__":
    main()
