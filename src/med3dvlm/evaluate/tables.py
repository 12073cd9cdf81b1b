"""Tables of results as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from med3dvlm.files import atomic_file, write_json

Row = dict[str, float | int | str]


@dataclass
class Table:
    """Rows with the same columns; shares between 0 and 1 are shown as percentages."""

    title: str
    rows: list[Row]

    def to_markdown(self) -> str:
        columns = list(self.rows[0])
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(_cell(row[column]) for column in columns) for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in lines)])


def _cell(value: float | int | str) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, float) else str(value)


@dataclass
class Results:
    """Several tables with what they are about."""

    facts: dict[str, Any]
    tables: list[Table] = field(default_factory=list)

    def add(self, title: str, rows: list[Row]) -> None:
        self.tables.append(Table(title, rows))

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "tables": {table.title: table.rows for table in self.tables}}

    def to_markdown(self) -> str:
        facts = "; ".join(f"{name}: {value}" for name, value in self.facts.items())
        return "\n\n".join([facts, *(table.to_markdown() for table in self.tables)])

    def save(self, folder: Path | str) -> None:
        """results.json, results.md and one CSV per table, each written atomically."""
        folder = Path(folder)
        write_json(folder / "results.json", json.loads(json.dumps(self.to_dict())))
        with atomic_file(folder / "results.md") as temporary:
            temporary.write_text(self.to_markdown() + "\n", "utf-8")
        for table in self.tables:
            name = "-".join(table.title.lower().replace(",", "").split())
            with (
                atomic_file(folder / f"{name}.csv") as temporary,
                temporary.open("w", encoding="utf-8", newline="") as file,
            ):
                writer = csv.DictWriter(file, list(table.rows[0]))
                writer.writeheader()
                writer.writerows(table.rows)
