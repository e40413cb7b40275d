"""Fields of requests by name: what ``--set NAME=VALUE`` takes, and the screen that lists them.

Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from osscar.base.errors import OptionError
from osscar.base.inputs import OwnDistance, bare, safe_repr
from osscar.recovery.request import RecoveryRequest
from osscar.report.sections import Section, Text, table
from osscar.request import PruningRequest

RECOVERY = "recovery"
"""Begins the names of a `RecoveryRequest`'s fields where a pruning is followed by a recovery."""


def value_of(text: str) -> Any:
    """Read a value: JSON where it can be, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def known_names(request: type[Any], recovers: bool = False) -> list[str]:
    """Return the names of all fields that can be set."""
    own = [one.name for one in dataclasses.fields(request)]
    more = dataclasses.fields(RecoveryRequest) if recovers else ()
    return [*own, *(f"{RECOVERY}.{one.name}" for one in more)]


def check_name(name: str, known: Collection[str], request: type[Any], where: str = "") -> None:
    """Refuse a name that is not `known`, and name the nearest (OptionError)."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        command = "prune" if request is not RecoveryRequest else "recover"
        raise OptionError(
            f"{where or '--set'} names {safe_repr(name)}, which is no field; {meant}"
            f"`osscar fields {command}` lists all"
        )


def set_name(pair: str) -> str:
    """Return the name in ``NAME=VALUE``: of a field, or with a dot of an entry of a mapping."""
    field, dot, entry = pair.partition("=")[0].strip().partition(".")
    return f"{field.replace('-', '_')}{dot}{entry}"


def read_settings(
    pairs: Iterable[str], request: type[Any], recovers: bool = False
) -> dict[str, Any]:
    """Return the fields that ``NAME=VALUE`` pairs set, those of a recovery as one mapping."""
    known = known_names(request, recovers)
    mappings = [one.name for one in dataclasses.fields(request) if is_mapping(one.type)]
    entries: dict[str, Any] = {}
    for pair in pairs:
        name, (_, equals, text) = set_name(pair), pair.partition("=")
        field, _, entry = name.partition(".")
        if not equals:
            raise OptionError(f"--set {safe_repr(pair)} is not NAME=VALUE")
        check_name(field if entry and field in mappings else name, known, request)
        if name in entries:
            raise OptionError(f"--set gives {name} more than once; give it once")
        entries[name] = value_of(text)
        if name in mappings and not isinstance(entries[name], dict):
            raise OptionError(f"--set {safe_repr(pair)} holds no mapping; give {name}.NAME=VALUE")
    found: dict[str, Any] = {}
    for name, value in sorted(entries.items()):  # a whole mapping before its entries
        field, _, entry = name.partition(".")
        found[field] = {**found.get(field, {}), entry: value} if entry else value
    return found


def as_pairs(values: Mapping[str, Any]) -> dict[str, str]:
    """Return ``NAME=VALUE`` pairs that set these fields, by their names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        flat |= {f"{name}.{entry}": one for entry, one in inner} if inner else {name: value}
    flat = {set_name(name): value for name, value in flat.items()}
    return {name: f"{name}={json.dumps(value, default=str)}" for name, value in flat.items()}


def is_mapping(annotation: Any) -> bool:
    """Whether a field holds values by name."""
    return get_origin(bare(annotation)) is get_origin(Mapping[str, Any])


# ---- what there is -----------------------------------------------------------------------


def documented(request: type[Any]) -> dict[str, str]:
    """Return what the docstring of a class says of each parameter."""
    _, _, text = (inspect.getdoc(request) or "").partition("Parameters\n----------\n")
    entries = re.findall(r"^(\w[\w, ]*)\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}


def fields_of(command: Literal["prune", "sweep", "recover"]) -> list[Section]:
    """Return a table of all fields that a command takes, and how they are set."""
    request = RecoveryRequest if command == "recover" else PruningRequest
    words = documented(request)
    columns = {
        "name": lambda one: one.name,
        "type": lambda one: _kind(one.type),
        "default": lambda one: _default(one.default),
        "what it is": lambda one: _first_sentence(words[one.name]),
    }
    how = [f"`osscar {command} --set NAME=VALUE` sets a field; in Python it is a keyword."]
    if command != "recover":
        example = f"osscar {command} --set backend_options.max_swaps=100"
        how.append(f"An entry of a mapping is NAME.ENTRY, as in `{example}`.")
    if command == "prune":
        recovery = "osscar prune --recover --set recovery.steps=100"
        how.append(f"A field of `osscar fields recover` is {RECOVERY}.NAME, as in `{recovery}`.")
    return [table("", columns, dataclasses.fields(request)), Text(tuple(how))]


def _kind(annotation: Any) -> str:
    """Return a type in words, without what only Python can give."""
    kind = bare(annotation)
    several = get_origin(kind) in (Union, UnionType)
    found: list[str] = []
    for one in get_args(kind) if several else (kind,):
        if get_origin(one) is Literal:
            found += map(str, get_args(one))
        elif one not in (NoneType, Fraction, OwnDistance):
            origin = get_origin(one) or one
            found.append(getattr(origin, "__name__", str(origin)))
    return " | ".join(found)


def _default(value: Any) -> str:
    empty = value is None or value == () or value is dataclasses.MISSING
    return "" if empty else value if isinstance(value, str) else json.dumps(value)


def _first_sentence(words: str) -> str:
    return re.sub(r"(?<=[.])\s.*", "", words).replace("`", "")
