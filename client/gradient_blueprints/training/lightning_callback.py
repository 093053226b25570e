"""A callback for Lightning's Trainer that meters training, keeps the curve of Ψ over Γ, and stops by a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gradient_blueprints.client import Client
from gradient_blueprints.errors import ConfigurationError, MissingExtra
from gradient_blueprints.training.finetuning import SelectedAdamW
from gradient_blueprints.training.metered_run import DecayGuard, MeteredRun
from gradient_blueprints.training.resources import ResourceMeter
from gradient_blueprints.training.run_reporting import RunReporter
from gradient_blueprints.training.stopping import MarginalReturn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ModuleNotFoundError as missing:
    if missing.name not in ("lightning", "lightning.pytorch"):
        raise
    raise MissingExtra("lightning", "The callback for Lightning") from missing


def _model_of(module: LightningModule) -> nn.Module:
    model = getattr(module, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            "the module has no `model` to meter: give network=, a function from the module to what is called with "
            "batches, such as network=lambda module: module.net"
        )
    return model


class CapabilityCallback(Callback):
    """The counterpart of `trainer_callback.CapabilityCallback`: a point (Ψ, Γ) at each validation.

    Ψ is what the module logs as `metric`. Tokens and FLOPs are counted where `network(module)`, by default its
    attribute `model`, is called with `input_ids`. `meter` and `rule` may be their arguments as mappings, as there. The
    state lies in the checkpoints, as that of Lightning's own EarlyStopping does, and comes back with
    `fit(ckpt_path=...)`. No file is kept beside it, for `default_root_dir` is often shared: what was spent between the
    last checkpoint and a kill is counted as far as a `report` told it. With `report` the run is uploaded as there, kept
    in `default_root_dir/run.jsonl`; Lightning tells no seed, so put it in `report`. Each training has a
    `run` of its own, as there; a further `fit` of the same trainer without `ckpt_path` goes on with its run. Raises
    ConfigurationError where Lightning would clip the gradients of a `SelectedAdamW`, which it cannot, and where a
    module has no `model` and `network` was not given.
    """

    def __init__(
        self,
        rule: MarginalReturn | Mapping[str, Any] | None = None,
        gamma: str | Mapping[str, float] = "seconds",
        *,
        metric: str = "val_loss",
        guard: float = 0.5,
        meter: ResourceMeter | Mapping[str, Any] | None = None,
        client: Client | None = None,
        report: Mapping[str, Any] | None = None,
        network: Callable[[LightningModule], nn.Module] = _model_of,
    ) -> None:
        self.metric, self.guard = metric, DecayGuard(guard)
        self.run = MeteredRun(meter, rule, gamma)
        self._network = network
        if client is not None or report is not None:
            self.run.reporter = RunReporter(client, report or {}, metric=metric, rule=self.run.rule)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.run.ended:  # the state is loaded next
            self._begin_afresh()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.gradient_clip_val and any(isinstance(each, SelectedAdamW) for each in trainer.optimizers):
            raise ConfigurationError(
                "gradient_clip_val does nothing to SelectedAdamW, whose gradients Lightning cannot see: "
                "leave it away and give the optimizer max_norm"
            )
        resumed = trainer.global_step > 0
        if self.run.begun and not resumed:
            self._begin_afresh()
        self.run.begin(self._network(pl_module), trainer.optimizers[0] if trainer.optimizers else None)
        if self.run.reporter is not None and trainer.is_global_zero:
            journal = Path(trainer.default_root_dir) / "run.jsonl"
            self.run.begin_report(journal, seed=None, resumed=resumed)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._decay_ahead(trainer)  # to have seen the highest rate

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.run.meter.running:
            return
        if self.metric not in trainer.callback_metrics:
            raise ConfigurationError(
                f"the module logs no {self.metric!r}; there is {', '.join(trainer.callback_metrics) or 'nothing'}"
            )
        psi = float(trainer.callback_metrics[self.metric])
        stop = self.run.check(trainer.global_step, psi, decay_ahead=self._decay_ahead(trainer)).stop
        # A metric that was logged without sync_dist differs between the processes: one that stops, stops all.
        trainer.should_stop = trainer.should_stop or trainer.strategy.reduce_boolean_decision(stop, all=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.end()
        if self.run.reporter is not None:
            tally = self.run.meter.tally_of_ranks()
            if trainer.is_global_zero:
                self.run.end_report(tally)

    def _begin_afresh(self) -> None:
        self.run, self.guard = self.run.afresh(), DecayGuard(self.guard.share)

    def _decay_ahead(self, trainer: Trainer) -> bool:
        if not trainer.optimizers or not trainer.lr_scheduler_configs:
            return False
        config = trainer.lr_scheduler_configs[0]
        steps = trainer.estimated_stepping_batches if config.interval == "step" else trainer.max_epochs
        if steps is not None and not 0 <= steps < math.inf:  # a training may be bounded by time alone
            steps = None
        return self.guard.ahead(trainer.optimizers[0], config.scheduler, None if steps is None else int(steps))

    def state_dict(self) -> dict[str, Any]:
        return {**self.run.state_dict(), "highest_rate": self.guard.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run.load_state_dict(state_dict)
        self.guard.highest = state_dict["highest_rate"]
