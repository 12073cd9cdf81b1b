"""Structured Reports that have left, for later ones to name."""

import sqlalchemy as sa
from alembic import op

from med3dvlm.service.database import UtcTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "report_documents",
        sa.Column("number", Number, nullable=False),
        sa.Column("study_id", sa.String(length=32), nullable=False),
        sa.Column("created", UtcTime(), nullable=False),
        sa.Column("format", sa.String(length=20), nullable=False),
        sa.Column("addenda", sa.Integer(), nullable=False),
        sa.Column("study_uid", sa.String(length=64), nullable=False),
        sa.Column("series_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("study_id", "sop_instance_uid", name="left_once"),
    )
