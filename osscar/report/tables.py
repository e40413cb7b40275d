"""What all tables share: cells are taken as they are, and shown whole however narrow it gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from osscar.base.numbers import percent
from osscar.base.printable import printable

_AIRY, _TIGHT = (0, 1, 0, 1), (0, 1, 0, 0)
"""Paddings: top, right, bottom, left."""

_PIECE = 16
"""Columns of a terminal that a piece of a row's name has if it is folded."""

_ENDLESS = 1 << 16
"""Columns in which any cell fits."""


class _PlainTable(Table):
    """A table whose cells are taken as they are: names of things are neither markup nor control.

    None of them is ever cut.  Where a terminal is too narrow, texts go over several lines, then
    columns move together, then names are folded; numbers stay whole.  If all that does not do, each
    row becomes a list of its own.  A file has no edge: there lines are as long as names need.
    """

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        super().add_row(*(_plain(cell) for cell in cells), **more)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        endless = options.update_width(_ENDLESS)
        spans = [self._span(console, endless, index) for index in range(len(self.columns))]
        whole = [least for least, _ in spans]
        folded = [min(whole[0], _PIECE), *whole[1:]]
        for padding, least in ((_AIRY, whole), (_TIGHT, whole), (_TIGHT, folded)):
            edges = len(spans) * (1 + padding[1] + padding[3]) + 1
            room = options.max_width - edges
            widths = _narrowed([most for _, most in spans], least, room)
            if sum(widths) <= room or not console.is_terminal:
                self.padding, self.width = padding, sum(widths) + edges
                for column, width in zip(self.columns, widths, strict=True):
                    column.width = width
                yield from super().__rich_console__(console, options)
                return
        yield from self._lists()

    def _span(self, console: Console, options: ConsoleOptions, index: int) -> tuple[int, int]:
        """Return how wide a column is with no word of it folded, and with no line of it."""
        column = self.columns[index]
        measures = [Measurement.get(console, options, cell) for cell in column.cells]
        heading = Measurement.get(console, options, column.header)
        most = max((measure.maximum for measure in measures), default=0)
        # Names are to be copied whole, and "6 of 8" is one number.
        keeps_lines = index == 0 or column.justify == "right"
        least = most if keeps_lines else max((m.minimum for m in measures), default=0)
        return max(least, heading.minimum), max(most, heading.maximum)

    def _lists(self) -> Iterator[RenderableType]:
        """Yield each row as a list of what stands in its columns."""
        if self.title:
            yield Text(str(self.title), style="bold")
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield Text("")
            fields = Table.grid(padding=(0, 2, 0, 0))
            fields.add_column(overflow="fold", style="dim")
            fields.add_column(overflow="fold")
            for column, cell in zip(self.columns, row, strict=True):
                fields.add_row(column.header, cell)
            yield fields
        yield Text("")


def new_table(
    title: str, *columns: str, rows: Iterable[Sequence[RenderableType | None]] = ()
) -> Table:
    """Return a table, which terminals and pages show alike.

    A column whose name ends in ``>`` holds numbers, put to the right.
    """
    table = _PlainTable(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    for column in columns:
        table.add_column(
            Text(printable(column.removesuffix(">").rstrip())),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    return table


def _narrowed(widths: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return the widths, the widest of which are narrowed until they fit, as far as they may be."""
    narrowed = list(widths)
    while sum(narrowed) > room:
        wide = [index for index, width in enumerate(narrowed) if width > least[index]]
        if not wide:
            break
        narrowed[max(wide, key=narrowed.__getitem__)] -= 1
    return narrowed


def _plain(cell: RenderableType | None) -> RenderableType | None:
    if isinstance(cell, Text):
        return Text(printable(cell.plain), style=cell.style)
    return Text(printable(cell)) if isinstance(cell, str) else cell


_MOST_NATS = 700.0
"""Of more, the exponential is no number."""

LIMIT_IN_WORDS = (
    "the gap that every root bound leaves, however long it is searched for; none known where it "
    "may leave none"
)
"""What the column "limit" of tables says; a root bound has one matrix of multipliers."""


def limit_cell(gap: float | None, digits: int = 2) -> str:
    """Return the least gap that a root bound can leave; a limit of zero tells nothing."""
    return "none known" if gap is not None and gap <= 0 else percent(gap, digits)


def nats(value: float) -> str:
    """Return a divergence with the digits that it has."""
    if value >= 0.001 or not value:
        return f"{value:.4f}"
    return f"{value:.6f}" if value >= 1e-5 else f"{value:.1e}"


def divergence_in_words(value: float, what: str) -> str:
    """Say what a divergence in nats comes to where a token, or a class, is predicted.

    The cross entropy of what a model draws is its own entropy plus the divergence from it.
    """
    times = f"exp({nats(value)}) = {math.exp(min(value, _MOST_NATS)):.4g} times"
    if what == "token":
        return (
            f"A divergence of {nats(value)} nats means: of text that the dense model writes, the "
            f"perplexity is {times} the dense one's."
        )
    return (
        f"A divergence of {nats(value)} nats means: a {what} drawn as the dense model predicts is, "
        f"in the geometric mean, {times} less likely here than there."
    )
