"""Run by Alembic: the database that the service would use, and the model that it has."""

from __future__ import annotations

from alembic import context
from sessionscope.engines import make_engine

from models import Base
from web.options import make_parser

url = context.config.get_main_option("sqlalchemy.url") or make_parser().parse_args([]).database_url
engine = make_engine(url)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
