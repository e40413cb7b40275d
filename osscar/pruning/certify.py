"""Solutions whose gap is known, each verified from its problem alone."""

from __future__ import annotations

import dataclasses

import solvers
from solvers.exact.branch_and_bound import BranchAndBound

EXACT_UNITS = 32
"""Up to so many units a bound comes from branch and bound, which mostly closes the gap."""

EXACT_SECONDS = 10.0
"""How long branch and bound may take for one bound; what it has by then is valid."""


def certified(
    problem: solvers.SubsetProblem, backend: solvers.Backend
) -> tuple[solvers.Solution, solvers.Verification]:
    """Solve, add a lower bound that no choice of units can beat, and verify both.

    Parameters
    ----------
    problem
        What to solve.
    backend
        Who chooses the units; the bound does not change the choice.

    Raises
    ------
    VerificationError
        If the solution is not what it claims to be.
    """
    exact = backend.kind is solvers.BackendKind.EXACT or problem.units > EXACT_UNITS
    solution = solvers.solve(problem, backend, bound=exact)
    if not exact:
        solution = _closely_bounded(solution)
    return solution, solution.verify()


def _closely_bounded(solution: solvers.Solution) -> solvers.Solution:
    """Take the bound of branch and bound, and leave the choice as the backend made it."""
    start = tuple(solution.support.tolist())
    search = BranchAndBound(start=start, time_limit=EXACT_SECONDS)
    proof = solvers.solve(solution.problem, search)
    if not proof.lower_bound > solution.lower_bound:
        return solution
    return dataclasses.replace(
        solution,
        lower_bound=proof.lower_bound,
        bound_from=proof.bound_from,
        certificate=proof.certificate,
    )
