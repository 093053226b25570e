"""The callback inside a real Trainer, publishing to a real registry."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gradient_blueprints import Client
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.training.profiling.callback import BlueprintCallback
from gradient_blueprints.training.profiling.checkpoints import CheckpointProfiler, publish_folder
from gradient_blueprints.training.profiling.privacy import Privacy
from tests.training.profiling.small_models import Rows, batch, build


def train(folder: Path, *callbacks: Any, **arguments: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(build("gpt2"))  # with dropout: training draws random numbers
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **({"save_strategy": "no"} | arguments),
    )
    Trainer(model=model, args=settings, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks)).train()
    return dict(model.named_parameters())


def test_blueprints_are_written_and_published_at_the_fractions_and_training_is_not_disturbed(
    tmp_path: Path, make_client: Callable[..., Client]
) -> None:
    data = {"general": [batch(seed=3), batch(seed=4)], "bio": [batch(seed=5)]}
    client = make_client("lab-a")
    callback = BlueprintCallback("tiny", data, client=client)
    profiled = train(tmp_path / "a", callback, save_strategy="steps", save_steps=1)
    plain = train(tmp_path / "b")
    assert [path.parent.name for path in callback.written] == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert callback.unpublished == []
    found = [Blueprint.from_pretrained(path) for path in callback.written]
    assert [blueprint.training_checkpoint for blueprint in found] == [0.5, 0.8, 1.0]
    assert found[0].layers != found[2].layers
    for path, blueprint in zip(callback.written, found, strict=True):
        assert (path.parent / "model.safetensors").is_file()  # the trainer's own
        published = client.fetch_blueprint("tiny", blueprint.training_checkpoint)
        assert published == blueprint
        assert client.fetch_factors(published).read_bytes() == (path.parent / "factors.safetensors").read_bytes()
    for name, parameter in plain.items():
        assert torch.equal(parameter, profiled[name]), name


def test_a_registry_that_does_not_answer_does_not_end_the_training(
    tmp_path: Path, make_client: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    with Client("http://127.0.0.1:9", api_key="gb_none", cache=tmp_path / "cache", timeout=0.2) as nobody:
        callback = BlueprintCallback("tiny", {"general": [batch()]}, client=nobody, fractions=[0.8])
        train(tmp_path, callback)
    assert callback.unpublished == [tmp_path / "checkpoint-4"]
    assert "publish_folder" in caplog.text
    client = make_client("lab-a")
    assert publish_folder(client, callback.unpublished[0]).created
    assert client.fetch_blueprint("tiny", 0.8) == Blueprint.from_pretrained(callback.written[0])


def test_without_data_the_evaluation_of_the_trainer_is_profiled(tmp_path: Path) -> None:
    callback = BlueprintCallback("tiny", batches=2, statistics="batches")
    train(tmp_path, callback, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4)
    # the evaluation after step 4 is the first behind 0.5 and 0.8; the last step is evaluated anyway
    assert [path.parent.name for path in callback.written] == ["checkpoint-4", "checkpoint-5"]
    blueprint = Blueprint.from_pretrained(callback.written[0])
    assert (blueprint.training_checkpoint, blueprint.attachments) == (0.8, None)
    assert blueprint.provenance is not None
    assert (blueprint.provenance.batches, blueprint.provenance.examples) == (2, 8)


def test_a_resumed_training_profiles_what_lies_ahead() -> None:
    profiler = CheckpointProfiler("tiny", {}, (0.5, 0.8, 1.0), None, {})
    profiler.start(80, 100)
    assert [profiler.due(step, 100) for step in (81, 99, 100, 100)] == [None, None, 1.0, None]
    profiler.start(0, 1)
    assert profiler.due(1, 1) == 1.0  # one document a step, not three


def test_a_frozen_part_stays_in_eval_mode(tmp_path: Path) -> None:
    model = copy.deepcopy(build("gpt2")).train()
    frozen = model.get_submodule("transformer.h.0").eval()
    before = {module: module.training for module in model.modules()}
    profiler = CheckpointProfiler("tiny", {"general": [batch()]}, (1.0,), None, {"statistics": "batches"})
    profiler.profile(model, None, 1.0, tmp_path, seed=0)
    assert model.training
    assert not frozen.training
    assert {module: module.training for module in model.modules()} == before


def test_fractions_and_budgets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not all in"):
        BlueprintCallback("tiny", {}, fractions=[1.5])
    with pytest.raises(ConfigurationError, match="releases=3"):
        BlueprintCallback("tiny", {}, privacy=Privacy(clip=1, epsilon=1, delta=1e-6))
