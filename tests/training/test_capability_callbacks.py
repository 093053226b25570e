"""The meter and the rule inside a real Trainer, killed and resumed, and inside Lightning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, get_scheduler

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Instrument, Resource, RunPoint
from gradient_blueprints.training.flops import FlopRate, flops_by_formula
from gradient_blueprints.training.lightning_callback import CapabilityCallback as LightningCapability
from gradient_blueprints.training.metered_run import DecayGuard
from gradient_blueprints.training.resources import ResourceMeter
from gradient_blueprints.training.stopping import MarginalReturn, Reason
from gradient_blueprints.training.trainer_callback import CapabilityCallback
from tests.training.metered_training import LENGTH, ROWS, Rows, make_model, make_trainer
from tests.training.profiling.small_models import llama

TOKENS_A_STEP = ROWS * LENGTH


def train(folder: Path, callback: CapabilityCallback, steps: int = 6, **options: Any) -> Trainer:
    trainer = make_trainer(folder, callback, steps, **options)
    trainer.train()
    return trainer


def test_each_evaluation_is_a_point_of_the_curve_with_everything_spent_so_far(tmp_path: Path) -> None:
    callback = CapabilityCallback()
    train(tmp_path, callback, eval_steps=2)
    assert [point.step for point in callback.run.points] == [2, 4, 6]
    assert [point.gamma[Resource.TOKENS] for point in callback.run.points] == [
        TOKENS_A_STEP * step for step in (2, 4, 6)
    ]
    assert not callback.run.meter.running
    assert callback.run.last_ratio is None
    assert callback.run.stopped is None


def test_a_rule_that_nothing_can_satisfy_stops_the_trainer_after_its_patience(tmp_path: Path) -> None:
    rule = MarginalReturn(eta=1e9, patience=2, window=1)
    callback = CapabilityCallback(rule, gamma={"tokens": 1e-3, "seconds": 0.0}, guard=1)
    trainer = train(tmp_path, callback, steps=20, eval_steps=2)
    assert trainer.state.global_step == 6  # one check to fill the window, two below
    assert callback.run.stopped is not None
    assert callback.run.last_ratio == callback.run.stopped.ratio


def test_it_does_not_stop_before_the_learning_rate_has_come_down(tmp_path: Path) -> None:
    callback = CapabilityCallback(MarginalReturn(eta=1e9, patience=1, window=1), "tokens", guard=0.5)
    trainer = train(tmp_path, callback, steps=12, eval_steps=1)
    reasons = [decision.reason for decision in callback.run.decisions]
    assert Reason.DECAY_AHEAD in reasons
    assert trainer.state.global_step == 6  # linear from step 0 to 12


def test_with_a_constant_learning_rate_there_is_no_decay_to_wait_for(tmp_path: Path) -> None:
    callback = CapabilityCallback(MarginalReturn(eta=1e9, patience=1, window=1), "tokens")
    trainer = train(tmp_path, callback, steps=12, eval_steps=1, lr_scheduler_type="constant")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant_with_warmup", False), ("linear", True), ("cosine", True), ("warmup_stable_decay", True)],
)
def test_the_guard_knows_which_of_transformers_schedules_decay(name: str, expected: bool) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    kwargs = {"num_decay_steps": 20} if name == "warmup_stable_decay" else {}
    schedule = get_scheduler(name, optimizer, 5, 100, scheduler_specific_kwargs=kwargs)
    guard, seen = DecayGuard(), []
    for _ in range(100):
        seen.append(guard.ahead(optimizer, schedule, 100))
        optimizer.step()
        schedule.step()
    assert any(seen) is expected
    assert not seen[-1]


def test_a_schedule_whose_future_cannot_be_asked_is_taken_to_decay() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert DecayGuard().ahead(optimizer, CosineAnnealingLR(optimizer, 10), 10)
    assert not DecayGuard().ahead(optimizer, None, 10)


def test_a_gamma_that_this_machine_cannot_read_is_refused_before_the_training(tmp_path: Path) -> None:
    callback = CapabilityCallback(
        MarginalReturn(eta=1), "energy_kwh", meter={"powercap": str(tmp_path / "no counters")}
    )
    with pytest.raises(ConfigurationError, match="energy_kwh cannot be read here"):
        train(tmp_path, callback)
    assert not callback.run.meter.running


def test_an_unknown_resource_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not of joy"):
        CapabilityCallback(gamma="joy")


def test_a_callback_made_anew_from_a_checkpoint_has_a_meter_with_the_same_arguments() -> None:
    rate = FlopRate(7.0, Instrument.FLOP_COUNTER)
    meter = ResourceMeter(
        region="Iceland", carbon_intensity=28, processor_watts=65, devices=[torch.device("cuda", 1)], flop_rate=rate
    )
    saved = json.loads(json.dumps(CapabilityCallback(meter=meter).state()))
    restored = CapabilityCallback(**saved["args"]).run.meter
    assert restored.arguments() == meter.arguments()
    assert (restored.carbon_intensity, restored.flop_rate) == (28, rate)


def test_the_metric_may_be_named_as_for_the_best_model_without_eval_in_front(tmp_path: Path) -> None:
    callback = CapabilityCallback(MarginalReturn(eta=1e9, patience=1, window=1), metric="loss", guard=1)
    trainer = train(tmp_path, callback, eval_steps=1)
    assert trainer.state.global_step == 2


def missed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of metrics that did not come; reports of other tests may still be tried again meanwhile."""
    return [told for record in caplog.records if (told := record.getMessage()).startswith("No evaluation gave")]


