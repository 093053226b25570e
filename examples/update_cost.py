"""What a partial update costs on this machine, and the fraction that then gains most per cost.

    python -m examples.update_cost [--plot docs/plots/gain-per-cost.svg]

A small GPT is trained for some steps at several shares of its coordinates, with a small batch and with a large one.
Peak memory and seconds are measured, C(k) = a + b·k fitted to them per parameter, and k* and G(k*)/G(1) derived.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import CostModel
from gradient_blueprints.plots import plot_gain
from gradient_blueprints.theory import gain_per_cost
from gradient_blueprints.training.costs import SHARES, fit_costs, measure_costs, recommended_fraction

BATCHES = {"1 x 32": (1, 32), "8 x 128": (8, 128)}
GAMMAS = (0.3, 0.5, 0.7)


def row(name: str, costs: CostModel, gamma: float) -> str:
    best = recommended_fraction(costs, gamma=gamma)
    gain = gain_per_cost(best.fraction, gamma, costs.fixed, costs.variable)
    over_full = gain / gain_per_cost(1, gamma, costs.fixed, costs.variable)
    return f"| {name} | {gamma} | {best.regime} | {best.fraction:.3f} | {over_full:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fitted: dict[str, CostModel] = {"paper's example: a = 1, b = 4": CostModel(fixed=1, variable=4)}
    print("| Batch | " + " | ".join(f"k = {share:g}" for share in SHARES) + " | a | b | worst fit |")
    print("|---" * (len(SHARES) + 4) + "|")
    for name, (rows, length) in BATCHES.items():
        ids = torch.randint(0, 2048, (rows, length), generator=torch.Generator().manual_seed(0))
        steps = measure_costs(model, {"input_ids": ids, "labels": ids})
        for unit, scale in {"bytes": 1.0, "ns": 1e9}.items():
            spent = [step.peak_bytes if unit == "bytes" else step.seconds * scale for step in steps]
            cells = " | ".join(f"{amount / parameters:.1f}" for amount in spent)
            try:
                fit = fit_costs(SHARES, spent, parameters)
            except ConfigurationError as error:
                print(f"| {name}, {unit} per parameter | {cells} | {error} | | |")
                continue
            fitted[f"{name}, {unit}"] = fit.costs
            line = f"{fit.costs.fixed:.1f} | {fit.costs.variable:.1f} | {fit.error:.1%}"
            print(f"| {name}, {unit} per parameter | {cells} | {line} |")
    print("\n| Costs | gamma | regime | k* | G(k*) / G(1) |\n|---|---|---|---|---|")
    for name, costs in fitted.items():
        for gamma in GAMMAS:
            print(row(name, costs, gamma))
    if options.plot:
        memory = {f"gamma 0.5, {name}": costs for name, costs in fitted.items() if not name.endswith("ns")}
        settings = {name: (0.5, costs.fixed, costs.variable) for name, costs in memory.items()}
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_gain(settings).savefig(options.plot)


if __name__ == "__main__":
    main()
