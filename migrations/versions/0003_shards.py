"""Jobs in parts: each shard of a job, and the merge of its shards, has a state and a lease of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003_shards"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_parts",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("announced_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("announcements", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'crashed', 'cancelled')",
            name=op.f("ck_job_parts_state"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_parts_job_id")),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_job_parts")),
        sa.UniqueConstraint("job_id", "lease_token", name=op.f("uq_job_parts_job_id_lease_token")),
    )
    op.create_index(
        "ix_job_parts_announced_at",
        "job_parts",
        ["announced_at"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_job_parts_lease_expires_at",
        "job_parts",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('running', 'cancelling')"),
    )
    op.add_column("job_events", sa.Column("shards", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("outbox", sa.Column("part", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("outbox", "part")
    op.drop_column("job_events", "shards")
    op.drop_table("job_parts")
