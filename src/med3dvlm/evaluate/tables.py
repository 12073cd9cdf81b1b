"""Tables of results as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from med3dvlm.files import atomic_file, write_json

Value = float | int | str | bool | None
Row = dict[str, Value]
P_VALUE = "p"  # a column of the probabilities that a test gives


@dataclass
class Table:
    """Rows of named values; what a row lacks is shown as a dash.

    Attributes:
        shares: whether floats from 0 to 1 are shares, shown as percentages in Markdown, and
            columns that begin with "difference" differences of shares, shown in points. CSV and
            JSON always hold the plain number.
    """

    title: str
    rows: Sequence[Row]
    shares: bool = True

    @property
    def columns(self) -> list[str]:
        """Every column of any row, in the order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def to_markdown(self) -> str:
        columns = self.columns
        if not columns:
            return f"**{self.title}**\n\n(no rows)"
        lines = [[_escape(column) for column in columns], ["---"] * len(columns)]
        lines += [
            [_escape(self.show(row.get(column), column)) for column in columns] for row in self.rows
        ]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def to_csv(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.to_list())
        return text.getvalue()

    def to_list(self) -> list[Row]:
        """The rows with NaN and infinities as None: JSON has no word for them."""
        return [{key: _plain(value) for key, value in row.items()} for row in self.rows]

    def show(self, value: Value, column: str) -> str:
        """A value of a column as people read it."""
        value = _plain(value)
        if value is None:
            return "–"
        if isinstance(value, float):
            if column == P_VALUE:
                return f"{value:.2g}"
            if self.shares and column.startswith("difference"):
                return f"{100 * value:+.1f}"
            share = self.shares and 0 <= value <= 1
            return f"{100 * value:.1f}%" if share else f"{value:.4g}"
        return str(value)


def _plain(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(text: str) -> str:
    """A bar or a line break would end the cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


@dataclass
class Results:
    """Several tables with what they are about; `notes` are sentences on what is not in them."""

    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, title: str, rows: Sequence[Row], *, shares: bool = True) -> None:
        """Raises ValueError for a title that is there already: one would hide the other."""
        if file_name(title) in {file_name(table.title) for table in self.tables}:
            raise ValueError(f"there is a table {title!r} already: give it another title.")
        self.tables.append(Table(title, rows, shares))

    def to_dict(self) -> dict[str, Any]:
        notes = {"notes": self.notes} if self.notes else {}
        tables = {table.title: table.to_list() for table in self.tables}
        return {**self.facts, **notes, "tables": tables}

    def to_markdown(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self.facts.items())
        notes = [f"Note: {note}" for note in self.notes]
        return "\n\n".join([facts, *notes, *(table.to_markdown() for table in self.tables)])

    def save(self, folder: Path | str) -> None:
        """results.json, results.md and one CSV per table, each written atomically."""
        folder = Path(folder)
        write_json(folder / "results.json", self.to_dict())
        _write(folder / "results.md", self.to_markdown() + "\n")
        for table in self.tables:
            _write(folder / f"{file_name(table.title)}.csv", table.to_csv())


def file_name(title: str) -> str:
    """Letters, digits and dashes only, so that a title cannot lead to another folder."""
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-") or "table"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, "utf-8", newline="")
