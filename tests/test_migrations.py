"""Alembic's migrations: what they lead to is what the service makes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sessionscope.engines import make_engine
from sqlalchemy import Engine, insert, inspect, text
from support import environ, names, serve_once

import models
from models import Base, Item
from serve import create_app
from web.database import WrongTable, check_tables, create_tables

INI = Path(models.__file__).with_name("alembic.ini")

TABLES = "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'alembic%' AND sql <> '' ORDER BY name"


@pytest.fixture
def fresh(any_url: str) -> Iterator[Engine]:
    """A database without tables, on each engine in turn."""
    engine = make_engine(any_url)
    yield engine
    Base.metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
    engine.dispose()


def alembic(url: str) -> Config:
    config = Config(INI)
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def test_they_lead_to_the_model(fresh: Engine, any_url: str) -> None:
    """After all migrations Alembic finds no difference to the model, nor does the service."""
    command.upgrade(alembic(any_url), "head")
    check_tables(fresh)
    with fresh.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_they_make_what_the_service_makes(tmp_path: Path) -> None:
    """On SQLite the tables and indexes are the same to the letter."""
    made = []
    for name in ("migrated", "created"):
        url = f"sqlite:///{tmp_path}/{name}.db"
        engine = make_engine(url)
        if name == "migrated":
            command.upgrade(alembic(url), "head")
        else:
            create_tables(engine)
        with engine.connect() as connection:
            found = connection.scalars(text(TABLES))
            made.append([" ".join(sql.replace(" IF NOT EXISTS", "").split()) for sql in found])
        engine.dispose()
    assert made[0] == made[1] != []


def test_they_take_what_the_service_has_made(fresh: Engine, any_url: str) -> None:
    """A database that the service has filled is migrated without a loss."""
    create_tables(fresh)
    with fresh.begin() as connection:
        connection.execute(insert(Item).values(name="kept"))
    command.upgrade(alembic(any_url), "head")
    assert names(fresh) == ["kept"]
    assert inspect(fresh).has_table("alembic_version")


COLLATIONS = {
    "postgresql": ["", 'COLLATE "und-x-icu"'],
    "mariadb": ["COLLATE utf8mb4_general_ci", "CHARACTER SET latin1"],
}


def described(engine: Engine) -> list[object]:
    """The columns and indexes of the items, with types, collations and defaults."""
    found = inspect(engine)
    columns = [
        [column["name"], repr(column["type"]), column["nullable"], column["default"]]
        for column in found.get_columns("items")
    ]
    return [*columns, found.get_pk_constraint("items"), found.get_indexes("items")]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("any_url", ["postgresql", "mariadb"], indirect=True)
def test_they_change_the_collation(number: int, fresh: Engine, any_url: str) -> None:
    """A table with another collation becomes the service's own, which then starts on it."""
    create_tables(fresh)
    created = described(fresh)
    Base.metadata.drop_all(fresh)
    name = fresh.dialect.name
    key = "SERIAL" if name == "postgresql" else "INTEGER AUTO_INCREMENT"
    column = f"name VARCHAR(16) {COLLATIONS[name][number]}"
    with fresh.begin() as connection:
        connection.execute(text(f"CREATE TABLE items (id {key} PRIMARY KEY, {column})"))
        connection.execute(insert(Item).values(name="kept"))
    with pytest.raises(WrongTable, match="which migration 0002 changes; run `alembic upgrade"):
        check_tables(fresh)

    command.upgrade(alembic(any_url), "head")

    assert described(fresh) == created
    service = create_app(any_url)
    assert serve_once(service, environ("POST", "/")).content == b'{"id": 2, "name": "Item #2"}\n'
    service.dispose()
    assert names(fresh) == ["kept", "Item #2"]


def test_they_can_be_undone(fresh: Engine, any_url: str) -> None:
    """Downgrading to nothing leaves no table but Alembic's own."""
    command.upgrade(alembic(any_url), "head")
    command.downgrade(alembic(any_url), "base")
    assert inspect(fresh).get_table_names() == ["alembic_version"]
