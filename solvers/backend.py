"""The backend protocol, the registry, and `solve`, which dispatches to a backend.

A backend is a frozen dataclass: its fields are its options.  It is registered through the
entry-point group ``osscar.backends``, so that any installed package can add one.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import reprlib
import time
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, cast

import torch

from solvers.errors import BackendError, ProblemError
from solvers.problem import SubsetProblem
from solvers.refit import refit
from solvers.solution import Selection, Solution
from solvers.values import as_number, as_whole

ENTRY_POINTS = "osscar.backends"


class Kind(enum.StrEnum):
    """What a backend's answer is worth."""

    HEURISTIC = "heuristic"
    EXACT = "exact"
    BOUND = "bound"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can take.

    Parameters
    ----------
    wide_units
        Units of more than one row (attention heads, convolution channels).
    several_consumers
        Units that several linear maps read.
    max_units
        The most units that it can be expected to handle, or None.
    devices
        Where it computes.
    """

    wide_units: bool = True
    several_consumers: bool = True
    max_units: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refusal(self, problem: SubsetProblem) -> str | None:
        """Return why `problem` cannot be taken, or None."""
        if problem.width > 1 and not self.wide_units:
            return f"takes units of one row only, and these have {problem.width}"
        if len(problem.consumers) > 1 and not self.several_consumers:
            return f"takes one consumer only, and this problem has {len(problem.consumers)}"
        if self.max_units is not None and problem.units > self.max_units:
            return f"takes at most {self.max_units} units, and this problem has {problem.units}"
        if problem.device.type not in self.devices:
            return (
                f"computes on {' or '.join(self.devices)}, and this problem is on {problem.device}"
            )
        return None


class Backend(Protocol):
    """A way to choose a support; implemented by a frozen dataclass whose fields are its options."""

    kind: ClassVar[Kind]
    summary: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @classmethod
    def available(cls) -> str | None:
        """Return None, or why the backend cannot run here and how to mend that."""

    def select(self, problem: SubsetProblem) -> Selection:
        """Choose ``problem.keep`` units."""


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


@cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def backend_names() -> tuple[str, ...]:
    """Return the names of all registered backends, in alphabetical order."""
    return tuple(sorted(_registered()))


def backend_class(name: str) -> type[Backend]:
    """Return the class that is registered under `name`.

    Raises
    ------
    BackendError
        If there is none, or it cannot be imported.
    """
    registered = _registered()
    if not registered:
        raise BackendError("no backend is registered; install the package: pip install -e .")
    if name not in registered:
        raise BackendError(
            f"there is no backend {name!r}; choose from {', '.join(backend_names())}"
        )
    try:
        return cast(type[Backend], registered[name].load())
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} is registered but does not load: {error}") from error


def backends() -> tuple[BackendInfo, ...]:
    """Describe every registered backend, also those that cannot run here."""
    return tuple(_describe(name) for name in backend_names())


def _describe(name: str) -> BackendInfo:
    try:
        cls = backend_class(name)
    except BackendError as error:
        return BackendInfo(name, "", "", {}, Capabilities(), str(error))
    options = {f.name: f.default for f in dataclasses.fields(cast(Any, cls))}
    return BackendInfo(name, cls.kind, cls.summary, options, cls.capabilities, cls.available())


def make_backend(name: str, /, **options: Any) -> Backend:
    """Return the backend `name` with its options set.

    Values are checked against the annotations of the backend's fields: whole numbers of any type
    become int, real ones float, and sequences tuples.  Infinity is for the backend to refuse.

    Raises
    ------
    BackendError
        If it is unknown, not available here, has no such option, or the option takes no such value.
    """
    return _make(name, options)


def _make(name: str, options: Mapping[str, Any]) -> Backend:
    cls = backend_class(name)
    reason = cls.available()
    if reason is not None:
        raise BackendError(f"backend {name!r} is not available: {reason}")
    known = [f.name for f in dataclasses.fields(cast(Any, cls)) if f.init]
    unknown = sorted(str(key) for key in options if key not in known)
    if unknown:
        raise BackendError(
            f"backend {name!r} has no option {', '.join(unknown)}; "
            f"it has {', '.join(known) or 'none'}"
        )
    expected = _annotations(cls)
    values = {}
    for key, value in options.items():
        values[key] = _converted(value, expected.get(key, Any))
        if values[key] is _REFUSED:
            raise BackendError(
                f"backend {name!r}: {key} is {reprlib.repr(value)}; it must be "
                f"{_spelled(expected[key])}"
            )
    chosen = cls(**values)
    # The backend's own check had the first word: it knows more to say.
    nan = [key for key, value in values.items() if isinstance(value, float) and math.isnan(value)]
    if nan:
        raise BackendError(f"backend {name!r}: {nan[0]} is nan; it must be a number")
    return chosen


_REFUSED = object()
"""What `_converted` returns in place of a value that an annotation does not admit."""


def _annotations(cls: type[Backend]) -> dict[str, Any]:
    """Return the types of a backend's fields; none where they cannot be evaluated."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        # Names that only a type checker imports: the backend then has to check for itself.
        return {}


