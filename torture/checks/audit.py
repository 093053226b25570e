"""Every write has its row in the audit, once, and no row is there for a write that was not."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from torture.checks.rules import Record, Rule
from torture.checks.snapshot import path_of, text_of


def writes(rule: Rule, record: Record) -> None:
    """Versions, models, blobs, files, alias moves, jobs and their ends, each against the actions that tell of them."""
    database = record.database
    audit: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in database["audit"]:
        audit[row["action"]][row["subject"], _detail(row["action"], json.loads(row["details"]))] += 1
    _match(rule, "blueprint.publish", audit, ((path_of(row), text_of(row["digest"])) for row in database["versions"]))
    _match(rule, "model.create", audit, ((row["name"], "") for row in database["models"]))
    _match(rule, "blob.upload", audit, ((text_of(row["digest"]), str(row["size"])) for row in database["blobs"]))
    _match(
        rule,
        "alias.move",
        audit,
        ((f"{row['model']}:{row['name']}", str(row["revision"])) for row in database["alias_moves"]),
    )
    _match(rule, "job.submit", audit, ((row["id"], "") for row in database["jobs"]))
    digests = {row["id"]: text_of(row["digest"]) for row in database["versions"]}
    succeeded = [row for row in database["jobs"] if row["state"] == "succeeded"]
    _match(rule, "job.finish", audit, ((row["id"], digests.get(row["version_id"], "")) for row in succeeded))
    claims: Counter[str] = Counter()
    for (job, _), times in audit["job.claim"].items():
        claims[job] += times
    tokens = {row["id"]: row["lease_token"] for row in database["jobs"]}
    for job in tokens.keys() | claims.keys():
        rule.expect(claims[job] == tokens.get(job), f"job {job}: {claims[job]} claims in the audit, {tokens.get(job)}")


def _match(
    rule: Rule,
    action: str,
    audit: dict[str, Counter[tuple[str, str]]],
    written: Iterable[tuple[str, str]],
) -> None:
    expected = Counter(written)
    for entry in expected.keys() | audit[action].keys():
        rule.expect(
            audit[action][entry] == expected[entry],
            f"{action} of {' '.join(entry)}: {audit[action][entry]} in the audit, {expected[entry]} written",
        )


def _detail(action: str, details: dict[str, object]) -> str:
    named = {"blueprint.publish": "digest", "job.finish": "digest", "blob.upload": "size", "alias.move": "revision"}
    return str(details[named[action]]) if action in named else ""


def turns(rule: Rule, record: Record) -> None:
    """The yanks and unyanks of a version take turns and leave it as it is; so do uploads and deletions of a file."""
    history: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in record.database["audit"]:
        noun, _, verb = row["action"].partition(".")
        if row["action"] in ("version.yank", "version.unyank", "file.upload", "file.delete"):
            history[noun, row["lab"] if noun == "file" else "", row["subject"]].append(verb)
    for row in record.database["versions"]:
        done = history.pop(("version", "", path_of(row)), [])
        expected = (["yank", "unyank"] * len(done))[: len(done)]
        rule.expect(done == expected and (len(done) % 2 == 1) == row["yanked"], f"{path_of(row)}: audit says {done}")
    for row in record.database["files"]:
        subject = f"{row['model']}@{row['fraction'].normalize():f}/{row['path']}"
        uploads = [verb for verb in history.pop(("file", row["lab"], subject), []) if verb == "upload"]
        rule.expect(len(uploads) == int(row["complete"]), f"{subject} of {row['lab']}: {len(uploads)} uploads")
    for (noun, lab, subject), done in history.items():
        gone = noun == "file" and done[-1] == "delete"
        rule.expect(gone, f"{noun} {subject} {lab} is not there, and the audit says {done}")
