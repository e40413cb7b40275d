"""What an optimality-gap study solves."""

from dataclasses import dataclass
from typing import Annotated, Any

import solvers
from osscar.base.errors import OptionError
from osscar.base.inputs import safe_repr
from osscar.request import BOUND_ROUNDS, Range, checked, count_from

HEURISTICS = ("magnitude", "wanda", "greedy", "multistage", "local_search")
DEFAULT_BACKENDS = (*HEURISTICS, "perspective", "branch_and_bound")

_SPARSITY = Range(float, lambda share: 0 < share < 1, "shares above 0 and below 1")


def _each_once(name: str, values: Any, one: str) -> tuple[Any, ...]:
    """Return a list as a tuple; refuse none, an empty one, and what is in it twice."""
    if not isinstance(values, tuple | list):
        raise OptionError(f"{name} is {safe_repr(values)}; give a tuple")
    if not values:
        raise OptionError(f"a study needs at least one {one}")
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise OptionError(f"{name} has {', '.join(twice)} twice; give each once")
    return tuple(values)


def _sparsities(name: str, values: Any) -> tuple[float, ...]:
    return tuple(_SPARSITY("sparsity", one) for one in _each_once(name, values, "sparsity"))


def _backends(name: str, values: Any) -> tuple[str, ...]:
    """Make each of them, so that nothing is solved only to find that the last cannot run."""
    for backend in _each_once(name, values, "backend"):
        if not isinstance(backend, str):
            raise OptionError(f"backend is {safe_repr(backend)}; give a name")
        solvers.make_backend(backend)
    return tuple(values)


@dataclass(frozen=True)
class StudyDesign:
    """What a study solves.

    Parameters
    ----------
    sparsities
        Shares of the units to remove, each above 0 and below 1.
    backends
        Registered names, or ``file.py:Class`` of your own; those that prove optimality run only on
        problems of `exact_units` units or fewer.
    exact_units
        The most units of a problem that is given to an exact backend.
    window_units, windows
        Draw this many windows of that many units from every larger problem, at every sparsity;
        no windows if `window_units` is None.
    bound_rounds
        How long the `perspective` bound is searched for.
    time_limit, gap_tolerance
        Seconds for one exact solve, and the relative gap at which it may stop.
    seed
        Of the windows.

    Raises
    ------
    OptionError
        If a number makes no sense.
    BackendError
        If a backend does not exist.
    """

    sparsities: Annotated[tuple[float, ...], _sparsities] = (0.25, 0.5, 0.75)
    backends: Annotated[tuple[str, ...], _backends] = DEFAULT_BACKENDS
    exact_units: Annotated[int, count_from(1)] = 64
    window_units: Annotated[int | None, count_from(2)] = None
    windows: Annotated[int, count_from(1)] = 3
    bound_rounds: Annotated[int, count_from(0)] = BOUND_ROUNDS
    time_limit: Annotated[
        float, Range(float, lambda seconds: 0 < seconds <= 1e9, "seconds above 0")
    ] = 60.0
    gap_tolerance: Annotated[
        float, Range(float, lambda gap: 0 <= gap < 1, "a share from 0 and below 1")
    ] = 1e-6
    seed: Annotated[int, count_from(0)] = 0

    def __post_init__(self) -> None:
        checked(self)

    def keep(self, units: int, sparsity: float) -> int:
        """Return how many of `units` stay: at least one, and at least one goes."""
        return max(1, min(units - 1, units - round(sparsity * units)))

    def keeps(self, units: int) -> dict[int, tuple[float, ...]]:
        """Return the numbers of units that stay, each with the sparsities that come to it."""
        found: dict[int, tuple[float, ...]] = {}
        for sparsity in self.sparsities:
            keep = self.keep(units, sparsity)
            found[keep] = (*found.get(keep, ()), sparsity)
        return found
