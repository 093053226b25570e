"""One run: start the service, let clients loose on it, inflict the faults, let it settle, check."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from gradient_blueprints.models import Scope
from torture.checker import check, count
from torture.checks.rules import Rule
from torture.damage import DAMAGES, damage_and_check
from torture.faults import inflict
from torture.journal import Operation, read_journals
from torture.laboratory import Laboratory
from torture.schedule import FaultKind, Schedule
from torture.system import System, running

STILL_SECONDS = 90.0
LONGEST_SECONDS = 1_200.0
LOOK_SECONDS = 0.3
_OPEN = (
    "SELECT (SELECT count(*) FROM jobs WHERE state IN ('queued', 'running', 'cancelling')) "
    "+ (SELECT count(*) FROM outbox)"
)
_HAPPENED = "SELECT count(*) FROM job_events"
_FAILED_REQUEST = re.compile(r"request \S+ failed")
_DATABASE_AWAY_AT_START = 3  # status of an API process that starts while Postgres is down; its supervisor tries again


@dataclass(frozen=True)
class Run:
    """What happened, and the system that it happened to, still running."""

    system: System
    journal: list[Operation]
    faults: Counter[FaultKind]
    rules: list[Rule]
    settled: float  # seconds from the last fault until the last job had ended

    @property
    def violations(self) -> int:
        return count(self.rules)

    def damaged(self) -> dict[str, int]:
        """How many violations more the checker finds after each kind of damage that can be done, all undone."""

        async def each() -> dict[str, int]:
            connection = await asyncpg.connect(self.system.database_url)
            store = self.system.store.path
            try:
                undamaged = count(await check(connection, self.journal, store))
                found = {
                    name: await damage_and_check(connection, statement, self.journal, store)
                    for name, statement in DAMAGES.items()
                }
                return {name: total - undamaged for name, total in found.items() if total is not None}
            finally:
                await connection.close()

        return asyncio.run(each())


@contextmanager
def performed(schedule: Schedule, folder: Path) -> Iterator[Run]:
    """The run of a schedule in an empty folder."""
    journals = folder / "journals"
    journals.mkdir()
    with running(folder, schedule.scale) as system:
        keys = [
            system.new_key(f"lab-{number}", Scope.READ, Scope.PUBLISH, Scope.PROFILE)
            for number in range(schedule.scale.clients)
        ]
        began = time.monotonic()
        laboratories = [
            Laboratory(schedule, number, system.url, key, system.sources, journals, began)
            for number, key in enumerate(keys)
        ]
        with ThreadPoolExecutor(len(laboratories)) as clients:
            working = [clients.submit(laboratory.run) for laboratory in laboratories]
            faults = inflict(schedule, system, began)
            for future in working:
                future.result()
        settled = _settle(system)
        journal = read_journals(journals)
        rules = asyncio.run(_checked(system, journal))
        yield Run(system, journal, faults, rules, settled)


def _settle(system: System) -> float:
    """Wait, with all faults over, until no job is open and no message waits; how many seconds that took.

    What is still open when nothing has happened to any job for STILL_SECONDS is stuck, and for the checker to tell.
    """

    async def wait() -> None:
        connection = await asyncpg.connect(system.database_url)
        before, changed = None, began
        try:
            while await connection.fetchval(_OPEN):
                happened = await connection.fetchval(_HAPPENED)
                if happened != before:
                    before, changed = happened, time.monotonic()
                if time.monotonic() - changed > STILL_SECONDS or time.monotonic() - began > LONGEST_SECONDS:
                    return
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await connection.close()

    began = time.monotonic()
    asyncio.run(wait())
    return time.monotonic() - began


async def _checked(system: System, journal: list[Operation]) -> list[Rule]:
    connection = await asyncpg.connect(system.database_url)
    try:
        return [*await check(connection, journal, system.store.path), _in_the_logs(system), _ended(system)]
    finally:
        await connection.close()


def _in_the_logs(system: System) -> Rule:
    rule = Rule("no request that the API's log calls failed")
    for name, line in system.log_lines():
        if name == "api":
            rule.expect(_FAILED_REQUEST.search(line) is None, line)
    return rule


def _ended(system: System) -> Rule:
    rule = Rule("no process ends by itself, but an API that starts without a database")
    ended = system.ended_by_themselves()
    for name in system.components:
        for status in ended.get(name, [0]):
            allowed = status == 0 or (status == _DATABASE_AWAY_AT_START and name.startswith("api"))
            rule.expect(allowed, f"{name} ended with status {status}")
    return rule