def test_a_metric_that_never_comes_is_told_at_once_and_a_rule_that_was_never_asked_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = CapabilityCallback(MarginalReturn(eta=1), metric="accuracy")
    train(tmp_path, callback, steps=3, eval_steps=1)
    assert len(missed(caplog)) == 2
    assert all("'accuracy'" in told and "eval_loss" in told for told in missed(caplog))
    caplog.clear()
    train(tmp_path, CapabilityCallback(metric="accuracy"), steps=3, eval_steps=3)
    assert len(missed(caplog)) == 1, "of an evaluation at the end"


def test_of_several_evaluation_sets_the_one_of_the_metric_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = CapabilityCallback(metric="eval_second_loss")
    trainer = make_trainer(tmp_path, callback, 3, eval_steps=1)
    trainer.eval_dataset = {"first": trainer.eval_dataset, "second": trainer.eval_dataset}
    trainer.train()
    assert [point.step for point in callback.run.points] == [1, 2, 3]
    assert not missed(caplog)


@pytest.mark.parametrize("restore", [False, True])
def test_rule_curve_and_tally_come_back_with_the_trainers_checkpoint(tmp_path: Path, restore: bool) -> None:
    rule = {"eta": -1e9, "patience": 1, "window": 3}
    first = CapabilityCallback(rule, "tokens", meter={"region": "Iceland"})
    train(tmp_path, first, steps=4, eval_steps=1, save_steps=4)
    second = CapabilityCallback(rule, "tokens", meter={"region": "Iceland"})
    trainer = make_trainer(
        tmp_path, second, 6, eval_steps=1, save_steps=4, restore_callback_states_from_checkpoint=restore
    )
    trainer.train(resume_from_checkpoint=True)
    (resumed,) = [call for call in trainer.callback_handler.callbacks if isinstance(call, CapabilityCallback)]
    assert (resumed is second) is not restore
    assert [point.step for point in resumed.run.points] == [1, 2, 3, 4, 5, 6]
    assert resumed.run.meter.tally().tokens == 6 * TOKENS_A_STEP
    assert resumed.run.meter.tally().region == "Iceland"
    assert [decision.ratio is not None for decision in resumed.run.decisions] == [True, True]  # the window was full


