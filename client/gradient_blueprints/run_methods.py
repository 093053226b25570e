"""The methods of both clients on runs and the leaderboard, each written once."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from gradient_blueprints.calls import JSON_BODY, Checkpointish, Connected, built, checkpoint_text, listing, method, some
from gradient_blueprints.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    MalformedRequest,
    PayloadTooLarge,
)
from gradient_blueprints.models import Wire
from gradient_blueprints.record_models import (
    DEFAULT_WINDOW,
    MAX_POINTS,
    ChosenPart,
    Goal,
    Leaderboard,
    NewRun,
    PointBatch,
    ReportedPoint,
    Run,
    RunEnd,
    RunPage,
    RunPointPage,
)
from gradient_blueprints.run_journal import RunJournal, read_journal
from gradient_blueprints.run_models import Resource, Tally
from gradient_blueprints.transport import Request, Steps, Stream, Work

BATCH = 500  # points of a request: well within the largest body
REFUSALS = (MalformedRequest, Conflict, PayloadTooLarge, InvalidRequest)  # the same points would meet them again

Gamma = Tally | Mapping[Resource, float] | Mapping[str, float]


class RunHandle:
    """A run that goes on. Its methods answer the `Run`; those of an AsyncClient's are awaited.

    A point whose sending fails stays and is sent with the next; what the registry refuses is dropped.
    """

    def __init__(self, client: RunMethods, run: Run) -> None:
        self._client = client
        self.run = run
        self._waiting: list[ReportedPoint] = []
        self._tally: Tally | None = None

    def __repr__(self) -> str:
        return f"<RunHandle {self.run.id} of {self.run.task}, {self.run.points} points>"

    def append(self, step: int, psi: float, gamma: Gamma) -> Any:
        """Report a score and everything spent so far: a Tally, or amounts by resource.

        Raises ConfigurationError for a step that is not later than the last, and beyond 20,000 points.
        """
        amounts = gamma.amounts() if isinstance(gamma, Tally) else gamma
        point = built(ReportedPoint, step=step, psi=psi, gamma=dict(amounts))
        last = self._waiting[-1] if self._waiting else self.run.last
        if last is not None and point.step <= last.step:
            raise ConfigurationError(
                f"Step {step} follows step {last.step}: each point has a later step than the last."
            )
        if self.run.points + len(self._waiting) >= MAX_POINTS:
            raise ConfigurationError(f"A run has at most {MAX_POINTS:,} points; evaluate less often.")
        self._waiting.append(point)
        if isinstance(gamma, Tally):
            self._tally = gamma
        return self._perform(self._send())

    def finish(self, tally: Tally, *, stopped: str | None = None) -> Any:
        """Close the run for ever; the registry works out the final pair and what cannot be right."""
        return self._perform(self._end(tally, stopped))

    def _perform(self, steps: Steps[Run]) -> Any:
        return self._client._run(steps)  # type: ignore[attr-defined]  # of Blocking or Awaiting

    def _send(self) -> Steps[Run]:
        yield from self._client._send_points(self, self._waiting, self._tally)
        return self.run

    def _end(self, tally: Tally, stopped: str | None) -> Steps[Run]:
        yield from self._send()
        self.run = yield from self._client._end(self.run.id, tally, stopped)
        return self.run


class RunMethods(Connected):
    """Report, list and rank."""

    @method
    def report_run(
        self,
        task: str,
        model_id: str,
        *,
        metric: str,
        goal: Goal = "fall",
        checkpoint: Checkpointish | None = None,
        blueprint: str | None = None,
        selection: ChosenPart | None = None,
        seed: int | None = None,
        parameters: int | None = None,
        settings: Mapping[str, float | bool | str] | None = None,
        callbacks: Iterable[str] = (),
        window: int = DEFAULT_WINDOW,
        run_id: str | uuid.UUID | None = None,
    ) -> Steps[RunHandle]:
        """Begin a run of your lab (scope publish), or go on with the one of `run_id`.

        Runs that differ in nothing but the seed are ranked as one configuration: put what sets others apart into
        `settings`. The callbacks of `training` do all of this while training goes on, and outlive kills.

            run = client.report_run("stdlib-code/held-out-loss", "tiny", metric="eval_loss", seed=0)
            run.append(100, 3.21, meter.tally())
            run.finish(meter.tally())
        """
        new = built(
            NewRun,
            id=run_id or uuid.uuid4(),
            task=task,
            model_id=model_id,
            metric=metric,
            goal=goal,
            training_checkpoint=None if checkpoint is None else float(checkpoint_text(checkpoint)),
            blueprint=blueprint,
            selection=selection,
            seed=seed,
            parameters=parameters,
            settings=dict(settings or {}),
            callbacks=tuple(callbacks),
            window=window,
        )
        return RunHandle(self, (yield from self._begin(new)))

    @method
    def send_run(self, journal: str | PathLike[str] | RunJournal) -> Steps[Run]:
        """Send what the registry does not have yet of a run that a callback has kept on disk; safe to repeat."""
        kept = journal if isinstance(journal, RunJournal) else (yield Work(lambda: read_journal(Path(journal))))
        handle = RunHandle(self, (yield from self._begin(kept.run)))
        if handle.run.points > len(kept.points):
            raise ConfigurationError(
                f"The registry has more points of run {kept.run.id} than {kept.path}: an old copy?"
            )
        yield from self._send_points(handle, list(kept.points[handle.run.points :]), kept.tally)
        if kept.end is not None:
            return (yield from self._end(kept.run.id, kept.end.tally, kept.end.stopped))
        return handle.run

    @method
    def get_run(self, run_id: str | uuid.UUID) -> Steps[Run]:
        """A run as it is now; `run.tally.model_card()` is its disclosure."""
        return (yield from self._read(Run, _path(run_id)))

    @listing
    def list_runs(
        self, task: str | None = None, *, model: str | None = None, lab: str | None = None, limit: int | None = None
    ) -> Stream[Run]:
        """Newest first, unfinished ones among them."""
        yield from self._pages(RunPage, "runs", "/v1/runs", some(task=task, model=model, lab=lab), limit)

    @listing
    def list_points(self, run_id: str | uuid.UUID, *, limit: int | None = None) -> Stream[ReportedPoint]:
        """The curve of a run, from its first point."""
        yield from self._pages(RunPointPage, "points", f"{_path(run_id)}/points", {}, limit)

    @method
    def leaderboard(
        self,
        task: str,
        resource: Resource | str,
        *,
        at_gamma: float | None = None,
        at_psi: float | None = None,
        metric: str | None = None,
    ) -> Steps[Leaderboard]:
        """The runs of a task by capability per resource, in groups that measured the resource alike.

        At an equal amount (`at_gamma`) by the score it bought, at an equal score (`at_psi`) by what that took; without
        either where the median curve ends: the lower median of what had been spent at each run's last score.

            board = client.leaderboard("stdlib-code/held-out-loss", "energy_kwh", at_psi=3.2)
            [(entry.rank, entry.lab, entry.value, entry.value_interval) for entry in board.groups[0].entries]
        """
        if at_gamma is not None and at_psi is not None:
            raise ConfigurationError("Runs are compared at one Γ or at one Ψ: give at_gamma or at_psi.")
        at = None if at_gamma is None else f"gamma:{at_gamma:.17g}"
        at = at if at_psi is None else f"psi:{at_psi:.17g}"
        query = some(task=task, resource=resource, at=at, metric=metric)
        return (yield from self._read(Leaderboard, "/v1/leaderboard", query))

    # --- steps that the above share; each may be repeated when its answer is lost

    def _begin(self, new: NewRun) -> Steps[Run]:
        return (yield from self._repeatable("/v1/runs", new))

    def _send_points(self, handle: RunHandle, points: list[ReportedPoint], tally: Tally | None) -> Steps[None]:
        """In batches; those that were taken, or refused, leave the list."""
        while points:
            batch = built(
                PointBatch,
                first=handle.run.points,
                points=tuple(points[:BATCH]),
                tally=None if tally is None else tally.told(),
            )
            try:
                run = yield from self._repeatable(f"{_path(handle.run.id)}/points", batch)
            except REFUSALS:
                _drop(points, batch)
                raise
            _drop(points, batch)
            if run.points > handle.run.points:  # no late answer: of an AsyncClient's handle several may be under way
                handle.run = run

    def _end(self, run_id: uuid.UUID, tally: Tally, stopped: str | None) -> Steps[Run]:
        end = built(RunEnd, tally=tally.told(), stopped=stopped)
        return (yield from self._repeatable(f"{_path(run_id)}/finish", end))

    def _repeatable(self, path: str, body: Wire) -> Steps[Run]:
        content = body.model_dump_json(exclude_none=True).encode()
        answer = yield from self._exchange(Request("POST", path, {}, JSON_BODY, content))
        return answer.parse(Run)


def _drop(points: list[ReportedPoint], batch: PointBatch) -> None:
    """Those of the batch that are still there, which another sending may have dropped."""
    last = batch.points[-1].step
    points[:] = [point for point in points if point.step > last]


def _path(run_id: str | uuid.UUID) -> str:
    try:
        return f"/v1/runs/{uuid.UUID(str(run_id))}"
    except ValueError:
        raise ConfigurationError(f"{run_id!r} is not the id of a run: give a UUID.") from None
