"""The callback inside a real Lightning Trainer."""

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from gradient_blueprints.errors import ConfigurationError, MissingExtra
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.profiling import lightning_callback
from gradient_blueprints.training.profiling.lightning_callback import BlueprintCallback
from tests.training.profiling.small_models import Rows, batch, build


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = copy.deepcopy(build("gpt2")).train()

    def training_step(self, values: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**values).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(folder: Path, *callbacks: Any, **bounds: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Module()
    trainer = Trainer(
        **bounds or {"max_steps": 5},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        accumulate_grad_batches=2,
    )
    trainer.fit(module, DataLoader(Rows(), batch_size=2))
    return dict(module.named_parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")
def test_blueprints_are_written_at_the_fractions_and_training_is_not_disturbed(tmp_path: Path) -> None:
    callback = BlueprintCallback("tiny", {"general": [batch(seed=3)]}, statistics="batches", seed=2)
    profiled = train(tmp_path / "a", callback)
    plain = train(tmp_path / "b")
    assert [path.parent.relative_to(tmp_path / "a").name for path in callback.written] == [
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    ]
    found = [Blueprint.from_pretrained(path) for path in callback.written]
    assert [blueprint.training_checkpoint for blueprint in found] == [0.5, 0.8, 1.0]
    assert found[0].layers != found[2].layers
    for name, parameter in plain.items():
        assert torch.equal(parameter, profiled[name]), name


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")
def test_a_training_without_a_last_step_has_no_fractions_and_says_so(tmp_path: Path) -> None:
    callback = BlueprintCallback("tiny", {"general": [batch(seed=3)]}, statistics="batches")
    with pytest.raises(ConfigurationError, match="max_steps or max_epochs"):
        train(tmp_path, callback, max_epochs=-1, max_time={"minutes": 1})


def test_without_lightning_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gradient-blueprints\[lightning\]'"):
        runpy.run_path(lightning_callback.__file__)
