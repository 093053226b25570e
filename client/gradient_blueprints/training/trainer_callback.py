"""A callback for `transformers.Trainer` that meters training, keeps the curve of Ψ over Γ, and stops by a rule."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gradient_blueprints.client import Client
from gradient_blueprints.training.metered_run import DecayGuard, MeteredRun
from gradient_blueprints.training.resources import ResourceMeter
from gradient_blueprints.training.run_reporting import RunReporter
from gradient_blueprints.training.stopping import MarginalReturn

JOURNAL_SECONDS = 30.0

logger = logging.getLogger("gradient_blueprints")


class CapabilityCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers carries no types
    """Meters the whole training; at each evaluation adds a point (Ψ, Γ) and, with a `rule`, may stop the training.

        callback = CapabilityCallback(rule=MarginalReturn(eta=0.02, patience=3), gamma="energy_kwh")
        Trainer(..., callbacks=[callback]).train()
        callback.run.points, callback.run.meter.tally(), callback.run.stopped

    Ψ is the evaluation's `metric`, `eval_` in front or not. Γ is one resource, or prices
    `{"energy_kwh": 0.25, "accelerator_hours": 2.0}`. Evaluations without the metric are warned of at the next step,
    and a rule that was never asked at the end: a training is not lost for it.
    `meter` is a ResourceMeter, or its arguments as a mapping; the model and the optimizer are the trainer's.

    Stopping waits while the learning rate is above `guard` times its highest so far, if the schedule is one that
    decays: what a decay brings would be lost. `guard=1` lets it stop at any time.

    The state travels in `trainer_state.json` and is taken up again by `train(resume_from_checkpoint=...)`, whether or
    not `restore_callback_states_from_checkpoint` is set (when it is, Trainer puts a new callback in the place of this
    one: find it in `trainer.callback_handler`). Each process also keeps `output_dir/resources-RANK.json`, rewritten at
    saves and, every half minute at most, at logs, so that work between the last checkpoint and a kill is counted: it
    was spent.

    With `report`, at least `{"task": ..., "model_id": ...}` (fields of record_models.NewRun), the run is uploaded
    through `client` while it trains, or through one from the environment, which is also what a callback that the
    Trainer restored uses. It is kept in `output_dir/run.jsonl`, see RunReporter.

    Several processes: Γ is that of all of them, and they all decide alike.

    Each `train()` has a `run` of its own, with a meter and a rule like those that were given: keep `callback.run` of
    the first before the second. Only one that goes on from a checkpoint after one that broke off goes on with its run.
    """

    def __init__(
        self,
        rule: MarginalReturn | Mapping[str, Any] | None = None,
        gamma: str | Mapping[str, float] = "seconds",
        *,
        metric: str = "eval_loss",
        guard: float = 0.5,
        meter: ResourceMeter | Mapping[str, Any] | None = None,
        client: Client | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        self.metric, self.guard = metric, DecayGuard(guard)
        self.run = MeteredRun(meter, rule, gamma)
        self._other_metrics: set[str] = set()
        self._settled = False
        """Whether the metric came, or its absence was told."""
        self._journalled = -math.inf
        if client is not None or report is not None:
            self.run.reporter = RunReporter(client, report or {}, metric=metric, rule=self.run.rule)

    # --- the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        resumed = state.global_step > 0
        if self.run.ended or (self.run.begun and not resumed):
            self.run, self.guard = self.run.afresh(), DecayGuard(self.guard.share)
            self._other_metrics, self._settled = set(), False
        if resumed:
            saved = state.stateful_callbacks.get(type(self).__name__)
            saved = saved[0] if isinstance(saved, list) else saved
            if saved is not None:
                self.saved_state = saved["attributes"]["saved_state"]
            if self._journal(args).is_file():
                self.run.meter.load(self._journal(args))
        self.run.begin(rest["model"], rest.get("optimizer"))
        if self.run.reporter is not None and state.is_world_process_zero:
            journal = Path(args.output_dir) / "run.jsonl"
            self.run.begin_report(journal, seed=args.seed, resumed=resumed)

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.run.meter.running and time.monotonic() - self._journalled > JOURNAL_SECONDS:
            self._save(args)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._save(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.guard.ahead(rest["optimizer"], rest.get("lr_scheduler"), state.max_steps)  # to have seen the highest rate
        if self._other_metrics and not self._settled:  # not at once: several sets are evaluated one after the other
            self._warn()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **rest: Any) -> None:
        if not self.run.meter.running or not metrics:
            return
        name = next((name for name in (self.metric, f"eval_{self.metric}") if name in metrics), None)
        if name is None:
            self._other_metrics.update(metrics)
            return
        self._settled = True
        decay_ahead = self.guard.ahead(rest["optimizer"], rest.get("lr_scheduler"), state.max_steps)
        if self.run.check(state.global_step, metrics[name], decay_ahead=decay_ahead).stop:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.run.end()
        self._save(args)
        never_asked = self.run.rule is not None and not self.run.points and not self.run.decisions
        if never_asked or (self._other_metrics and not self._settled):
            self._warn()
        if self.run.reporter is not None:
            tally = self.run.meter.tally_of_ranks()
            if state.is_world_process_zero:
                self.run.end_report(tally)

    def _warn(self) -> None:
        self._settled = True
        there = ", ".join(sorted(self._other_metrics)) or "nothing"
        logger.warning(
            "No evaluation gave %r, so no point was added and no rule asked; there is %s", self.metric, there
        )

    def _save(self, args: Any) -> None:
        self._journalled = time.monotonic()
        self.run.meter.save(self._journal(args))

    @staticmethod
    def _journal(args: Any) -> Path:
        return Path(args.output_dir) / f"resources-{args.process_index}.json"

    # --- what the trainer saves and restores

    def state(self) -> dict[str, Any]:
        rule = self.run.rule
        return {
            "args": {
                "rule": None if rule is None else rule.settings(),
                "gamma": dict(self.run.prices),
                "metric": self.metric,
                "guard": self.guard.share,
                "meter": self.run.meter.arguments(),
                "report": None if self.run.reporter is None else self.run.reporter.fields,
            },
            "attributes": {"saved_state": self.saved_state},
        }

    @property
    def saved_state(self) -> dict[str, Any]:
        return {**self.run.state_dict(), "highest_rate": self.guard.highest}

    @saved_state.setter
    def saved_state(self, state: Mapping[str, Any]) -> None:
        self.run.load_state_dict(state)
        self.guard.highest = state["highest_rate"]
