"""From `Trainer` to the leaderboard: two learning rates, two seeds each, reported while they train, then ranked.

    BLUEPRINTS_URL=... BLUEPRINTS_API_KEY=... python -m examples.report_runs FOLDER

Each run trains a Llama of 0.1 M parameters on the standard library's sources for 60 steps, seconds on a core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gradient_blueprints import Client
from gradient_blueprints.plots import plot_curve
from gradient_blueprints.run_models import Resource
from gradient_blueprints.training.stopping import MarginalReturn
from gradient_blueprints.training.trainer_callback import CapabilityCallback

TASK = "stdlib-bytes/held-out-loss"
LENGTH, STEPS, EVERY = 128, 60, 5


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Windows of the text of standard modules, a token a byte."""

    def __init__(self, *modules: str) -> None:
        folder = Path(os.__file__).parent
        text = b"".join((folder / f"{name}.py").read_bytes() for name in modules)
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = self.windows[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def train(folder: Path, client: Client, rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    callback = CapabilityCallback(
        MarginalReturn(eta=1.5e-5, patience=2, window=3),
        gamma="tokens",
        client=client,
        report={"task": TASK, "model_id": "byte-llama", "settings": {"learning_rate": rate}},
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="no",
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Bytes("argparse", "inspect", "typing"),
        eval_dataset=Bytes("queue"),
        callbacks=[callback],
    ).train()


def main(folder: Path) -> None:
    with Client() as client:
        for rate in (3e-3, 3e-4):
            for seed in (0, 1):
                train(folder / f"{rate}-{seed}", client, rate, seed)
        plot(folder, client)


def plot(folder: Path, client: Client) -> None:
    """The curves, with the points at which the rule ended them."""
    curves: dict[str, list[tuple[float, float]]] = {}
    stops: dict[str, int | None] = {}
    for run in client.list_runs(TASK):
        name = f"{run.settings['learning_rate']}, seed {run.seed}"
        curves[name] = [(point.gamma[Resource.TOKENS], point.psi) for point in client.list_points(run.id)]
        stops[name] = run.points - 1 if run.stopped is not None else None
    plot_curve(curves, stops, psi="held-out loss", gamma="tokens").savefig(folder / "runs.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
