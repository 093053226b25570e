"""Sizes of selections and sparse deltas on disk: python -m benchmarks.deltas

One matrix of 4096 × 4096 bfloat16 and float32 weights, its coordinates chosen by a random gradient, the worst case for
the indices; all chosen weights change.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.deltas import Delta, DeltaStack, save_delta
from gradient_blueprints.training.selection import select

SIDE = 4096


def main() -> None:
    torch.manual_seed(0)
    layers = [{"id": "weight", "gradient_norm": 1.0, "parameters": SIDE * SIDE}]
    blueprint = Blueprint.from_dict({"model_id": "matrix", "training_checkpoint": 1.0, "layers": layers})
    gradient = torch.randn(SIDE, SIDE)
    print("| trained | selection, bits a coordinate | delta float32 | delta bfloat16 | save | apply |")
    print("|---|---|---|---|---|---|")
    for share in (0.01, 0.1, 0.25):
        selection = select(blueprint, budget=share, gradients={"weight": gradient})
        sizes, seconds = [], [0.0, 0.0]
        with tempfile.TemporaryDirectory() as folder:
            file = selection.save(Path(folder) / "selection")
            bits = 8 * file.stat().st_size / selection.selected
            for dtype in (torch.float32, torch.bfloat16):
                base = nn.ParameterDict({"weight": nn.Parameter(torch.randn(SIDE, SIDE).to(dtype))})
                tuned = {"weight": base["weight"].detach().clone()}
                flat = tuned["weight"].view(-1)
                chosen = torch.from_numpy(selection.parts["weight"].copy())
                flat[chosen] = (flat[chosen].float() * 1.1 + 0.01).to(dtype)
                began = time.perf_counter()
                path = save_delta(base, tuned, selection, Path(folder) / "delta")
                seconds[0] = time.perf_counter() - began
                sizes.append(path.stat().st_size / (SIDE * SIDE * dtype.itemsize))
                began = time.perf_counter()
                DeltaStack(base).apply("task", Delta.load(path))
                seconds[1] = time.perf_counter() - began
        row = [f"{share:.0%}", f"{bits:.2f}", *(f"{size:.1%} of the matrix" for size in sizes)]
        print("| " + " | ".join([*row, *(f"{each:.2f} s" for each in seconds)]) + " |", flush=True)


if __name__ == "__main__":
    main()
