"""Uploading a run while it trains: to a file at once, and from there to the registry whenever it answers."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from gradient_blueprints.calls import built
from gradient_blueprints.client import Client
from gradient_blueprints.errors import (
    BlueprintsError,
    ConfigurationError,
    ConnectionFailed,
    InternalError,
    RateLimited,
    ServiceUnavailable,
)
from gradient_blueprints.record_models import ChosenPart, NewRun, ReportedPoint, Run, RunEnd
from gradient_blueprints.run_journal import (
    GrowingJournal,
    aside,
    begin_journal,
    find_journal,
    journal_end,
    journal_point,
)
from gradient_blueprints.run_models import RunPoint, Tally
from gradient_blueprints.training.finetuning import SelectedAdamW
from gradient_blueprints.training.flops import encodes_and_decodes, multiplied_parameters
from gradient_blueprints.training.stopping import MarginalReturn

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts at a registry that does not answer
PATIENCE = 30.0  # seconds that the end of a training waits for its upload
PASSING = (ConnectionFailed, ServiceUnavailable, RateLimited, InternalError)

logger = logging.getLogger("gradient_blueprints")


class RunReporter:
    """Reports one training; what a callback makes of its `client` and `report`.

    `report` holds fields of NewRun: task and model_id at least; settings, blueprint, selection, ... Training never
    waits for the registry, nor fails for it: each point is on disk in `journal` before a thread of its own sends it,
    and what could not be sent when training ends stays there (`blueprints send-run JOURNAL`). A training that goes on
    from a checkpoint after a kill goes on with its run: a step that was scored before the kill is not scored twice.
    """

    def __init__(
        self, client: Client | None, report: Mapping[str, Any], *, metric: str, rule: MarginalReturn | None
    ) -> None:
        """`client`: without it one from the environment. Raises ConfigurationError where `report` fits no run."""
        fields: dict[str, Any] = {"metric": metric}
        if rule is not None:
            settings = ", ".join(f"{name}={value}" for name, value in rule.settings().items())
            fields |= {"goal": rule.goal, "window": rule.window, "callbacks": (f"MarginalReturn({settings})",)}
        told = built(NewRun, id=uuid.uuid4(), **{**fields, **report})
        self.fields = told.model_dump(mode="json", exclude={"id"}, exclude_none=True)
        self.run: Run | None = None
        """As the registry has it, once all of it is there."""
        self.refused: Exception | None = None
        """Why the registry does not take the run."""
        self._client = client if client is not None else Client()
        self._journal: GrowingJournal | None = None
        """Where the run began, and its id: a later one may begin there while this one is still being sent."""
        self._last_step = -1
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def afresh(self) -> RunReporter:
        """Another for another run; the thread of this one goes on sending its own, which is then kept aside."""
        return RunReporter(self._client, self.fields, metric=self.fields["metric"], rule=None)

    def begin(
        self,
        journal: Path,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        seed: int | None,
        resumed: bool,
        earlier: Sequence[RunPoint] = (),
    ) -> Tally | None:
        """Begin, or go on with the run in `journal` where it is the same and has not ended.

        Answers what had been spent at that run's last point. `earlier`: points of before, for a run that begins anew.
        """
        new = self._described(model, optimizer, seed)
        kept = find_journal(journal) if resumed else None
        self.run, self.refused, tally = None, None, None
        if kept is not None and kept.end is None and kept.run == new.model_copy(update={"id": kept.run.id}):
            self._last_step = kept.points[-1].step if kept.points else -1
            tally = kept.tally
            self._journal = GrowingJournal(journal, kept.run.id)
        else:
            begin_journal(journal, new)
            self._last_step = -1
            self._journal = GrowingJournal(journal, new.id)
        for point in earlier:
            self.add(point, None)
        self._news.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._upload, name="run-reporter", daemon=True)
            self._thread.start()
        return tally

    def _described(self, model: nn.Module, optimizer: Optimizer | None, seed: int | None) -> NewRun:
        """The run, with what the two tell: what multiplies for each token, and how much of all is trained.

        Of an encoder and a decoder neither multiplies for each token: `parameters` is absent.
        """
        fields: dict[str, Any] = {"seed": seed}
        with suppress(ConfigurationError):  # a mixture that does not tell: absent
            if not encodes_and_decodes(model):
                fields["parameters"] = round(sum(multiplied_parameters(model).values())) or None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate and Lightning wrap it
        if isinstance(optimizer, SelectedAdamW):
            trained = sum(entry.trained for entry in optimizer.selected)
        else:
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if trained < parameters:
            fields["selection"] = ChosenPart(trained=trained, parameters=parameters)
        return built(NewRun, id=uuid.uuid4(), **{**fields, **self.fields})

    def add(self, point: RunPoint, tally: Tally | None) -> None:
        """A point, unless the run has one of that step, or of a later one."""
        if self._journal is None or point.step <= self._last_step:
            return
        try:
            reported = ReportedPoint(step=point.step, psi=point.psi, gamma=dict(point.gamma))
        except ValidationError as invalid:  # an exploded perplexity must not end the training that it is told of
            logger.warning("The point of step %d is not reported: %s", point.step, invalid.errors()[0]["msg"])
            return
        self._last_step = point.step
        journal_point(self._journal.path, reported, tally)
        self._news.set()

    def finish(self, tally: Tally, stopped: str | None, patience: float | None = None) -> None:
        """The end; waits at most `patience` seconds (PATIENCE) for the registry to have it all."""
        if self._journal is None or self._thread is None:
            return
        journal, run_id = self._journal.path, self._journal.run_id
        journal_end(journal, RunEnd(tally=tally, stopped=stopped))
        self._news.set()
        self._thread.join(PATIENCE if patience is None else patience)
        if self.run is None:
            logger.warning(
                "Run %s was not uploaded to its end; later: blueprints send-run %s, or %s once another begins there",
                run_id,
                journal,
                aside(journal, run_id).name,
            )

    def _upload(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self._news.wait()
            self._news.clear()
            assert self._journal is not None
            growing = self._journal
            journal, run_id = growing.path, growing.run_id
            try:
                run = self._client.send_run(growing.read())
            except PASSING as passing:
                logger.info("run %s waits in %s: %s", run_id, journal.parent, passing)
                self._news.wait(pause)
                self._news.set()
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            except (BlueprintsError, OSError) as error:
                self.refused = error
                logger.error(
                    "The registry does not take the run %s, which stays in %s: %s", run_id, journal.parent, error
                )
                return
            pause = FIRST_PAUSE
            if run.finished_at is not None:
                self.run = run
                return
