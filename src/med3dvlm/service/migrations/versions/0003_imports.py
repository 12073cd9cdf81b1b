"""Jobs that have no study yet, and how far they are."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True)


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("study_id", existing_type=sa.String(length=32), nullable=True)
        jobs.add_column(sa.Column("progress", Json, nullable=True))
