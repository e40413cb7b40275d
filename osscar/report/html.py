"""Sections as pages show them: one file, without anything to fetch."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import cache

import jinja2

from osscar import __version__
from osscar.base.printable import printable
from osscar.report.sections import Figure, Section, Table


def page(title: str, sections: Iterable[Section]) -> str:
    """Return a page, or without a title a part of one, as for a notebook; all text is escaped."""
    shown = [one for one in sections if not (isinstance(one, Table) and not one.rows)]
    template = _environment().get_template("page.html.j2")
    return template.render(title=title, sections=shown, version=__version__)


@cache
def _environment() -> jinja2.Environment:
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
