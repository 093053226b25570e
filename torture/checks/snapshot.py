"""Everything that the database holds, read by plain SQL: the checks share no code with the service they judge."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import asyncpg

Row = dict[str, Any]
TERMINAL = {"succeeded", "failed", "crashed", "cancelled"}

_QUERIES = {
    "models": "SELECT models.id, models.name, labs.name AS lab FROM models JOIN labs ON labs.id = lab_id",
    "checkpoints": (
        "SELECT checkpoints.id, models.name AS model, fraction, last_version FROM checkpoints "
        "JOIN models ON models.id = model_id"
    ),
    "documents": "SELECT id, digest, checkpoint_id, body, size, layer_count FROM documents",
    "layers": "SELECT document_id, layer_id, gradient_norm FROM layers ORDER BY document_id, position",
    "attachments": "SELECT document_id, name, blob_digest FROM attachments",
    "versions": (
        "SELECT versions.id, versions.checkpoint_id, number, labs.name AS lab, document_id, digest, "
        "models.name AS model, fraction, yanks.version_id IS NOT NULL AS yanked "
        "FROM versions JOIN labs ON labs.id = versions.lab_id JOIN documents ON documents.id = document_id "
        "JOIN checkpoints ON checkpoints.id = versions.checkpoint_id JOIN models ON models.id = model_id "
        "LEFT JOIN yanks ON yanks.version_id = versions.id ORDER BY versions.id"
    ),
    "blobs": "SELECT digest, size FROM blobs",
    "alias_moves": (
        "SELECT models.name AS model, alias_moves.name, revision, version_id FROM alias_moves "
        "JOIN models ON models.id = model_id ORDER BY models.name, alias_moves.name, revision"
    ),
    "aliases": "SELECT models.name AS model, aliases.name, revision, version_id FROM aliases "
    "JOIN models ON models.id = model_id",
    "audit": (
        "SELECT audit.id, labs.name AS lab, action, subject, details::text AS details FROM audit "
        "LEFT JOIN labs ON labs.id = lab_id ORDER BY audit.id"
    ),
    "jobs": (
        "SELECT jobs.id::text AS id, labs.name AS lab, request->>'provenance_notes' AS note, state, reason, "
        "version_id, lease_token FROM jobs JOIN labs ON labs.id = lab_id"
    ),
    "job_parts": (
        "SELECT job_id::text AS job, number, state, lease_token, lease_expires_at, attempts FROM job_parts "
        "ORDER BY job_id, number"
    ),
    "job_events": "SELECT job_id::text AS job, state, progress IS NULL AS moved FROM job_events ORDER BY id",
    "outbox": "SELECT job_id::text AS job FROM outbox",
    "files": (
        "SELECT labs.name AS lab, model_name AS model, fraction, path, size, digest, place, "
        "completed_at IS NOT NULL AS complete FROM checkpoint_files JOIN labs ON labs.id = lab_id"
    ),
}


@dataclass(frozen=True)
class Snapshot:
    """The rows of each query above, by its name."""

    rows: dict[str, list[Row]]

    def __getitem__(self, name: str) -> list[Row]:
        return self.rows[name]

    def by(self, name: str, column: str) -> dict[Any, list[Row]]:
        """The rows of a query by the value of one column."""
        found: dict[Any, list[Row]] = defaultdict(list)
        for row in self.rows[name]:
            found[row[column]].append(row)
        return found


async def take_snapshot(connection: asyncpg.Connection) -> Snapshot:
    """All of it as of one moment, when nothing else writes any more."""
    return Snapshot({name: [dict(row) for row in await connection.fetch(query)] for name, query in _QUERIES.items()})


def content_of(document: Row) -> dict[str, Any]:
    """What the bytes of a document say; nothing when they are not those of its digest."""
    if hashlib.sha256(document["body"]).digest() != document["digest"]:
        return {}
    content: dict[str, Any] = json.loads(document["body"])
    return content


def text_of(digest: bytes) -> str:
    return f"sha256:{digest.hex()}"


def path_of(version: Row) -> str:
    """How the audit names a version: `foundation-7b@0.8@3`."""
    return f"{version['model']}@{version['fraction'].normalize():f}@{version['number']}"
