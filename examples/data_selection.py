"""Does it pay to choose the data? The best 30 % of a pool by each strategy, trained on, against held-out loss.

    python -m examples.data_selection [--pool mixed] [--seeds 3] [--threads 1]

A small GPT is pre-trained on English and adapted to Python code. The pool is 640 sequences of 128 tokens: `code`, all
of them code, or `mixed`, half code, a quarter English, 15 % licences, and a tenth code with its tokens shuffled. Each
strategy scores the pool, its best 30 % are trained on for two epochs with one learning rate for all (not tuned per
arm), and so is the whole pool. Prints a Markdown table: held-out loss on code over the seeds (each draws another pool
and order), the gain as a share of the whole pool's, and what of the chosen is code and what is shuffled.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from demo import models, texts
from demo.adapting import fine_tune
from demo.models import Batch
from gradient_blueprints.allocation import spearman
from gradient_blueprints.training.data_selection import (
    ErrorNorm,
    GradientNorm,
    Index,
    Loss,
    Random,
    Strategy,
    fit_influence,
    keep_top,
)
from gradient_blueprints.training.gradient_similarity import GradientSimilarity

LENGTH, BATCH, POOL, FRACTION, EPOCHS, RATE, SAMPLE = 128, 8, 640, 0.3, 2, 2e-3, 128
MIXTURE = {"code": 0.5, "english": 0.25, "legal": 0.15, "shuffled": 0.1}


def draw_pool(tokens: dict[str, torch.Tensor], mixed: bool, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Sequences (640, 128) in random order, and what each is."""
    shares = MIXTURE if mixed else {"code": 1.0}
    rows, kinds = [], []
    for number, (kind, share) in enumerate(shares.items()):
        count = round(share * POOL)
        source = tokens["code" if kind == "shuffled" else kind]
        (batch,) = models.random_batches(source, 1, count, LENGTH, seed=100 * seed + number)
        ids = batch["input_ids"]
        if kind == "shuffled":
            generator = torch.Generator().manual_seed(seed)
            ids = torch.stack([row[torch.randperm(LENGTH, generator=generator)] for row in ids])
        rows.append(ids)
        kinds += [kind] * count
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
    return torch.cat(rows)[order], [kinds[i] for i in order.tolist()]


def batches_of(rows: torch.Tensor) -> list[Batch]:
    return [{"input_ids": part, "labels": part} for part in torch.split(rows, BATCH)]


def in_epochs(rows: torch.Tensor, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=generator) for _ in range(EPOCHS)]
    return [batch for order in orders for batch in batches_of(rows[order])]


def main(pool: str, seeds: int) -> None:
    corpora = {"english": texts.english(), "code": texts.code(), "legal": texts.legal()}
    with tempfile.TemporaryDirectory() as folder:
        size = models.GptSize(steps=400)
        english = corpora["english"].training
        *_, last = models.pretrain_gpt("data-gpt", english, Path(folder), size, [1.0], lambda step, loss: None)
        model, tokenizer = models.load(last.folder)
    tokens = {name: models.tokenize(tokenizer, corpus.training) for name, corpus in corpora.items()}
    code = corpora["code"]
    heldout = models.ordered_batches(models.tokenize(tokenizer, code.heldout), 8, BATCH, LENGTH)
    target = tuple(models.ordered_batches(models.tokenize(tokenizer, code.validation), 4, BATCH, LENGTH))
    base = models.mean_loss(model, heldout)
    losses: dict[str, list[float]] = {}
    chosen_kinds: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    notes = []
    for seed in range(seeds):
        rows, kinds = draw_pool(tokens, pool == "mixed", seed)
        stream = batches_of(rows)
        pick = np.random.default_rng(seed).choice(POOL, SAMPLE, replace=False)
        predictor = fit_influence(model, batches_of(rows[pick]), seed=seed)
        strategies: dict[str, Strategy] = {
            "random": Random(seed),
            "predicted influence (Algorithm 2)": predictor,
            "exact influence (GraNd)": GradientNorm(),
            "EL2N": ErrorNorm(),
            "highest loss": Loss("high"),
            "lowest loss": Loss("low"),
            "middle loss": Loss("middle"),
            "gradient similarity to code": GradientSimilarity(target, seed=seed),
        }
        chosen: dict[str, Index] = {"everything": np.arange(POOL)}
        scores = {}
        for name, strategy in strategies.items():
            began = time.perf_counter()
            scores[name] = strategy(model, stream)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            chosen[name] = keep_top(scores[name], FRACTION)
        exact = scores["exact influence (GraNd)"]
        chosen["lowest exact influence"] = keep_top(-exact, FRACTION)
        chosen["exact influence, top 10 % left out"] = keep_top(exact, FRACTION, guard=0.1)
        against = {name: spearman(exact.tolist(), found.tolist()) or 0.0 for name, found in scores.items()}
        others = ", ".join(f"{name} {value:.2f}" for name, value in against.items() if not name.startswith("exact"))
        notes.append(
            f"seed {seed}: {predictor.calibration}. Over the pool, Spearman with the exact influence: {others}"
        )
        for name, index in chosen.items():
            outcome = fine_tune(name, model, None, in_epochs(rows[index], seed), heldout, RATE)
            losses.setdefault(name, []).append(outcome.loss)
            chosen_kinds.setdefault(name, []).extend(kinds[i] for i in index)
    print(f"\npool `{pool}`, held-out loss before {base:.3f}, {seeds} seeds\n")
    print("| Chosen by | loss | over seeds | gain of everything's | code | shuffled | seconds to score |")
    print("|---|---|---|---|---|---|---|")
    whole = np.array(losses["everything"])
    for name, found in sorted(losses.items(), key=lambda item: sum(item[1])):
        gain = 100 * (base - np.array(found)) / (base - whole)
        share = {kind: chosen_kinds[name].count(kind) / len(chosen_kinds[name]) for kind in ("code", "shuffled")}
        cost = f"{seconds[name] / seeds:.0f}" if name in seconds else ""
        print(
            f"| {name} | {np.mean(found):.3f} | {min(found):.3f} to {max(found):.3f} | {gain.mean():.0f} % "
            f"| {share['code']:.0%} | {share['shuffled']:.0%} | {cost} |"
        )
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=["mixed", "code"], default="mixed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.pool, arguments.seeds)
