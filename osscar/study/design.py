"""What an optimality-gap study solves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import solvers
from osscar.base.errors import OptionError
from osscar.base.inputs import shown

HEURISTICS = ("magnitude", "wanda", "greedy", "multistage", "local_search")
DEFAULT_BACKENDS = (*HEURISTICS, "perspective", "branch_and_bound")


@dataclass(frozen=True)
class StudyDesign:
    """What a study solves.

    Parameters
    ----------
    sparsities
        Shares of the units to remove, each above 0 and below 1.
    backends
        Registered names; those that prove optimality run only on problems of `exact_units` units
        or fewer.
    exact_units
        The most units of a problem that is given to an exact backend.
    window_units, windows
        Draw this many windows of that many units from every larger problem, at every sparsity;
        no windows if `window_units` is None.
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

    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    exact_units: int = 64
    window_units: int | None = None
    windows: int = 3
    time_limit: float = 60.0
    gap_tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_lists()
        for name, least in (("windows", 1), ("exact_units", 1), ("window_units", 2), ("seed", 0)):
            value = getattr(self, name)
            if not (name == "window_units" and value is None) and not is_count(value, least):
                said = name.removeprefix("window_").replace("_", " ")
                raise OptionError(
                    f"{said} is {shown(value)}; give a whole number of at least {least}"
                )
        if self.seed >= 2**63:
            raise OptionError(f"seed is {self.seed}; give a whole number below 2^63")
        if not _is_number(self.time_limit) or not 0 < self.time_limit < math.inf:
            raise OptionError(f"time limit is {shown(self.time_limit)}; give seconds above 0")
        if not _is_number(self.gap_tolerance) or not 0 <= self.gap_tolerance < 1:
            raise OptionError(f"gap tolerance is {shown(self.gap_tolerance)}; give a share below 1")

    def _check_lists(self) -> None:
        for name in ("sparsities", "backends"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise OptionError(f"{name} is {shown(values)}; give a tuple")
            object.__setattr__(self, name, tuple(values))
        if not self.sparsities or not self.backends:
            raise OptionError("a study needs at least one sparsity and one backend")
        for sparsity in self.sparsities:
            if not _is_number(sparsity) or not 0 < sparsity < 1:
                raise OptionError(f"sparsity is {shown(sparsity)}; give shares above 0 and below 1")
        for backend in self.backends:
            if not isinstance(backend, str):
                raise OptionError(f"backend is {shown(backend)}; give a name")
            # Here, so that nothing is solved only to find that the last backend cannot run.
            solvers.make_backend(backend)
        for name in ("sparsities", "backends"):
            values = getattr(self, name)
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise OptionError(f"{name} has {', '.join(twice)} twice; give each once")

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


def is_count(value: object, least: int) -> bool:
    """Return whether `value` is a whole number and not below `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
