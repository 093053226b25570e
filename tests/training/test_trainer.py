"""A selection inside a real Trainer and inside Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import integration_utils

from gradient_blueprints.client import Client
from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import Blueprint
from gradient_blueprints.run_journal import read_journal
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.lightning_callback import CapabilityCallback
from gradient_blueprints.training.selection import Selection, select
from gradient_blueprints.training.trainer import SelectionCallback, trainer_arguments
from gradient_blueprints.training.trainer_callback import CapabilityCallback as TrainerCapability
from tests.training.profiling.small_models import Rows, build


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    model: PreTrainedModel = build("llama")
    return model


@pytest.fixture(scope="module")
def selection(base: PreTrainedModel) -> Selection:
    return select_of(base, 0.3)


def select_of(base: PreTrainedModel, budget: float) -> Selection:
    layers = [
        {"id": name, "gradient_norm": 1.0, "parameters": parameter.numel()}
        for name, parameter in base.named_parameters()
    ]
    blueprint = Blueprint.from_dict({"model_id": "tiny", "training_checkpoint": 1.0, "layers": layers})
    return select(blueprint, budget=budget)


def train(base: PreTrainedModel, selection: Selection, folder: Path, resume: bool = False, **options: Any) -> Trainer:
    trainer = make_trainer(base, selection, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make_trainer(
    base: PreTrainedModel, selection: Selection, folder: Path, *callbacks: TrainerCallback, **options: Any
) -> Trainer:
    model = copy.deepcopy(base)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{"report_to": [], "max_grad_norm": 0.05, "learning_rate": 1e-2, "weight_decay": 0.1, **options},
    )
    given = trainer_arguments(model, selection, arguments, callbacks)
    return Trainer(model=model, args=arguments, train_dataset=Rows(), **given)


def test_the_trainer_trains_clips_accumulates_saves_and_resumes_a_selection(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    straight = train(base, selection, tmp_path)
    norms = [entry["grad_norm"] for entry in straight.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert all(norm > 0.05 for norm in norms), "the norm before clipping, not the zero that the Trainer sees"
    optimizer = straight.optimizer.optimizer
    assert isinstance(optimizer, SelectedAdamW)
    assert optimizer.max_norm == 0.05
    assert {state["step"] for state in optimizer.state.values()} == {4}
    for name, before in base.named_parameters():
        after = dict(straight.model.named_parameters())[name]
        indices = selection.indices(name, tuple(before.shape))
        assert indices is not None
        changed = (before != after).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(indices.tolist())
        assert len(changed) > 0 or len(indices) == 0 or before.dim() == 1
    folder = tmp_path / "checkpoint-4"
    assert folder.is_dir()
    for file in sorted(folder.iterdir()):
        file.unlink()
    folder.rmdir()
    resumed = train(base, selection, tmp_path, resume=True)
    for expected, found in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_with_all_selected_a_training_is_the_trainers_own(base: PreTrainedModel, tmp_path: Path) -> None:
    """Rate, warm-up, betas, epsilon, decay and clipping are those of its AdamW, and the epsilon tells."""
    options: dict[str, Any] = {
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "weight_decay": 0.7,
        "adam_beta1": 0.5,
        "adam_beta2": 0.8,
        "adam_epsilon": 1e-2,
        "save_strategy": "no",
        "optim": "adamw_torch",
    }
    selected = train(base, select_of(base, 1.0), tmp_path, **options)
    assert isinstance(selected.optimizer.optimizer, SelectedAdamW)
    own = Trainer(model=copy.deepcopy(base), args=selected.args, train_dataset=Rows())
    own.train()
    changed = 0
    for before, expected, found in zip(
        *map(PreTrainedModel.parameters, (base, own.model, selected.model)), strict=True
    ):
        changed += not torch.equal(before, expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert changed == len(list(base.parameters()))
    logs = [
        [entry[key] for entry in each.state.log_history[:4]]
        for each in (own, selected)
        for key in ("grad_norm", "learning_rate")
    ]
    assert logs[2:] == [pytest.approx(each, rel=1e-5) for each in logs[:2]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        lambda: GptOssForCausalLM(
            GptOssConfig(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=4,
                layer_types=["full_attention"],
            )
        ),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)),
    ],
    ids=["relative_attention_bias", "biases of experts, and sinks", "D"],
)
def test_what_decays_is_what_decays_in_the_trainer(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = make()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, weight_decay=0.1)
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def decaying(optimizer: torch.optim.Optimizer) -> set[str]:
        return {names[each] for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]}

    layers = [{"id": name, "gradient_norm": 1.0} for name in names.values()]
    blueprint = Blueprint.from_dict({"model_id": "tiny", "training_checkpoint": 1.0, "layers": layers})
    given = trainer_arguments(model, select(blueprint, budget=1.0, model=model), arguments)
    assert decaying(given["optimizers"][0]) == decaying(trainer.optimizer)


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """A reporting integration: the Trainer makes it by its name and calls it before the callbacks it is given."""

    norms: list[float]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def test_reporting_integrations_see_the_norm_of_the_selected_gradient(
    base: PreTrainedModel, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "norms", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    trainer = train(base, selection, tmp_path, report_to=["recorder"])
    kept = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(kept) == 4
    assert kept == Recorder.norms
    assert all(norm > 0.05 for norm in kept)


def test_the_trainer_takes_callbacks_of_ones_own_beside_those_of_the_selection(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    model, own = copy.deepcopy(base), TrainerCallback()
    trainer = Trainer(model=model, args=arguments, **trainer_arguments(model, selection, arguments, callbacks=[own]))
    first, *others = trainer.callback_handler.callbacks
    assert isinstance(first, SelectionCallback)
    assert own in others
    assert others[0] is not own, "the Trainer's own come before the user's, as always"


def test_sharding_by_the_trainer_is_refused_before_the_model_is_touched(
    base: PreTrainedModel, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, fsdp="full_shard")
    model = copy.deepcopy(base)
    with pytest.raises(ConfigurationError, match="apply_selection after fully_shard"):
        trainer_arguments(model, selection, arguments)
    arguments.fsdp = []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    with pytest.raises(ConfigurationError, match="apply_selection after fully_shard"):
        trainer_arguments(model, selection, arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_norm_is_logged_where_nothing_is_clipped(base: PreTrainedModel, selection: Selection, tmp_path: Path) -> None:
    runs = (train(base, selection, tmp_path / str(norm), max_grad_norm=norm) for norm in (1e9, 0, -1.0))
    expected, norms, below = ([entry.get("grad_norm") for entry in each.state.log_history] for each in runs)
    assert norms == expected
    assert below == expected
    assert norms[0] > 0.05


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning 2.6 under torch 2.13
def test_a_reported_run_trains_the_selected_coordinates_and_not_the_tensors_that_hold_them(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    reporting: dict[str, Any] = {
        "client": Client("http://127.0.0.1:9", cache=False, offline=True),  # what is told lies in the journal
        "report": {"task": "rows", "model_id": "tiny"},
    }
    make_trainer(base, selection, tmp_path / "trainer", TrainerCapability(**reporting)).train()
    fit(base, selection, tmp_path / "lightning", 1, callbacks=[CapabilityCallback(**reporting)])
    chosen = sum(entry.selected for entry in apply_selection(copy.deepcopy(base), selection))
    for kind in ("trainer", "lightning"):
        told = read_journal(tmp_path / kind / "run.jsonl").run.selection
        assert told is not None
        assert (told.trained, told.parameters) == (chosen, base.num_parameters())


class Interrupt(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Ctrl-C in the midst of the first accumulation."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_after_an_interrupted_one_starts_without_its_gradients(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    expected = train(base, selection, tmp_path / "straight").state.log_history[0]["grad_norm"]
    trainer = make_trainer(base, selection, tmp_path / "again", Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(expected)


@pytest.mark.parametrize("launched", [False, True])
def test_fp16_is_refused_before_the_model_is_touched(
    launched: bool, base: PreTrainedModel, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(base)
    if launched:  # as `accelerate launch --mixed_precision fp16` does
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, fp16=not launched)
    with pytest.raises(ConfigurationError, match="bf16=True"):
        trainer_arguments(model, selection, arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Module(lightning.LightningModule):
    def __init__(self, model: PreTrainedModel, selection: Selection) -> None:
        super().__init__()
        self.model, self.selection = model, selection

    def training_step(self, rows: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**rows).loss
        return loss

    def configure_optimizers(self) -> SelectedAdamW:
        return SelectedAdamW(apply_selection(self.model, self.selection), lr=1e-2, max_norm=0.05)


def fit(
    base: PreTrainedModel,
    selection: Selection,
    folder: Path,
    epochs: int,
    checkpoint: Path | None = None,
    **options: Any,
) -> Module:
    module = Module(copy.deepcopy(base).train(), selection)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(Rows(), batch_size=2), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning 2.6 under torch 2.13
def test_lightning_trains_and_resumes_a_selection(base: PreTrainedModel, selection: Selection, tmp_path: Path) -> None:
    straight = fit(base, selection, tmp_path, 2)
    model = copy.deepcopy(base).train()
    optimizer = SelectedAdamW(apply_selection(model, selection), lr=1e-2, max_norm=0.05)
    for number, rows in enumerate([*DataLoader(Rows(), batch_size=2)] * 2):
        (model(**rows).loss / 2).backward()
        if number % 2:
            optimizer.step()
    for expected, found in zip(model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    fit(base, selection, tmp_path, 1)
    resumed = fit(base, selection, tmp_path, 2, tmp_path / "1.ckpt")
    for expected, found in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning 2.6 under torch 2.13
def test_clipping_that_lightning_cannot_do_is_refused(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="gradient_clip_val"):
        fit(base, selection, tmp_path, 1, gradient_clip_val=1.0, callbacks=[CapabilityCallback()])
    with pytest.raises(ConfigurationError, match="clip by max_norm"):
        fit(base, selection, tmp_path, 1, gradient_clip_val=1.0, precision="bf16-mixed")


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # Lightning 2.6 under torch 2.13
def test_lightning_trains_a_selection_in_bfloat16_and_is_refused_fp16(
    base: PreTrainedModel, selection: Selection, tmp_path: Path
) -> None:
    fit(base, selection, tmp_path, 1, precision="bf16-mixed")
    fp16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigurationError, match="precision='bf16-mixed'"):
        fit(base, selection, tmp_path, 1, plugins=[fp16])
