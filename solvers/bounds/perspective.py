"""The scalable root bound as a backend, and the bound of any solution that has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.bounds.relaxation import Effort, Relaxation, relax
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import MultiplierCertificate
from solvers.closed_forms.refit import refit_loss
from solvers.errors import BackendError
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Selection, Status

BOUND_FROM = "perspective relaxation with common multipliers"


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
        The most updates of the multipliers.
    steps
        The most gradient steps in each minimization over the polytope.
    tighten
        Whether to optimize the diagonal as well: the better half of the time, a few per cent of
        the loss.
    polish
        Whether the support that comes with the bound is improved by exchanges; if not, it is the
        relaxation rounded.
    """

    kind: ClassVar[BackendKind] = BackendKind.BOUND
    summary: ClassVar[str] = "certified lower bound for layers of any size, with a rounded support"
    rounds: int = 6
    steps: int = 100
    tighten: bool = True
    polish: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise BackendError(
                f"perspective: rounds is {self.rounds} and steps {self.steps}; use 1 or more"
            )

    def select(self, problem: SubsetProblem) -> Selection:
        """Bound, round, and improve what rounding gives."""
        bound, certificate, relaxation = self.bound(problem)
        if relaxation is None:
            support = torch.arange(problem.units, device=problem.device)
        else:
            support = relaxation.support
        if self.polish and relaxation is not None:
            support = LocalSearch(start=tuple(support.tolist())).support(problem)
        return Selection(
            support,
            Status.BOUNDED,
            lower_bound=bound,
            bound_from=BOUND_FROM,
            iterations=self.rounds,
            history=(refit_loss(problem, support),),
            certificate=certificate,
        )

    def bound(
        self, problem: SubsetProblem
    ) -> tuple[float, MultiplierCertificate | None, Relaxation | None]:
        """Return the bound, its certificate, and the relaxation; the latter None if keep is n."""
        terms = RemovalTerms.of(problem)
        if terms.removals == 0:
            return terms.certified(0.0), None, None
        relaxation = relax(terms, Effort(self.rounds, self.steps, self.tighten))
        return *relaxation.claim, relaxation
