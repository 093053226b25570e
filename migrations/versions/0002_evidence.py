"""Staleness: kept checks, and the events of their share crossing the limit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

IMMUTABLE = ("evidence", "staleness_events")


def upgrade() -> None:
    op.create_table(
        "evidence",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("checkpoint_id", sa.BigInteger(), nullable=False),
        sa.Column("document_id", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("domain", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), server_default=sa.text("CURRENT_DATE"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("level", sa.Text(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=False),
        sa.Column("layers", sa.Integer(), nullable=False),
        sa.Column("spearman", sa.Double(), nullable=True),
        sa.Column("corrected", sa.Double(), nullable=True),
        sa.Column("ceiling", sa.Double(), nullable=True),
        sa.Column("top_overlap", sa.Double(), nullable=True),
        sa.Column("norms", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.CheckConstraint("verdict IN ('fresh', 'stale', 'indeterminate')", name=op.f("ck_evidence_verdict")),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_evidence_checkpoint_id")),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name=op.f("fk_evidence_document_id")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_evidence_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evidence")),
        sa.UniqueConstraint(
            "key_id", "document_id", "domain", "day", name=op.f("uq_evidence_key_id_document_id_domain_day")
        ),
    )
    op.create_index("ix_evidence_document_id_domain", "evidence", ["document_id", "domain"], unique=False)
    op.create_index("ix_evidence_checkpoint_id_id", "evidence", ["checkpoint_id", "id"], unique=False)
    op.create_table(
        "staleness_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.BigInteger(), nullable=False),
        sa.Column("document_id", sa.BigInteger(), nullable=False),
        sa.Column("domain", sa.Text(), nullable=False),
        sa.Column("stale_share", sa.Double(), nullable=False),
        sa.Column("users", sa.Integer(), nullable=False),
        sa.CheckConstraint("kind IN ('raised', 'cleared')", name=op.f("ck_staleness_events_kind")),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_staleness_events_checkpoint_id")),
        sa.ForeignKeyConstraint(["document_id"], ["documents.id"], name=op.f("fk_staleness_events_document_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_staleness_events")),
    )
    op.create_index(op.f("ix_staleness_events_checkpoint_id"), "staleness_events", ["checkpoint_id"], unique=False)
    op.create_index(
        "ix_staleness_events_document_id_domain_id", "staleness_events", ["document_id", "domain", "id"], unique=False
    )
    for table in IMMUTABLE:
        op.execute(
            f"CREATE TRIGGER {table}_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )


def downgrade() -> None:
    op.drop_table("staleness_events")
    op.drop_table("evidence")
