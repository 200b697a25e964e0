"""Compare names by code point, also in tables made before the model said so."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NAME = (
    sa.String(16)
    .with_variant(sa.String(16, "C"), "postgresql")
    .with_variant(sa.String(16, "utf8mb4_bin"), "mysql", "mariadb")
)


def upgrade() -> None:
    """Change the collation; if it is the same already, the database does nothing.

    SQLite compares by code point anyway.
    """
    if op.get_bind().dialect.name != "sqlite":
        op.alter_column("items", "name", type_=NAME, existing_nullable=True)


def downgrade() -> None:
    """Keep the collation, which 0001 gives to new tables, too."""
