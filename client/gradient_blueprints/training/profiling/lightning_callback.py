"""A callback for Lightning's Trainer that profiles at chosen fractions of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradient_blueprints.client import Client
from gradient_blueprints.errors import ConfigurationError, MissingExtra
from gradient_blueprints.training.profiling.checkpoints import FRACTIONS, CheckpointProfiler, Data

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as missing:
    if missing.name not in ("lightning", "lightning.pytorch"):
        raise
    raise MissingExtra("lightning", "The callback for Lightning") from missing


class BlueprintCallback(Callback):
    """Profiles at 50, 80 and 100 % of the steps; the counterpart of `callback.BlueprintCallback`.

    The files go to `checkpoint-STEP` in the folder of the trainer's checkpoint callback, or in its
    `default_root_dir` without one. `network(module)` gives the model inside the LightningModule, by
    default its attribute `model`; the profiler calls that with the batches of `data`.

    >>> Trainer(callbacks=[BlueprintCallback("tiny", {"general": batches})])                  # doctest: +SKIP
    """

    def __init__(
        self,
        model_id: str,
        data: Data | Callable[[], Data],
        *,
        fractions: Sequence[float] = FRACTIONS,
        client: Client | None = None,
        network: Callable[[LightningModule], nn.Module] = lambda module: module.model,  # type: ignore[assignment,return-value]
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self._profiler = CheckpointProfiler(model_id, data, fractions, client, options)
        self._network, self._tokenizer = network, tokenizer

    @property
    def written(self) -> list[Path]:
        """The documents so far."""
        return self._profiler.written

    @property
    def unpublished(self) -> list[Path]:
        """Folders whose publication failed."""
        return self._profiler.unpublished

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed training does not profile again what lies behind it."""
        self._profiler.start(trainer.global_step, _last_step(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Profile when the step that just ended reaches a fraction that is due."""
        fraction = self._profiler.due(trainer.global_step, _last_step(trainer))
        if fraction is None or not trainer.is_global_zero:
            return
        saved = getattr(trainer.checkpoint_callback, "dirpath", None)
        folder = Path(saved or trainer.default_root_dir) / f"checkpoint-{trainer.global_step}"
        self._profiler.profile(self._network(pl_module), self._tokenizer, fraction, folder, seed=0)


def _last_step(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ConfigurationError(
            "A training bounded by time alone has no fractions: give the Trainer max_steps or max_epochs."
        )
    return int(steps)
