"""A selection inside `transformers.Trainer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import distributed, nn
from torch.distributed import ProcessGroup
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.selection import Selection


class SelectionTrainer(Trainer):  # type: ignore[misc]  # transformers carries no types
    """A Trainer of a selection in several processes, on replicas of the model; else it is a Trainer like any other.

    A `Trainer` puts `DistributedDataParallel` around the model, which keeps and sends whole gradients. Here the model
    stays as it is, and the optimizer of `trainer_arguments` averages the selected gradients, and nothing else. Trainers
    of other kinds take it in front: `class Tuner(SelectionTrainer, SFTTrainer): pass`.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """As in the Trainer, and a model with a selection is prepared as if for evaluation: placed, but not wrapped."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_selected(
            model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
        ) -> nn.Module:
            selected = [each for each in self.callback_handler.callbacks if isinstance(each, SelectionCallback)]
            for callback in selected:
                callback.unwrapped = True
            unwrapped = evaluation_mode or bool(selected)
            prepared: nn.Module = prepare(model, device_placement=device_placement, evaluation_mode=unwrapped)
            return prepared

        self.accelerator.prepare_model = prepare_selected


def trainer_arguments(
    model: nn.Module,
    selection: Selection,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
) -> dict[str, Any]:
    """The optimizer and the callbacks, `callbacks` among them, with which a `Trainer` trains a selection.

    >>> trainer = Trainer(model, arguments, **trainer_arguments(model, selection, arguments))      # doctest: +SKIP

    Learning rate, betas, epsilon and decay are those of `arguments`; what decays is as in the Trainer, which leaves
    biases and norms out by their names. Clipping is the optimizer's, since the Trainer's finds no gradients. To resume,
    apply the same selection again: its state is in the checkpoint, and that of another selection is refused.

    Several processes (`torchrun`, `accelerate launch`) hold replicas and take a `SelectionTrainer`. Raises
    ConfigurationError for FSDP and DeepSpeed, which shard the model after the optimizer has been made for it, and for
    `fp16`, whose GradScaler unscales gradients that are no longer there.
    """
    launched = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if parse_flag_from_env(name)]
    if arguments.fsdp or arguments.deepspeed or launched:
        raise ConfigurationError(
            "FSDP and DeepSpeed of transformers.Trainer shard the model after SelectedAdamW has been made for it, and "
            "it has to know the shards. Train replicas with SelectionTrainer, or write the loop: apply_selection after "
            "fully_shard."
        )
    if arguments.fp16 or getattr(arguments, "mixed_precision", "no") == "fp16":  # the latter by `accelerate launch`
        raise ConfigurationError(
            "fp16 scales the loss, and its GradScaler finds no gradients to unscale: SelectedAdamW has taken them. Use "
            "bf16=True, which needs no scaling."
        )
    selected = apply_selection(model, selection)
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # asks nothing of the trainer, which is not yet made
    groups = [
        {"params": entries, "weight_decay": decay}
        for entries, decay in (
            ([entry for entry in selected if entry.name in decaying], arguments.weight_decay),
            ([entry for entry in selected if entry.name not in decaying], 0.0),
        )
        if entries
    ]
    optimizer = SelectedAdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        # as the Trainer reads it, which clips by norms above 0; the norm is logged where nothing is clipped too
        max_norm=arguments.max_grad_norm if (arguments.max_grad_norm or 0) > 0 else math.inf,
        process_group=distributed.group.WORLD if arguments.world_size > 1 else None,
    )
    return {"optimizers": (optimizer, None), "callbacks": FirstInFront([SelectionCallback(optimizer), *callbacks])}


class FirstInFront(list[TrainerCallback | type[TrainerCallback]]):
    """Callbacks the first of which is called before the Trainer's own; the others after them, as always.

    The Trainer joins `its_own + given`, and a reporting integration among its own logs whatever has been corrected
    before its turn. A list's subclass on the right is asked first how it wants to be added.
    """

    def __radd__(
        self, others: list[TrainerCallback | type[TrainerCallback]]
    ) -> list[TrainerCallback | type[TrainerCallback]]:
        return [*self[:1], *others, *self[1:]]


class SelectionCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """What the Trainer cannot do itself: it sees neither the selected gradients nor their norm."""

    def __init__(self, optimizer: SelectedAdamW) -> None:
        self._optimizer = optimizer
        self.unwrapped = False
        """Whether the model was prepared by a SelectionTrainer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Forget what an interrupted run left half accumulated, and give replicas the first process's weights.

        The Trainer does the former by `model.zero_grad()`, the latter by its wrapper.
        """
        self._optimizer.zero_grad()
        if isinstance(self._optimizer.process_group, ProcessGroup):
            if not self.unwrapped:
                raise ConfigurationError(
                    "in several processes a Trainer puts DistributedDataParallel around the model, which keeps and "
                    "sends whole gradients: take gradient_blueprints.training.trainer.SelectionTrainer in its place"
                )
            for tensor in (*rest["model"].parameters(), *rest["model"].buffers()):
                held = tensor.detach()
                sent = held.contiguous()
                distributed.broadcast(sent, 0)
                if sent is not held:
                    held.copy_(sent)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Put the norm in the place of the Trainer's 0, in what is shown and in what is kept."""
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "grad_norm" in entry and self._optimizer.last_norm is not None:
                entry["grad_norm"] = self._optimizer.last_norm
