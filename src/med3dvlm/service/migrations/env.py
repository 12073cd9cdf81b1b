"""What Alembic runs: the steps, over the connection that `migrate` made."""

from typing import Any, Literal

from alembic import context

import med3dvlm.service.access.tables
import med3dvlm.service.audit
import med3dvlm.service.tables
from med3dvlm.service.database import Base, UtcTime

__all__ = ["med3dvlm"]


def _render(kind: str, item: Any, autogenerate: Any) -> str | Literal[False]:
    if kind == "type" and isinstance(item, UtcTime):
        autogenerate.imports.add("from med3dvlm.service.database import UtcTime")
        return "UtcTime()"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
    render_item=_render,
)
with context.begin_transaction():
    context.run_migrations()
