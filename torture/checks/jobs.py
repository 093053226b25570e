"""No job is lost, none is done twice, none is stuck; each ended as it had to."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from torture.checks.rules import Record, Rule
from torture.checks.snapshot import TERMINAL, content_of
from torture.journal import Outcome
from torture.schedule import StepKind

MOVES = {
    "queued": {"queued", "running", "cancelled", "crashed", "failed"},
    "running": {"running", "queued", "cancelling", "succeeded", "failed", "crashed"},
    "cancelling": {"cancelling", "cancelled"},
}


def kept(rule: Rule, record: Record) -> None:
    """Each acknowledged submission is a job of its lab; one submission is one job at most; no job came from nowhere."""
    jobs = {row["id"]: (row["lab"], row["note"]) for row in record.database["jobs"]}
    notes = Counter(jobs.values())
    submitted = set()
    for operation in record.journal:
        if operation.kind != StepKind.SUBMIT_JOB:
            continue
        named = operation.arguments["lab"], operation.arguments["note"]
        submitted.add(named)
        rule.expect(operation.outcome is not Outcome.REFUSED, f"{operation}: refused: {operation.error}")
        rule.expect(notes[named] <= 1, f"{operation}: {notes[named]} jobs")
        if operation.outcome is Outcome.ACKNOWLEDGED:
            rule.expect(jobs.get(operation.answer["job"]) == named, f"{operation}: {operation.answer} is lost")
    for job, named in jobs.items():
        rule.expect(named in submitted, f"nobody submitted job {job}")


def ended(rule: Rule, record: Record) -> None:
    """Every job has ended, with all its parts; no lease and no message is left of it. Nothing but a cancel ends a good
    job without a result."""
    cancels: dict[str, set[Outcome]] = defaultdict(set)
    for operation in record.journal:
        if operation.kind == StepKind.CANCEL_JOB:
            cancels[operation.arguments["job"]].add(operation.outcome)
    parts = record.database.by("job_parts", "job")
    waiting = Counter(row["job"] for row in record.database["outbox"])
    for job in record.database["jobs"]:
        name, state = f"job {job['id']}", job["state"]
        asked = cancels[job["id"]] - {Outcome.REFUSED}
        possible = {"succeeded"} | ({"cancelled"} if asked else set())
        if Outcome.ACKNOWLEDGED in asked:
            possible = {"cancelled"}
        rule.expect(state in possible, f"{name} is {state} ({job['reason']}), not {' or '.join(sorted(possible))}")
        for part in parts[job["id"]]:
            rule.expect(
                part["state"] in TERMINAL and part["lease_expires_at"] is None,
                f"{name}: part {part['number']} is {part['state']}, its lease {part['lease_expires_at']}",
            )
        rule.expect(waiting[job["id"]] == 0, f"{name}: {waiting[job['id']]} messages wait for the broker")


def one_result(rule: Rule, record: Record) -> None:
    """A job that succeeded has one version, of its lab and with its note; any other has none. No two share one."""
    notes = {row["id"]: content_of(row).get("provenance", {}).get("notes") for row in record.database["documents"]}
    versions = {row["id"]: row for row in record.database["versions"]}
    noted: Counter[tuple[str, str]] = Counter()
    for version in versions.values():
        if (note := notes[version["document_id"]]) is not None:
            noted[version["lab"], note] += 1
    taken: Counter[int] = Counter(row["version_id"] for row in record.database["jobs"] if row["version_id"])
    for job in record.database["jobs"]:
        name = f"job {job['id']}, {job['state']}"
        results = int(job["state"] == "succeeded")
        found = noted[job["lab"], job["note"]]
        rule.expect(found == results, f"{name}: {found} results")
        rule.expect((job["version_id"] is not None) == bool(results), f"{name}: its version is {job['version_id']}")
        if job["version_id"] is not None and rule.expect(job["version_id"] in versions, f"{name}: its version is gone"):
            rule.expect(versions[job["version_id"]]["lab"] == job["lab"], f"{name}: its version is another lab's")
            rule.expect(taken[job["version_id"]] == 1, f"{name}: its version is another job's too")


def told(rule: Rule, record: Record) -> None:
    """The events of a job begin with queued, follow one another as states may, and end with its end, told once."""
    events = record.database.by("job_events", "job")
    for job in record.database["jobs"]:
        states = [row["state"] for row in events[job["id"]]]
        name = f"job {job['id']}"
        rule.expect(states[:1] == ["queued"], f"{name}: its first event is {states[:1]}")
        rule.expect(states[-1:] == [job["state"]], f"{name}: {job['state']}, its last event {states[-1:]}")
        for one, other in pairwise(states):
            rule.expect(other in MOVES.get(one, set()), f"{name}: from {one} to {other}")
