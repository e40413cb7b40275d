"""What users give: numbers, names, sizes, distances; checked against annotations, and shown."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args, get_origin

from annotated_types import Interval

from osscar.base.errors import OptionError, OsscarError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def safe_repr(value: object) -> str:
    """Return an argument as a message shows it: short, whatever it is, and if it has no text."""
    try:
        return _SHOWN.repr(value)
    except Exception:  # it looks into numbers of any length, and into what is but called a list
        return f"an object of {type(value).__qualname__}"


def whole_number(value: object, what: str, least: int) -> int:
    """Return a number that counts something (OptionError); `what` names also the option."""
    from pydantic import Strict

    found: int = checked(what, Annotated[int, Strict(), count_from(least)], value)
    return found


def parse_size(value: object) -> int:
    """Read a size of memory: ``"8GB"``, ``"512MiB"``, or a number of bytes (OptionError)."""
    text = str(value).strip()
    found = _SIZE.fullmatch(text)
    if found is not None and isinstance(value, str | Integral) and not isinstance(value, bool):
        number, unit, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()])
        if size:
            return size
    raise OptionError(f"{safe_repr(value)} is not a size of memory; give one such as 8GB or 512MiB")


def count_from(least: int) -> Interval:
    """Return the range of whole numbers that tensors can hold, from one on."""
    return Interval(ge=least, lt=2**63)


@dataclass(frozen=True)
class Read:
    """Stands in an annotation, and reads what is given in the place of its type, or before it."""

    read: Callable[[Any], Any]
    """Returns what the field holds; a ValueError or OsscarError says what to give."""
    first: bool = False
    """Whether the type is checked then."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Have pydantic call it, and name the field where it raises an error."""
        from pydantic_core import core_schema

        def read(value: Any) -> Any:
            try:
                return self.read(value)
            except OsscarError as error:
                raise ValueError(str(error)) from error

        if self.first:
            return core_schema.no_info_before_validator_function(read, handler(source))
        return core_schema.no_info_plain_validator_function(read)


def from_percent(value: Any) -> Any:
    """Return ``"30%"`` as the fraction that it is, 0.3, and anything else as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        with suppress(ValueError, ZeroDivisionError):
            return float(Fraction(value.strip().removesuffix("%")) / 100)
    return value


PERCENT = Read(from_percent, first=True)
"""Stands in the annotation of a fraction, which may be given in per cent, such as ``"30%"``."""


def check_fields(filled: Any) -> None:
    """Make each field of a dataclass that is not at its default what its annotation says."""
    for one in dataclasses.fields(filled):
        value = getattr(filled, one.name)
        if value is not one.default and not isinstance(one.type, str):
            object.__setattr__(filled, one.name, checked(one.name, one.type, value))


def checked(name: str, annotation: Any, value: Any) -> Any:
    """Return a value, numbers as Python's own, as an annotation says (OptionError)."""
    from pydantic import ValidationError

    if getattr(value, "shape", None) == ():  # a number of numpy or torch
        value = value.item()
    try:
        return _adapter(annotation).validate_python(value, strict=isinstance(value, bool) or None)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        option = ".".join(str(one) for one in (name, *found["loc"]) if one != "[key]")
        rule = found["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
        raise OptionError(f"{option} is {safe_repr(found['input'])}; {rule}") from error


def bare(annotation: Any) -> Any:
    """Return an annotation without its range, as others read it who check nothing."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


# ---- distances ---------------------------------------------------------------------------


NATS, RELATIVE = "nats", "relative"


@dataclass(frozen=True)
class OwnDistance:
    """A distance that the caller's code measures; `source` is its name, with that of its file.

    The function is called with what the smaller model returns for a batch, what the dense one
    does, and the batch, a dict of tensors by argument name.  It returns one number a sample,
    (samples,), at least 0, and 0 where both return the same; it is differentiable in the first for
    a recovery.
    """

    function: Callable[..., Any] = field(repr=False)
    source: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> OwnDistance:
        """Name a function as one gives it in this directory, after its file if it has one."""
        known = getattr(function, "__qualname__", type(function).__name__)
        try:
            file = inspect.getsourcefile(inspect.unwrap(function)) or ""
        except TypeError:  # built in, or an object
            file = ""
        return cls(function, f"{os.path.relpath(file)}:{known}" if os.path.isfile(file) else known)

    def __str__(self) -> str:
        return self.source


def read_distance(value: Any) -> Any:
    """Read ``"nats"``, ``"relative"``, ``"file.py:function"``, or a function."""
    if isinstance(value, OwnDistance) or (isinstance(value, str) and value in (NATS, RELATIVE)):
        return value
    function = value
    if isinstance(value, str) and ":" in value:
        from solvers.own_code import importable, imported  # loads torch

        with importable(value):
            function = imported(value, OptionError)
    if not callable(function):
        raise ValueError(
            "give 'nats', 'relative', file.py:function, or a function of (outputs, dense outputs, "
            "batch) that returns one number a sample"
        )
    return OwnDistance(function, value) if isinstance(value, str) else OwnDistance.of(function)


AnyDistance: TypeAlias = str | Callable[..., Any] | OwnDistance | None
"""What `read_distance` takes, or nothing."""

DistanceOption: TypeAlias = Annotated[AnyDistance, Read(read_distance)]


# ---- files of code in settings that are kept ---------------------------------------------


_CODE = ("backend", "distance")
"""Settings that may be ``file.py:name``."""


def opened_from(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings whose files of code, named as in a folder, open from anywhere."""
    return _with_files(settings, lambda file: folder / file.expanduser())


def named_from(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a document for a folder, in which files of code that open from anywhere are named."""
    place = folder.expanduser().resolve()

    def named(file: Path) -> str:
        return os.path.relpath(file.resolve(), place) if file.is_absolute() else str(file)

    return {**document, "settings": _with_files(document["settings"], named)}


def _with_files(settings: Mapping[str, Any], named: Callable[[Path], Any]) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        file, _, own = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        return f"{named(Path(file))}:{own}" if file.endswith(".py") else value

    return {name: changed(one) if name in _CODE else one for name, one in settings.items()}
