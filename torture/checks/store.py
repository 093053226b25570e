"""Every blob and file that the database knows lies in the store, and every acknowledged upload is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torture.checks.rules import Record, Rule
from torture.checks.snapshot import text_of
from torture.journal import Outcome
from torture.schedule import StepKind


def _digest(path: Path) -> str:
    if not path.is_file():
        return "nothing"
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def blobs(rule: Rule, record: Record) -> None:
    """Attachments lie under their digest."""
    known = set()
    for row in record.database["blobs"]:
        digest = text_of(row["digest"])
        known.add(digest)
        name = digest.removeprefix("sha256:")
        path = record.store / "blobs" / name[:2] / name
        rule.expect(_digest(path) == digest, f"blob {digest}: the store has {_digest(path)}")
    for operation in record.journal:
        for digest in operation.arguments.get("attachments", ()):
            if operation.outcome is Outcome.ACKNOWLEDGED:
                rule.expect(digest in known, f"{operation}: its attachment {digest} is lost")


def files(rule: Rule, record: Record) -> None:
    """Uploaded checkpoint files are complete, unless their lab deleted them or never heard that they are."""
    complete = {}
    for row in record.database["files"]:
        if row["complete"]:
            digest = text_of(row["digest"])
            complete[row["lab"], row["path"]] = digest
            path = record.store / "checkpoints" / "files" / row["place"][:2] / row["place"]
            rule.expect(_digest(path) == digest, f"file {row['path']} of {row['lab']}: the store has {_digest(path)}")
    deleted = {
        (operation.arguments["lab"], operation.arguments["path"])
        for operation in record.journal
        if operation.kind == StepKind.DELETE_FILE
    }
    for operation in record.journal:
        if operation.kind == StepKind.UPLOAD_FILE and operation.outcome is Outcome.ACKNOWLEDGED:
            place = operation.arguments["lab"], operation.arguments["path"]
            if place not in deleted:
                rule.expect(complete.get(place) == operation.arguments["digest"], f"{operation}: {place} is lost")
    for operation in record.journal:
        if operation.kind == StepKind.DELETE_FILE and operation.outcome is Outcome.ACKNOWLEDGED:
            place = operation.arguments["lab"], operation.arguments["path"]
            rule.expect(place not in complete, f"{operation}: {place} is still there")
