"""JSON from outside: read without being believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from osscar.base.errors import FileError
from osscar.base.files import reason_of
from osscar.base.inputs import read_bytes

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Configures dataclasses that `read_json` reads, by `with_config`; what they contain follows.

Of the types that JSON has, none is taken for another; no field is missing or left over.
"""

MEGABYTE = 2**20

_LARGEST = 2**63
"""Whole numbers lie below it and above its negative: tensors hold no others."""

_SHOWN = 60
"""Characters of an offending value that a message shows."""


def read_json(path: Path, schema: type[T], *, limit: int = 16 * MEGABYTE) -> T:
    """Read a JSON file that anyone may have written, of at most `limit` bytes.

    `schema` is what it has to hold: a dataclass that is configured as `STRICT`.  A FileError says
    that it is missing, too large, no JSON (as RFC 8259 has it: no NaN; no key twice), or nested too
    deeply, or names the field that is not as the schema says.
    """
    return parse_json(_read_text(path, limit), schema, path)


def validated(content: Any, schema: type[T], name: str | os.PathLike[str]) -> T:
    """Check what JSON was parsed to against a schema; a FileError names the field."""
    # As JSON: of Python's own values, pydantic would take tuples alone for tuples.
    with _named(name):
        return cast(T, _adapter(schema).validate_json(json.dumps(content), strict=True))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of another project's, whose fields nobody here can list.

    It comes in on the same way as with `read_json`, less the schema. Infinity is let through, since
    some families write it (``time_step_limit`` of Mamba), and so are large numbers
    (``model_max_length`` of tokenizers is 1e30). NaN and a key that stands there twice are refused.
    """

    def number(text: str) -> float:
        return _finite(text) if text == "NaN" else float(text)

    found = _parsed(_read_text(path, 64 * MEGABYTE), path, parse_constant=number)
    if not isinstance(found, dict):
        raise FileError(path, f"it holds a {type(found).__name__}, not an object")
    return found


def parse_json(text: str, schema: type[T], path: str | os.PathLike[str]) -> T:
    """Parse and check the text of a JSON file, as `read_json` does."""
    found = _parsed(text, path, parse_constant=_finite, parse_float=_finite, parse_int=_moderate)
    return validated(found, schema, path)


def _read_text(path: Path, limit: int) -> str:
    try:
        return read_bytes(path, limit).decode("utf-8")
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise FileError(path, f"it is not UTF-8 (byte {error.start})") from error


def _parsed(text: str, path: str | os.PathLike[str], **numbers: Any) -> Any:
    """Parse a text, and refuse what parsers of JSON differ about: not all would read the same.

    That is a key that stands there twice, and half of a surrogate pair.
    """
    with _named(path):
        found = json.loads(text, object_pairs_hook=_distinct, **numbers)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what is wrong with a file as a `FileError`."""
    try:
        yield
    except ValidationError as error:
        raise FileError(path, _first(error)) from error
    except RecursionError as error:
        raise FileError(path, "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise FileError(path, f"it is not JSON: {error}") from error
    except UnicodeEncodeError as error:
        raise FileError(path, "it is not JSON: it escapes half of a surrogate pair") from error
    except ValueError as error:
        raise FileError(path, str(error)) from error


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.{_SHOWN}} is not a finite number")
    return value


def _moderate(text: str) -> int:
    if len(text) > 20 or not -_LARGEST < int(text) < _LARGEST:
        raise ValueError(f"{text:.{_SHOWN}} is not a number below 2^63")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r:.{_SHOWN}}")
    return found


def _first(error: ValidationError) -> str:
    """Say the first thing that is wrong: where, what, and the value."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    complete = found["type"] in ("missing", "value_error")
    shown = "" if complete else f", not {found['input']!r}"
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "..."
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] in ("dataclass_type", "dict_type"):
        message = "input should be an object"
    message = message[:1].lower() + message[1:]
    return f"{place}: {message}{shown}" if place else f"{message}{shown}"
