"""The wire types of the record: runs as labs report them, and the leaderboard of a task."""

from __future__ import annotations

import itertools
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from gradient_blueprints.canonical import MAX_SAFE_INTEGER
from gradient_blueprints.models import Checkpoint, Count, Digest, Interval, LabName, ModelId, Page, Share, Tag, Wire
from gradient_blueprints.run_models import Basis, Instrument, Resource, Tally

MAX_POINTS = 20_000
"""Points of one run."""
MAX_BATCH = 1_000
"""Points of one request."""
DEFAULT_WINDOW = 5
LARGEST = 1e100
"""Beyond what anybody spends or scores; sums and squares of such figures are still numbers."""

Task = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@ -]*$", max_length=128),
    Field(description="what is learned, on which data, scored how", examples=["stdlib-code/held-out-loss"]),
]
Goal = Literal["fall", "rise"]
Said = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00]*$")]
Step = Annotated[int, Field(strict=True, ge=0, le=MAX_SAFE_INTEGER)]
Bounded = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST)]
Claimed = Annotated[dict[Resource, Bounded], Field(min_length=1)]


class ChosenPart(Wire):
    """Which selection a run trained, by the digest of its file and in short."""

    digest: Digest | None = Field(None, description="of the selection's file")
    trained: Count = Field(description="parameters that were trained")
    parameters: Count = Field(description="of those that it was chosen from")
    unit: Said | None = Field(None, description="layer, row or coordinate")
    criterion: Said | None = None


class NewRun(Wire):
    """A run as it begins. Runs that differ in nothing but id and seed are seeds of one configuration."""

    id: UUID = Field(description="made by the sender: the same id again is the same run")
    task: Task
    model_id: ModelId
    metric: Tag = Field(description="name of the score, psi", examples=["eval_loss"])
    goal: Goal = Field("fall", description="whether a better score is a smaller or a larger one")
    training_checkpoint: Checkpoint | None = Field(None, description="where it started from")
    blueprint: Digest | None = Field(None, description="the blueprint that was used")
    selection: ChosenPart | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SAFE_INTEGER)] | None = None
    parameters: Annotated[int, Field(strict=True, gt=0, le=MAX_SAFE_INTEGER)] | None = Field(
        None, description="that multiply for each token: without embeddings that are looked up and experts at rest"
    )
    settings: Annotated[dict[Tag, Bounded | bool | Said], Field(max_length=64)] = Field(
        default_factory=dict, description="what else sets configurations apart, such as the learning rate"
    )
    callbacks: Annotated[tuple[Said, ...], Field(max_length=20)] = Field((), description="that may have ended it")
    window: Annotated[int, Field(strict=True, ge=1, le=1_000)] = Field(
        DEFAULT_WINDOW, description="points of the last window"
    )


class ReportedPoint(Wire):
    """A point of a run's curve as it was claimed. What cannot be, such as a cumulative sum that falls, is marked."""

    step: Step
    psi: Bounded
    gamma: Claimed = Field(description="everything spent so far, by resource")


def _steps_rise(points: tuple[ReportedPoint, ...]) -> tuple[ReportedPoint, ...]:
    for earlier, later in itertools.pairwise(points):
        if later.step <= earlier.step:
            raise PydanticCustomError(
                "steps_must_rise",
                "step {later} follows step {earlier}: each point has a later step than the one before",
                {"earlier": earlier.step, "later": later.step},
            )
    return points


def _bounded(tally: Tally) -> Tally:
    if any(amount > LARGEST for amount in tally.amounts().values()):
        raise PydanticCustomError("figure_too_large", "a figure of the tally is above {largest}", {"largest": LARGEST})
    return tally


TallySoFar = Annotated[Tally, AfterValidator(_bounded)]


class PointBatch(Wire):
    """Points `first`, `first` + 1, ... of a run, counted from 0."""

    first: Annotated[int, Field(strict=True, ge=0, lt=MAX_POINTS)]
    points: Annotated[tuple[ReportedPoint, ...], Field(min_length=1, max_length=MAX_BATCH), AfterValidator(_steps_rise)]
    tally: TallySoFar | None = Field(None, description="so far: hardware, and how each resource is read")


class RunEnd(Wire):
    """What a run has spent in all, and why it ended."""

    tally: TallySoFar
    stopped: Said | None = Field(None, description="which rule ended it and why; absent when it ran to its end")


