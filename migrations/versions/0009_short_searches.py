"""Terms of one or two letters are found by an index too: of the pairs of letters in a model's name."""

from __future__ import annotations

from alembic import op

revision = "0009_short_searches"
down_revision = "0008_job_origins"
branch_labels = None
depends_on = None

# Every letter of the name and every two that follow each other. Of lower(): the search does not mind the case.
_LETTERS = """
CREATE FUNCTION short_terms(name text) RETURNS text[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT array_agg(DISTINCT substr(lower(name), place, length))
    FROM generate_series(1, length(name)) place, generate_series(1, 2) length
$$
"""


def upgrade() -> None:
    op.execute(_LETTERS)
    op.execute("CREATE INDEX ix_models_short_terms ON models USING gin (short_terms(name))")


def downgrade() -> None:
    op.execute("DROP INDEX ix_models_short_terms")
    op.execute("DROP FUNCTION short_terms(text)")
