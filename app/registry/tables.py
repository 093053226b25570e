"""The schema. What is immutable is also guarded by triggers (migrations/versions/0001)."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gradient_blueprints.models import JobState

SHORT_TERM = 2
"""Letters of the longest terms that the function short_terms (migration 0009) answers of a name."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy, never changed
        str: Text,
        int: BigInteger,
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        Decimal: Numeric(5, 4),
        list[str]: ARRAY(Text),
        dict[str, Any]: JSONB,
        list[dict[str, Any]]: JSONB,
    }


def _identity() -> Mapped[int]:
    return mapped_column(BigInteger, Identity(always=True), primary_key=True)


def _now() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


def table_of(model: type[Base]) -> Table:
    """For statements without the ORM."""
    return Base.metadata.tables[model.__tablename__]


class Lab(Base):
    __tablename__ = "labs"

    id: Mapped[int] = _identity()
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = _now()


class Key(Base):
    __tablename__ = "keys"

    id: Mapped[int] = _identity()
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    hash: Mapped[bytes] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    bootstrap: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime] = _now()
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class WebSession(Base):
    """A browser that is logged in with a key, whose rights it has as long as the key has them."""

    __tablename__ = "web_sessions"

    token_hash: Mapped[bytes] = mapped_column(primary_key=True)  # keyed, as that of a key
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"), index=True)
    created_at: Mapped[datetime] = _now()
    expires_at: Mapped[datetime] = mapped_column(index=True)


class Model(Base):
    __tablename__ = "models"
    __table_args__ = (
        Index("ix_models_name_trigrams", "name", postgresql_using="gin", postgresql_ops={"name": "gin_trgm_ops"}),
        Index("ix_models_short_terms", text("short_terms(name)"), postgresql_using="gin"),
    )

    id: Mapped[int] = _identity()
    name: Mapped[str] = mapped_column(unique=True)
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"), index=True)  # the owner
    created_at: Mapped[datetime] = _now()


class Checkpoint(Base):
    """The row that is locked to hand out version numbers."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("model_id", "fraction"),
        CheckConstraint("fraction > 0 AND fraction <= 1", name="fraction"),
    )

    id: Mapped[int] = _identity()
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    fraction: Mapped[Decimal]
    last_version: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    created_at: Mapped[datetime] = _now()


class Document(Base):
    """The canonical bytes that a digest names."""

    __tablename__ = "documents"

    id: Mapped[int] = _identity()
    digest: Mapped[bytes] = mapped_column(unique=True)
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id"), index=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    size: Mapped[int] = mapped_column(Integer)
    layer_count: Mapped[int] = mapped_column(Integer)
    warnings: Mapped[list[dict[str, Any]]]
    created_at: Mapped[datetime] = _now()


class Layer(Base):
    """A layer of a document, in columns that SQL can aggregate."""

    __tablename__ = "layers"

    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    layer_id: Mapped[str]
    gradient_norm: Mapped[float]
    gradient_norm_low: Mapped[float | None]
    gradient_norm_high: Mapped[float | None]
    alpha: Mapped[float | None]
    gamma: Mapped[float | None]
    k_star: Mapped[float | None]
    example_norm: Mapped[float | None]
    signal: Mapped[float | None]
    spread: Mapped[float | None]
    first_order: Mapped[float | None]
    parameters: Mapped[int | None]
    kind: Mapped[str | None]
    depth: Mapped[int | None] = mapped_column(Integer)
    domain_tags: Mapped[dict[str, Any] | None]


class Version(Base):
    """A publication of a document by a lab under the next number of its checkpoint."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("checkpoint_id", "number"),
        UniqueConstraint("checkpoint_id", "lab_id", "document_id"),
        Index("ix_versions_checkpoint_id_lab_id_number", "checkpoint_id", "lab_id", text("number DESC")),
        CheckConstraint("number >= 1", name="number"),
    )

    id: Mapped[int] = _identity()
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id"))
    number: Mapped[int] = mapped_column(Integer)
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id"), index=True)
    created_at: Mapped[datetime] = _now()


class Yank(Base):
    """Present while its version is yanked; the past is in the audit."""

    __tablename__ = "yanks"

    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"), primary_key=True, autoincrement=False)
    reason: Mapped[str]
    yanked_at: Mapped[datetime] = _now()


class Blob(Base):
    """A file in the store whose bytes were verified against its digest."""

    __tablename__ = "blobs"

    digest: Mapped[bytes] = mapped_column(primary_key=True)
    size: Mapped[int]
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    created_at: Mapped[datetime] = _now()


class Attachment(Base):
    __tablename__ = "attachments"

    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    blob_digest: Mapped[bytes] = mapped_column(ForeignKey("blobs.digest"), index=True)


