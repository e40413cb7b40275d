"""What the site takes from elsewhere: README, the help of commands, and the fields of documents."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from pydoc import locate
from typing import Any


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Put in the place of a mark what it names; mkdocs calls this for each page.

    ``<!-- rows CLASS -->`` is a row of a table for each field of a dataclass, and
    ``<!-- fields CLASS -->`` its fields in one line; names that follow `but` are left out.
    """
    for mark, text in {"<!-- readme -->": readme, "<!-- commands -->": help_of_commands}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return re.sub(r"<!-- (rows|fields) (\S+)(?: but (.+?))? -->", _of_class, markdown)


def readme() -> str:
    """Return README with its links as they are from the first page of the site."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def help_of_commands() -> str:
    """Return the help of each command as Markdown, a section for each."""
    from osscar.cli.commands import app

    _, _, text = app.generate_docs(output_format="markdown").partition("\n## osscar demo")
    text = f"## osscar demo{text}".replace("```console", "```")
    return re.sub(r"\n {2}(osscar .*)", r"\n\n    \1\n", text)


_LISTED = re.compile(r"^(\w+(?:, \w+)*)(?:$|: )((?:.+)?(?:\n {4}.+)*)", re.MULTILINE)
"""Names of fields and what they are: indented below them, or behind a colon."""


def _of_class(mark: re.Match[str]) -> str:
    found = [
        (names, text)
        for names, text in described(locate(mark[2]))
        if not set(names) & set((mark[3] or "").split())
    ]
    if mark[1] == "fields":
        return _in_line(found)
    return "\n".join(f"| {_listed(names)} | {text} |" for names, text in found)


def described(of: Any) -> list[tuple[list[str], str]]:
    """Return the fields of a dataclass, and what its docstrings and those of its fields say."""
    words, hints = _docstrings(of), typing.get_type_hints(of)
    found: list[tuple[list[str], str]] = []
    for field in dataclasses.fields(of):
        hint = hints[field.name]
        own = [_fields_of(one) for one in _classes(hint)]
        text = ": ".join(filter(None, [words.get(field.name), "; ".join(own)]))
        several = typing.get_origin(hint) in (list, tuple)
        name = f"{field.name}{'[]' if several else ''}"
        if text and found and found[-1][1] == text:
            found[-1][0].append(name)
        else:
            found.append(([name], text))
    return found


def _fields_of(of: type) -> str:
    """Return the fields of a class in one line, or where the reference has them."""
    package = of.__module__.partition(".")[0]
    if of.__name__ in locate(package).__all__:  # type: ignore[attr-defined]
        return f"the fields of [`{of.__name__}`][{package}.{of.__name__}]"
    return _in_line(described(of))


def _in_line(found: list[tuple[list[str], str]]) -> str:
    return ", ".join(_listed(names) + (text and f" ({text})") for names, text in found)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _classes(hint: Any) -> Iterator[type]:
    """Yield the dataclasses in a type."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in typing.get_args(hint):
        yield from _classes(argument)


def _docstrings(of: type) -> dict[str, str]:
    """Return what a dataclass says of each field: under its parameters, or below the field."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(of.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        text = ast.get_docstring(tree) or ""
        for names, about in _LISTED.findall(text):
            found |= dict.fromkeys(names.split(", "), about)
        for field, below in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(below.value)
    return {name: _as_markdown(text) for name, text in found.items()}


def _as_markdown(text: str) -> str:
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    text = re.sub(r"\bNone\b", "`null`", text).removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
