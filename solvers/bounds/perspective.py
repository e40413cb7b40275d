"""The scalable root bound as a backend, and the bound of any solution that has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from solvers.bounds.relaxation import Effort, Relaxation, relax
from solvers.bounds.removal import RemovalTerms
from solvers.closed_forms.refit import refit_loss
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Natural, Positive, Selection, Status

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
