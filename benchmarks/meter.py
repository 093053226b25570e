"""What the resource meter adds to training steps, beside the same steps without it.

    python -m benchmarks.meter --steps 12 --rounds 6

Blocks of steps with and without a running meter alternate; the ratio is of the medians of processor seconds over the
blocks. On a busy machine that ratio is as uncertain as its spread, which stands beside it, so the two things that the
meter does are also timed alone: a sample, of which there is one a second, and the hook, of which there is one a step.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import processor_seconds
from gradient_blueprints.training.resources import ResourceMeter


def build() -> nn.Module:
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="per block")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 2048, (8, 128))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    blocks: dict[bool, list[float]] = {True: [], False: []}
    meter = ResourceMeter(model, optimizer, processor_watts=100, memory_watts=10)
    for number in range(2 * options.rounds):
        metered = number % 2 == 0
        with meter if metered else nullcontext():
            blocks[metered].append(processor_seconds(step, options.steps))
    plain, with_meter = statistics.median(blocks[False]), statistics.median(blocks[True])
    spread = (max(blocks[False]) - min(blocks[False])) / plain
    print(f"a step {plain * 1e3:.1f} ms, with the meter {with_meter * 1e3:.1f} ms of processor time")
    print(f"ratio {with_meter / plain:.4f}; the plain blocks among themselves spread over {spread:.1%}")

    with meter:
        sample = processor_seconds(meter._sample, 500)
        hook = processor_seconds(lambda: meter._see_batch(model, (), batch), 500)
        tally = processor_seconds(meter.tally, 100)
    share = sample / meter.interval + hook / plain
    print(f"a sample {sample * 1e6:.0f} us each {meter.interval:g} s, the hook {hook * 1e6:.0f} us a step: {share:.3%}")
    print(f"a tally when asked for {tally * 1e6:.0f} us")


if __name__ == "__main__":
    main()
