"""JSON from outside: read without being believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from osscar.base.errors import FileError
from osscar.base.files import reason_of

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Configures dataclasses that `read_json` reads, by `with_config`; what they contain follows.

Of the types that JSON has, none is taken for another; no field is missing or left over.
"""

MOST_NUMBERS = 2**26
"""The most that a tensor has which is made by what a file says of it, whoever has written that."""

_SHOWN = 60
"""Characters of an offending value that a message shows."""


def read_json(path: Path, schema: type[T]) -> T:
    """Read a JSON file by a schema, a dataclass configured as `STRICT` or a mapping (FileError)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    return parse_json(content, schema, path)


def parse_json(content: str | bytes, schema: type[T], path: str | os.PathLike[str]) -> T:
    """Parse and check the content of a JSON file, as `read_json` does."""
    try:
        return cast(T, _adapter(schema).validate_json(content, strict=True))
    except ValidationError as error:
        raise FileError(path, _first(error)) from error


def validated(content: Any, schema: type[T], name: str | os.PathLike[str]) -> T:
    """Check what JSON was parsed to against a schema; a FileError names the field."""
    # As JSON: of Python's own values, pydantic would take tuples alone for tuples.
    return parse_json(json.dumps(content), schema, name)


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def _first(error: ValidationError) -> str:
    """Say the first thing that is wrong: where, what, and the value."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    complete = found["type"] in ("missing", "value_error", "json_invalid")
    shown = "" if complete else f", not {found['input']!r}"
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "..."
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] in ("dataclass_type", "dict_type"):
        message = "input should be an object"
    message = message[:1].lower() + message[1:]
    return f"{place}: {message}{shown}" if place else f"{message}{shown}"
