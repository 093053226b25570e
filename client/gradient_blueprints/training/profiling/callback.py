"""A callback for `transformers.Trainer` that profiles at chosen fractions of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.models import BLUEPRINT_FILE, Blueprint
from gradient_blueprints.training.profiling.losses import Batch
from gradient_blueprints.training.profiling.profiler import GradientProfiler

FRACTIONS = (0.5, 0.8, 1.0)
FACTORS_FILE = "factors.safetensors"


class BlueprintCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Profiles validation batches at 50, 80 and 100 % of the steps and writes `gradient_blueprint.json`.

    The file goes to the step's checkpoint folder, `output_dir/checkpoint-STEP`, beside the weights
    that the trainer saves there. `data` maps domains to batches, which are read anew each time, or
    is a function that gives such a mapping. `publish(blueprint)` is called with each document.

    >>> trainer.add_callback(BlueprintCallback("tiny", {"general": batches}))        # doctest: +SKIP
    """

    def __init__(
        self,
        model_id: str,
        data: Mapping[str, Sequence[Batch]] | Callable[[], Mapping[str, Iterable[Batch]]],
        *,
        fractions: Sequence[float] = FRACTIONS,
        publish: Callable[[Blueprint], object] | None = None,
        **options: Any,
    ) -> None:
        if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
            raise ConfigurationError(f"The fractions {list(fractions)} are not all in (0, 1].")
        self.model_id = model_id
        self.written: list[Path] = []
        self._data = data
        self._waiting = sorted(set(fractions))
        self._publish = publish
        self._options = options

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Profile when the step that just ended reaches a fraction that is due."""
        while self._waiting and state.global_step >= self._waiting[0] * state.max_steps - 1e-9:
            fraction = self._waiting.pop(0)
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                self._profile(model, rest.get("processing_class"), fraction, folder, args.seed)

    def _profile(self, model: Any, tokenizer: Any, fraction: float, folder: Path, seed: int) -> None:
        training = model.training
        data = self._data() if callable(self._data) else self._data
        try:
            with GradientProfiler(model.eval(), tokenizer, seed=seed, **self._options) as profiler:
                for domain, batches in data.items():
                    for batch in batches:
                        profiler.step(batch, domain=domain)
        finally:
            model.train(training)
        blueprint = profiler.blueprint(self.model_id, round(fraction, 4))
        blueprint.save_pretrained(folder)
        if self._options.get("statistics", "all") == "all":
            profiler.save_factors(folder / FACTORS_FILE)
        self.written.append(folder / BLUEPRINT_FILE)
        if self._publish is not None:
            self._publish(blueprint)
