"""What an optimality-gap study solves."""

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from annotated_types import Interval, MinLen

import solvers
from osscar.base.inputs import PERCENT, check_fields, count_from
from osscar.request import BOUND_ROUNDS, SHARE
from osscar.study.records import Instance

HEURISTICS = ("magnitude", "wanda", "greedy", "multistage", "local_search")
SPARSITIES = (0.25, 0.5, 0.75)
DEFAULT_BACKENDS = (*HEURISTICS, "perspective", "branch_and_bound")

Sparsity: TypeAlias = Annotated[float, SHARE, PERCENT]


@dataclass(frozen=True)
class StudyDesign:
    """What a study solves.

    Parameters
    ----------
    sparsities
        Shares of the units to remove, each above 0 and below 1; None solves a problem that says how
        many units stay as it says, and others at `SPARSITIES`.
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

    sparsities: Annotated[tuple[Sparsity, ...], MinLen(1)] | None = None
    backends: Annotated[tuple[str, ...], MinLen(1)] = DEFAULT_BACKENDS
    exact_units: Annotated[int, count_from(1)] = 64
    window_units: Annotated[int | None, count_from(2)] = None
    windows: Annotated[int, count_from(1)] = 3
    bound_rounds: Annotated[int, count_from(0)] = BOUND_ROUNDS
    time_limit: Annotated[float, Interval(gt=0, le=1e9)] = 60.0
    gap_tolerance: Annotated[float, Interval(ge=0, lt=1)] = 1e-6
    seed: Annotated[int, count_from(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("sparsities", "backends"):
            values = getattr(self, name)
            object.__setattr__(self, name, values and tuple(dict.fromkeys(values)))
        for backend in self.backends:  # before anything is solved that the last one cannot
            solvers.make_backend(backend)

    def keeps(self, instance: Instance) -> dict[int, tuple[float, ...]]:
        """Return the numbers of units that stay, each with the sparsities that come to it.

        At least one unit stays, and at least one goes.
        """
        units, found = instance.units, dict[int, tuple[float, ...]]()
        if self.sparsities is None and instance.keep < units:
            return {instance.keep: (1 - instance.keep / units,)}
        for sparsity in self.sparsities or SPARSITIES:
            keep = max(1, min(units - 1, units - round(sparsity * units)))
            found[keep] = (*found.get(keep, ()), sparsity)
        return found
