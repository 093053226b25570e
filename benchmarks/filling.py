"""Rows straight into the tables: publishing so many over HTTP would take longer than what is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import asyncpg

from app.registry.blueprints import LAYER_COLUMNS, layer_record
from gradient_blueprints.canonical import canonical_bytes
from gradient_blueprints.models import Blueprint


async def publish_as_labs(database_url: str, documents: Sequence[dict[str, Any]]) -> None:
    """Each document, all of one model and checkpoint, as the publication of a lab of its own."""
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            names = [f"lab-{number:05}" for number in range(len(documents))]
            labs = await _insert(connection, "labs (name)", "text[]", names)
            keys = await connection.fetch(
                "INSERT INTO keys (lab_id, name, prefix, hash, scopes) "
                "SELECT id, '', '', 'key'::bytea || id::text::bytea, '{}' FROM unnest($1::bigint[]) AS id RETURNING id",
                labs,
            )
            (model,) = await connection.fetch(
                "INSERT INTO models (name, lab_id) VALUES ($1, $2) RETURNING id", documents[0]["model_id"], labs[0]
            )
            (checkpoint,) = await connection.fetch(
                "INSERT INTO checkpoints (model_id, fraction, last_version) VALUES ($1, $2, $3) RETURNING id",
                model["id"],
                Decimal(str(documents[0]["training_checkpoint"])),
                len(documents),
            )
            for number, plain in enumerate(documents):
                blueprint = Blueprint.model_validate(plain)
                body = canonical_bytes(blueprint.to_dict())
                stored = await connection.fetchval(
                    "INSERT INTO documents (digest, checkpoint_id, body, size, layer_count, warnings) "
                    "VALUES ($1, $2, $3, $4, $5, '[]') RETURNING id",
                    hashlib.sha256(body).digest(),
                    checkpoint["id"],
                    body,
                    len(body),
                    len(blueprint.layers),
                )
                records = [layer_record(stored, position, layer) for position, layer in enumerate(blueprint.layers)]
                await connection.copy_records_to_table("layers", columns=LAYER_COLUMNS, records=records)
                await connection.execute(
                    "INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id) "
                    "VALUES ($1, $2, $3, $4, $5)",
                    checkpoint["id"],
                    number + 1,
                    labs[number],
                    keys[number]["id"],
                    stored,
                )
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


async def _insert(connection: Any, into: str, kind: str, values: Sequence[object]) -> list[int]:
    rows = await connection.fetch(f"INSERT INTO {into} SELECT * FROM unnest($1::{kind}) RETURNING id", values)  # noqa: S608 - constants
    return [row["id"] for row in rows]
