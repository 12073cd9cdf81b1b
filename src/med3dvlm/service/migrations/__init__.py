"""Bringing a database to the schema of this version, step by step (Alembic).

A new step, from the difference between a database of the last version and the tables:

    python -m med3dvlm.service.migrations "what changes"
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from med3dvlm.service.database import Database, DatabaseError

LOCK = 0x4D334456  # of PostgreSQL: one process brings the schema forward at a time


def migrate(database: Database, *, to: str = "head") -> str:
    """Bring the schema to this version's, or one before; says which it was ("" for none).

    Raises:
        DatabaseError: if the database is of a later version of the program.
    """
    config = _config()
    with database.engine.connect() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": LOCK})
            connection.commit()
        try:
            before = revision_of(connection)
            _check_known(config, before)
            config.attributes["connection"] = connection
            command.upgrade(config, to)
            connection.commit()
        finally:
            if database.dialect == "postgresql":
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": LOCK})
                connection.commit()
    return before


def current_revision(database: Database) -> str:
    """The schema of a database that is up to date.

    Raises:
        DatabaseError: if it is not.
    """
    with database.engine.connect() as connection:
        found = revision_of(connection)
    if found != ScriptDirectory.from_config(_config()).get_current_head():
        raise DatabaseError("the schema is an older one: run 'med3dvlm service migrate' first.")
    return found


def revision_of(connection: Connection) -> str:
    """The schema of a database; "" for an empty one."""
    found = MigrationContext.configure(connection).get_current_revision() or ""
    connection.rollback()
    return found


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _check_known(config: Config, revision: str) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision and revision not in known:
        raise DatabaseError(
            f"the database is of a later version of med3dvlm (schema {revision!r}): install that "
            "version, or restore a backup of this one."
        )
