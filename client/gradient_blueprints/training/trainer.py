"""A selection inside `transformers.Trainer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import distributed, nn
from transformers import TrainerCallback, TrainingArguments

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.training.finetuning import SelectedAdamW, apply_selection
from gradient_blueprints.training.selection import Selection


def trainer_arguments(
    model: nn.Module,
    selection: Selection,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
) -> dict[str, Any]:
    """The optimizer and the callbacks, `callbacks` among them, with which a `Trainer` trains a selection.

    >>> trainer = Trainer(model, arguments, **trainer_arguments(model, selection, arguments))      # doctest: +SKIP

    Learning rate, betas, epsilon and decay are those of `arguments`; as in the Trainer vectors (biases, norms) do not
    decay. Clipping is the optimizer's, since the Trainer's finds no gradients. To resume, apply the same selection
    again: its state is in the checkpoint, and that of another selection is refused.

    One process only, else ConfigurationError: the Trainer wraps or shards the model after the optimizer has been made,
    and the optimizer has to know of shards. Several take a loop of your own. Nor `fp16`, whose GradScaler unscales
    gradients that are no longer there.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigurationError(
            "transformers.Trainer wraps or shards the model after SelectedAdamW has been made for it, so it trains "
            "selections in one process only. With several write the loop: SelectedAdamW(..., process_group=...) on "
            "replicas, or apply_selection after fully_shard."
        )
    if arguments.fp16:
        raise ConfigurationError(
            "fp16 scales the loss, and its GradScaler finds no gradients to unscale: SelectedAdamW has taken them. Use "
            "bf16=True, which needs no scaling."
        )
    selected = apply_selection(model, selection)
    matrices = [entry for entry in selected if entry.parameter.dim() > 1]
    vectors = [entry for entry in selected if entry.parameter.dim() <= 1]
    groups = [
        {"params": entries, "weight_decay": decay}
        for entries, decay in ((matrices, arguments.weight_decay), (vectors, 0.0))
        if entries
    ]
    optimizer = SelectedAdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        max_norm=arguments.max_grad_norm or math.inf,  # the norm is logged where nothing is clipped too
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Forget what an interrupted run left half accumulated, as `model.zero_grad()` does with other gradients."""
        self._optimizer.zero_grad()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Put the norm in the place of the Trainer's 0, in what is shown and in what is kept."""
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None and "grad_norm" in entry and self._optimizer.last_norm is not None:
                entry["grad_norm"] = self._optimizer.last_norm
