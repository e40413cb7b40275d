"""Sections as a terminal shows them: no number and no name is ever cut."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text as Line

from osscar.base.printable import printable
from osscar.report.sections import Figure, Section, Table, Text


def print_section(console: Console, section: Section) -> None:
    """Print a section; a figure is for pages alone."""
    match section:
        case Text(lines=lines):
            for line in lines:
                console.print(_line(line), soft_wrap=True)
        case Table(columns=("", ""), rows=rows):
            for name, value in rows:
                console.print(_line(f"{name}: {value}"), soft_wrap=True)
        case Table(rows=rows) if rows:
            console.print(_Rows(section), crop=False)
        case Table() | Figure():
            pass


def _line(text: str) -> Line:
    return Line(printable(text))


@dataclass(frozen=True)
class _Rows:
    """A table, or a list for each row where a terminal is too narrow; a file has no edge."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = _line(self.table.title) if self.table.title else None
        grid = Grid(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        widths, least = [], []
        for index, column in enumerate(self.table.columns):
            head, is_number = column.removesuffix(">").strip(), column.endswith(">")
            cells = [head, *(printable(row[index]) for row in self.table.rows)]
            widths.append(max(map(cell_len, cells)))
            # Names are to be copied, and "6 of 8" is one number.
            words = cells if index == 0 or is_number else " ".join(cells).split()
            least.append(max(map(cell_len, words), default=0))
            grid.add_column(_line(head), justify="right" if is_number else "left", overflow="fold")
        for row in self.table.rows:
            grid.add_row(*map(_line, row))
        edges = 3 * len(widths) + 1  # the characters between cells
        room = options.max_width - edges
        if sum(least) > room and console.is_terminal:
            yield from self._lists()
            return
        while sum(widths) > max(room, sum(least)):
            widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
            widths[widest] -= 1
        for one, width in zip(grid.columns, widths, strict=True):
            one.width = width
        yield from console.render(grid, options.update_width(sum(widths) + edges))

    def _lists(self) -> RenderResult:
        if self.table.title:
            yield Line(printable(self.table.title), style="bold")
        for row in self.table.rows:
            for title, cell in zip(self.table.columns, row, strict=True):
                yield Line(printable(f"{title.removesuffix('>').strip()}: {cell}"), overflow="fold")
            yield Line("")
