"""Answers that were kept for a repeated request are found by their age, which the relay asks for every few seconds."""

from __future__ import annotations

from alembic import op

revision = "0010_old_answers"
down_revision = "0009_short_searches"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_idempotent_requests_created_at"), "idempotent_requests", ["created_at"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_idempotent_requests_created_at"), table_name="idempotent_requests")
