"""Sections as pages show them: one file, without anything to fetch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files

import jinja2

from osscar import __version__
from osscar.base.printable import printable
from osscar.report.sections import Figure, Section, Table, Text


def page(title: str, sections: Iterable[Section]) -> str:
    """Return a page; all text in it is escaped, and control characters are shown as such.

    Without a title it is what may stand among other things, as in a notebook.
    """
    told = [one for one in sections if isinstance(one, Figure) or _content(one)]
    template = _environment().get_template("page.html.j2")
    return template.render(title=title, sections=told, version=__version__)


def _content(section: Table | Text) -> Sequence[object]:
    return section.rows if isinstance(section, Table) else section.lines


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
        # Names come from strangers: nothing in them may move or hide what stands beside them.
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.tests["figure"] = lambda section: isinstance(section, Figure)
    environment.tests["table"] = lambda section: isinstance(section, Table)
    return environment