class Alias(Base):
    __tablename__ = "aliases"

    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    revision: Mapped[int] = mapped_column(Integer)
    updated_at: Mapped[datetime] = _now()


class AliasMove(Base):
    """Every move of an alias; a removal has no version."""

    __tablename__ = "alias_moves"

    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    version_id: Mapped[int | None] = mapped_column(ForeignKey("versions.id"))
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    moved_at: Mapped[datetime] = _now()


class AuditEntry(Base):
    __tablename__ = "audit"

    id: Mapped[int] = _identity()
    at: Mapped[datetime] = _now()
    key_id: Mapped[int | None] = mapped_column(ForeignKey("keys.id"))
    lab_id: Mapped[int | None] = mapped_column(ForeignKey("labs.id"))
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]
    request_id: Mapped[str | None]


class IdempotentRequest(Base):
    """What a request with an Idempotency-Key was answered, so that its repetition gets the same."""

    __tablename__ = "idempotent_requests"

    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"), primary_key=True)
    token: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[bytes]
    status: Mapped[int] = mapped_column(Integer)
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in JobState)})", name="state"),
        Index("ix_jobs_lab_id_id", "lab_id", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    request: Mapped[dict[str, Any]]  # gradient_blueprints.models.NewJob
    state: Mapped[str]
    max_attempts: Mapped[int] = mapped_column(Integer)  # of each part
    lease_token: Mapped[int] = mapped_column(server_default=text("0"))  # fencing: rises with each claim of a part
    reason: Mapped[str | None]
    version_id: Mapped[int | None] = mapped_column(ForeignKey("versions.id"))
    request_id: Mapped[str | None]  # of the request that submitted it
    trace_parent: Mapped[str | None]  # likewise, as W3C Trace Context writes it
    created_at: Mapped[datetime] = _now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobPart(Base):
    """What one worker does of a job under one lease: a shard, or with number = shards the merge of them all."""

    __tablename__ = "job_parts"
    __table_args__ = (
        CheckConstraint(f"state IN ({', '.join(repr(state.value) for state in JobState)})", name="state"),
        UniqueConstraint("job_id", "lease_token"),
        Index(
            "ix_job_parts_lease_expires_at",
            "lease_expires_at",
            postgresql_where=text("state IN ('running', 'cancelling')"),
        ),
        Index("ix_job_parts_announced_at", "announced_at", postgresql_where=text("state = 'queued'")),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    state: Mapped[str]
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"), default=0)
    lease_token: Mapped[int | None]  # of the last claim
    lease_expires_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    reason: Mapped[str | None]
    state_digest: Mapped[bytes | None]  # of the partial result that a shard handed in
    announced_at: Mapped[datetime | None]
    announcements: Mapped[int] = mapped_column(Integer, server_default=text("0"))


class JobEvent(Base):
    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_id", "job_id", "id"),)

    id: Mapped[int] = _identity()
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"))
    at: Mapped[datetime] = _now()
    state: Mapped[str]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    reason: Mapped[str | None]
    parts: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))  # state to number, with shards


class OutboxMessage(Base):
    """A message that must reach the broker; the relay deletes it once it has."""

    __tablename__ = "outbox"

    id: Mapped[int] = _identity()
    task: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id"), index=True)
    part: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    created_at: Mapped[datetime] = _now()


class Evidence(Base):
    """A staleness check that an adapter let the registry keep: one a key, document, domain and day."""

    __tablename__ = "evidence"
    __table_args__ = (
        UniqueConstraint("key_id", "document_id", "domain", "day"),
        Index("ix_evidence_document_id_domain", "document_id", "domain"),
        Index("ix_evidence_checkpoint_id_id", "checkpoint_id", "id"),
        CheckConstraint("verdict IN ('fresh', 'stale', 'indeterminate')", name="verdict"),
    )

    id: Mapped[int] = _identity()
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id"))
    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    domain: Mapped[str]
    day: Mapped[date] = mapped_column(server_default=text("CURRENT_DATE"))
    at: Mapped[datetime] = _now()
    verdict: Mapped[str]
    level: Mapped[str | None]
    threshold: Mapped[float]
    layers: Mapped[int] = mapped_column(Integer)
    spearman: Mapped[float | None]
    corrected: Mapped[float | None]
    ceiling: Mapped[float | None]
    top_overlap: Mapped[float | None]
    norms: Mapped[dict[str, Any] | None]


class StalenessEvent(Base):
    """The share of stale verdicts on a document in a domain crossed the limit."""

    __tablename__ = "staleness_events"
    __table_args__ = (
        Index("ix_staleness_events_document_id_domain_id", "document_id", "domain", "id"),
        CheckConstraint("kind IN ('raised', 'cleared')", name="kind"),
    )

    id: Mapped[int] = _identity()
    at: Mapped[datetime] = _now()
    kind: Mapped[str]
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoints.id"), index=True)
    document_id: Mapped[int] = mapped_column(ForeignKey("documents.id"))
    domain: Mapped[str]
    stale_share: Mapped[float]
    users: Mapped[int] = mapped_column(Integer)


