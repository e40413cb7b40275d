"""What all tables share: cells are taken as they are, whatever is in a name."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from osscar.core.printable import printable


class _PlainTable(Table):
    """A table whose cells are taken as they are: names of things are neither markup nor control."""

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        super().add_row(*(_plain(cell) for cell in cells), **more)


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table; a column whose name ends in ``>`` is aligned to the right."""
    table = _PlainTable(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    for index, column in enumerate(columns):
        right = column.endswith(">")
        table.add_column(
            Text(printable(column.removesuffix(">").rstrip())),
            justify="right" if right else "left",
            no_wrap=right or index == 0,  # names are to be copied whole
        )
    return table


def _plain(cell: RenderableType | None) -> RenderableType | None:
    if isinstance(cell, Text):
        return Text(printable(cell.plain), style=cell.style)
    return Text(printable(cell)) if isinstance(cell, str) else cell
