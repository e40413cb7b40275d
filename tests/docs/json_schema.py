"""What `docs/json.md` says of the documents that commands write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pydoc import locate
from typing import Any

import docs_hooks
from tests.docs.pages import ROOT

EVERYWHERE = {"schema", "osscar_version"}
"""Fields of every document, which the page describes at its top."""

FREE = {
    *("evaluation", "shapes", "dtypes", "groups", "options", "backend_options", "capabilities"),
    *("widths", "measured", "errors", "before", "inputs", "outputs", "stages"),
}
"""Fields whose own fields are described elsewhere, or are the user's."""


@cache
def sections() -> dict[str, str]:
    """The part of the page that describes a schema, by the schema's name."""
    text = docs_hooks.on_page_markdown((ROOT / "docs/json.md").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        for schema in re.findall(r"`(osscar\.\w+/\d+)`", heading):
            found[schema] = body
    return found


def undescribed(document: dict[str, Any]) -> set[str]:
    """The fields of a document, at any depth, that the page does not name.

    Where it says *as in* another schema, that one's fields are the same, and *the fields of* a
    class are described in the reference.
    """
    described = sections()
    body = described[document["schema"]]
    body += "".join(described[name] for name in re.findall(r"as in `(osscar\.\w+/\d+)`", body))
    named = set(re.findall(r"`(?:\w+\[?\]?\.)*(\w+)(?:\[\])?`", body))
    for of in re.findall(r"the fields of \[`\w+`\]\[([\w.]+)\]", body):
        found: Any = locate(of)
        named |= {field.name for field in dataclasses.fields(found)}
    return set(_fields(document)) - named - EVERYWHERE


def _fields(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _fields(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            if name not in FREE or isinstance(item, list):
                yield from _fields(item)


def missing(document: dict[str, Any]) -> set[str]:
    """The rows of the page, by their fields, of which nothing is in a document.

    What the page says is there only at times is left out.
    """
    body = sections()[document["schema"]]
    firsts = [row.split("|")[1] for row in body.splitlines() if row.startswith("| `")]
    rows = [first for first in firsts if f"|{first}| only" not in body]
    there = set(_fields(document))
    return {row.strip() for row in rows if not there.intersection(re.findall(r"`(\w+)", row))}
