"""Publishing blueprints and resolving what a fetch answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from operator import attrgetter
from typing import Any

from sqlalchemy import Numeric, Row, Select, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.registry import audit, tables, webhooks
from app.registry.callers import Caller
from app.registry.documents import Document
from app.registry.threads import in_thread_unless
from gradient_blueprints import models
from gradient_blueprints.errors import BlueprintNotFound, CheckpointNotFound, MissingBlob, ModelNotFound
from gradient_blueprints.models import Warning_, format_checkpoint, parse_checkpoint
from gradient_blueprints.webhook_models import WebhookEvent

ANY_LAB = "*"
_MADE_COLUMNS = [
    "document_id",
    "position",
    "layer_id",
    "gradient_norm_low",
    "gradient_norm_high",
    "kind",
    "domain_tags",
]
_COPIED_COLUMNS = [column.name for column in tables.Layer.__table__.columns if column.name not in _MADE_COLUMNS]
_copied_values = attrgetter(*_COPIED_COLUMNS)
LAYER_COLUMNS = [*_MADE_COLUMNS, *_COPIED_COLUMNS]
_BRIEF_LAYERS = 2_000  # of which the rows are made in a few milliseconds


@dataclass(frozen=True)
class Found:
    """What a fetch resolves to: which document, and what the registry says of this publication of it."""

    version_id: int
    document_id: int
    digest: bytes
    size: int
    version: int
    lab: str
    model_id: str
    checkpoint: Decimal
    yanked: str | None  # the reason
    distance: Decimal = Decimal(0)

    @property
    def digest_text(self) -> str:
        return f"sha256:{self.digest.hex()}"


def digest_bytes(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))


# --- publishing


async def publish(session: AsyncSession, caller: Caller, document: Document) -> models.Publication:
    """Store a document under the next version of its checkpoint, in the caller's transaction.

    The same lab publishing the same bytes again gets the version that it has; another lab gets one
    of its own. The checkpoint's row lock hands out the numbers, so they have no gaps and are never
    reissued.
    """
    blueprint = document.blueprint
    fraction = parse_checkpoint(blueprint.training_checkpoint)
    asked = {
        "model_id": blueprint.model_id,
        "checkpoint": fraction,
        "digest": digest_bytes(document.digest),
        "body": document.body,
        "size": len(document.body),
        "layer_count": len(blueprint.layers),
        "warnings": [warning.model_dump() for warning in document.warnings],
    }
    known = (await session.execute(_STORE, asked)).one()
    model_id = known.model_id or await _create_model(session, caller, blueprint.model_id)
    checkpoint_id = known.checkpoint_id or await _create_checkpoint(session, model_id, fraction)
    while known.added is None and known.document_id is None:  # a new checkpoint, or somebody was storing these bytes
        known = (await session.execute(_STORE, asked)).one()
    existing = None
    if known.added is not None:
        await _store_parts(session, known.added, blueprint)
    else:
        existing = await _version_of(session, checkpoint_id, caller.lab_id, known.document_id)
    # From here on publishers of this checkpoint follow one another: all that takes long was done before.
    warnings = document.warnings
    if existing is None:
        number = (
            await session.execute(
                _NEXT_VERSION,
                {
                    "checkpoint_id": checkpoint_id,
                    "lab_id": caller.lab_id,
                    "key_id": caller.key_id,
                    "document_id": known.added or known.document_id,
                },
            )
        ).scalar_one()
        place = version_path(blueprint.model_id, blueprint.training_checkpoint, number)
        await audit.record(session, caller, "blueprint.publish", place, digest=document.digest)
        told = {
            "training_checkpoint": blueprint.training_checkpoint,
            "version": number,
            "digest": document.digest,
            "lab": caller.lab,
        }
        await webhooks.announce(session, WebhookEvent.BLUEPRINT_PUBLISHED, blueprint.model_id, told)
    else:
        number = existing.number
        if existing.yanked is not None:
            warnings = (Warning_.model_validate(yanked_warning(existing.yanked)), *warnings)
    return models.Publication(
        model_id=blueprint.model_id,
        training_checkpoint=blueprint.training_checkpoint,
        version=number,
        digest=document.digest,
        created=existing is None,
        lab=caller.lab,
        warnings=warnings,
    )


def version_path(model_id: str, checkpoint: float | Decimal, number: int) -> str:
    """How the audit and messages name a version: `foundation-7b@0.8@3`."""
    return f"{model_id}@{format_checkpoint(checkpoint)}@{number}"


def yanked_warning(reason: str) -> dict[str, str]:
    return {"code": "yanked", "pointer": "", "detail": f"this version was yanked: {reason}"}


# Stores the document, unless it is there or its checkpoint is not.
_STORE = text("""
WITH asked AS (
    SELECT m.id AS model_id, c.id AS checkpoint_id, d.id AS document_id
    FROM (SELECT) AS nothing
    LEFT JOIN models m ON m.name = :model_id
    LEFT JOIN checkpoints c ON c.model_id = m.id AND c.fraction = :checkpoint
    LEFT JOIN documents d ON d.digest = :digest
), added AS (
    INSERT INTO documents (digest, checkpoint_id, body, size, layer_count, warnings)
    SELECT :digest, checkpoint_id, :body, :size, :layer_count, :warnings FROM asked
    WHERE checkpoint_id IS NOT NULL AND document_id IS NULL
    ON CONFLICT DO NOTHING  -- waits for whoever stores the same bytes at this moment
    RETURNING id
)
SELECT asked.*, added.id AS added FROM asked LEFT JOIN added ON true
""").bindparams(
    bindparam("checkpoint", type_=Numeric),
    *(
        bindparam(column.name, type_=column.type)
        for column in tables.table_of(tables.Document).columns
        if column.name in {"digest", "body", "size", "layer_count", "warnings"}
    ),
)

_NEXT_VERSION = text("""
WITH numbered AS (
    UPDATE checkpoints SET last_version = last_version + 1 WHERE id = :checkpoint_id RETURNING last_version
)
INSERT INTO versions (checkpoint_id, number, lab_id, key_id, document_id)
SELECT :checkpoint_id, last_version, :lab_id, :key_id, :document_id FROM numbered RETURNING number
""")


async def _create_model(session: AsyncSession, caller: Caller, model_id: str) -> int:
    """The model's row; a lab that publishes it first becomes its owner."""
    created: int | None = await session.scalar(
        insert(tables.Model)
        .values(name=model_id, lab_id=caller.lab_id)
        .on_conflict_do_nothing()
        .returning(tables.Model.id)
    )
    if created is not None:
        await audit.record(session, caller, "model.create", model_id)
        return created
    return (await session.execute(select(tables.Model.id).where(tables.Model.name == model_id))).scalar_one()


