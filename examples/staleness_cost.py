"""What it costs to believe a stale blueprint: loss after fine-tuning by it, against the verdict of the registry.

    python -m examples.staleness_cost [--seeds 3] [--steps 60]

A small GPT is pre-trained on English and adapted to code. Blueprints are profiled on mixtures of code and English and
on legal text, published, and judged by the registry against a local sample of code. With the row and column factors of
each, and nothing else, 10 % and 2.5 % of the coordinates of every matrix are chosen and trained; beside them random
coordinates, the local gradient, and everything. Learning rates are the demo's. Prints a Markdown table: the corrected
correlation that the verdict is read off, and the share of full fine-tuning's gain in held-out loss, mean and range.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from demo import models, service, texts
from demo.adapting import fine_tune, norms_by_batch
from demo.models import Batch
from gradient_blueprints import Client
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.selection import mean_gradients, select

LENGTH, EXAMPLES, BATCHES = 128, 8, 16
SHARES = (1.0, 0.5, 0.25, 0.1, 0.03, 0.0)
RATES = {1.0: 2e-3, 0.1: 8e-3, 0.025: 1.6e-2}
RANDOM_RATES = {0.1: 1.6e-2, 0.025: 3.2e-2}


def mixed(code: Sequence[Batch], other: Sequence[Batch], share: float) -> list[Batch]:
    """Batches in which `share` of the sequences are code, spread evenly over all of them."""
    count = len(code) * EXAMPLES
    is_code = torch.tensor([int((i + 1) * share) > int(i * share) for i in range(count)]).view(len(code), EXAMPLES, 1)
    return [
        {name: torch.where(mask, mine[name], theirs[name]) for name in mine}
        for mask, mine, theirs in zip(is_code, code, other, strict=True)
    ]


def profile(model: torch.nn.Module, batches: Sequence[Batch], domain: str) -> GradientProfiler:
    with GradientProfiler(model) as profiler:
        for batch in batches:
            profiler.step(batch, domain=domain)
    return profiler


def main(seeds: int, steps: int) -> None:
    corpora = {"english": texts.english(), "code": texts.code(), "legal": texts.legal()}
    with tempfile.TemporaryDirectory() as folder:
        size = models.GptSize()
        english = corpora["english"].training
        *_, last = models.pretrain_gpt("staleness-gpt", english, Path(folder), size, [1.0], lambda step, loss: None)
        model, tokenizer = models.load(last.folder)
        tokens = {name: models.tokenize(tokenizer, corpus.training) for name, corpus in corpora.items()}
        third = len(tokens["code"]) // 3  # the lab's, the adapter's sample, and what is trained on
        labs, sample, rest = tokens["code"][:third], tokens["code"][third : 2 * third], tokens["code"][2 * third :]
        heldout = models.ordered_batches(models.tokenize(tokenizer, corpora["code"].heldout), 8, EXAMPLES, LENGTH)

        def draw(source: torch.Tensor, seed: int) -> list[Batch]:
            return list(models.random_batches(source, BATCHES, EXAMPLES, LENGTH, seed))

        local = draw(sample, 1)
        local_norms = norms_by_batch(profile(model, local, "code"), "code")
        code, other = draw(labs, 2), draw(tokens["english"], 3)
        published = {f"{share:.0%} code, rest English": mixed(code, other, share) for share in SHARES}
        published["legal"] = draw(tokens["legal"], 4)

        def train(name: str, choice: object, share: float, rate: float) -> list[float]:
            return [
                fine_tune(
                    name,
                    model,
                    choice,  # type: ignore[arg-type] # a Selection or None
                    list(models.random_batches(rest, steps, EXAMPLES, LENGTH, seed=100 + seed)),
                    heldout,
                    rate,
                ).loss
                for seed in range(seeds)
            ]

        base = models.mean_loss(model, heldout)
        everything = train("everything", None, 1.0, RATES[1.0])
        print(
            f"\nheld-out loss before {base:.3f}, after full fine-tuning {sum(everything) / seeds:.3f}; {seeds} seeds\n"
        )
        print(
            "| Coordinates by | corrected correlation | verdict | gain at 10 % | gain at 2.5 % |\n|---|---|---|---|---|"
        )

        def gains(losses: list[float]) -> str:
            found = [100 * (base - loss) / (base - full) for loss, full in zip(losses, everything, strict=True)]
            return f"{sum(found) / len(found):.1f} % ({min(found):.1f} to {max(found):.1f})"

        def row(name: str, judged: str, verdict: str, cells: list[str]) -> None:
            print(f"| {name} | {judged} | {verdict} | {' | '.join(cells)} |", flush=True)

        with service.running(Path(folder), threads=1) as running:
            client = Client(running.url, api_key=running.admin_key, cache=False)
            for name, batches in published.items():
                profiler = profile(model, batches, "lab")
                version = client.publish_blueprint(profiler.blueprint("staleness-gpt", 1.0)).version
                checked = client.check_staleness("staleness-gpt", 1.0, local_norms, version=version, domain="code")
                agreement = checked.agreement
                low, high = agreement.corrected_ci or (float("nan"), float("nan"))
                blueprint: Blueprint = client.fetch_blueprint("staleness-gpt", 1.0, version=version)
                cells = []
                for share in (0.1, 0.025):
                    chosen = select(blueprint, budget=share, factors=profiler.factors(), domain="lab", model=model)
                    cells.append(gains(train(name, chosen, share, RATES[share])))
                shown = "–" if agreement.corrected is None else f"{agreement.corrected:.2f} [{low:.2f}, {high:.2f}]"
                row(name, shown, checked.verdict, cells)
            client.close()
        cells = []
        for share in (0.1, 0.025):
            chosen = select(blueprint, budget=share, gradients=mean_gradients(model, local), trust=0.0, model=model)
            cells.append(gains(train("local", chosen, share, RATES[share])))
        row("the local gradient", "", "", cells)
        cells = [
            gains(train("random", select(blueprint, budget=share, model=model), share, RANDOM_RATES[share]))
            for share in (0.1, 0.025)
        ]
        row("chance", "", "", cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.steps)
