"""A training run under the meter: its curve of Ψ over Γ, and the rule that may end it. What the callbacks share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gradient_blueprints.errors import ConfigurationError
from gradient_blueprints.run_models import Resource, RunPoint, Tally
from gradient_blueprints.tallies import merge_tallies
from gradient_blueprints.training.replay import Check
from gradient_blueprints.training.resources import ResourceMeter
from gradient_blueprints.training.run_reporting import RunReporter
from gradient_blueprints.training.stopping import Decision, MarginalReturn, Reason, priced


class DecayGuard:
    """Whether the learning rate is still to be decayed: it is above `share` of its highest, and will go below."""

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ConfigurationError(f"guard = {share}: it is a share of the highest learning rate, in (0, 1]")
        self.share = share
        self.highest = 0.0

    def ahead(self, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int | None) -> bool:
        """`steps`: after how many of its steps the scheduler will be at the end of training; None: nobody knows.

        A LambdaLR, which all schedules of transformers but one are, is asked for its rate then. Any other scheduler,
        or one without an end, is taken to decay.
        """
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        self.highest = max(self.highest, rate)
        if scheduler is None or rate <= self.share * self.highest:
            return False
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        if isinstance(scheduler, LambdaLR) and steps is not None:
            bases = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            return max(float(base) * factor(steps) for base, factor in bases) <= self.share * self.highest
        return True


class MeteredRun:
    """Meter, rule and curve of one training. Γ is one resource, or a price for each of several.

    Meter and rule are given, or their arguments as a mapping.
    """

    def __init__(
        self,
        meter: ResourceMeter | Mapping[str, Any] | None,
        rule: MarginalReturn | Mapping[str, Any] | None,
        gamma: str | Mapping[str, float] = "seconds",
    ) -> None:
        self.meter = meter if isinstance(meter, ResourceMeter) else ResourceMeter(**(meter or {}))
        self.rule = rule if isinstance(rule, MarginalReturn | None) else MarginalReturn(**rule)
        self.begun = self.ended = False
        prices = {gamma: 1.0} if isinstance(gamma, str) else dict(gamma)
        unknown = sorted(name for name in prices if name not in list(Resource))
        if unknown or not prices:
            raise ConfigurationError(f"Γ is made of {', '.join(Resource)}; not of {', '.join(unknown) or 'nothing'}")
        self.prices = {Resource(name): float(price) for name, price in prices.items()}
        self.points: list[RunPoint] = []
        self.decisions: list[Decision] = []
        self.stopped: Decision | None = None
        self.reporter: RunReporter | None = None
        self._of_ranks: Tally | None = None  # at the last check, where there are several

    def afresh(self) -> MeteredRun:
        """Another with the same settings, of a training that has spent nothing yet. This one is over."""
        self.meter.stop()  # where the training broke off
        rule = None if self.rule is None else type(self.rule)(**self.rule.settings())
        prices = {str(name): price for name, price in self.prices.items()}
        run = MeteredRun(ResourceMeter(**self.meter.arguments()), rule, prices)
        run.reporter = None if self.reporter is None else self.reporter.afresh()
        return run

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Meter from here on. ConfigurationError now, and not at the first evaluation, where Γ cannot be read here."""
        self.begun, self.ended = True, False
        self.meter.stop()  # of a training that broke off: its hook is on that one's model
        self.meter.model, self.meter.optimizer = model, optimizer
        self.meter.start()
        try:
            self._check_gamma()
        except ConfigurationError:
            self.meter.stop()
            raise

    def begin_report(self, journal: Path, *, seed: int | None, resumed: bool) -> None:
        """Report from here on. What a killed process had told as spent is counted, whether or not it was saved."""
        assert self.reporter is not None
        meter = self.meter
        assert meter.model is not None
        spent = self.reporter.begin(
            journal, meter.model, meter.optimizer, seed=seed, resumed=resumed, earlier=self.points
        )
        if spent is not None:
            meter.add_earlier(spent)

    def end(self) -> None:
        """The training is over; what begins after it is another, though it may go on from a checkpoint."""
        self.ended = True
        self.meter.stop()

    def end_report(self, tally: Tally) -> None:
        assert self.reporter is not None
        ended = self.stopped
        stopped = None if ended is None or ended.ratio is None else f"MarginalReturn: ratio {ended.ratio:.6g} below eta"
        self.reporter.finish(tally, stopped)

    def _check_gamma(self) -> None:
        if self.rule is not None:
            counted = dict.fromkeys((Resource.TOKENS, Resource.FLOPS), 0.0)  # read once a batch has come
            priced({**counted, **self.meter.tally().amounts()}, self.prices)

    def check(self, step: int, psi: float, *, decay_ahead: bool = False) -> Decision:
        """Add the point and ask the rule; without one the answer is to go on. All ranks have to call it."""
        tally = self.meter.tally_of_ranks()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._of_ranks = tally
        spent = tally.amounts()
        if math.isfinite(psi):
            self.points.append(RunPoint(step=step, psi=psi, gamma=spent))
            if self.reporter is not None:
                self.reporter.add(self.points[-1], tally)
        if self.rule is None:
            return Decision(False, Reason.PAYS, None)
        decision = self.rule.update(psi, priced(spent, self.prices), decay_ahead=decay_ahead)
        self.decisions.append(decision)
        if decision.stop:
            self.stopped = decision
        return decision

    @property
    def last_ratio(self) -> float | None:
        """The ratio of the last window, which the paper asks to report."""
        return self.decisions[-1].ratio if self.decisions else None

    def curve(self) -> list[Check]:
        """The points as `replay` wants them, without knowledge of a decay."""
        return [Check(priced(point.gamma, self.prices), point.psi) for point in self.points]

    def state_dict(self) -> dict[str, Any]:
        """Of one rank, which saves it for all: what the others had spent at the last check, the rule counts on."""
        meter = self.meter.state_dict()
        if self._of_ranks is not None:
            together = merge_tallies([self._of_ranks, Tally.model_validate(meter["tally"])])
            meter["tally"] = together.model_dump(mode="json")
        return {
            "meter": meter,
            "rule": None if self.rule is None else self.rule.state_dict(),
            "points": [point.model_dump(mode="json") for point in self.points],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meter.load_state_dict(state["meter"])
        if self.rule is not None and state["rule"] is not None:
            self.rule.load_state_dict(state["rule"])
        self.points = [RunPoint.model_validate(point) for point in state["points"]]
        self.decisions, self.stopped = [], None