def test_a_training_that_was_killed_goes_on_and_what_the_kill_lost_was_still_spent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.metered_training", str(tmp_path)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    killed, end = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "end"))
    assert killed["exit"] == -signal.SIGKILL
    spent = killed["spent"]
    points = [RunPoint.model_validate(point) for point in end["points"]]
    assert [point.step for point in points] == list(range(2, 13, 2))
    gammas = [point.gamma[Resource.TOKENS] for point in points]
    assert gammas == sorted(gammas)
    assert spent["tokens"] == 6 * TOKENS_A_STEP
    assert end["tally"]["tokens"] == spent["tokens"] + (12 - 4) * TOKENS_A_STEP  # two steps were taken twice
    assert end["tally"]["tokens"] > 12 * TOKENS_A_STEP
    assert end["tally"]["seconds"] > spent["seconds"]


def test_a_callback_begins_a_second_training_afresh(tmp_path: Path) -> None:
    callback = CapabilityCallback(MarginalReturn(eta=-1e9, patience=1, window=2), "tokens", meter={"region": "France"})
    train(tmp_path / "first", callback, eval_steps=2)
    first = callback.run
    larger = llama(hidden_size=32)
    train(tmp_path / "second", callback, model=larger, eval_steps=2)
    second = callback.run
    for run in (first, second):
        assert [point.step for point in run.points] == [2, 4, 6]
        assert run.points[-1].gamma[Resource.TOKENS] == 6 * TOKENS_A_STEP
        assert [decision.reason for decision in run.decisions] == [Reason.FILLING, Reason.FILLING, Reason.PAYS]
    assert second.points[0].psi != first.points[0].psi
    assert second.meter.tally().region == "France"
    assert second.meter.tally().flops == 6 * TOKENS_A_STEP * flops_by_formula(larger).per_token


def test_a_callback_that_goes_on_with_another_training_counts_nothing_of_its_first(tmp_path: Path) -> None:
    train(tmp_path / "other", CapabilityCallback(gamma="tokens"), steps=4, eval_steps=2, save_steps=4)
    callback = CapabilityCallback(gamma="tokens")
    train(tmp_path / "first", callback, eval_steps=2)
    first = callback.run
    trainer = make_trainer(tmp_path / "other", callback, 6, eval_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4"))
    for run in (first, callback.run):
        assert [point.gamma[Resource.TOKENS] / TOKENS_A_STEP for point in run.points] == [2, 4, 6]


def test_a_training_after_one_that_broke_off_is_metered_on_its_own_model(tmp_path: Path) -> None:
    class BreaksOff(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 5:
                raise KeyError("the power went")

    callback = CapabilityCallback(MarginalReturn(eta=-1e9, patience=1, window=1), "tokens")
    trainer = make_trainer(tmp_path, callback, 6, eval_steps=1, save_steps=4)
    trainer.add_callback(BreaksOff())
    with pytest.raises(KeyError):
        trainer.train()
    broken = callback.run.meter
    make_trainer(tmp_path, callback, 6, eval_steps=1, save_steps=9).train(resume_from_checkpoint=True)
    assert callback.run.meter is broken
    assert broken.tally().tokens == (5 + 6 - 4) * TOKENS_A_STEP
    assert [point.step for point in callback.run.points] == [1, 2, 3, 4, 5, 6]
    assert len(callback.run.decisions) == 2
    trainer = make_trainer(tmp_path / "anew", callback, 6, eval_steps=1)
    trainer.add_callback(BreaksOff())
    with pytest.raises(KeyError):
        trainer.train()
    broken = callback.run.meter
    train(tmp_path / "last", callback)
    assert callback.run.meter.tally().tokens == 6 * TOKENS_A_STEP
    assert not broken.running


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda epoch: 1.0)}


