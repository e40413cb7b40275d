"""Results that show themselves, and fields of dataclasses as columns of tables."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from osscar.report.sections import Section


class Shown(ABC):
    """A result that shows its `sections`, in a terminal or a notebook."""

    @abstractmethod
    def sections(self) -> Iterable[Section]:
        """Return the tables, figures and texts of a result."""

    def summary(self) -> str:
        """Return the texts and tables of a result as a terminal shows them."""
        from rich.console import Console

        from osscar.report.terminal import print_section

        file = io.StringIO()
        console = Console(file=file, width=140, color_system=None)
        for section in self.sections():
            print_section(console, section)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        from osscar.report.html import page

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
