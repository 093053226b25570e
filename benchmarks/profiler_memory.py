"""What memory profiling takes beside a plain pass: peaks of resident memory, each variant in a process of its own.

    python -m benchmarks.profiler_memory --layers 8 --batches 2

The reference is what no profiler can do without: weights, the activations of a forward and backward
pass in which no parameter has a gradient, and the largest layer's gradient. `peak` is the kernel's
high-water mark over the process before the model was built, `anonymous` the part of it that is not
pages of files (sampled every millisecond): sums in a folder are files that the system may write out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.profiler import VOCABULARY, smollm2
from benchmarks.results import Ratio, publish
from gradient_blueprints.training.profiling import GradientProfiler
from gradient_blueprints.training.profiling.layers import group_parameters

REFERENCE = "weights and activations"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "plain, with gradients": {},
    "norms of examples": {"statistics": "examples"},
    "and of batches": {"statistics": "batches"},
    "all, sums in files": {"statistics": "all", "sums": "folder"},
    "all, sums in memory": {"statistics": "all", "sums": "host"},
    "all, in files, micro-batches of 1": {"statistics": "all", "sums": "folder", "micro_batch": 1},
    "all, in memory, micro-batches of 1": {"statistics": "all", "sums": "host", "micro_batch": 1},
}


class Peak:
    """Peaks since it was made, in bytes."""

    def __init__(self) -> None:
        self._anonymous, self._over = 0, threading.Event()
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        self._base = self._status("VmRSS")
        self._base_anonymous = self._status("RssAnon")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _status(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self._anonymous = max(self._anonymous, self._status("RssAnon"))

    def read(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return {"peak": self._status("VmHWM") - self._base, "anonymous": self._anonymous - self._base_anonymous}


def measure(variant: str, layers: int, examples: int, length: int, batches: int) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    smollm2(1)(
        input_ids=torch.zeros(1, 8, dtype=torch.long)
    ).logits.sum().backward()  # what torch loads when first used
    peak = Peak()
    model = smollm2(layers)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(VARIANTS[variant])
        if options.get("sums") == "folder":
            options["sums"] = Path(folder)
        if options:
            profiler = GradientProfiler(model, verify=False, **options)
            profiler.__enter__()
        elif variant == REFERENCE:
            model.requires_grad_(False)
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())  # type: ignore[operator]
        for number in range(batches):
            ids = torch.randint(0, VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(number))
            batch = {"input_ids": ids, "labels": ids}
            if options:
                profiler.step(batch)
            else:
                model(**batch).loss.backward()
                model.zero_grad(set_to_none=True)
        found = peak.read()
    found["weights"] = sum(4 * parameter.numel() for parameter in model.parameters())
    found["largest"] = max(4 * group.size for group in group_parameters(model, "submodule"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one here, and print JSON")
    options = parser.parse_args()
    shape = options.layers, options.examples, options.length, options.batches
    if options.variant:
        print(json.dumps(measure(options.variant, *shape)))
        return
    print(f"{options.examples} x {options.length} tokens, MB")
    print(f"{'variant':<36} {'peak':>7} {'anonymous':>10} {'peak over reference':>20} {'anonymous over it':>18}")
    reference: dict[str, int] = {}
    rows = []
    for variant in VARIANTS:
        answer = subprocess.run(
            [sys.executable, "-m", "benchmarks.profiler_memory", "--variant", variant]
            + [
                f"--{name}={value}"
                for name, value in zip(("layers", "examples", "length", "batches"), shape, strict=True)
            ],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed tensors go back to the system
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(answer.stdout)
        reference = reference or {name: found[name] + found["largest"] for name in ("peak", "anonymous")}
        peak, anonymous = found["peak"], found["anonymous"]
        rows.append(
            Ratio(
                f"peak memory: {variant}",
                "weights, activations and the largest layer's gradient",
                (anonymous / reference["anonymous"],),
                1.1 if "files" in variant or "norms of examples" in variant else None,
                note="without pages of files" if "files" in variant else "",
            )
        )
        ratios = f"{peak / reference['peak']:>20.2f} {anonymous / reference['anonymous']:>18.2f}"
        print(f"{variant:<36} {peak / 1e6:>7.0f} {anonymous / 1e6:>10.0f} {ratios}", flush=True)
    publish(rows)
    print(f"weights {found['weights'] / 1e6:.0f}, the largest layer's gradient {found['largest'] / 1e6:.0f}")


if __name__ == "__main__":
    main()
