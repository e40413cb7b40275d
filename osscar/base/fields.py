"""Values that users give for fields and options, checked by pydantic against annotations.

Ranges are those of `annotated_types`, which pydantic reads.  Pydantic itself is loaded with the
first value that is checked, so that help of the command line comes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from annotated_types import Interval

from osscar.base.errors import OptionError, OsscarError
from osscar.base.inputs import safe_repr

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def count_from(least: int) -> Interval:
    """Return the range of whole numbers that tensors can hold, from one on."""
    return Interval(ge=least, lt=2**63)


@dataclass(frozen=True)
class Read:
    """Stands in an annotation, and reads what is given in the place of its type."""

    read: Callable[[Any], Any]
    """Returns what the field holds; a ValueError or OsscarError says what to give."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Have pydantic call it, and name the field where it raises an error."""
        from pydantic_core import core_schema

        def read(value: Any) -> Any:
            try:
                return self.read(value)
            except OsscarError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_plain_validator_function(read)


def check_fields(filled: Any) -> None:
    """Make each field of a dataclass what its annotation says, as `checked` does.

    A field at its default is left as it is, and so is one whose annotation is quoted.
    """
    for one in dataclasses.fields(filled):
        value = getattr(filled, one.name)
        if value is not one.default and not isinstance(one.type, str):
            object.__setattr__(filled, one.name, checked(one.name, one.type, value))


def checked(name: str, annotation: Any, value: Any) -> Any:
    """Return a value of an option as its annotation says.

    Numbers of any library become Python's own; True and False are no numbers.

    Raises
    ------
    OptionError
        If it is of another type, or out of range; the message says what to give.
    """
    from pydantic import ValidationError

    if getattr(value, "shape", None) == ():  # a number of numpy or torch
        value = value.item()
    try:
        return _adapter(annotation).validate_python(value, strict=isinstance(value, bool) or None)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        option = ".".join(map(str, (name.replace("_", "-"), *found["loc"])))
        should = found["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        should = _WORDS.get(found["type"], should)
        raise OptionError(f"{option} is {safe_repr(found['input'])}; {should}") from error


_WORDS = {
    "too_short": "give at least one",
    "int_parsing_size": "it should be a whole number below 2^63",
}
"""In the place of what pydantic says."""


def bare(annotation: Any) -> Any:
    """Return an annotation without its range, as others read it who check nothing."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