class CheckpointFile(Base):
    """A file of a lab's checkpoint in the registry's store; on its way in until `completed_at`, unchangeable after."""

    __tablename__ = "checkpoint_files"
    __table_args__ = (
        UniqueConstraint("lab_id", "model_name", "fraction", "path"),
        Index("ix_checkpoint_files_touched_at", "touched_at", postgresql_where=text("completed_at IS NULL")),
        CheckConstraint("received BETWEEN 0 AND size", name="received"),
    )

    id: Mapped[int] = _identity()
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    model_name: Mapped[str]  # not a row of models, which everybody may list
    fraction: Mapped[Decimal]
    path: Mapped[str]
    size: Mapped[int]
    digest: Mapped[bytes]
    received: Mapped[int] = mapped_column(server_default=text("0"))
    token: Mapped[int] = mapped_column(server_default=text("0"))  # fencing: rises with each request that writes
    place: Mapped[str]  # its name in the store
    upload: Mapped[dict[str, Any]]  # what the store needs to go on with it
    created_at: Mapped[datetime] = _now()
    touched_at: Mapped[datetime] = _now()
    completed_at: Mapped[datetime | None]


class Run(Base):
    """A training run that a lab reports; unchangeable once it has finished."""

    __tablename__ = "runs"
    __table_args__ = (
        Index("ix_runs_task_id", "task", "id"),
        Index("ix_runs_model_name_id", "model_name", "id"),
        Index("ix_runs_lab_id_id", "lab_id", "id"),
    )

    id: Mapped[int] = _identity()
    name: Mapped[UUID] = mapped_column(unique=True)  # the id that its sender made
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    task: Mapped[str]
    model_name: Mapped[str]  # not a row of models, which everybody may list
    begun: Mapped[dict[str, Any]]  # gradient_blueprints.record_models.NewRun
    points: Mapped[int] = mapped_column(Integer, server_default=text("0"), default=0)
    tally: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    stopped: Mapped[str | None]
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))  # final pair, ratio, marks
    curves: Mapped[dict[str, Any] | None] = mapped_column(  # envelope by resource; up to 80 kB, for the leaderboard
        JSONB(none_as_null=True), deferred=True, deferred_raiseload=True
    )
    created_at: Mapped[datetime] = _now()
    finished_at: Mapped[datetime | None]


class RunPoint(Base):
    __tablename__ = "run_points"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    step: Mapped[int]
    psi: Mapped[float]
    gamma: Mapped[dict[str, Any]]


class Webhook(Base):
    """An address that wants to hear of events; its secret is derived from its id (app/registry/webhooks.py)."""

    __tablename__ = "webhooks"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    lab_id: Mapped[int] = mapped_column(ForeignKey("labs.id"), index=True)
    key_id: Mapped[int] = mapped_column(ForeignKey("keys.id"))
    url: Mapped[str]
    events: Mapped[list[str]]
    model_name: Mapped[str | None] = mapped_column(index=True)  # without one: the models that the lab owns
    failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # in a row, of any of its messages
    held_until: Mapped[datetime] = _now()  # a relay sends to it until then, or it rests after a failure
    created_at: Mapped[datetime] = _now()
    gone_at: Mapped[datetime | None]  # it answered 410


class WebhookDelivery(Base):
    """A message to one webhook: the exact text that is signed and sent."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("webhook_id", "message_id"),
        Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),
        Index(
            "ix_webhook_deliveries_webhook_id_due_at",
            "webhook_id",
            "due_at",
            postgresql_where=text("state = 'waiting'"),
        ),
        Index("ix_webhook_deliveries_finished_at", "finished_at"),
        CheckConstraint("state IN ('waiting', 'delivered', 'given_up')", name="state"),
    )

    id: Mapped[int] = _identity()
    webhook_id: Mapped[UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    message_id: Mapped[UUID]  # the same for all webhooks that hear of an event, and at every attempt
    event: Mapped[str]
    body: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=text("'waiting'"))
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    due_at: Mapped[datetime] = _now()
    created_at: Mapped[datetime] = _now()
    finished_at: Mapped[datetime | None]


class WebhookAttempt(Base):
    """One attempt to send a delivery; without an end while it lasts, or when its relay died."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[int] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    began_at: Mapped[datetime] = _now()
    ended_at: Mapped[datetime | None]
    status: Mapped[int | None] = mapped_column(Integer)
    fault: Mapped[str | None]
