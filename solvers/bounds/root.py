"""Root bounds as backends: the scalable one, also of any solution that has none, and that of cvxpy.

For fixed multipliers the cost of a removal is at least ``2 a'x - x'Q x`` on binary x
(`solvers.bounds.removal`).  cvxpy solves Shor's relaxation of that minimum, whose dual is the best
diagonal q.  The objective of its solver is never reported: its x and q give a linearization whose
value is evaluated and certified in float64, so that an inexact solve costs tightness and not
validity.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from solvers.bounds.quadratic import QuadraticBound, made_dominating
from solvers.bounds.relaxation import Effort, Relaxation, alternate, relax
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import MultiplierCertificate
from solvers.closed_forms.refit import refit_loss
from solvers.errors import BackendError
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import (
    Backend,
    BackendKind,
    Capabilities,
    Natural,
    Positive,
    Selection,
    Status,
)

_BOUND_FROM = "perspective relaxation with common multipliers"


@dataclass(frozen=True)
class Perspective(Backend):
    """Bound the loss of every support from below, and return the best support known.

    Perspective relaxations (Dong, Chen and Linderoth, 2015; Atamturk and Gomez, 2020) split a
    diagonal off the Hessian.  Here the diagonal is split off an n x n matrix in which all rows,
    responses and consumers are already summed up (`solvers.bounds.removal`), which gives the same
    bound for one response and a far better one for many.  The bound is certified: rounding is
    accounted for, and the solution carries what `Solution.verify` needs to recompute it.

    Parameters
    ----------
    rounds
        The most updates of multipliers and diagonal together; 0 finds one after the other.
    steps
        The most gradient steps in each minimization over the polytope.
    """

    kind: ClassVar[BackendKind] = BackendKind.BOUND
    summary: ClassVar[str] = "certified lower bound for layers of any size, with a rounded support"
    rounds: Natural = Effort.rounds
    steps: Positive = Effort.steps

    def select(self, problem: SubsetProblem) -> Selection:
        """Bound, round, and improve what rounding gives."""
        claims, relaxation = self.bound(problem)
        support = torch.arange(problem.units, device=problem.device)
        if relaxation is not None:
            rounded = tuple(relaxation.support.tolist())
            support = LocalSearch(start=rounded).select(problem).support
        return Selection(
            support,
            Status.BOUNDED,
            iterations=self.rounds,
            history=(refit_loss(problem, support),),
            **claims,
        )

    def bound(self, problem: SubsetProblem) -> tuple[dict[str, Any], Relaxation | None]:
        """Return what a `Selection` says of the bound, and the relaxation: None if keep is n."""
        terms = RemovalTerms.of(problem)
        if terms.removals == 0:
            return {"lower_bound": terms.certified(0.0), "bound_from": _BOUND_FROM}, None
        relaxation = relax(terms, Effort(self.rounds, self.steps))
        bound, certificate = relaxation.claim
        claims = {"lower_bound": bound, "bound_from": _BOUND_FROM, "certificate": certificate}
        return claims, relaxation


_STEPS = 200
_SOLVED = ("optimal", "optimal_inaccurate")


@dataclass(frozen=True)
class Conic(Backend):
    """Bound small layers by a semidefinite relaxation, and round it to a support.

    Parameters
    ----------
    solver
        What cvxpy calls the solver: CLARABEL, SCS, or MOSEK where installed.
    rounds
        Updates of the multipliers, each followed by one conic solve.
    """

    kind: ClassVar[BackendKind] = BackendKind.BOUND
    summary: ClassVar[str] = "semidefinite relaxation by an interior-point solver; for small layers"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=80, devices=("cpu",))
    package: ClassVar[str] = "cvxpy"
    solver: str = "CLARABEL"
    rounds: Positive = 2

    def select(self, problem: SubsetProblem) -> Selection:
        """Relax, certify, and round; keep the best support of all rounds."""
        terms = RemovalTerms.of(problem)
        if terms.removals == 0:
            support = torch.arange(problem.units, device=problem.device)
            return self._selection(problem, terms.certified(0.0), None, [support])
        best = current = alternate(terms, _STEPS)
        found = [current.support]
        for _ in range(self.rounds):
            solved = self._solve(current)
            found.append(solved.support)
            best = solved if solved.value > best.value else best
            start = (solved.share + solved.bound.point) / 2, solved.bound.shape
            current = alternate(terms, _STEPS, start=start, rounds=1)
        return self._selection(problem, *best.claim, found)

    def _selection(
        self,
        problem: SubsetProblem,
        bound: float,
        certificate: MultiplierCertificate | None,
        found: list[Tensor],
    ) -> Selection:
        losses = [refit_loss(problem, support) for support in found]
        loss = min(losses)
        support = found[losses.index(loss)]
        return Selection(
            support,
            Status.BOUNDED,
            lower_bound=bound,
            bound_from=f"semidefinite relaxation by {self.solver}, re-evaluated in float64",
            iterations=self.rounds,
            history=(loss,),
            certificate=certificate,
        )

    def _solve(self, relaxation: Relaxation) -> Relaxation:
        """Return the relaxation with the solver's point and diagonal."""
        bound = relaxation.bound
        x, q = _semidefinite(bound, self.solver)
        point = torch.from_numpy(np.clip(x, 0.0, 1.0)).to(bound.point)
        q = torch.maximum(torch.from_numpy(q).to(bound.q), bound.Q.diagonal())
        scale = q.rsqrt()
        largest = float(torch.linalg.eigvalsh(bound.Q * scale[:, None] * scale)[-1])
        moved = replace(bound, point=point, q=q * max(largest, 1e-3))
        return replace(relaxation, bound=made_dominating(moved))


def _semidefinite(bound: QuadraticBound, solver: str) -> tuple[Any, Any]:
    """Solve ``min 2 a'x - tr(Q X)``, ``[1 x'; x X] >= 0``, ``diag X = x``, whose dual is q."""
    import cvxpy as cp

    unit = float(bound.q.mean())
    a, Q = bound.a.numpy() / unit, bound.Q.numpy() / unit
    n = len(a)
    Z = cp.Variable((n + 1, n + 1), PSD=True)
    x, X = Z[0, 1:], Z[1:, 1:]
    diagonal = cp.diag(X) == x
    constraints = [Z[0, 0] == 1, diagonal, x <= 1, x >= 0, cp.sum(x) == bound.removals]
    problem = cp.Problem(cp.Minimize(2 * a @ x - cp.trace(Q @ X)), constraints)
    with warnings.catch_warnings():
        # An inexact answer is as valid as any: the bound is evaluated afresh.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=solver)
    if problem.status not in _SOLVED:
        raise BackendError(
            f"cvxpy: {solver} ended with status {problem.status!r}; try another solver"
        )
    return x.value, diagonal.dual_value * unit
