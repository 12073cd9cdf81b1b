"""Write the next step, from what the tables have become since the last."""

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory

from med3dvlm.service.database import Database
from med3dvlm.service.migrations import _config, migrate

with tempfile.TemporaryDirectory() as folder:
    database = Database(f"sqlite:///{Path(folder, 'new.db')}")
    migrate(database)
    config = _config()
    number = sum(1 for _ in ScriptDirectory.from_config(config).walk_revisions()) + 1
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        command.revision(config, sys.argv[1], autogenerate=True, rev_id=f"{number:04d}")
