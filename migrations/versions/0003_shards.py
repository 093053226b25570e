"""Jobs in parts: each shard of a job, and the merge of its shards, has a state and a lease of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003_shards"
down_revision = "0002"
branch_labels = None
depends_on = None


MOVED = "state, attempts, lease_expires_at, progress, announced_at, announcements"  # from a job to its only part

KEEP_TERMINAL_PART = """
CREATE FUNCTION keep_terminal_part() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'part % of job % has ended as %', OLD.number, OLD.job_id, OLD.state
        USING ERRCODE = 'restrict_violation';
END $$
"""

# The service of before knows no shards: an open job of several parts is lost to its workers, and begun anew.
PUT_BACK = """
UPDATE jobs SET
    request = request #- '{options,shards}',
    attempts = parts.attempts,
    lease_expires_at = CASE
        WHEN jobs.state IN ('running', 'cancelling') THEN CASE WHEN parts.several THEN now() ELSE parts.expiry END
    END,
    progress = CASE WHEN NOT parts.several THEN parts.progress END,
    announced_at = CASE WHEN parts.several THEN now() ELSE parts.announced_at END,
    announcements = CASE WHEN parts.several THEN 0 ELSE parts.announcements END
FROM (
    SELECT job_id, count(*) > 1 AS several, max(attempts) AS attempts, max(lease_expires_at) AS expiry,
        (array_agg(progress))[1] AS progress, max(announced_at) AS announced_at, max(announcements) AS announcements
    FROM job_parts GROUP BY job_id
) AS parts
WHERE parts.job_id = jobs.id
"""


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
        sa.Column("state_digest", sa.LargeBinary(), nullable=True),
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
    op.execute(
        f"INSERT INTO job_parts (job_id, number, lease_token, {MOVED}) "  # noqa: S608 - a constant
        f"SELECT id, 0, nullif(lease_token, 0), {MOVED} FROM jobs"
    )
    op.execute(KEEP_TERMINAL_PART)
    op.execute(
        "CREATE TRIGGER job_parts_keep_terminal_state BEFORE UPDATE ON job_parts FOR EACH ROW "
        "WHEN (OLD.state IN ('succeeded', 'failed', 'crashed', 'cancelled') AND NEW IS DISTINCT FROM OLD) "
        "EXECUTE FUNCTION keep_terminal_part()"
    )
    for column in ("attempts", "lease_expires_at", "progress", "announced_at", "announcements"):
        op.drop_column("jobs", column)  # and the indexes on them
    op.add_column("job_events", sa.Column("parts", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("outbox", sa.Column("part", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.add_column("jobs", sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.add_column("jobs", sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("jobs", sa.Column("announced_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("announcements", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.execute("ALTER TABLE jobs DISABLE TRIGGER jobs_keep_terminal_state")
    op.execute(PUT_BACK)
    op.execute("ALTER TABLE jobs ENABLE TRIGGER jobs_keep_terminal_state")
    op.create_index(
        "ix_jobs_announced_at", "jobs", ["announced_at"], unique=False, postgresql_where=sa.text("state = 'queued'")
    )
    op.create_index(
        "ix_jobs_lease_expires_at",
        "jobs",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('running', 'cancelling')"),
    )
    op.drop_column("outbox", "part")
    op.drop_column("job_events", "parts")
    op.drop_table("job_parts")
    op.execute("DROP FUNCTION keep_terminal_part")