async def _create_checkpoint(session: AsyncSession, model_id: int, fraction: Decimal) -> int:
    await session.execute(
        insert(tables.Checkpoint).values(model_id=model_id, fraction=fraction).on_conflict_do_nothing()
    )
    query = select(tables.Checkpoint.id).where(
        tables.Checkpoint.model_id == model_id, tables.Checkpoint.fraction == fraction
    )
    return (await session.execute(query)).scalar_one()


async def _version_of(
    session: AsyncSession, checkpoint_id: int, lab_id: int, document_id: int
) -> Row[int, str | None] | None:
    """The lab's version of that document, if it has one; the checkpoint's row is locked from here on.

    Not FOR UPDATE, which would wait for the key-share locks that the documents of other publishers hold on this row,
    and they for each other.
    """
    locked = select(tables.Checkpoint.id).where(tables.Checkpoint.id == checkpoint_id)
    await session.execute(locked.with_for_update(key_share=True))
    query = (
        select(tables.Version.number, tables.Yank.reason.label("yanked"))
        .outerjoin(tables.Yank, tables.Yank.version_id == tables.Version.id)
        .where(
            tables.Version.checkpoint_id == checkpoint_id,
            tables.Version.lab_id == lab_id,
            tables.Version.document_id == document_id,
        )
    )
    return (await session.execute(query)).first()


async def _store_parts(session: AsyncSession, document_id: int, blueprint: models.Blueprint) -> None:
    """What belongs to a document that was just stored."""
    await _check_attachments(session, blueprint)
    await _copy_layers(session, document_id, blueprint.layers)
    if blueprint.attachments:
        await session.execute(
            insert(tables.Attachment),
            [
                {"document_id": document_id, "name": item.name, "blob_digest": digest_bytes(item.digest)}
                for item in blueprint.attachments
            ],
        )


