"""A selection trained by transformers in as many processes as start this, or in one.

torchrun --standalone --nproc-per-node 2 -m tests.training.replicated_training FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.selection import Selection, select
from gradient_blueprints.training.trainer import SelectionTrainer, trainer_arguments
from tests.training.profiling.small_models import Rows, llama

STEPS, EXAMPLES = 4, 4  # examples a step and micro-batch, over all processes


class Shouting(Trainer):  # type: ignore[misc]  # transformers carries no types
    """Some other kind of Trainer."""

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        super().log(logs | {"shouted": 1.0}, *rest)


class Both(SelectionTrainer, Shouting):
    """A selection in that other kind."""


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return llama()


def make_selection() -> Selection:
    layers = [
        {"id": name, "gradient_norm": 1.0, "parameters": parameter.numel()}
        for name, parameter in make_model(0).named_parameters()
    ]
    document = {"model_id": "tiny", "training_checkpoint": 1.0, "layers": layers}
    return select(Blueprint.from_dict(document), budget=0.3)


def make_trainer(kind: type[Trainer], model: nn.Module, folder: Path, processes: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=EXAMPLES // processes,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.05,
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return kind(
        model=model, args=arguments, train_dataset=Rows(), **trainer_arguments(model, make_selection(), arguments)
    )


def train(folder: Path, rank: int, processes: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights at the end, straight on and resumed half-way, and what was logged."""
    # each process starts with weights of its own: those of the first have to count
    straight = make_trainer(Both, make_model(rank), folder / "straight", processes)
    straight.train()
    if rank == 0:
        shutil.rmtree(folder / "straight" / f"checkpoint-{STEPS}")
    if processes > 1:
        distributed.barrier()
    resumed = make_trainer(SelectionTrainer, make_model(rank), folder / "straight", processes)
    resumed.train(resume_from_checkpoint=True)
    weights = {
        f"{kind}/{name}": parameter.detach().clone()
        for kind, trainer in (("straight", straight), ("resumed", resumed))
        for name, parameter in trainer.model.named_parameters()
    }
    history = [entry for entry in straight.state.log_history if "grad_norm" in entry]
    found = {
        "norms": [entry["grad_norm"] for entry in history],
        "losses": [entry["loss"] for entry in history],
        "shouted": all("shouted" in entry for entry in history),
        "wrapped": isinstance(straight.model_wrapped, DistributedDataParallel),
    }
    return weights, found


def refusal(folder: Path, rank: int, processes: int) -> str:
    """What a Trainer that wraps the model is told."""
    try:
        make_trainer(Trainer, make_model(rank), folder / "wrapped", processes).train()
    except ConfigurationError as error:
        return str(error)
    return ""


def wrapped_without_a_selection(folder: Path) -> bool:
    """Whether a SelectionTrainer that is given no selection averages as a Trainer does."""
    arguments = TrainingArguments(output_dir=str(folder / "plain"), max_steps=1, report_to=[], use_cpu=True)
    trainer = SelectionTrainer(model=make_model(0), args=arguments, train_dataset=Rows())
    trainer.train()
    return isinstance(trainer.model_wrapped, DistributedDataParallel)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, processes = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    weights, found = train(folder, rank, processes)
    found["refusal"] = refusal(folder, rank, processes)
    found["wrapped without a selection"] = wrapped_without_a_selection(folder)
    save_file(weights, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    os._exit(0)  # gloo's threads have been seen to abort a process that was done, on a loaded machine
