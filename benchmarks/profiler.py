"""What profiling costs beside a plain forward and backward pass of the same batches, gradients discarded.

    python -m benchmarks.profiler --lengths 128 512 --rounds 5

The model has the shape of SmolLM2-135M with random weights, which cost what trained ones cost. Runs are
interleaved; ratios are of processor time, which a busy machine disturbs less, with the least seconds by the processor
and by the wall clock above them. `forward` is a validation pass without gradients, the baseline of the paper's "1-2 %".
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import Ratio, publish
from gradient_blueprints.training.profiling import GradientProfiler

VOCABULARY = 49_152
BOUNDS = {
    ("norms of examples", 128): 0.80,
    ("norms of examples", 512): 1.0,
    ("all statistics", 128): 1.05,
    ("all statistics", 512): 1.05,
}
Batch = dict[str, Tensor]


def smollm2(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def plain(model: nn.Module, batch: Batch) -> None:
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def forward(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        model(**batch)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(processor, wall)."""
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


Times = dict[str, list[tuple[float, float]]]


def measure(model: nn.Module, length: int, examples: int, rounds: int) -> Times:
    """(processor, wall) seconds of each variant in each round."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    profilers = {
        "norms of examples": GradientProfiler(model, statistics="examples", verify=False),
        "and of batches": GradientProfiler(model, statistics="batches", verify=False),
        "all statistics": GradientProfiler(model, statistics="all", verify=False),
    }
    for number in range(rounds):
        ids = torch.randint(0, VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(number))
        batch = {"input_ids": ids, "labels": ids}
        found["forward"].append(seconds(partial(forward, model, batch)))
        found["plain"].append(seconds(partial(plain, model, batch)))
        for name, profiler in profilers.items():
            with profiler:
                profiler.step({key: value[:2, :8] for key, value in batch.items()}, key=f"warm-up {number}")
                found[name].append(seconds(partial(profiler.step, batch)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = smollm2(options.layers)
    rows = []
    for length in options.lengths:
        times = measure(model, length, options.examples, options.rounds)
        for name, found in times.items():
            processor, wall = (min(each) for each in zip(*found, strict=True))
            print(f"{options.examples} x {length} {name:<20} {processor:8.2f} s {wall:8.2f} s", flush=True)
            if name != "plain":
                plain = zip(found, times["plain"], strict=True)
                rows.append(
                    Ratio(
                        f"{name}, {options.examples} x {length} tokens, {options.layers} layers of SmolLM2-135M",
                        "forward and backward, gradients discarded",
                        tuple(mine / theirs for (mine, _), (theirs, _) in plain),
                        BOUNDS.get((name, length)),
                    )
                )
    publish(rows)


if __name__ == "__main__":
    main()
