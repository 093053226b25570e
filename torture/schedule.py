"""What happens when: the faults, the jobs and the steps of every client, all drawn from one seed and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    KILL_API = "kill -9 of an API process"
    KILL_WORKER = "kill -9 of a worker"
    KILL_PROFILER = "kill -9 of a worker's profiling process"
    FREEZE_WORKER = "a worker stands still for longer than its lease"
    KILL_RELAY = "kill -9 of a relay"
    KILL_BROKER = "kill -9 of Valkey"
    WIPE_BROKER = "kill -9 of Valkey, its data lost"
    KILL_POSTGRES = "kill -9 of Postgres"
    CUT_CLIENTS = "connections between clients and API cut"
    CUT_DATABASE = "connections to Postgres cut"
    FILL_STORE = "the store is full"


class StepKind(StrEnum):
    PUBLISH = "publish"
    PUBLISH_AGAIN = "publish again"
    PUBLISH_ATTACHED = "publish with attachment"
    PUBLISH_INVALID = "publish what is refused"
    FETCH_NEWEST = "fetch newest"
    FETCH_PUBLIC = "fetch newest without a key"
    FETCH_DIGEST = "fetch by digest"
    LIST_VERSIONS = "list versions"
    YANK = "yank"
    UNYANK = "unyank"
    MOVE_ALIAS = "move alias"
    AGGREGATE = "aggregate"
    UPLOAD_FILE = "upload file"
    DELETE_FILE = "delete file"
    CANCEL_JOB = "cancel job"
    SUBMIT_JOB = "submit job"


WEIGHTS: dict[StepKind, int] = {
    StepKind.PUBLISH: 24,
    StepKind.PUBLISH_AGAIN: 10,
    StepKind.PUBLISH_ATTACHED: 8,
    StepKind.PUBLISH_INVALID: 3,
    StepKind.FETCH_NEWEST: 18,
    StepKind.FETCH_PUBLIC: 12,
    StepKind.FETCH_DIGEST: 8,
    StepKind.LIST_VERSIONS: 4,
    StepKind.YANK: 7,
    StepKind.UNYANK: 4,
    StepKind.MOVE_ALIAS: 5,
    StepKind.AGGREGATE: 4,
    StepKind.UPLOAD_FILE: 5,
    StepKind.DELETE_FILE: 2,
    StepKind.CANCEL_JOB: 4,
}

CUTS = (0, 1, 150, 600, 2_000, 8_000)
"""After how many bytes a connection is cut; 0 cuts all that there are at once."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong `at` seconds after the start, and `lasts` so long. `number` chooses among several, `size` is in
    bytes."""

    at: float
    kind: FaultKind
    lasts: float
    number: int = 0
    size: int = 0

    @property
    def component(self) -> str:
        """What it hits; two faults never hit the same thing at once."""
        match self.kind:
            case FaultKind.KILL_WORKER | FaultKind.FREEZE_WORKER | FaultKind.KILL_PROFILER:
                return f"worker {self.number}"
            case FaultKind.KILL_BROKER | FaultKind.WIPE_BROKER:
                return "valkey"
            case FaultKind.KILL_API:
                return f"api {self.number}"
            case FaultKind.KILL_RELAY:
                return f"relay {self.number}"
            case _:
                return self.kind.name

    def __str__(self) -> str:
        where = {"valkey": "", self.kind.name: ""}.get(self.component, f", {self.component}")
        size = f", after {self.size} bytes" if self.kind in (FaultKind.CUT_CLIENTS, FaultKind.CUT_DATABASE) else ""
        return f"{self.at:6.1f} s  {self.kind}{where}{size}, for {self.lasts:.1f} s"


@dataclass(frozen=True)
class Scale:
    """How much of everything there is."""

    clients: int = 4
    api_processes: int = 2
    relays: int = 2
    workers: int = 2
    jobs: int = 4  # of each client
    sharded: float = 0.25  # share of the jobs that are done in two shards and a merge
    gap: float = 2.5  # seconds between two faults, on average
    lease: float = 4.0  # seconds


@dataclass(frozen=True)
class Schedule:
    seed: int
    seconds: float
    scale: Scale
    faults: tuple[Fault, ...]
    jobs: tuple[tuple[float, ...], ...]
    """When each client submits its jobs."""

    def steps(self, client: int) -> Iterator[tuple[int, StepKind, random.Random]]:
        """The steps of a client without end, each with random numbers of its own, so that no step moves another's."""
        number = 0
        while True:
            draw = random.Random(f"{self.seed}/{client}/{number}")  # noqa: S311 - repeatable, no secret
            (kind,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
            yield number, kind, draw
            number += 1

    def __str__(self) -> str:
        jobs = [f"client {client}: {', '.join(f'{at:.1f}' for at in times)}" for client, times in enumerate(self.jobs)]
        return "\n".join(
            [f"seed {self.seed}, {self.seconds:g} s, {self.scale}", *map(str, self.faults), "jobs at", *jobs]
        )


def make_schedule(seed: int, seconds: float, scale: Scale | None = None) -> Schedule:
    """The same for the same arguments, on any machine. Every kind of fault comes before any comes again."""
    scale = scale or Scale()
    draw = random.Random(f"{seed}/schedule")  # noqa: S311 - repeatable, no secret
    faults: list[Fault] = []
    free_at: dict[str, float] = {}
    deck: list[FaultKind] = []
    at = 2.0
    while at < seconds - 1:
        if not deck:
            deck = draw.sample(list(FaultKind), len(FaultKind))
        fault = _draw_fault(draw, round(at, 1), deck.pop(), scale)
        if free_at.get(fault.component, 0.0) <= fault.at:
            faults.append(fault)
            free_at[fault.component] = fault.at + fault.lasts + 1.0
        at += draw.uniform(0.4, 1.6) * scale.gap
    jobs = tuple(
        tuple(sorted(round(draw.uniform(0.5, 0.8 * seconds), 1) for _ in range(scale.jobs)))
        for _ in range(scale.clients)
    )
    return Schedule(seed, seconds, scale, tuple(faults), jobs)


def _draw_fault(draw: random.Random, at: float, kind: FaultKind, scale: Scale) -> Fault:
    lasts = round(draw.uniform(0.2, 2.5), 1)
    number = draw.randrange(12)
    size = draw.choice(CUTS)
    match kind:
        case FaultKind.KILL_API:
            return Fault(at, kind, lasts, number % scale.api_processes)
        case FaultKind.KILL_RELAY:
            return Fault(at, kind, lasts, number % scale.relays)
        case FaultKind.KILL_WORKER:
            return Fault(at, kind, lasts, number % scale.workers)
        case FaultKind.KILL_PROFILER:  # at the next one that there is
            return Fault(at, kind, 6.0, number % scale.workers)
        case FaultKind.FREEZE_WORKER:
            return Fault(at, kind, round(scale.lease * 1.5, 1), number % scale.workers)
        case FaultKind.CUT_CLIENTS | FaultKind.CUT_DATABASE:
            return Fault(at, kind, lasts, number % 2, size)
        case _:
            return Fault(at, kind, lasts)