def fit(
    folder: Path,
    callback: LightningCapability,
    epochs: int,
    checkpoint: Path | None = None,
    module: lightning.LightningModule | None = None,
    also: Sequence[lightning.Callback] = (),
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback, *also],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(Rows(2 * ROWS), batch_size=ROWS)
    trainer.fit(module or Module(), loader, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_lightning_is_stopped_by_the_rule_and_its_checkpoint_holds_the_state(tmp_path: Path) -> None:
    first = LightningCapability(MarginalReturn(eta=-1e9, window=2), "tokens")
    fit(tmp_path, first, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    assert [point.gamma[Resource.TOKENS] for point in first.run.points] == [2 * TOKENS_A_STEP, 4 * TOKENS_A_STEP]

    second = LightningCapability(MarginalReturn(eta=1e9, patience=1, window=2), "tokens")
    trainer = fit(tmp_path, second, epochs=9, checkpoint=tmp_path / "half.ckpt")
    assert trainer.current_epoch == 3  # the two checks of before fill the window
    assert second.run.meter.tally().tokens == 6 * TOKENS_A_STEP
    assert [point.step for point in second.run.points] == [2, 4, 6]


def test_lightning_too_takes_meter_and_rule_as_mappings() -> None:
    callback = LightningCapability({"eta": 2.0, "patience": 1}, "tokens", meter={"region": "France"})
    assert callback.run.rule is not None
    assert (callback.run.meter.region, callback.run.rule.settings()["eta"]) == ("France", 2.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_lightning_too_begins_a_second_training_afresh(tmp_path: Path) -> None:
    callback = LightningCapability(MarginalReturn(eta=-1e9, patience=1, window=1), "tokens")
    saved = tmp_path / "half.ckpt"
    fit(tmp_path, callback, epochs=2).save_checkpoint(saved)
    first = callback.run
    fit(tmp_path, callback, epochs=2)
    for run in (first, callback.run):
        assert [point.gamma[Resource.TOKENS] for point in run.points] == [2 * TOKENS_A_STEP, 4 * TOKENS_A_STEP]
        assert [decision.reason for decision in run.decisions] == [Reason.FILLING, Reason.PAYS]
    assert callback.run is not first
    first = callback.run
    trainer = fit(tmp_path, callback, epochs=3, checkpoint=saved)
    assert [point.gamma[Resource.TOKENS] / TOKENS_A_STEP for point in callback.run.points] == [2, 4, 6]
    assert len(first.points) == 2
    third = callback.run
    assert trainer.fit_loop.max_epochs is not None
    trainer.fit_loop.max_epochs += 1
    trainer.fit(Module(), *(2 * (DataLoader(Rows(2 * ROWS), batch_size=ROWS),)))
    assert callback.run is third  # the same trainer goes on
    assert third.points[-1].gamma[Resource.TOKENS] == 8 * TOKENS_A_STEP


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_lightning_leaves_no_meter_running_where_gamma_cannot_be_read(tmp_path: Path) -> None:
    meter = ResourceMeter(powercap=tmp_path / "no counters")
    with pytest.raises(ConfigurationError, match="energy_kwh cannot be read here"):
        fit(tmp_path, LightningCapability(MarginalReturn(eta=1), "energy_kwh", meter=meter), epochs=1)
    assert not meter.running


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_a_lightning_module_that_has_no_model_is_refused_until_it_names_its_network(tmp_path: Path) -> None:
    class Named(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = self.model
            del self.model

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(**batch).loss
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
            self.log("val_loss", self.net(**batch).loss)

    with pytest.raises(ConfigurationError, match="give network="):
        fit(tmp_path, LightningCapability(), epochs=1, module=Named())
    callback = LightningCapability(network=lambda module: module.net)  # type: ignore[arg-type,return-value]  # its own
    fit(tmp_path, callback, epochs=1, module=Named())
    assert callback.run.meter.tally().tokens == 2 * TOKENS_A_STEP


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_lightning_may_train_without_a_last_step_and_the_guard_waits(tmp_path: Path) -> None:
    """As with `max_time` alone, where Lightning estimates infinitely many steps."""

    class StepByStep(Module):
        def configure_optimizers(self) -> Any:
            configured = super().configure_optimizers()
            return configured | {"lr_scheduler": {"scheduler": configured["lr_scheduler"], "interval": "step"}}

    class Ends(lightning.Callback):
        def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = trainer.should_stop or trainer.current_epoch == 3

    callback = LightningCapability(MarginalReturn(eta=1e9, patience=1, window=1), "tokens")
    fit(tmp_path, callback, epochs=-1, module=StepByStep(), also=[Ends()])
    assert {decision.reason for decision in callback.run.decisions} == {Reason.FILLING, Reason.DECAY_AHEAD}
