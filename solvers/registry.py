"""Which backends there are: registered through the entry-point group ``osscar.backends``.

Those that choose whole experts have a group of their own, ``osscar.expert_backends``.  Any
installed package can add to either.  A class that is in none is named as ``file.py:Class`` or
``module:Class``; who names it runs its code.
"""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from solvers.errors import BackendError
from solvers.own_code import importable, imported
from solvers.protocol import Backend, Capabilities

BACKENDS = "osscar.backends"
EXPERT_BACKENDS = "osscar.expert_backends"
"""The group of those that take a `solvers.ExpertProblem`."""

_ANY_TYPE = ConfigDict(arbitrary_types_allowed=True)


@dataclass(frozen=True)
class BackendInfo:
    """A registered backend as a table row.

    Parameters
    ----------
    name, kind, summary
        What it is called, what its answer is worth, and what it does in one line.
    options
        Names and default values.
    capabilities
        What it can take.
    unavailable
        None, or why it cannot run here and the fix.
    """

    name: str
    kind: str
    summary: str
    options: dict[str, Any]
    capabilities: Capabilities
    unavailable: str | None


_OWN = {
    BACKENDS: {
        "random": "heuristics.baselines:Random",
        "magnitude": "heuristics.baselines:Magnitude",
        "wanda": "heuristics.baselines:Wanda",
        "greedy": "heuristics.baselines:Greedy",
        "multistage": "heuristics.baselines:Multistage",
        "local_search": "heuristics.local_search:LocalSearch",
        "group_lasso": "heuristics.group_lasso:GroupLasso",
        "enumerate": "exact.enumeration:Enumerate",
        "branch_and_bound": "exact.branch_and_bound:BranchAndBound",
        "highs": "exact.outer_approximation:Highs",
        "gurobi": "exact.outer_approximation:Gurobi",
        "perspective": "bounds.root:Perspective",
        "cvxpy": "bounds.root:Conic",
    },
    EXPERT_BACKENDS: {
        "random": "experts.backends:Random",
        "frequency": "experts.backends:Frequency",
        "reap": "experts.backends:Reap",
        "greedy": "experts.backends:Greedy",
        "local_search": "experts.backends:LocalSearch",
        "enumerate": "experts.backends:Enumerate",
    },
}
"""Those of this package; those of others are entry points."""


@cache
def _registered(group: str) -> dict[str, EntryPoint]:
    """Return those of this package, and those that others register as entry points."""
    own = (
        EntryPoint(name, f"solvers.{place}", group) for name, place in _OWN.get(group, {}).items()
    )
    return {point.name: point for point in (*entry_points(group=group), *own)}


def backend_names(group: str = BACKENDS) -> tuple[str, ...]:
    """Return the names of all backends registered in a group, in alphabetical order."""
    return tuple(sorted(_registered(group)))


def backend_class(name: str, group: str = BACKENDS) -> type[Backend]:
    """Return the class that is registered under `name`, or ``file.py:Class`` of a user's own.

    Raises BackendError if there is none, or it cannot be imported.
    """
    if ":" in name:
        place, _, own = name.rpartition(":")
        if place.endswith(".py"):
            name = f"{Path(place).expanduser().absolute()}:{own}"
        return _own_class(name)
    registered = _registered(group)
    if name not in registered:
        raise BackendError(
            f"there is no backend {name!r}; choose from {', '.join(backend_names(group))}, or give "
            "path/file.py:Class of your own"
        )
    try:
        return cast(type[Backend], registered[name].load())
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} is registered but does not load: {error}") from error


@cache
def _own_class(name: str) -> type[Backend]:
    """Return a class of a user's own, the same one each time."""
    with importable(name):
        found = imported(name, BackendError)
    if not (
        isinstance(found, type)
        and dataclasses.is_dataclass(found)
        and isinstance(getattr(found, "capabilities", None), Capabilities)
        and all(hasattr(found, name) for name in ("kind", "summary", "available", "select"))
    ):
        raise BackendError(
            f"{name} is {reprlib.repr(found)}; give a frozen dataclass with kind, summary, "
            "capabilities, available() and select(), such as docs/howto/backend.md has"
        )
    return cast(type[Backend], found)


def backends(group: str = BACKENDS) -> tuple[BackendInfo, ...]:
    """Describe every backend registered in a group, also those that cannot run here."""
    return tuple(_describe(name, group) for name in backend_names(group))


def _describe(name: str, group: str) -> BackendInfo:
    try:
        cls = backend_class(name, group)
    except BackendError as error:
        return BackendInfo(name, "", "", {}, Capabilities(), str(error))
    options = {f.name: f.default for f in dataclasses.fields(cast(Any, cls))}
    return BackendInfo(name, cls.kind, cls.summary, options, cls.capabilities, cls.available())


def make_backend(name: str, group: str = BACKENDS, /, **options: Any) -> Backend:
    """Return the backend `name` with its options set.

    Values are held against the annotations of the backend's fields by pydantic, which converts
    what it can: whole numbers of any type to int, sequences to tuples.  Raises BackendError if it
    is unknown, not available here, has no such option, or the option takes no such value.
    """
    cls = backend_class(name, group)
    reason = cls.available()
    if reason is not None:
        raise BackendError(f"backend {name!r} is not available: {reason}")
    known = [f.name for f in dataclasses.fields(cast(Any, cls)) if f.init]
    unknown = sorted(str(key) for key in options if key not in known)
    if unknown:
        takes = f"it has {', '.join(known)}" if known else "it takes none"
        raise BackendError(f"backend {name!r} has no option {', '.join(unknown)}; {takes}")
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # names that only a type checker imports: the backend checks for itself
        hints = {}
    for key, value in options.items():
        try:
            adapter = TypeAdapter(hints.get(key, Any), config=_ANY_TYPE)
            options[key] = adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            raise BackendError(
                f"backend {name!r}: {key} is {reprlib.repr(value)}; it {reason}"
            ) from error
    return cls(**options)
