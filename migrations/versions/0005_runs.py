"""Runs as labs report them, and the points of their curves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005_runs"
down_revision = "0004_checkpoint_files"
branch_labels = None
depends_on = None

REFUSE_LATE_POINT = """
CREATE FUNCTION refuse_late_point() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM runs WHERE id = NEW.run_id AND finished_at IS NOT NULL) THEN
        RAISE EXCEPTION 'run % has ended: it is immutable', NEW.run_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$
"""


def upgrade() -> None:
    json = postgresql.JSONB(astext_type=sa.Text())
    op.create_table(
        "runs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Uuid(), nullable=False),
        sa.Column("lab_id", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("begun", json, nullable=False),
        sa.Column("points", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("tally", json, nullable=True),
        sa.Column("stopped", sa.Text(), nullable=True),
        sa.Column("outcome", json, nullable=True),
        sa.Column("curves", json, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["lab_id"], ["labs.id"], name=op.f("fk_runs_lab_id")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_runs_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    op.create_index("ix_runs_task_id", "runs", ["task", "id"], unique=False)
    op.create_index("ix_runs_model_name_id", "runs", ["model_name", "id"], unique=False)
    op.create_index("ix_runs_lab_id_id", "runs", ["lab_id", "id"], unique=False)
    op.create_table(
        "run_points",
        sa.Column("run_id", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("psi", sa.Double(), nullable=False),
        sa.Column("gamma", json, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_points_run_id")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_run_points")),
    )
    op.execute(
        "CREATE TRIGGER runs_immutable BEFORE UPDATE OR DELETE ON runs FOR EACH ROW "
        "WHEN (OLD.finished_at IS NOT NULL) EXECUTE FUNCTION refuse_change()"
    )
    op.execute("CREATE TRIGGER runs_kept BEFORE TRUNCATE ON runs FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()")
    op.execute(
        "CREATE TRIGGER run_points_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON run_points "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
    op.execute(REFUSE_LATE_POINT)
    op.execute(
        "CREATE TRIGGER run_points_in_time BEFORE INSERT ON run_points FOR EACH ROW "
        "EXECUTE FUNCTION refuse_late_point()"
    )


def downgrade() -> None:
    op.drop_table("run_points")
    op.drop_table("runs")
    op.execute("DROP FUNCTION refuse_late_point()")
