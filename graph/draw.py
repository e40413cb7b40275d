"""Drawing coupling groups as SVG, one row a group, in execution order; layers alike share a row."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from graph.groups import CouplingGroup, Role, Slot, UnitKind

_COLOURS = {
    UnitKind.HEADS: "#3b6fb6",
    UnitKind.NEURONS: "#c2702d",
    UnitKind.CHANNELS: "#3f8f5f",
    UnitKind.HIDDEN: "#7d5aa6",
    UnitKind.EXPERTS: "#b0557f",
    UnitKind.OTHER: "#6b7280",
}
_PALE = 0.35
_COLUMNS = {
    "producers": (Role.PRODUCER,),
    "pass-through": (Role.PASS_THROUGH,),
    "consumers": (Role.CONSUMER, Role.ASIDE),
}
_LINE, _PAD, _GAP, _SWATCH = 16, 8, 10, 12
_TITLE_CHARACTERS, _COLUMN_CHARACTERS = 44, 36
_TITLE_WIDTH, _COLUMN_WIDTH = 310, 252
_SHOWN = 6
"""How many slots of one role are drawn; the rest is counted."""

_WIDTH = _TITLE_WIDTH + 3 * _COLUMN_WIDTH + 5 * _GAP
"""Pixels of which a sheet of A4 that lies on its side has 1123."""

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


@dataclass
class _Canvas:
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, width: int, height: int, style: str) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" {style}/>'
        )

    def text(self, x: int, y: int, text: str, style: str = "") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>')

    def arrow(self, x: int, y: int, colour: str) -> None:
        self.parts.append(f'<path d="M{x} {y - 4}l{_GAP - 2} 4l-{_GAP - 2} 4z" fill="{colour}"/>')


@dataclass(frozen=True)
class _Row:
    """What is written of a group; alike of groups that differ in the number of their layer."""

    kind: UnitKind
    prunable: bool
    title: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, group: CouplingGroup) -> _Row:
        number = _NUMBER.search(group.name)
        name, layer = group.name, ""
        if number:
            layer = group.name[: number.end() + 1]
            name = f"{group.name[: number.start()]}N{group.name[number.end() :]}"
        columns = (
            _entries((s for s in group.slots if s.role in roles), layer)
            for roles in _COLUMNS.values()
        )
        title = _title(group, _fit(name, _TITLE_CHARACTERS), layer)
        return cls(group.kind, group.prunable, title, tuple(columns))


def render(groups: Sequence[CouplingGroup]) -> str:
    """Return an SVG document with a row for each group, or for several that are alike.

    A row shows the group and the tensors that produce its units, pass them through and consume
    them, with the dimension of each and how many of its indices a unit owns.  Colours tell kinds;
    frozen groups are pale and say why.
    """
    rows: dict[_Row, list[CouplingGroup]] = {}
    for group in groups:
        rows.setdefault(_Row.of(group), []).append(group)
    canvas = _Canvas()
    y = _legend(canvas, list(dict.fromkeys(row.kind for row in rows)))
    x = _TITLE_WIDTH + 2 * _GAP
    for title in _COLUMNS:
        canvas.text(x + _PAD, y + _LINE, title, 'font-weight="bold"')
        x += _COLUMN_WIDTH + _GAP
    y += 2 * _LINE
    for row, alike in rows.items():
        y += _draw(canvas, row, _numbers(alike), y) + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" '
        f'viewBox="0 0 {_WIDTH} {y}" style="max-width: 100%; height: auto" '
        f'font-family="monospace" font-size="11"><rect width="{_WIDTH}" height="{y}" '
        'fill="#ffffff"/>'
    )
    return "\n".join((head, *canvas.parts, "</svg>\n"))


def _legend(canvas: _Canvas, kinds: Sequence[UnitKind]) -> int:
    """Say what colours and words mean, and return how high that is."""
    x, y = _GAP, _GAP
    entries = [(kind.value, _COLOURS[kind], 1.0) for kind in kinds]
    for name, colour, opacity in (*entries, ("pale: frozen", _COLOURS[UnitKind.OTHER], _PALE)):
        canvas.box(x, y, _SWATCH, _SWATCH, f'fill="{colour}" fill-opacity="{opacity}"')
        canvas.text(x + _SWATCH + _PAD, y + _SWATCH - 2, name)
        x += 120
    y += _LINE + _SWATCH
    for line in (
        "Units of a group leave together: rows of what produces them, and columns of what consumes "
        "them. [d] xK: along dimension d a unit owns K indices.",
        "N: the number of a layer; groups that differ in it alone are drawn once, and ~ stands "
        "for the module of that layer.",
    ):
        canvas.text(_GAP, y, line, 'fill="#4b5563"')
        y += _LINE
    return y


def _draw(canvas: _Canvas, row: _Row, numbers: str, y: int) -> int:
    """Draw one row at height `y` and return how high it is."""
    title = (*row.title[:1], *((numbers,) if numbers else ()), *row.title[1:])
    height = max(len(lines) for lines in (title, *row.columns)) * _LINE + 2 * _PAD
    colour, opacity = _COLOURS[row.kind], 1.0 if row.prunable else _PALE
    canvas.box(_GAP, y, _TITLE_WIDTH, height, f'fill="{colour}" fill-opacity="{opacity}"')
    shade = "#ffffff" if row.prunable else "#1f2937"
    for index, line in enumerate(title):
        canvas.text(_GAP + _PAD, y + _PAD + 12 + index * _LINE, line, f'fill="{shade}"')
    x = _TITLE_WIDTH + 2 * _GAP
    style = f'fill="{colour}" fill-opacity="0.10" stroke="{colour}" stroke-opacity="{opacity}"'
    for lines in row.columns:
        if lines:
            canvas.arrow(x - _GAP + 1, y + height // 2, colour)
            canvas.box(x, y, _COLUMN_WIDTH, height, style)
        for index, line in enumerate(lines):
            canvas.text(x + _PAD, y + _PAD + 12 + index * _LINE, line)
        x += _COLUMN_WIDTH + _GAP
    return height


def _title(group: CouplingGroup, name: str, layer: str) -> tuple[str, ...]:
    lines = [name, f"{group.units} {group.kind.value}, {group.removable} each"]
    for freeze in group.frozen[:2]:
        reason = f"frozen: {freeze.reason}"
        lines += textwrap.wrap(reason, _TITLE_CHARACTERS, subsequent_indent="  ")
        if freeze.operator:
            lines.append(_fit(f"  by {freeze.operator}", _TITLE_CHARACTERS))
        if freeze.module:
            lines.append(_fit(f"  in {_within(freeze.module, layer)}", _TITLE_CHARACTERS))
    return tuple(lines)


def _entries(slots: Iterable[Slot], layer: str) -> tuple[str, ...]:
    lines = []
    for slot in slots:
        tail = f" [{slot.dim}] x{slot.width}"
        tail += ", in training" if slot.role is Role.ASIDE else ""
        lines.append(_fit(_within(slot.tensor, layer), _COLUMN_CHARACTERS - len(tail)) + tail)
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"]
    return tuple(lines)


def _numbers(groups: Sequence[CouplingGroup]) -> str:
    """Say which layers groups are of that share a row; nothing where their names have no number."""
    found = [match for group in groups if (match := _NUMBER.search(group.name))]
    numbers = sorted(int(match[0]) for match in found)
    spans = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *_, last = (number for _, number in [*run] * 2)
        spans.append(str(first) if first == last else f"{first} to {last}")
    return _fit(f"N = {', '.join(spans)}", _TITLE_CHARACTERS) if spans else ""


def _within(name: str, layer: str) -> str:
    """Shorten the name of what lies in the layer of a group."""
    return f"~.{name.removeprefix(layer)}" if layer and name.startswith(layer) else name


def _fit(text: str, width: int) -> str:
    """Shorten a text from the left, where qualified names say least."""
    return text if len(text) <= width else f"…{text[-width + 1 :]}"
