"""How results show themselves, in a terminal or as a page: one file, without anything to fetch."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as Grid
from rich.text import Text as Line

from osscar import __version__
from osscar.base.printable import printable
from osscar.report.sections import Figure, Section, Table, Text


class Shown(ABC):
    """A result that shows its `sections`, in a terminal or a notebook."""

    @abstractmethod
    def sections(self) -> Iterable[Section]:
        """Return the tables, figures and texts of a result."""

    def summary(self) -> str:
        """Return the texts and tables of a result as a terminal shows them."""
        file = io.StringIO()
        console = Console(file=file, width=140, color_system=None)
        for section in self.sections():
            print_section(console, section)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        return page("", self.sections())


@dataclass(frozen=True)
class Column:
    """How tables show a field, as ``Annotated[float, Column("loss >", decimals)]``."""

    title: str
    """The title of the column; one that ends in ``>`` is that of numbers."""
    value: Callable[[Any], str] = str
    """Writes the value of the field."""
    row: Callable[[Mapping[str, Any]], str] | None = None
    """Writes the cell from all fields, by name, in place of `value`."""
    note: str = ""
    """What the column tells, where its title is not enough."""

    def text(self, name: str, row: Mapping[str, Any]) -> str:
        """Return the cell of the field of this name; empty for a value that is not known."""
        if self.row is not None:
            return self.row(row)
        return "" if row.get(name) is None else self.value(row[name])


def columns(of: type[Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Return by title what writes a cell from a mapping, for each field that a class declares."""
    return {one.title: partial(one.text, name) for name, one in _declared(of)}


def notes(of: type[Any]) -> dict[str, str]:
    """Return the notes of the same columns by title."""
    return {one.title: one.note for _, one in _declared(of) if one.note}


def _declared(of: type[Any]) -> Iterator[tuple[str, Column]]:
    hints = get_type_hints(of, include_extras=True)
    for name in of.__annotations__:
        for one in getattr(hints[name], "__metadata__", ()):
            if isinstance(one, Column):
                yield name, one


# ---- terminals ---------------------------------------------------------------------------


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


# ---- pages -------------------------------------------------------------------------------


def page(title: str, sections: Iterable[Section]) -> str:
    """Return a page, or without a title a part of one, as for a notebook; all text is escaped."""
    shown = [one for one in sections if not (isinstance(one, Table) and not one.rows)]
    template = _environment().get_template("page.html.j2")
    return str(template.render(title=title, sections=shown, version=__version__))


@cache
def _environment() -> Any:
    import jinja2  # here, since help needs none

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("osscar.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Names come from strangers: nothing in them may move or hide what stands beside them.
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.tests["figure"] = lambda section: isinstance(section, Figure)
    environment.tests["table"] = lambda section: isinstance(section, Table)
    return environment
