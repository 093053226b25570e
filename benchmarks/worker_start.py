"""From the start of a job's process to its first batch, beside importing torch and transformers and loading weights.

    python -m benchmarks.worker_start [--rounds 5] [--layers 24]

The process verifies what it is given (sizes, headers, the digest of the weights), reads and tokenises 256 kB of text,
plans the model before it is built, and sets up the profiler besides.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import Ratio, interleaved, publish, ratios
from benchmarks.shards import llama, tokenizer
from gradient_blueprints.models import DataSource, NewJob, ProfileOptions
from worker.child import Child, Specification
from worker.speaking import FAILED, PROGRESS

LOADING = """
import sys, torch, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
"""


def loading(model: Path) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOADING, model], check=True, capture_output=True)
    return time.perf_counter() - began


def to_first_batch(folder: Path) -> float:
    job = NewJob(
        model_id="bench",
        training_checkpoint=0.8,
        source=str(folder / "model"),
        data={"general": DataSource(source=str(folder / "general.txt"))},
        options=ProfileOptions(batches=4, batch_size=4, sequence_length=128),
    )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        specification = Specification(
            job=job,
            folder=Path(work),
            allowed_roots=(folder,),
            device="cpu",
            max_model_bytes=1 << 36,
            max_text_bytes=1 << 30,
        )
        began = time.perf_counter()
        child = Child(specification)
        try:
            while True:
                kind, content = child.said.get(timeout=120)
                if kind == FAILED:
                    raise SystemExit(content)
                if kind == PROGRESS and content["phase"] == "profiling":
                    return time.perf_counter() - began
        finally:
            child.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blueprints-") as name:
        folder = Path(name)
        draw = random.Random(0)  # noqa: S311 - a sample, not a secret
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(3_000)]
        (folder / "general.txt").write_text("".join(" ".join(draw.choices(words, k=12)) + ".\n" for _ in range(3_600)))
        tokenizer(words).save_pretrained(folder / "model")
        model = llama(hidden=576, layers=options.layers)
        model.save_pretrained(folder / "model")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        found = interleaved(
            options.rounds, start=lambda: to_first_batch(folder), loading=lambda: loading(folder / "model")
        )
    print({name: f"{min(times):.2f} s" for name, times in found.items()}, f"{parameters / 1e6:.0f} M parameters")
    publish(
        [
            Ratio(
                "start of a job's process to its first batch",
                "import of torch and transformers, loading weights and tokenizer",
                ratios(found, "start", "loading"),
                1.3,
            )
        ]
    )


if __name__ == "__main__":
    main()
