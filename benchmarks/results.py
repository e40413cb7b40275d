"""Put what a benchmark prints into the file of results, docs/results.md.

    python -m benchmarks.quality OUT --data DATA | python -m benchmarks.results "Language model"

Cells of the last table that it reads go into the table below that heading: into the row and the
column of the same names.  New rows come last; blank cells and all other cells stay as they are.
Other pages show a number of the file as `43.04<!-- Language model / ROW / COLUMN -->`, and a test
compares the two.

Takes a second.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import markdown

FILE = Path(__file__).parents[1] / "docs/results.md"


@dataclass(frozen=True)
class Table:
    """A table of a page: the heading above, where it lies in the text, and its cells by name."""

    heading: str
    begin: int
    end: int
    columns: list[str]
    rows: dict[str, list[str]]

    def cell(self, row: str, column: str) -> str | None:
        """Return a cell; None if there is none of these names, or it is blank."""
        known = row in self.rows and column in self.columns[1:]
        return self.rows[row][self.columns.index(column)] or None if known else None


def tables(page: str) -> Iterator[Table]:
    """Yield the tables of a page."""
    heading = ""
    for found in re.finditer(r"^#+ (.*)$|(?:^\|.*\n)+", page, re.MULTILINE):
        if found[1]:
            heading = found[1]
            continue
        lines = [line.strip()[1:-1].split("|") for line in found[0].splitlines()]
        columns, _, *rows = [[cell.strip() for cell in line] for line in lines]
        yield Table(heading, *found.span(), columns, {row[0]: row for row in rows})


def cell(page: str, heading: str, row: str, column: str) -> str:
    """Return a cell of a page, which has to be the only one of these names."""
    own = (table for table in tables(page) if table.heading == heading)
    (found,) = filter(None, (table.cell(row, column) for table in own))
    return found


def put(page: str, heading: str, printed: str) -> str:
    """Return a page with the cells of the last table of a text."""
    *_, new = tables(printed)
    (old,) = (
        table
        for table in tables(page)
        if table.heading == heading and set(new.columns) <= set(table.columns)
    )
    rows = {name: list(row) for name, row in old.rows.items()}
    for name in new.rows:
        row = rows.setdefault(name, [name, *[""] * (len(old.columns) - 1)])
        for index, column in enumerate(old.columns[1:], 1):
            row[index] = new.cell(name, column) or row[index]
    lines = markdown([old.columns, *rows.values()])
    return page[: old.begin] + "".join(f"{line}\n" for line in lines) + page[old.end :]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("heading", help="of the table in docs/results.md")
    arguments = parser.parse_args()
    page = FILE.read_text(encoding="utf-8")
    FILE.write_text(put(page, arguments.heading, sys.stdin.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