class Implausible(StrEnum):
    """What a run's figures are held against. Physics, not taste: a mark means that a figure cannot be right."""

    ENERGY_BELOW_IDLE = "energy_below_idle"
    """Less energy than the devices draw when they do nothing."""
    FLOPS_BEYOND_PEAK = "flops_beyond_peak"
    """More FLOPs than the devices can do in the time."""
    TOKENS_BEYOND_FLOPS = "tokens_beyond_flops"
    """More tokens than the FLOPs suffice for, at 6·N each; with a share k of the parameters trained at N·(2 + 2·k)."""
    NEGATIVE_GAMMA = "negative_gamma"
    FALLING_GAMMA = "falling_gamma"
    """A cumulative sum that was larger before."""
    TALLY_BELOW_CURVE = "tally_below_curve"
    """The final figure is below one of the curve."""


class Mark(Wire):
    """A claim that cannot be right."""

    code: Implausible
    detail: str


class LastPair(Wire):
    """The end of a run: its score, its best, and all that was spent."""

    psi: float
    best_psi: float
    gamma: Claimed


class Run(NewRun):
    """A run as the registry has it."""

    lab: LabName
    created_at: datetime
    finished_at: datetime | None = None
    points: int = Field(description="how many there are: where the next batch begins")
    last: ReportedPoint | None = None
    tally: Tally | None = Field(None, description="of the last batch, or the final one; without spans and sensors")
    stopped: Said | None = None
    final: LastPair | None = Field(None, description="once finished")
    last_ratio: dict[Resource, float] | None = Field(
        None, description="gain in psi per unit over the last window; no resource of which nothing was spent in it"
    )
    marks: tuple[Mark, ...] = Field((), description="claims that cannot be right")
    unchecked: tuple[Implausible, ...] = Field((), description="for want of a figure or of the device's data")
    model_card: str | None = Field(None, description="path of its disclosure for a model card, once finished")


class RunPage(Page):
    runs: tuple[Run, ...]


class RunPointPage(Page):
    points: tuple[ReportedPoint, ...]


# --- leaderboard


class At(Wire):
    """Where runs are compared: at an equal score, or an equal amount of the resource."""

    axis: Literal["psi", "gamma"]
    value: float


class BoardRun(Wire):
    """One run of a configuration."""

    id: UUID
    seed: int | None = None
    value: float | None = Field(None, description="absent: not reached, or not yet scored there")
    area: float | None = None
    psi: float = Field(description="the best it reached")
    gamma: float = Field(description="all that it spent")
    on_front: bool = Field(description="no run of the group got as good a score for less, or a better one for as much")
    marks: tuple[Implausible, ...] = ()


class BoardEntry(Wire):
    """A configuration, by its mean over seeds."""

    rank: int
    lab: LabName
    model_id: ModelId
    training_checkpoint: Checkpoint | None = None
    blueprint: Digest | None = None
    selection: ChosenPart | None = None
    settings: dict[Tag, float | bool | Said] = Field(default_factory=dict)
    hardware: tuple[str, ...] = Field((), description="names of the devices of its first run")
    value: float | None = Field(None, description="mean over seeds; absent unless every seed has one")
    value_interval: Interval | None = Field(None, description="95 %, t; absent with one seed")
    area: float | None = Field(None, description="under psi over the logarithm of gamma, within `area_range`")
    area_interval: Interval | None = None
    seeds: int = Field(description="runs of one seed, or of none told, count as one")
    reached: Share = Field(description="share of the runs that have a value")
    runs: tuple[BoardRun, ...]


class BoardGroup(Wire):
    """Runs that measured the resource alike; only these are ranked against each other."""

    basis: Basis
    instruments: tuple[Instrument, ...]
    missing: tuple[str, ...] = Field((), description="parts of the machine that all of them could not read")
    at: At
    area_range: Interval | None = Field(None, description="of gamma, common to the group")
    entries: tuple[BoardEntry, ...]
    front: tuple[tuple[float, float], ...] = Field(
        description="the Pareto front of the runs' pairs: all that was spent, gamma, and the best psi that was reached"
    )


class LeftOutReason(StrEnum):
    UNFINISHED = "unfinished"
    OTHER_METRIC = "other_metric"
    NOT_READ = "not_read"
    """It did not read the resource."""
    NO_POINTS = "no_points"
    """Its curve has no points of the resource."""


class LeftOut(Wire):
    """A run of the task that is not compared."""

    id: UUID
    lab: LabName
    reason: LeftOutReason


class Leaderboard(Wire):
    """Capability per resource in one task; the largest group first."""

    task: Task
    resource: Resource
    metric: Tag | None = Field(None, description="absent where the task has no runs")
    goal: Goal | None = None
    groups: tuple[BoardGroup, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    truncated: bool = Field(False, description="there are older runs than the newest that were looked at")