def _converted(value: Any, annotation: Any) -> Any:
    """Return an option's value as its annotation wants it, or `_REFUSED`."""
    if annotation is int:
        whole = as_whole(value)
        return _REFUSED if whole is None else whole
    if annotation is float:
        try:
            return as_number("option", value)
        except ProblemError:
            return _REFUSED
    if annotation in (bool, str, types.NoneType):
        return value if isinstance(value, annotation) else _REFUSED
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _first_converted(value, arguments)
    if origin is tuple and arguments[1:] == (...,):
        return _converted_tuple(value, arguments[0])
    return value


def _first_converted(value: Any, annotations: tuple[Any, ...]) -> Any:
    for annotation in annotations:
        converted = _converted(value, annotation)
        if converted is not _REFUSED:
            return converted
    return _REFUSED


def _converted_tuple(value: Any, annotation: Any) -> Any:
    if isinstance(value, str | bytes | Mapping):
        return _REFUSED
    try:
        members = tuple(_converted(member, annotation) for member in value)
    except TypeError:
        return _REFUSED
    refused = any(member is _REFUSED for member in members)
    return _REFUSED if refused else members


def _spelled(annotation: Any) -> str:
    """Return a type as its annotation is written."""
    if annotation is types.NoneType:
        return "None"
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(_spelled(argument) for argument in arguments)
    return (
        annotation.__name__ if isinstance(annotation, type) and not arguments else str(annotation)
    )


def solve(
    problem: SubsetProblem,
    backend: str | Backend = "local_search",
    *,
    device: str | torch.device | None = None,
    bound: bool = False,
    options: Mapping[str, Any] | None = None,
    **more_options: Any,
) -> Solution:
    """Solve a subset problem with the named backend, and refit on what it chose.

    Parameters
    ----------
    problem
        What to solve.
    backend
        A registered name, or a backend object with its options set.
    device
        Where to compute; by default where the problem is.
    bound
        Whether to add the `perspective` lower bound where the backend gives none, so that
        `Solution.gap` is a number.
    options, **more_options
        Options of the named backend, as a mapping of their names or by name.

    Returns
    -------
    Solution
        Support, refitted weights, loss and certificate.

    Raises
    ------
    BackendError
        If the backend is unknown, unavailable, or cannot take this problem.
    ProblemError
        If the problem turns out to be ill posed (`Consumer.flaw`), before the backend starts.

    Examples
    --------
    >>> import torch
    >>> X, W0 = torch.randn(64, 6).double(), torch.randn(6, 3).double()
    >>> problem = SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
    >>> solve(problem, "enumerate").loss <= solve(problem, "magnitude").loss
    True
    """
    if not isinstance(options, Mapping | None):
        raise BackendError(f"options is {reprlib.repr(options)}; it must map names to values")
    twice = sorted(set(options or {}) & set(more_options))
    if twice:
        raise BackendError(f"options {', '.join(twice)} are given twice, by name and in a mapping")
    given = {**(options or {}), **more_options}
    if isinstance(backend, str):
        name, chosen = backend, _make(backend, given)
    elif given:
        raise BackendError("options go with a backend's name; this backend object has its own")
    else:
        name, chosen = type(backend).__name__, backend
    if device is not None:
        problem = problem.to(device)
    refusal = chosen.capabilities.refusal(problem)
    if refusal is not None:
        raise BackendError(f"backend {name!r} {refusal}; choose another: {_takers(problem, name)}")
    problem.check_definite()
    start = time.perf_counter()
    try:
        selection = chosen.select(problem)
        support = selection.support.sort().values
        weights, loss = refit(problem, support)
        if bound and math.isinf(selection.lower_bound):
            selection = _with_bound(problem, selection)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BackendError(
            f"backend {name!r}: H is too close to singular with {_damping(problem)}; build the "
            f"problem with a larger damp ({error})"
        ) from error
    return Solution(
        problem=problem,
        backend=name,
        support=support,
        weights=weights,
        loss=loss,
        status=selection.status,
        lower_bound=selection.lower_bound,
        bound_from=selection.bound_from,
        iterations=selection.iterations,
        history=selection.history,
        path=selection.path,
        gap_tolerance=selection.gap_tolerance,
        certificate=selection.certificate,
        seconds=time.perf_counter() - start,
    )


def _damping(problem: SubsetProblem) -> str:
    """Name the damping of each consumer, for an error message."""
    shares = [
        c.damping / max(float(c.H.diagonal().mean()) - c.damping, c.damping, 1e-300)
        for c in problem.consumers
    ]
    return f"damp={', '.join(f'{share:.2g}' for share in shares)}"


def _with_bound(problem: SubsetProblem, selection: Selection) -> Selection:
    # Imported here: the bound is itself a backend, and uses this module.
    from solvers.bounds.perspective import BOUND_FROM, Perspective

    value, certificate, _ = Perspective().bound(problem)
    return dataclasses.replace(
        selection, lower_bound=value, bound_from=BOUND_FROM, certificate=certificate
    )


def _takers(problem: SubsetProblem, refused: str) -> str:
    """Name the backends that take `problem`, for an error message."""
    takers = [
        info.name
        for info in backends()
        if info.name != refused
        and info.unavailable is None
        and info.capabilities.refusal(problem) is None
    ]
    return ", ".join(takers) or "none does"
