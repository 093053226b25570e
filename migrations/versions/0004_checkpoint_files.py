"""Files of checkpoints in the registry's store, complete or on their way in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004_checkpoint_files"
down_revision = "0003_shards"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "checkpoint_files",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("lab_id", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("fraction", sa.Numeric(precision=5, scale=4), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("received", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("token", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("upload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("received BETWEEN 0 AND size", name=op.f("ck_checkpoint_files_received")),
        sa.ForeignKeyConstraint(["lab_id"], ["labs.id"], name=op.f("fk_checkpoint_files_lab_id")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_checkpoint_files_key_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint_files")),
        sa.UniqueConstraint(
            "lab_id",
            "model_name",
            "fraction",
            "path",
            name=op.f("uq_checkpoint_files_lab_id_model_name_fraction_path"),
        ),
    )
    op.create_index(
        "ix_checkpoint_files_touched_at",
        "checkpoint_files",
        ["touched_at"],
        unique=False,
        postgresql_where=sa.text("completed_at IS NULL"),
    )
    op.execute(
        "CREATE TRIGGER checkpoint_files_immutable BEFORE UPDATE ON checkpoint_files FOR EACH ROW "
        "WHEN (OLD.completed_at IS NOT NULL) EXECUTE FUNCTION refuse_change()"
    )


def downgrade() -> None:
    op.drop_table("checkpoint_files")
