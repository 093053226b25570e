"""How ranks and exponents move while a model is trained: a small GPT, pre-trained on the spot, at 50, 80 and 100 %.

    python -m examples.profile_training --seeds 3

Each checkpoint is profiled on held-out English, the domain it is trained on, with each seed's sample. Rankings are
compared between checkpoints and, for a ceiling, between seeds at the same checkpoint. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np

from demo import models, texts
from demo.models import GptSize
from examples.rankings import agreement, print_table, ranking, relative_width, tails
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.checkpoints import FRACTIONS

LENGTH, EXAMPLES = 128, 8


def by_kind(blueprint: Blueprint) -> dict[str, str]:
    """Median exponent of each kind of layer."""
    found: dict[str, list[float]] = {}
    for layer in blueprint.layers:
        if layer.alpha is not None and layer.kind is not None:
            found.setdefault(layer.kind, []).append(layer.alpha)
    return {f"alpha, {kind}": f"{np.median(values):.2f}" for kind, values in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=GptSize.steps)
    parser.add_argument("--batches", type=int, default=16, help="per checkpoint and seed")
    options = parser.parse_args()
    english = texts.english()
    size = replace(GptSize(), steps=options.steps)
    documents: dict[tuple[float, int], Blueprint] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = models.pretrain_gpt("tiny", english.training, Path(scratch), size, FRACTIONS, lambda step, loss: None)
        for checkpoint in work:
            model, tokenizer = models.load(checkpoint.folder)
            tokens = models.tokenize(tokenizer, english.validation)
            for seed in range(options.seeds):
                batches = list(models.random_batches(tokens, options.batches, EXAMPLES, LENGTH, seed=seed))
                with GradientProfiler(model.eval(), tokenizer, seed=seed, general="english") as profiler:
                    profiler.run(batches, domain="english")
                documents[checkpoint.fraction, seed] = profiler.blueprint("tiny", checkpoint.fraction)
    rows = {}
    for fraction in FRACTIONS:
        blueprint = documents[fraction, 0]
        assert blueprint.provenance is not None
        loss = (blueprint.provenance.loss or {})["english"]
        norms = [layer.gradient_norm for layer in blueprint.layers]
        rows[f"{fraction:.0%}"] = {
            "loss per token": f"{loss:.2f}",
            "gradient_norm": f"{np.median(norms):.3f}",
            "relative width": relative_width(blueprint),
            **tails(blueprint),
            **by_kind(blueprint),
        }
    columns = list(next(iter(rows.values())))
    print_table("Median over layers, at", {name: {at: rows[at][name] for at in rows} for name in columns}, rows)
    ranks = {key: ranking(blueprint) for key, blueprint in documents.items()}
    seeds = range(options.seeds)
    agreements = {
        f"{fraction:.0%}, two seeds": agreement(
            (ranks[fraction, i], ranks[fraction, j]) for i, j in combinations(seeds, 2)
        )
        for fraction in FRACTIONS
    }
    for one, two in combinations(FRACTIONS, 2):
        agreements[f"{one:.0%} and {two:.0%}, two seeds"] = agreement(
            (ranks[one, i], ranks[two, j]) for i, j in product(seeds, seeds) if i != j
        )
        agreements[f"{one:.0%} and {two:.0%}, same sample"] = agreement((ranks[one, i], ranks[two, i]) for i in seeds)
    print_table("Spearman of ranks", agreements)


if __name__ == "__main__":
    main()