async def _check_attachments(session: AsyncSession, blueprint: models.Blueprint) -> None:
    attachments = blueprint.attachments or ()
    if not attachments:
        return
    wanted = [digest_bytes(item.digest) for item in attachments]
    rows = await session.execute(select(tables.Blob.digest, tables.Blob.size).where(tables.Blob.digest.in_(wanted)))
    sizes: dict[bytes, int] = dict(rows.all())
    faults: list[Any] = []
    for index, item in enumerate(attachments):
        size = sizes.get(digest_bytes(item.digest))
        place = f"/attachments/{index}"
        if size is None:
            detail = f"upload it first with PUT /v1/blobs/{item.digest}"
            faults.append({"pointer": f"{place}/digest", "code": "missing_blob", "detail": detail})
        elif size != item.size:
            detail = f"the blob has {size} bytes"
            faults.append({"pointer": f"{place}/size", "code": "wrong_size", "detail": detail})
    if faults:
        raise MissingBlob("The blueprint names attachments that the registry does not hold as stated.", errors=faults)


async def _copy_layers(session: AsyncSession, document_id: int, layers: Sequence[models.Layer]) -> None:
    """One COPY for all layers, in the session's transaction."""
    connection = await session.connection()
    raw = await connection.get_raw_connection()
    driver = raw.driver_connection
    assert driver is not None
    records = await in_thread_unless(len(layers) <= _BRIEF_LAYERS, _layer_records, document_id, layers)
    await driver.copy_records_to_table(tables.Layer.__tablename__, columns=LAYER_COLUMNS, records=records)


def _layer_records(document_id: int, layers: Sequence[models.Layer]) -> list[tuple[Any, ...]]:
    return [layer_record(document_id, position, layer) for position, layer in enumerate(layers)]


def layer_record(document_id: int, position: int, layer: models.Layer) -> tuple[Any, ...]:
    """A row, in the order of LAYER_COLUMNS."""
    low, high = layer.gradient_norm_ci or (None, None)
    kind = None if layer.kind is None else str(layer.kind)
    tags = None if layer.domain_tags is None else json.dumps(layer.domain_tags)
    return (document_id, position, layer.id, low, high, kind, tags, *_copied_values(layer))


# --- resolving


def _select_versions(*columns: Any) -> Select[Any]:
    """Versions with their document, checkpoint, model and lab, and their withdrawal if there is one."""
    return (
        select(*columns)
        .select_from(tables.Version)
        .join(tables.Document, tables.Document.id == tables.Version.document_id)
        .join(tables.Checkpoint, tables.Checkpoint.id == tables.Version.checkpoint_id)
        .join(tables.Model, tables.Model.id == tables.Checkpoint.model_id)
        .join(tables.Lab, tables.Lab.id == tables.Version.lab_id)
        .outerjoin(tables.Yank, tables.Yank.version_id == tables.Version.id)
    )


_FOUND = _select_versions(
    tables.Version.id,
    tables.Version.document_id,
    tables.Document.digest,
    tables.Document.size,
    tables.Version.number,
    tables.Lab.name.label("lab"),
    tables.Model.name.label("model_id"),
    tables.Checkpoint.fraction,
    tables.Yank.reason.label("yanked"),
)


def _found(row: Any, distance: Decimal = Decimal(0)) -> Found:
    return Found(
        version_id=row.id,
        document_id=row.document_id,
        digest=row.digest,
        size=row.size,
        version=row.number,
        lab=row.lab,
        model_id=row.model_id,
        checkpoint=row.fraction,
        yanked=row.yanked,
        distance=distance,
    )


_NEWEST_OF_OWNER = (
    _FOUND.where(
        tables.Model.name == bindparam("model_id"),
        tables.Checkpoint.fraction == bindparam("checkpoint"),
        tables.Version.lab_id == tables.Model.lab_id,
        tables.Yank.version_id.is_(None),
    )
    .order_by(tables.Version.number.desc())
    .limit(1)
)


async def resolve(
    session: AsyncSession,
    model_id: str,
    checkpoint: Decimal,
    *,
    lab: str | None = None,
    version: int | None = None,
    nearest: bool = False,
) -> Found:
    """The version that a fetch answers.

    Without `version` the newest that is not yanked: the owner's, or that of `lab`, or of any lab
    for `*`. A `version` is answered even when it was yanked, with a warning. `nearest` falls back to
    the nearest checkpoint that has an answer; of two equally near, the later one.
    """
    if lab is None and version is None:
        row = (await session.execute(_NEWEST_OF_OWNER, {"model_id": model_id, "checkpoint": checkpoint})).first()
        if row is not None:
            return _found(row)
    query = _FOUND.where(tables.Model.name == model_id)
    if version is not None:
        query = query.where(tables.Version.number == version)
    else:
        query = query.where(tables.Yank.version_id.is_(None))
    if lab is not None:
        if lab != ANY_LAB:
            query = query.where(tables.Lab.name == lab)
    elif version is None:
        query = query.where(tables.Version.lab_id == tables.Model.lab_id)

    exact = query.where(tables.Checkpoint.fraction == checkpoint).order_by(tables.Version.number.desc()).limit(1)
    row = (await session.execute(exact)).first()
    if row is None and nearest:
        from_here = tables.Checkpoint.fraction - checkpoint
        close = query.order_by(
            func.abs(from_here), tables.Checkpoint.fraction.desc(), tables.Version.number.desc()
        ).limit(1)
        row = (await session.execute(close)).first()
    if row is None:
        advise_nearest = version is None and not nearest
        raise await explain_miss(session, model_id, checkpoint, lab=lab, version=version, advise_nearest=advise_nearest)
    return _found(row, distance=abs(row.fraction - checkpoint))


