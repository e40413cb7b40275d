"""What a backend is, what it can take, and what it answers with.

A backend is a frozen dataclass: its fields are its options, and their annotations say which values
they take.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

from annotated_types import Ge, Interval
from torch import Tensor

from solvers.certificates.tree_certificate import Certificate
from solvers.problem import SubsetProblem

DEFAULT_GAP_TOLERANCE = 1e-4
"""Relative gap up to which an answer may be called optimal, unless a backend says otherwise."""


Natural: TypeAlias = Annotated[int, Ge(0)]
Positive: TypeAlias = Annotated[int, Ge(1)]
Seed: TypeAlias = Annotated[int, Interval(ge=0, lt=1 << 63)]
Seconds: TypeAlias = Annotated[float, Ge(0)]
Tolerance: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
"""Types of options, which `solvers.make_backend` holds values against."""


class Status(enum.Enum):
    """How a solve ended; the value is a sentence that a person can act on."""

    FEASIBLE = "A support of the asked size was found; nothing is claimed about how good it is."
    SWAP_OPTIMAL = "No exchange of one kept unit for one removed gains more than 1e-6 of the loss."
    OPTIMAL = "No support of the asked size has a lower loss, within the tolerance asked for."
    TIME_LIMIT = "The time limit was met; the bound is valid. Allow more time to close the gap."
    ITERATION_LIMIT = "The iteration limit was met. Raise it to let the search finish."
    NODE_LIMIT = "The node limit was met; the bound is valid. Raise it to close the gap."
    PRECISION_LIMIT = (
        "Rounding hides whether another support is better; a bound, if given, is valid. Raise damp."
    )
    BOUNDED = "A lower bound was computed; the support is the best one known to the bound."


@dataclass(frozen=True, eq=False)
class Selection:
    """A backend's choice, and what the backend claims about it.

    Parameters
    ----------
    support
        The units that stay, (k,) int64.
    status
        How the solve ended.
    lower_bound
        A number that no support's loss can be below, or -inf.
    bound_from
        What proved `lower_bound`, in a few words.
    iterations
        Removals, swaps, nodes: whatever the backend counts.
    history
        Loss after each improvement, as the backend saw it.
    gap_tolerance
        Up to which relative gap the backend calls its answer optimal.
    certificate
        Evidence from which `lower_bound` can be recomputed, or None.
    """

    support: Tensor
    status: Status
    lower_bound: float = -math.inf
    bound_from: str = ""
    iterations: int = 0
    history: tuple[float, ...] = field(default=(), repr=False)
    gap_tolerance: float = DEFAULT_GAP_TOLERANCE
    certificate: Certificate | None = field(default=None, repr=False)


class BackendKind(enum.StrEnum):
    """What a backend's solution guarantees."""

    HEURISTIC = "heuristic"
    EXACT = "exact"
    BOUND = "bound"


@dataclass(frozen=True)
class Capabilities:
    """Which problems a backend can take.

    Parameters
    ----------
    several_consumers
        Units that several linear maps read.
    max_units
        The most units that it can be expected to handle, or None.
    devices
        Where it computes.
    """

    several_consumers: bool = True
    max_units: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refusal(self, problem: SubsetProblem) -> str | None:
        """Return why `problem` cannot be taken, or None."""
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
    """A way to choose a support; implemented by a frozen dataclass whose fields are its options.

    Those that inherit from it take any problem and need no other package, unless they say so.
    """

    kind: ClassVar[BackendKind]
    summary: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    package: ClassVar[str] = ""
    """An optional package that it needs."""

    @classmethod
    def available(cls) -> str | None:
        """Return None, or why the backend cannot run here and how to mend that; imports nothing."""
        if cls.package and find_spec(cls.package) is None:
            return f"{cls.package} is not installed; pip install 'osscar[exact]'"
        return None

    def select(self, problem: Any) -> Selection:
        """Choose ``problem.keep`` units; of experts, `problem` is a `solvers.ExpertProblem`."""
