"""What was published is there, whole, once, under numbers without gaps; what was refused left nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torture.checks.rules import Record, Rule
from torture.checks.snapshot import content_of, text_of
from torture.journal import Operation, Outcome
from torture.schedule import StepKind

PUBLISHING = (StepKind.PUBLISH, StepKind.PUBLISH_AGAIN, StepKind.PUBLISH_ATTACHED)


def _publishes(record: Record, *outcomes: Outcome) -> Iterator[Operation]:
    for operation in record.journal:
        if operation.kind in PUBLISHING and operation.outcome in outcomes:
            yield operation


def acknowledged(rule: Rule, record: Record) -> None:
    """Every acknowledged publish has its version, with the number, the digest and the lab that were told."""
    versions = {
        (row["model"], float(row["fraction"]), row["number"]): (text_of(row["digest"]), row["lab"])
        for row in record.database["versions"]
    }
    for operation in _publishes(record, Outcome.ACKNOWLEDGED):
        wanted, told = operation.arguments, operation.answer
        stored = versions.get((wanted["model"], wanted["checkpoint"], told["version"]))
        rule.expect(
            stored == (wanted["digest"], wanted["lab"]) and told["digest"] == wanted["digest"],
            f"{operation}: told version {told['version']} of {wanted['digest']}, the database has {stored}",
        )


def valid_not_refused(rule: Rule, record: Record) -> None:
    """No good document is refused: a fault may cost an answer, never turn it into another."""
    for operation in _publishes(record, Outcome.ACKNOWLEDGED, Outcome.REFUSED, Outcome.UNKNOWN):
        rule.expect(operation.outcome is not Outcome.REFUSED, f"{operation}: refused: {operation.error}")


def gapless(rule: Rule, record: Record) -> None:
    """The versions of a checkpoint are 1, 2, 3, …, and its row knows the last."""
    versions = record.database.by("versions", "checkpoint_id")
    for checkpoint in record.database["checkpoints"]:
        numbers = sorted(row["number"] for row in versions.get(checkpoint["id"], ()))
        expected = list(range(1, checkpoint["last_version"] + 1))
        where = f"{checkpoint['model']} at {checkpoint['fraction']}"
        rule.expect(numbers == expected, f"{where}: {numbers}, last {checkpoint['last_version']}")
        rule.expect(bool(numbers), f"{where} has no version at all")


def whole(rule: Rule, record: Record) -> None:
    """Each document has the bytes of its digest, a version, and exactly the layers and attachments that it names."""
    layers, attachments = (record.database.by(name, "document_id") for name in ("layers", "attachments"))
    versions = record.database.by("versions", "document_id")
    for row in record.database["documents"]:
        name = text_of(row["digest"])
        body = content_of(row)
        if not rule.expect(bool(body), f"{name}: its bytes have another digest"):
            continue
        stored = [(layer["layer_id"], layer["gradient_norm"]) for layer in layers.get(row["id"], ())]
        named = [(layer["id"], layer["gradient_norm"]) for layer in body["layers"]]
        rule.expect(stored == named, f"{name}: {len(stored)} layers in columns, {len(named)} in its bytes")
        attached = {(item["name"], text_of(item["blob_digest"])) for item in attachments.get(row["id"], ())}
        wanted = {(item["name"], item["digest"]) for item in body.get("attachments", ())}
        rule.expect(attached == wanted, f"{name}: attachments {attached}, not {wanted}")
        rule.expect(bool(versions.get(row["id"])), f"{name}: a document of no version")


def asked_for(rule: Rule, record: Record) -> None:
    """Each version was asked for by a publish of its lab or by a job, and no lab has the same document twice."""
    asked: dict[str, set[str]] = defaultdict(set)
    for operation in _publishes(record, Outcome.ACKNOWLEDGED, Outcome.UNKNOWN, Outcome.BROKEN):
        asked[operation.arguments["lab"]].add(operation.arguments["digest"])
    of_jobs = {row["version_id"] for row in record.database["jobs"]}
    seen: set[tuple[str, bytes]] = set()
    for row in record.database["versions"]:
        name = f"{row['model']} at {row['fraction']}, version {row['number']} of {row['lab']}"
        rule.expect(row["id"] in of_jobs or text_of(row["digest"]) in asked[row["lab"]], f"nobody asked for {name}")
        rule.expect((row["lab"], row["digest"]) not in seen, f"{name} has the document of another version")
        seen.add((row["lab"], row["digest"]))


def refused_left_nothing(rule: Rule, record: Record) -> None:
    """A document that had to be refused was, and there is no trace of it."""
    marks = {content_of(row).get("extra", {}).get("mark") for row in record.database["documents"]}
    for operation in record.journal:
        if operation.kind == StepKind.PUBLISH_INVALID:
            rule.expect(operation.outcome is not Outcome.ACKNOWLEDGED, f"{operation}: was taken")
            rule.expect(operation.arguments["mark"] not in marks, f"{operation}: is stored all the same")


def empty_models(rule: Rule, record: Record) -> None:
    """A model exists since its first version, and not before."""
    published = {row["model"] for row in record.database["versions"]}
    for row in record.database["models"]:
        rule.expect(row["name"] in published, f"model {row['name']} has no version")
