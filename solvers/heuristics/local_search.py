"""The default backend: exact greedy elimination, then steepest swaps to a certified optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.elimination import eliminate, support_after
from solvers.errors import BackendError
from solvers.pivot import PivotState
from solvers.problem import SubsetProblem
from solvers.protocol import BackendKind, Capabilities, Selection, Status
from solvers.refit import refit
from solvers.swaps import best_swap

_DRIFT_TOLERANCE = 1e-10


@dataclass(frozen=True)
class LocalSearch:
    """Start from greedy elimination, then make the best single exchange until none helps.

    The gain of every one of the k (n - k) exchanges is computed exactly, so the search ends with a
    proof that no exchange lowers the loss, on a factorization whose drift is checked.

    Parameters
    ----------
    start
        Units to start from, or None for greedy elimination.
    max_swaps
        The most exchanges.
    tolerance
        An exchange counts if it gains more than this share of the current loss.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "greedy start, then exact steepest swaps to a certified optimum"
    capabilities: ClassVar[Capabilities] = Capabilities()
    start: tuple[int, ...] | None = None
    max_swaps: int = 10_000
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        if self.max_swaps < 0 or not 0 <= self.tolerance < 1:
            raise BackendError(
                f"local_search: max_swaps is {self.max_swaps} and tolerance {self.tolerance}; "
                "exchanges cannot be negative in number, and the tolerance lies in [0, 1)"
            )

    @classmethod
    def available(cls) -> str | None:
        """Return None: it needs nothing but torch."""
        return None

    def select(self, problem: SubsetProblem) -> Selection:
        """Search until a factorization that has not drifted confirms that no exchange helps."""
        state = self._initial_state(problem)
        support, swaps = state.support, 0
        history = [refit(problem, support)[1]]
        while True:
            made, converged = self._descend(state, history[-1], self.max_swaps - swaps)
            swaps += made
            loss = refit(problem, state.support)[1] if made else history[-1]
            gained = loss < history[-1]
            if gained:
                support = state.support
                history.append(loss)
            if not converged:
                status = Status.ITERATION_LIMIT
                break
            # Exchanges that gained only by the state's account are within its rounding.
            if not gained or state.drift() < _DRIFT_TOLERANCE:
                status = Status.SWAP_OPTIMAL
                break
            state = PivotState.on_support(problem, support)
        return Selection(support, status, iterations=swaps, history=tuple(history))

    def _initial_state(self, problem: SubsetProblem) -> PivotState:
        if self.start is None:
            removals = eliminate(problem, problem.units - problem.keep)
            return PivotState.on_support(problem, support_after(removals, problem))
        units = sorted(set(self.start))
        if len(units) != problem.keep or units[0] < 0 or units[-1] >= problem.units:
            raise BackendError(
                f"local_search: start must name {problem.keep} distinct units below "
                f"{problem.units}, not {self.start}"
            )
        support = torch.tensor(units, dtype=torch.int64, device=problem.device)
        return PivotState.on_support(problem, support)

    def _descend(self, state: PivotState, loss: float, limit: int) -> tuple[int, bool]:
        """Make at most `limit` improving exchanges; return how many, and whether none is left."""
        made = 0
        while (swap := best_swap(state)).gain > self.tolerance * loss:
            if made == limit:
                return made, False
            state.sweep([swap.leave, swap.enter])
            loss -= swap.gain
            made += 1
        return made, True
