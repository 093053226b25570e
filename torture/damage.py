"""Damage that the checker must see: done to the real database of a run, in transactions that are rolled back."""

from __future__ import annotations

from pathlib import Path

import asyncpg

from torture.checker import check, count
from torture.journal import Operation

# Triggers and foreign keys would refuse all of this, as they do for the service.
_UNGUARDED = "SET LOCAL session_replication_role = replica"

DAMAGES: dict[str, str] = {
    "a version is deleted": "DELETE FROM versions WHERE id = (SELECT min(id) FROM versions)",
    "a version has another number": "UPDATE versions SET number = 999 WHERE id = (SELECT min(id) FROM versions)",
    "a version points to another document": (
        "UPDATE versions SET document_id = (SELECT max(id) FROM documents) WHERE id = (SELECT min(id) FROM versions)"
    ),
    "a byte of a document is flipped": (
        "UPDATE documents SET body = set_byte(body, 20, get_byte(body, 20) # 1) "
        "WHERE id = (SELECT min(id) FROM documents)"
    ),
    "a layer is missing": (
        "DELETE FROM layers WHERE (document_id, position) IN (SELECT document_id, position FROM layers LIMIT 1)"
    ),
    "a result is there twice": (
        "WITH result AS (SELECT versions.* FROM versions JOIN jobs ON jobs.version_id = versions.id LIMIT 1), "
        "next AS (UPDATE checkpoints SET last_version = last_version + 1 "
        "WHERE id = (SELECT checkpoint_id FROM result) RETURNING id, last_version) "
        "INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id) "
        "SELECT next.id, next.last_version, lab_id, key_id, document_id FROM result, next"
    ),
    "a job is lost": "DELETE FROM jobs WHERE id = (SELECT id FROM jobs LIMIT 1)",
    "a job is stuck": ("UPDATE jobs SET state = 'running', version_id = NULL WHERE id = (SELECT id FROM jobs LIMIT 1)"),
    "an audit row is dropped": (
        "DELETE FROM audit WHERE id = (SELECT max(id) FROM audit WHERE action = 'blueprint.publish')"
    ),
    "an audit row is there twice": (
        "INSERT INTO audit (at, key_id, lab_id, action, subject, details, request_id) "
        "SELECT at, key_id, lab_id, action, subject, details, request_id FROM audit "
        "WHERE id = (SELECT min(id) FROM audit WHERE action = 'job.submit')"
    ),
    "a version is yanked that nobody yanked": (
        "INSERT INTO yanks (version_id, reason) SELECT min(id), 'damage' FROM versions "
        "WHERE id NOT IN (SELECT version_id FROM yanks)"
    ),
    "a blob is forgotten": "DELETE FROM blobs WHERE digest = (SELECT digest FROM blobs LIMIT 1)",
}

# The number is unique in the schema, so a duplicate needs the constraint away.
_UNCONSTRAINED = "ALTER TABLE versions DROP CONSTRAINT uq_versions_checkpoint_id_lab_id_document_id"


async def damage_and_check(
    connection: asyncpg.Connection, statement: str, journal: list[Operation], store: Path
) -> int | None:
    """How many violations the checker counts after this damage, which is undone; None if there is nothing to damage."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(_UNGUARDED)
        await connection.execute(_UNCONSTRAINED)
        if (await connection.execute(statement)).endswith(" 0"):
            return None
        return count(await check(connection, journal, store))
    finally:
        await transaction.rollback()
