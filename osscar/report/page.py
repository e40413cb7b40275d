"""What all pages share: one look, and one way to write names, tables and what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, TypeAlias

import jinja2
from markupsafe import Markup, escape
from rich.table import Column, Table

from osscar import __version__
from osscar.base.numbers import decimals
from osscar.base.printable import pluralize, printable
from osscar.report.tables import new_table

Part: TypeAlias = str | Table | Mapping[str, object]
"""Of what a result shows of itself: a sentence, a table, or a picture."""


def render(template: str, **content: Any) -> str:
    """Return a page; all text in it is escaped, and control characters are shown as such."""
    return _environment().get_template(template).render(version=__version__, **content)


def loading(document: Mapping[str, Any], directory: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the model in a directory is loaded, and what can be done with it.

    `data` are those that pruned or recovered it: others have to be of their sort.
    """
    text, own = "seqlen" in data, document["own_code"]
    images = data.get("preprocessing") is not None
    given = "--text FILE" if text else "--images PATH" if images else "--inputs FILE"
    export = f"osscar export {directory} --format onnx{' --dense DENSE' if own else ''}"
    steps = ["eval"] if document.get("recovery") else ["eval", "recover"]
    if text and document.get("form") == "exported":
        steps = []  # a program can neither generate nor be refitted
    commands = [f"osscar {step} {directory} --dense DENSE {given}" for step in steps]
    return {"directory": directory, "own_code": own, "commands": [*commands, export]}


@dataclass(frozen=True)
class Settings:
    """What a result was made with, by name, in three parts: asked, as by default, and known."""

    asked: Mapping[str, Any] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        request: type[Any],
        prefix: str = "",
        chosen: Mapping[str, Any] = MappingProxyType({}),
    ) -> Settings:
        """Part the settings of a request; of those that nobody asked for some were `chosen`."""
        usual = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory()
            for one in fields(request)
        }
        usual = json.loads(json.dumps(usual))
        asked = {n: v for n, v in settings.items() if v != usual[n]}
        default = {n: v for n, v in {**settings, **chosen}.items() if n not in asked}
        return cls(*({prefix + n: v for n, v in part.items()} for part in (asked, default)))

    def __or__(self, other: Settings) -> Settings:
        """Return the settings of both."""
        return Settings(
            {**self.asked, **other.asked},
            {**self.default, **other.default},
            {**self.known, **other.known},
        )

    def tables(self) -> Iterator[tuple[str, Table]]:
        """Yield a heading and a table with a row for each that says something, part by part."""
        parts = {
            "What was asked": self.asked,
            "As by default": self.default,
            "What it was made of": self.known,
        }
        for heading, part in parts.items():
            rows = [
                (key.replace("_", " "), _as_text(value))
                for key, value in part.items()
                if value is not None and value is not False and value not in ("", [], {})
            ]
            if rows:
                yield heading, new_table("", "", "", rows=rows)


def told(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what is told of data, by name, but not by what they are recognized."""
    return {f"{name} {key}": value for key, value in data.items() if key != "seen"}


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@cache
def _environment() -> jinja2.Environment:
    def read(name: str) -> str:
        return files("osscar.report").joinpath("templates", name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters.update(
        number=decimals, breakable=_breakable, columns=_columns, rows=_rows, pluralize=pluralize
    )
    return environment


def _shown(value: object) -> object:
    """Names come from strangers: nothing in them may move or hide what stands beside them."""
    return printable(value, keep="\n") if type(value) is str else value


def _breakable(name: str) -> Markup:
    """Let a long name go on in the next line after its dots, slashes, dashes and underscores."""
    text = escape(printable(name))
    for mark in "./-_":  # none of them is part of what replaces another
        text = text.replace(mark, Markup(f"{mark}<wbr>"))
    return text


def _columns(table: Table) -> list[Column]:
    """Return the columns of a table in which anything stands."""
    return [
        column
        for column in table.columns
        if not table.row_count or any(str(cell) for cell in column.cells)
    ]


def _rows(columns: Sequence[Column]) -> Iterator[list[tuple[str, Any]]]:
    """Yield the rows of a table, each cell with its class: a number, a name, or words."""
    for row in zip(*(column.cells for column in columns), strict=True):
        yield [
            ("n", cell.plain)
            if column.justify == "right"
            else ("wrap" if index else "name", _breakable(cell.plain))
            for index, (column, cell) in enumerate(zip(columns, row, strict=True))
        ]
