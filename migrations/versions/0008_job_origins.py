"""Which request, and which trace, a job comes from: what is logged of it later says so."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008_job_origins"
down_revision = "0007_web_sessions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("request_id", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("trace_parent", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "trace_parent")
    op.drop_column("jobs", "request_id")
