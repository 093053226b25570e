"""A small metered training; as a program it is killed half-way and resumed.

python -m tests.training.metered_training FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradient_blueprints.training import trainer_callback
from gradient_blueprints.training.stopping import MarginalReturn
from gradient_blueprints.training.trainer_callback import CapabilityCallback
from tests.training.profiling.small_models import VOCABULARY, llama

ROWS, LENGTH = 4, 12


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int) -> None:
        self.ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Hang(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Waits for the kill, three steps after a checkpoint and before the next."""

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 7:
            time.sleep(600)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def make_trainer(
    folder: Path, callback: CapabilityCallback, steps: int, model: nn.Module | None = None, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        eval_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "steps", "save_steps": 100, **options},
    )
    rows = Rows(16)
    model = model or make_model()
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])


def run(folder: Path, *, resumed: bool) -> None:
    trainer_callback.JOURNAL_SECONDS = 0.0  # at each log, so that what is on disk is known when the kill comes
    torch.set_num_threads(1)
    callback = CapabilityCallback(MarginalReturn(eta=-1e9), "tokens")
    trainer = make_trainer(folder, callback, 12, eval_steps=2, save_steps=4)
    if not resumed:
        trainer.add_callback(Hang())
    trainer.train(resume_from_checkpoint=resumed)
    end = callback.run.state_dict() | {"tally": callback.run.meter.tally().model_dump(mode="json")}
    (folder / "end.json").write_text(json.dumps(end))


def main(folder: Path) -> None:
    processes = get_context("fork")  # of a process that has imported everything and used nothing
    training = processes.Process(target=run, args=(folder,), kwargs={"resumed": False})
    training.start()
    journal, saved = folder / "resources-0.json", folder / "checkpoint-4" / "rng_state.pth"
    while training.is_alive() and not (
        saved.is_file() and json.loads(journal.read_text())["tally"]["tokens"] >= 6 * ROWS * LENGTH
    ):
        time.sleep(0.02)
    training.kill()
    training.join()
    killed = {"exit": training.exitcode, "spent": json.loads(journal.read_text())["tally"]}
    (folder / "killed.json").write_text(json.dumps(killed))
    again = processes.Process(target=run, args=(folder,), kwargs={"resumed": True})
    again.start()
    again.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
