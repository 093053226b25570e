"""The independent check after a run: reads the database, the store and the clients' journals, and counts violations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import asyncpg

from torture.checks import audit, blueprints, jobs, reads, store
from torture.checks.rules import Check, Record, Rule
from torture.checks.snapshot import take_snapshot
from torture.journal import Operation, Outcome

CHECKS: dict[str, Check] = {
    "an acknowledged publish is there with its digest": blueprints.acknowledged,
    "a valid document is never refused": blueprints.valid_not_refused,
    "versions are gapless": blueprints.gapless,
    "documents are whole": blueprints.whole,
    "no version that nobody asked for, none twice": blueprints.asked_for,
    "what was refused left nothing": blueprints.refused_left_nothing,
    "no model without a version": blueprints.empty_models,
    "answers tell what is there": reads.answers,
    "what is known is found": reads.known_is_found,
    "a lab sees its own writes": reads.own_writes,
    "yanks are as they were left": reads.yanks,
    "aliases are as they were left": reads.aliases,
    "no job is lost or doubled": jobs.kept,
    "no job is stuck or given up": jobs.ended,
    "a job has one result at most": jobs.one_result,
    "a job's events tell its course": jobs.told,
    "every write is in the audit once": audit.writes,
    "the audit of yanks and files fits": audit.turns,
    "blobs are in the store": store.blobs,
    "checkpoint files are in the store": store.files,
}


async def check(connection: asyncpg.Connection, journal: list[Operation], store_folder: Path) -> list[Rule]:
    """Every rule, applied to what the connection sees, in the transaction that it may be in."""
    record = Record(await take_snapshot(connection), journal, store_folder)
    rules = [no_broken_answers(journal)]
    for name, examine in CHECKS.items():
        rule = Rule(name)
        examine(rule, record)
        rules.append(rule)
    return rules


def no_broken_answers(journal: Iterable[Operation]) -> Rule:
    rule = Rule("no answer 500, and no exception that is not the SDK's own")
    for operation in journal:
        rule.expect(operation.outcome is not Outcome.BROKEN, f"{operation}: {operation.error}")
    return rule


def count(rules: Iterable[Rule]) -> int:
    return sum(len(rule.violations) for rule in rules)
