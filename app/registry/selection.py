"""Which versions an aggregation is about, in SQL; and that every name in it is known."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import tables
from app.registry.blueprints import digest_bytes
from gradient_blueprints.errors import BlueprintNotFound, LabNotFound, ModelNotFound
from gradient_blueprints.models import parse_checkpoint
from gradient_blueprints.statistics_models import Aggregation

# Each lab's newest that is not yanked, all that are not yanked, or versions by number. A digest names its versions by
# itself, yanked ones too: of equal publications by several labs the first (the same rows more often add nothing).
CHOSEN = """
chosen AS MATERIALIZED (
    SELECT v.id AS version_id, v.checkpoint_id, v.document_id, v.lab_id, v.number, d.digest,
           lab.name COLLATE "C" AS lab, m.name COLLATE "C" AS model_id, c.fraction, y.version_id IS NOT NULL AS yanked
    FROM versions v
    JOIN checkpoints c ON c.id = v.checkpoint_id
    JOIN models m ON m.id = c.model_id
    JOIN labs lab ON lab.id = v.lab_id
    JOIN documents d ON d.id = v.document_id
    LEFT JOIN yanks y ON y.version_id = v.id
    WHERE (CAST(:checkpoint_id AS bigint) IS NULL OR c.id = :checkpoint_id)
      AND (
        (
            CAST(:by_name AS boolean)
            AND (CAST(:models AS text[]) IS NULL OR m.name = ANY(:models))
            AND (CAST(:labs AS text[]) IS NULL OR lab.name = ANY(:labs))
            AND (CAST(:checkpoints AS numeric[]) IS NULL OR c.fraction = ANY(:checkpoints))
            AND (CAST(:earliest AS numeric) IS NULL OR c.fraction >= :earliest)
            AND (CAST(:latest AS numeric) IS NULL OR c.fraction <= :latest)
            AND CASE
                WHEN CAST(:numbers AS int[]) IS NOT NULL THEN v.number = ANY(:numbers)
                WHEN y.version_id IS NOT NULL THEN false
                WHEN CAST(:newest AS boolean) THEN NOT EXISTS (
                    SELECT FROM versions later LEFT JOIN yanks withdrawn ON withdrawn.version_id = later.id
                    WHERE later.checkpoint_id = v.checkpoint_id AND later.lab_id = v.lab_id
                      AND later.number > v.number AND withdrawn.version_id IS NULL
                )
                ELSE true
            END
            AND (CAST(:tags AS text[]) IS NULL OR EXISTS (
                SELECT FROM layers tagged
                WHERE tagged.document_id = v.document_id AND tagged.domain_tags ?| :tags
            ))
        )
        OR (
            d.digest = ANY(CAST(:digests AS bytea[]))
            AND NOT EXISTS (
                SELECT FROM versions first WHERE first.document_id = v.document_id AND first.number < v.number
            )
        )
      )
)
"""


def parameters(wanted: Aggregation, checkpoint_id: int | None = None) -> dict[str, Any]:
    """The values of CHOSEN."""
    numbers = wanted.versions if isinstance(wanted.versions, tuple) else None
    return {
        "checkpoint_id": checkpoint_id,
        "by_name": bool(wanted.models or wanted.labs),
        "models": list(wanted.models) or None,
        "labs": list(wanted.labs) or None,
        "checkpoints": [parse_checkpoint(fraction) for fraction in wanted.checkpoints] or None,
        "earliest": None if wanted.from_checkpoint is None else parse_checkpoint(wanted.from_checkpoint),
        "latest": None if wanted.to_checkpoint is None else parse_checkpoint(wanted.to_checkpoint),
        "numbers": None if numbers is None else list(numbers),
        "newest": wanted.versions == "newest",
        "tags": list(wanted.tags) or None,
        "digests": [digest_bytes(digest) for digest in wanted.digests],
    }


async def check_names(session: AsyncSession, wanted: Aggregation) -> None:
    """Raise the error of the first model, lab or digest that there is not: a typo must not look like an empty table."""
    for names, column, error, what in (
        (wanted.models, tables.Model.name, ModelNotFound, "model"),
        (wanted.labs, tables.Lab.name, LabNotFound, "lab"),
    ):
        known = set(await session.scalars(select(column).where(column.in_(names)))) if names else set()
        for name in names:
            if name not in known:
                raise error(f"There is no {what} {name!r}.")
    digests = [digest_bytes(digest) for digest in wanted.digests]
    found = set(await session.scalars(select(tables.Document.digest).where(tables.Document.digest.in_(digests))))
    for digest, digest_text in zip(digests, wanted.digests, strict=True):
        if digest not in found:
            raise BlueprintNotFound(f"No blueprint has the digest {digest_text}.")
