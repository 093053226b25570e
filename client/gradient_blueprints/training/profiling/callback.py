"""A callback for `transformers.Trainer` that profiles at chosen fractions of the training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gradient_blueprints.client import Client
from gradient_blueprints.training.profiling.checkpoints import FRACTIONS, CheckpointProfiler, Data


class BlueprintCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Profiles at 50, 80 and 100 % of the steps and writes `gradient_blueprint.json` and `factors.safetensors`.

    The files go to the step's checkpoint folder, `output_dir/checkpoint-STEP`, beside the weights
    that the trainer saves there; with a `client` they are published too, and a registry that does
    not answer does not end the training (`callback.unpublished`, `checkpoints.publish_folder`).

    `data` maps domains to batches, which are read anew each time, or is a function that gives such a
    mapping. Without it the first `batches` of the trainer's own evaluation data are profiled as the
    domain `general`, in the first evaluation at or after each fraction. `options` are the profiler's.

    >>> trainer.add_callback(BlueprintCallback("tiny", {"general": batches}, client=client))   # doctest: +SKIP
    """

    def __init__(
        self,
        model_id: str,
        data: Data | Callable[[], Data] | None = None,
        *,
        fractions: Sequence[float] = FRACTIONS,
        client: Client | None = None,
        batches: int = 64,
        **options: Any,
    ) -> None:
        self._profiler = CheckpointProfiler(model_id, data, fractions, client, options)
        self._own_data, self._batches = data is not None, batches

    @property
    def written(self) -> list[Path]:
        """The documents so far."""
        return self._profiler.written

    @property
    def unpublished(self) -> list[Path]:
        """Folders whose publication failed."""
        return self._profiler.unpublished

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A resumed training does not profile again what lies behind it."""
        self._profiler.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Profile the callback's own data."""
        if self._own_data:
            self._profile_if_due(args, state, rest)

    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Profile the trainer's evaluation data."""
        if not self._own_data:
            self._profile_if_due(args, state, rest)

    def _profile_if_due(self, args: Any, state: Any, rest: dict[str, Any]) -> None:
        fraction = self._profiler.due(state.global_step, state.max_steps)
        if fraction is None or not state.is_world_process_zero:
            return
        loader = None if self._own_data else rest.get("eval_dataloader")
        self._profiler.profile(
            rest["model"],
            rest.get("processing_class"),
            fraction,
            Path(args.output_dir) / f"checkpoint-{state.global_step}",
            seed=args.seed,
            data=None if loader is None else {"general": itertools.islice(loader, self._batches)},
        )
