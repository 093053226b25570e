"""What profiling costs beside a plain forward and backward pass of the same batches, gradients discarded.

    python benchmarks/profiler.py --lengths 128 512 --rounds 5

The model has the shape of SmolLM2-135M with random weights, which cost what trained ones cost. Runs are
interleaved; the ratio is of the smallest times, in seconds of processor time so that a busy machine
disturbs it less, with the wall clock beside it. `forward` is a validation pass without gradients,
the baseline of the paper's "1-2 %".
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

from gradient_blueprints.training.profiling import GradientProfiler

VOCABULARY = 49_152
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


def measure(model: nn.Module, length: int, examples: int, rounds: int) -> dict[str, tuple[float, float]]:
    """The smallest (processor, wall) seconds of each variant."""
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
    return {name: (min(c for c, _ in times), min(w for _, w in times)) for name, times in found.items()}


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
    print(f"{'tokens':>12} {'variant':<20} {'cpu s':>8} {'wall s':>8} {'ratio':>7} {'wall ratio':>11}")
    for length in options.lengths:
        times = measure(model, length, options.examples, options.rounds)
        cpu, wall = times["plain"]
        for name, (mine, clock) in times.items():
            ratios = f"{mine / cpu:>7.3f} {clock / wall:>11.3f}"
            print(f"{options.examples:>5} x {length:>4} {name:<20} {mine:>8.2f} {clock:>8.2f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
