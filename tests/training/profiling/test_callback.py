"""The callback inside a real Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.profiling.callback import BlueprintCallback
from tests.training.profiling.small_models import batch, build


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.values = batch(16, padded=False)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self.values.items()}


def train(folder: Path, *callbacks: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(build("gpt2"))  # with dropout: training draws random numbers
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks)).train()
    return dict(model.named_parameters())


def test_blueprints_are_written_at_the_fractions_and_training_is_not_disturbed(tmp_path: Path) -> None:
    published: list[Blueprint] = []
    data = {"general": [batch(seed=3), batch(seed=4)], "bio": [batch(seed=5)]}
    callback = BlueprintCallback("tiny", data, publish=published.append)
    profiled = train(tmp_path / "a", callback)
    plain = train(tmp_path / "b")
    assert [path.parent.name for path in callback.written] == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    found = [Blueprint.from_pretrained(path) for path in callback.written]
    assert [blueprint.training_checkpoint for blueprint in found] == [0.5, 0.8, 1.0]
    assert found == published
    assert found[0].layers != found[2].layers
    assert (callback.written[0].parent / "factors.safetensors").is_file()
    for name, parameter in plain.items():
        assert torch.equal(parameter, profiled[name]), name


def test_fractions_outside_the_training_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not all in"):
        BlueprintCallback("tiny", {}, fractions=[1.5])
