"""The leaderboard of a task: capability per resource, between runs that measured the resource alike."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.capability import Curve, area, cost_of, front, mean_interval, score_at
from gradient_blueprints.record_models import (
    At,
    BoardEntry,
    BoardGroup,
    BoardRun,
    Goal,
    Leaderboard,
    LeftOut,
    LeftOutReason,
    NewRun,
)
from gradient_blueprints.run_models import Basis, Method, Resource, Tally

MOST_RUNS = 500
"""Runs of a task that are looked at: finished ones first, of the metric that was asked for, the newest."""


@dataclass(frozen=True)
class Candidate:
    """A finished run that has a curve of the resource."""

    id: UUID
    lab: str
    begun: NewRun
    tally: Tally
    curve: Curve
    psi: float
    gamma: float
    marks: tuple[Any, ...]

    @property
    def configuration(self) -> str:
        """Equal for the seeds of one configuration."""
        return json.dumps([self.lab, self.begun.model_dump(mode="json", exclude={"id", "seed"})], sort_keys=True)


async def rank(
    session: AsyncSession, task: str, resource: Resource, *, at: At | None, metric: str | None
) -> Leaderboard:
    """Without `metric`, that of most finished runs; without `at`, where the median curve of a group ends."""
    found = (
        await session.execute(
            select(
                tables.Run.name,
                tables.Run.begun,
                tables.Run.tally,
                tables.Run.outcome,
                tables.Run.curves[resource.value].label("curve"),
                tables.Run.finished_at,
                tables.Lab.name.label("lab"),
            )
            .join(tables.Lab, tables.Lab.id == tables.Run.lab_id)
            .where(tables.Run.task == task)
            .order_by(
                tables.Run.finished_at.is_(None),  # so that runs which were only begun push nobody off the board
                *(() if metric is None else (tables.Run.begun["metric"].astext != metric,)),
                tables.Run.id.desc(),
            )
            .limit(MOST_RUNS + 1)
        )
    ).all()
    rows = found[:MOST_RUNS]
    named = Counter(
        (row.begun["metric"], row.begun["goal"])
        for row in rows
        if row.finished_at is not None and metric in (None, row.begun["metric"])
    )
    if not named:
        why = {True: LeftOutReason.UNFINISHED, False: LeftOutReason.OTHER_METRIC}
        return Leaderboard(
            task=task,
            resource=resource,
            metric=metric,
            left_out=tuple(LeftOut(id=row.name, lab=row.lab, reason=why[row.finished_at is None]) for row in rows),
            truncated=len(found) > MOST_RUNS,
        )
    (metric, goal), _ = named.most_common(1)[0]
    left_out: list[LeftOut] = []
    alike: dict[Method, list[Candidate]] = defaultdict(list)
    for row in rows:
        reason = _reason_to_leave_out(row, resource, (metric, goal))
        if reason is not None:
            left_out.append(LeftOut(id=row.name, lab=row.lab, reason=reason))
            continue
        candidate = _candidate(row, resource)
        alike[candidate.tally.methods[resource]].append(candidate)
    order = list(Basis)
    groups = sorted(alike.items(), key=lambda group: (-len(group[1]), order.index(group[0].basis)))
    return Leaderboard(
        task=task,
        resource=resource,
        metric=metric,
        goal=goal,
        groups=tuple(rank_group(method, candidates, goal, at) for method, candidates in groups),
        left_out=tuple(left_out),
        truncated=len(found) > MOST_RUNS,
    )


def _reason_to_leave_out(row: Any, resource: Resource, wanted: tuple[str, str]) -> LeftOutReason | None:
    if row.finished_at is None:
        return LeftOutReason.UNFINISHED
    if (row.begun["metric"], row.begun["goal"]) != wanted:
        return LeftOutReason.OTHER_METRIC
    if row.tally["methods"][resource]["basis"] == Basis.NOT_READ:
        return LeftOutReason.NOT_READ
    return None if row.curve else LeftOutReason.NO_POINTS


def _candidate(row: Any, resource: Resource) -> Candidate:
    curve = [(float(gamma), float(psi)) for gamma, psi in row.curve]
    tally = Tally.model_validate(row.tally)
    return Candidate(
        id=row.name,
        lab=row.lab,
        begun=NewRun.model_validate(row.begun),
        tally=tally,
        curve=curve,
        psi=curve[-1][1],
        gamma=max(curve[-1][0], tally.amounts()[resource]),
        marks=tuple(mark["code"] for mark in row.outcome["marks"]),
    )


# --- pure from here on


def rank_group(method: Method, runs: Sequence[Candidate], goal: Goal, at: At | None) -> BoardGroup:
    """Entries by their value at `at`, those of which not every seed has one after all others."""
    # What at least half of the runs reach: the least of all would let one run that stopped at once rank alone.
    at = at or At(axis="gamma", value=median_low(run.curve[-1][0] for run in runs))
    low, high = max(run.curve[0][0] for run in runs), max(run.gamma for run in runs)
    if low == 0:  # scored before it had spent anything; a logarithm begins at what the others spent first
        low = min((gamma for run in runs for gamma, _ in run.curve if gamma > 0), default=0.0)
    best = set(front(((run.gamma, run.psi) for run in runs), goal))
    configurations: dict[str, list[Candidate]] = defaultdict(list)
    for run in runs:
        configurations[run.configuration].append(run)
    entries = [
        _entry([_board_run(run, at, goal, (low, high), best) for run in seeds], seeds)
        for seeds in configurations.values()
    ]
    smaller = at.axis == "psi" or goal == "fall"
    entries.sort(
        key=lambda entry: (
            (0, entry.value if smaller else -entry.value, entry.lab)
            if entry.value is not None
            else (1, -entry.reached, entry.lab)
        )
    )
    return BoardGroup(
        basis=method.basis,
        instruments=method.instruments,
        missing=method.missing,
        at=at,
        area_range=(low, high) if 0 < low < high else None,
        entries=tuple(entry.model_copy(update={"rank": number}) for number, entry in enumerate(entries, 1)),
        front=tuple(sorted(best)),
    )


def _board_run(
    run: Candidate, at: At, goal: Goal, limits: tuple[float, float], best: set[tuple[float, float]]
) -> BoardRun:
    return BoardRun(
        id=run.id,
        seed=run.begun.seed,
        value=score_at(run.curve, at.value) if at.axis == "gamma" else cost_of(run.curve, at.value, goal),
        area=area(run.curve, *limits),
        psi=run.psi,
        gamma=run.gamma,
        on_front=(run.gamma, run.psi) in best,
        marks=run.marks,
    )


def _entry(runs: Sequence[BoardRun], of: Sequence[Candidate]) -> BoardEntry:
    values = _by_seed([(run.seed, run.value) for run in runs])
    areas = _by_seed([(run.seed, run.area) for run in runs])
    first = of[-1]  # rows come newest first
    return BoardEntry(
        rank=0,
        lab=first.lab,
        model_id=first.begun.model_id,
        training_checkpoint=first.begun.training_checkpoint,
        blueprint=first.begun.blueprint,
        selection=first.begun.selection,
        settings=first.begun.settings,
        hardware=tuple(sorted(set(first.tally.hardware.values()))),
        value=fmean(values) if values else None,
        value_interval=mean_interval(values),
        area=fmean(areas) if areas else None,
        area_interval=mean_interval(areas),
        seeds=len({run.seed for run in runs}),
        reached=sum(run.value is not None for run in runs) / len(runs),
        runs=tuple(runs),
    )


def _by_seed(told: Sequence[tuple[int | None, float | None]]) -> list[float]:
    """A mean for each seed, since running one twice says nothing more of chance; none unless every run has a value."""
    seeds: dict[int | None, list[float]] = defaultdict(list)
    for seed, value in told:
        if value is None:
            return []
        seeds[seed].append(value)
    return [fmean(values) for values in seeds.values()]
