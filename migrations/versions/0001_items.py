"""Create the items and the idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

NAME = (
    sa.String(16)
    .with_variant(sa.String(16, "C"), "postgresql")
    .with_variant(sa.String(16, "utf8mb4_bin"), "mysql", "mariadb")
)
RESPONSE = sa.LargeBinary(2**24 - 1).with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def upgrade() -> None:
    """Create what is missing: the service may have made it."""
    op.create_table(
        "items",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", NAME),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    op.create_index("ix_items_name", "items", ["name"], if_not_exists=True)
    op.create_table(
        "idempotency_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("response", RESPONSE),
        if_not_exists=True,
    )
    op.create_index(
        "ix_idempotency_keys_created", "idempotency_keys", ["created"], if_not_exists=True
    )


def downgrade() -> None:
    """Delete both."""
    op.drop_table("idempotency_keys")
    op.drop_table("items")
