"""Drawing coupling groups as SVG, one row a group, in execution order."""

from __future__ import annotations

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
    UnitKind.OTHER: "#6b7280",
}
_COLUMNS = ((Role.PRODUCER,), (Role.PASS_THROUGH,), (Role.CONSUMER, Role.ASIDE))
_LINE, _PAD, _GAP = 16, 8, 10
_TITLE_WIDTH, _COLUMN_WIDTH = 330, 400
_SHOWN = 6
"""How many slots of one role are drawn; the rest is counted."""

_WIDTH = _TITLE_WIDTH + 3 * _COLUMN_WIDTH + 5 * _GAP


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


def render(groups: Sequence[CouplingGroup]) -> str:
    """Return an SVG document with a row for each group.

    A row shows the group and the tensors that produce its units, pass them through and consume
    them, with the dimension of each and how many of its indices a unit owns.  Colours tell kinds;
    frozen groups are pale and say why.
    """
    canvas = _Canvas()
    x = _TITLE_WIDTH + 2 * _GAP
    for title in ("producers", "pass-through", "consumers"):
        canvas.text(x + _PAD, _LINE + 4, title, 'font-weight="bold"')
        x += _COLUMN_WIDTH + _GAP
    y = 2 * _LINE
    for group in groups:
        y += _row(canvas, group, y) + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" '
        f'viewBox="0 0 {_WIDTH} {y}" font-family="monospace" font-size="11">'
        f'<rect width="{_WIDTH}" height="{y}" fill="#ffffff"/>'
    )
    return "\n".join((head, *canvas.parts, "</svg>\n"))


def _row(canvas: _Canvas, group: CouplingGroup, y: int) -> int:
    """Draw one group at height `y` and return how high its row is."""
    title = _title(group)
    columns = [_entries(s for s in group.slots if s.role in roles) for roles in _COLUMNS]
    height = max(len(lines) for lines in (title, *columns)) * _LINE + 2 * _PAD
    colour = _COLOURS[group.kind]
    opacity = 1.0 if group.prunable else 0.35
    canvas.box(_GAP, y, _TITLE_WIDTH, height, f'fill="{colour}" fill-opacity="{opacity}"')
    shade = "#ffffff" if group.prunable else "#1f2937"
    for index, line in enumerate(title):
        canvas.text(_GAP + _PAD, y + _PAD + 12 + index * _LINE, line, f'fill="{shade}"')
    x = _TITLE_WIDTH + 2 * _GAP
    style = f'fill="{colour}" fill-opacity="0.10" stroke="{colour}" stroke-opacity="{opacity}"'
    for lines in columns:
        if lines:
            canvas.arrow(x - _GAP + 1, y + height // 2, colour)
            canvas.box(x, y, _COLUMN_WIDTH, height, style)
        for index, line in enumerate(lines):
            canvas.text(x + _PAD, y + _PAD + 12 + index * _LINE, line)
        x += _COLUMN_WIDTH + _GAP
    return height


def _title(group: CouplingGroup) -> list[str]:
    lines = [_fit(group.name, 45), f"{group.units} {group.kind.value}, {group.removable} each"]
    for freeze in group.frozen[:2]:
        lines += textwrap.wrap(f"frozen: {freeze.reason}", 45, subsequent_indent="  ")
        if freeze.operator:
            lines.append(_fit(f"  by {freeze.operator}", 45))
        if freeze.module:
            lines.append(_fit(f"  in {freeze.module}", 45))
    return lines


def _entries(slots: Iterable[Slot]) -> list[str]:
    lines = [
        f"{_fit(slot.tensor, 42)} [{slot.dim}] x{slot.width}"
        + (", in training" if slot.role is Role.ASIDE else "")
        for slot in slots
    ]
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _fit(text: str, width: int) -> str:
    """Shorten a text from the left, where qualified names say least."""
    return text if len(text) <= width else f"…{text[-width + 1 :]}"