async def explain_miss(
    session: AsyncSession,
    model_id: str,
    checkpoint: Decimal,
    *,
    lab: str | None = None,
    version: int | None = None,
    advise_nearest: bool = False,
) -> ModelNotFound | CheckpointNotFound | BlueprintNotFound:
    """The error that says what does exist; `advise_nearest`: the request takes `nearest` and did not ask for it."""
    fractions = (
        await session.scalars(
            select(tables.Checkpoint.fraction)
            .join(tables.Model)
            .where(tables.Model.name == model_id, tables.Checkpoint.last_version > 0)
            .order_by(tables.Checkpoint.fraction)
        )
    ).all()
    asked = format_checkpoint(checkpoint)
    if not fractions:
        return ModelNotFound(f"There is no model {model_id!r}; search with GET /v1/models?q=.")
    known = [float(fraction) for fraction in fractions]
    if checkpoint not in fractions:
        spelled = ", ".join(format_checkpoint(fraction) for fraction in fractions)
        return CheckpointNotFound(
            f"{model_id} has no checkpoint {asked}; it has {spelled}."
            + (" With nearest=true the nearest answers." if advise_nearest else ""),
            checkpoints=known,
        )
    if version is not None:
        return BlueprintNotFound(
            f"{model_id} at {asked} has no version {version}{f' of lab {lab}' if lab else ''}; "
            f"GET /v1/models/{model_id}/checkpoints/{asked}/versions lists them."
        )
    whose = {None: "its owner", ANY_LAB: "any lab"}.get(lab, f"lab {lab}")
    return BlueprintNotFound(
        f"{model_id} at {asked} has no version of {whose} that is not yanked; "
        f"GET /v1/models/{model_id}/checkpoints/{asked}/versions lists them, lab= chooses another lab."
    )


async def resolve_digest(session: AsyncSession, digest: str) -> Found:
    """The first publication of those bytes, so that no later lab changes what is said of them."""
    query = _FOUND.where(tables.Document.digest == digest_bytes(digest)).order_by(tables.Version.id).limit(1)
    row = (await session.execute(query)).first()
    if row is None:
        raise BlueprintNotFound(f"No blueprint has the digest {digest}.")
    return _found(row)


@dataclass(frozen=True)
class Stored:
    """What never changes of a document: its canonical bytes and the warnings it was stored with."""

    body: bytes
    warnings: tuple[dict[str, str], ...]


async def read_stored(session: AsyncSession, document_id: int) -> Stored:
    query = select(tables.Document.body, tables.Document.warnings).where(tables.Document.id == document_id)
    body, warnings = (await session.execute(query)).one()
    return Stored(body, tuple(warnings))


@dataclass(frozen=True)
class VersionRow:
    """A version with all that listings show of it."""

    id: int
    lab_id: int
    summary: models.VersionSummary


VERSIONS = _select_versions(
    tables.Version.id,
    tables.Version.lab_id,
    tables.Version.number,
    tables.Version.created_at,
    tables.Version.document_id,
    tables.Document.digest,
    tables.Document.layer_count,
    tables.Document.size,
    tables.Lab.name.label("lab"),
    tables.Model.name.label("model_id"),
    tables.Checkpoint.fraction,
    tables.Yank.reason.label("yanked_reason"),
)


def version_row(row: Any) -> VersionRow:
    created_at: datetime = row.created_at
    return VersionRow(
        id=row.id,
        lab_id=row.lab_id,
        summary=models.VersionSummary(
            model_id=row.model_id,
            training_checkpoint=float(row.fraction),
            version=row.number,
            digest=f"sha256:{row.digest.hex()}",
            lab=row.lab,
            layers=row.layer_count,
            size=row.size,
            created_at=created_at,
            yanked=row.yanked_reason is not None,
            yanked_reason=row.yanked_reason,
        ),
    )
