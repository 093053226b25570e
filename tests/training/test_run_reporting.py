"""Callbacks that report real trainings to a real registry: killed, cut off from it, refused by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from gradient_blueprints import Client, ConfigurationError, PermissionDenied, Scope
from gradient_blueprints.run_journal import find_journal, read_journal
from gradient_blueprints.run_models import Resource, RunPoint, Tally
from gradient_blueprints.training import run_reporting
from gradient_blueprints.training.flops import flops_by_counting
from gradient_blueprints.training.lightning_callback import CapabilityCallback as LightningCapability
from gradient_blueprints.training.resources import ResourceMeter
from gradient_blueprints.training.run_reporting import RunReporter
from gradient_blueprints.training.stopping import MarginalReturn
from gradient_blueprints.training.trainer_callback import CapabilityCallback
from tests.conftest import Server
from tests.training.metered_training import LENGTH, ROWS, Rows, make_model, make_trainer
from tests.training.profiling.small_models import mixtral, t5
from tests.training.reported_training import REPORT
from tests.training.test_capability_callbacks import Module

TOKENS_A_STEP = ROWS * LENGTH
MakeClient = Callable[..., Client]


def reporter_of(callback: CapabilityCallback | LightningCapability) -> RunReporter:
    assert callback.run.reporter is not None
    return callback.run.reporter


def test_a_trainer_reports_its_curve_and_its_end(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client("lab-a", Scope.PUBLISH)
    rule = MarginalReturn(eta=1e9, patience=1, window=1)
    callback = CapabilityCallback(rule, "tokens", guard=1, client=client, report=REPORT)
    make_trainer(tmp_path, callback, 20, eval_steps=2, seed=7).train()
    told = reporter_of(callback).run
    assert told is not None
    run = client.get_run(told.id)
    assert run.finished_at is not None
    assert (run.seed, run.window, run.goal, run.metric, run.points) == (7, 1, "fall", "eval_loss", 2)
    assert run.callbacks == ("MarginalReturn(eta=1000000000.0, patience=1, window=1, goal=fall)",)
    assert run.stopped is not None
    assert run.stopped.startswith("MarginalReturn: ratio")
    assert run.final is not None
    assert run.final.gamma[Resource.TOKENS] == 4 * TOKENS_A_STEP
    assert (run.last_ratio or {})[Resource.TOKENS] == pytest.approx(callback.run.last_ratio)
    assert run.tally is not None
    assert run.tally.spans == ()
    assert run.marks == ()
    assert "tokens_beyond_flops" not in run.unchecked
    assert [point.psi for point in client.list_points(run.id)] == [point.psi for point in callback.run.points]


def test_a_callback_reports_a_second_training_as_a_run_of_its_own(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client("lab-a", Scope.PUBLISH)
    callback = CapabilityCallback(gamma="tokens", client=client, report=REPORT)
    runs = []
    for _ in range(2):
        make_trainer(tmp_path, callback, 4, eval_steps=2).train()
        run = reporter_of(callback).run
        assert run is not None
        assert [point.psi for point in client.list_points(run.id)] == [point.psi for point in callback.run.points]
        assert run.final is not None
        assert run.final.gamma[Resource.TOKENS] == 4 * TOKENS_A_STEP
        runs.append(run.id)
    assert len(set(runs)) == 2


def test_a_run_that_waits_for_the_registry_is_sent_though_another_has_begun_in_its_folder(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_reporting, "PATIENCE", 0.1)
    monkeypatch.setattr(run_reporting, "FIRST_PAUSE", 0.05)
    here, away = make_client("lab-a", Scope.PUBLISH), Client("http://127.0.0.1:9", cache=False, timeout=0.05)
    callback = CapabilityCallback(client=away, report=REPORT)
    reporters, ids = [], []
    for steps in (2, 4):
        make_trainer(tmp_path, callback, steps, eval_steps=2).train()
        reporters.append(reporter_of(callback))
        ids.append(read_journal(tmp_path / "run.jsonl").run.id)
    for each in reporters:
        each._client = here  # the registry is back
        assert each._thread is not None
        each._thread.join(20)
    assert [each.run and each.run.id for each in reporters] == ids
    assert [each.run and each.run.points for each in reporters] == [1, 2]
    assert read_journal(tmp_path / f"run-{ids[0]}.jsonl").end is not None  # as the warning says


def test_an_encoder_decoder_model_bears_no_mark(make_client: MakeClient, tmp_path: Path) -> None:
    callback = CapabilityCallback(client=make_client("lab-a", Scope.PUBLISH), report=REPORT)
    make_trainer(tmp_path, callback, 2, t5(), eval_steps=2).train()
    run = reporter_of(callback).run
    assert run is not None
    assert (run.parameters, run.marks) == (None, ())


@pytest.mark.parametrize("counted", [True, False])
def test_an_honest_mixture_of_experts_bears_no_mark(make_client: MakeClient, tmp_path: Path, counted: bool) -> None:
    model, ids = mixtral(), Rows(ROWS).ids
    rate = flops_by_counting(lambda: model(input_ids=ids, labels=ids).loss.backward(), ids.numel()) if counted else None
    meter = ResourceMeter(flop_rate=rate)
    callback = CapabilityCallback(meter=meter, client=make_client("lab-a", Scope.PUBLISH), report=REPORT)
    make_trainer(tmp_path, callback, 2, model, eval_steps=2).train()
    run = reporter_of(callback).run
    assert run is not None
    at_rest = sum(parameter.numel() // 2 for name, parameter in model.named_parameters() if "experts" in name)
    embedding = model.get_parameter("model.embed_tokens.weight").numel()
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters()) - embedding - at_rest
    assert (run.selection, run.marks) == (None, ())
    assert "tokens_beyond_flops" not in run.unchecked


def test_a_training_killed_and_resumed_is_one_run_without_a_point_twice(server: Server, tmp_path: Path) -> None:
    key = server.key("lab-a", Scope.PUBLISH)
    command = [sys.executable, "-m", "tests.training.reported_training", str(tmp_path), server.url, key]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    killed = json.loads((tmp_path / "killed.json").read_text())
    assert killed["exit"] == -signal.SIGKILL
    with Client(server.url, cache=False) as client:
        (run,) = client.list_runs("rows/loss")
        points = list(client.list_points(run.id))
    assert (str(run.id), run.seed) == (killed["id"], 5)
    assert run.finished_at is not None
    assert [point.step for point in points] == list(range(2, 13, 2))
    for resource in (Resource.TOKENS, Resource.SECONDS, Resource.FLOPS):
        amounts = [point.gamma[resource] for point in points]
        assert amounts == sorted(amounts)
    assert run.marks == ()
    assert run.final is not None
    # Everything that was told as spent before the kill, and the steps from the checkpoint on, some of them again.
    assert killed["tokens"] == points[2].gamma[Resource.TOKENS] == 6 * TOKENS_A_STEP
    assert run.final.gamma[Resource.TOKENS] >= (6 + 12 - 4) * TOKENS_A_STEP


def test_a_registry_that_does_not_answer_holds_nothing_up_and_gets_the_run_later(
    make_client: MakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_reporting, "PATIENCE", 0.1)
    monkeypatch.setattr(run_reporting, "FIRST_PAUSE", 0.05)
    away = Client("http://127.0.0.1:9", cache=False, timeout=0.05)
    callback = CapabilityCallback(client=away, report=REPORT)
    make_trainer(tmp_path, callback, 4, eval_steps=2).train()
    reporter = reporter_of(callback)
    assert (reporter.run, reporter.refused) == (None, None)
    assert "blueprints send-run" in caplog.text
    kept = read_journal(tmp_path / "run.jsonl")
    assert (len(kept.points), kept.end is not None) == (2, True)
    here = make_client("lab-a", Scope.PUBLISH)
    reporter._client = here  # its thread has gone on trying: the registry is back
    assert reporter._thread is not None
    reporter._thread.join(20)
    assert reporter.run is not None
    assert here.send_run(tmp_path / "run.jsonl") == reporter.run


def test_a_registry_that_refuses_the_run_does_not_end_the_training(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = CapabilityCallback(client=make_client("lab-a", Scope.READ), report=REPORT)
    trainer = make_trainer(tmp_path, callback, 4, eval_steps=2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert isinstance(reporter_of(callback).refused, PermissionDenied)
    assert "does not take the run" in caplog.text


def test_a_report_that_fits_no_run_is_refused_before_the_training() -> None:
    client = Client("http://127.0.0.1:9", cache=False)
    for report in (None, {"task": "t"}, REPORT | {"joy": 1}):
        with pytest.raises(ConfigurationError, match="NewRun"):
            CapabilityCallback(client=client, report=report)


def reporter(journal: Path, *, rate: float = 1.0, resumed: bool = True, trained: bool = True) -> RunReporter:
    made = RunReporter(
        Client("http://127.0.0.1:9", cache=False, offline=True),  # one that tries on would outlast the test
        REPORT | {"settings": {"rate": rate}},
        metric="loss",
        rule=None,
    )
    model = make_model()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(trained)
    made.begin(journal, model, seed=1, resumed=resumed)
    return made


def test_only_the_same_run_that_has_not_ended_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def begun(**how: Any) -> str:
        reporter(path, **how)
        kept = find_journal(path)
        assert kept is not None
        return str(kept.run.id)

    first = begun(resumed=False)
    assert begun() == first
    assert begun(rate=2.0) != first
    second = begun(resumed=False)
    assert begun(trained=False) != second
    last = reporter(path)
    last.finish(Tally(), None, patience=0)
    assert begun() not in (first, second)
    assert len(list(tmp_path.glob("run-*.jsonl"))) == 5  # nothing was lost


def test_a_score_that_no_run_can_hold_is_left_out_and_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = reporter(tmp_path / "run.jsonl", resumed=False)
    made.add(RunPoint(step=1, psi=2.0, gamma={Resource.SECONDS: 1.0}), None)
    made.add(RunPoint(step=2, psi=1e200, gamma={Resource.SECONDS: 2.0}), None)
    made.add(RunPoint(step=3, psi=1.0, gamma={Resource.SECONDS: 3.0}), None)
    kept = find_journal(tmp_path / "run.jsonl")
    assert kept is not None
    assert [point.step for point in kept.points] == [1, 3]
    assert "step 2 is not reported" in caplog.text


def test_what_is_frozen_is_told(tmp_path: Path) -> None:
    reporter(tmp_path / "run.jsonl", trained=False)
    run = read_journal(tmp_path / "run.jsonl").run
    assert run.selection is not None
    assert run.parameters is not None
    assert 0 < run.selection.trained < run.selection.parameters == run.parameters


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own
def test_lightning_reports_and_goes_on_after_a_training_that_broke_off(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client("lab-a", Scope.PUBLISH)

    class BreaksOff(lightning.Callback):
        def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 2:
                raise KeyError("the power went")

        def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(*callbacks: lightning.Callback, checkpoint: Path | None = None) -> None:
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(Rows(2 * ROWS), batch_size=ROWS)
        trainer.fit(Module(), loader, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)

    def callback() -> LightningCapability:
        return LightningCapability(gamma="tokens", client=client, report=REPORT | {"seed": 1})

    with pytest.raises(KeyError):
        fit(callback(), BreaksOff())
    fit(second := callback(), checkpoint=tmp_path / "half.ckpt")
    (run,) = client.list_runs()
    assert reporter_of(second).run == run
    assert [point.gamma[Resource.TOKENS] for point in client.list_points(run.id)] == [
        steps * TOKENS_A_STEP for steps in (2, 4, 6)
    ]
