"""A lower bound of the loss for every number of units kept, from a few certificates.

The bound by multipliers Y, a diagonal q and a tangent at x (`solvers.certificates.certificate`) is

    e - tr(G' A G)  -  x'(Diag(q) - Q) x  +  the r least entries of g

where r units are removed.  Nothing but that last sum depends on r: one certificate bounds every
number of units by a sort.  How tight it is elsewhere depends on x more than on Y and q, and to
minimize over x again takes little, so that tangents at several x are kept for each Y and q.  And as
removing units never lowers the loss, what bounds k units bounds any fewer.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.bounds.quadratic import QuadraticBound, minimizers
from solvers.bounds.relaxation import Effort, relax
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import (
    EnumerationCertificate,
    MultiplierCertificate,
    check_numbers,
    check_point,
)
from solvers.certificates.inverses import Inverses
from solvers.errors import ProblemError, VerificationError
from solvers.problem import SubsetProblem
from solvers.verification import recomputing, tolerated

_MOST_ENUMERATED = 8
"""Units of a problem whose supports are all looked at, which takes no longer than multipliers."""

_POINTS = 16
"""Numbers of units for which x is found anew, for each Y and q."""


@dataclass(frozen=True, eq=False)
class MultiplierCurve:
    """A point of the relaxation, and some more x for its Y and q: they bound every number of units.

    points: (t, n), in [0, 1].
    """

    multipliers: MultiplierCertificate
    points: Tensor

    def curve(self, problem: SubsetProblem) -> Tensor:
        """Recompute the bounds by units kept from the problem, (n + 1,), in float64.

        Raises VerificationError if a number is out of its range, or ``Diag(q) - Q`` is not positive
            semidefinite.
        """
        if not isinstance(self.multipliers, MultiplierCertificate):
            raise VerificationError("the curve's multipliers must be a MultiplierCertificate")
        tangents = self.points.shape[:1] if isinstance(self.points, Tensor) else ()
        check_numbers("curve's points", self.points, (*tangents, problem.units), problem.device)
        if len(self.points):
            check_point("curve", self.points)
        inverses = Inverses.of(problem)
        costs = self.multipliers.costs(inverses, self.points.double())
        return inverses.all_proved(inverses.constant + costs.clamp(min=0.0)).flip(0)


@dataclass(frozen=True, eq=False)
class LowerCurve:
    """What no support's loss can be below, for every number of units kept.

    Parameters
    ----------
    problem
        The problem; how many units it is to keep does not matter.
    bounds
        No support of k units has a loss below ``bounds[k]``; float64, (n + 1,).  They do not
        increase with k.
    certificates
        What they can be recomputed from.

    Examples
    --------
    >>> import torch, solvers
    >>> X, W0 = torch.randn(64, 12).double(), torch.randn(12, 3).double()
    >>> problem = solvers.SubsetProblem.from_gram(X.T @ X / 64, W0, keep=6)
    >>> curve = solvers.lower_curve(problem, [4, 8])
    >>> bool(curve.verify()[6] <= solvers.solve(problem, "enumerate").loss)
    True
    """

    problem: SubsetProblem
    bounds: Tensor
    certificates: tuple[EnumerationCertificate | MultiplierCurve, ...]

    def verify(self) -> Tensor:
        """Recompute the bounds from the problem and the certificates alone, (n + 1,), in float64.

        Raises VerificationError if a field has a wrong type or range, the problem is ill posed, or
            a bound lies above what the certificates prove.
        """
        problem, given = self.problem, self.certificates
        if not isinstance(problem, SubsetProblem):
            raise VerificationError(
                f"problem is {reprlib.repr(problem)}; it must be a SubsetProblem"
            )
        check_numbers("bounds", self.bounds, (problem.units + 1,), problem.device)
        known = EnumerationCertificate | MultiplierCurve
        if not (isinstance(given, tuple) and all(isinstance(one, known) for one in given)):
            raise VerificationError(
                f"certificates is {reprlib.repr(given)}; it must be a tuple of known certificates"
            )
        with recomputing():
            problem.check_definite()
            curves = [one.curve(problem) for one in given]
        proved = _best([torch.zeros_like(self.bounds, dtype=torch.float64), *curves])
        for k, (bound, most) in enumerate(zip(self.bounds.tolist(), proved.tolist(), strict=True)):
            if not bound <= most + tolerated(most, problem):
                raise VerificationError(
                    f"bound {bound:.9g} of {k} units is claimed, its certificates prove {most:.9g}"
                )
        return proved


def lower_curve(
    problem: SubsetProblem, keeps: Sequence[int], *, rounds: int = Effort.rounds
) -> LowerCurve:
    """Bound the loss of every support of a problem, whatever the number of units that it keeps.

    Parameters
    ----------
    problem
        Its own number of units to keep does not matter.
    keeps
        Numbers of units near which the bound is to be good: multipliers are found for each.  Up to
        8 units, all supports are looked at instead.
    rounds
        The most updates of multipliers and diagonal together, as of the `perspective` backend.

    Raises
    ------
    ProblemError
        If one of `keeps` leaves no choice.
    """
    n = problem.units
    for keep in keeps:
        if not 0 < keep < n:
            raise ProblemError(
                f"keeps has {keep}, and a choice among {n} units keeps 1 to {n - 1}; leave it away"
            )
    if n <= _MOST_ENUMERATED:
        every = EnumerationCertificate()
        return LowerCurve(problem, _best([every.curve(problem)]), (every,))
    terms = RemovalTerms.of(problem)
    found, curves = [], [torch.zeros(n + 1, dtype=torch.float64, device=problem.device)]
    for keep in sorted(set(keeps)):
        relaxation = relax(replace(terms, removals=n - keep), Effort(rounds))
        bound = relaxation.bound
        if not bound.dominates:
            continue  # rounding forbids any
        points = _elsewhere(bound)
        costs = torch.stack([bound.values, *(replace(bound, point=x).values for x in points)])
        curves.append(terms.rounding.certified(terms.constant, costs.max(0).values).flip(0))
        found.append(MultiplierCurve(relaxation.certificate, points))
    return LowerCurve(problem, _best(curves), tuple(found))


def _elsewhere(bound: QuadraticBound) -> Tensor:
    """Return points, (t, n), at which the same Y and q bound other numbers of removed units."""
    n = len(bound.point)
    totals = torch.linspace(1, n - 1, min(_POINTS, n - 1)).round().to(bound.point)
    start = (bound.point * (totals / bound.removals)[:, None]).clamp(max=1.0)
    return minimizers(bound, start, totals, Effort.steps)


def _best(curves: Sequence[Tensor]) -> Tensor:
    """Return the best of some curves, (n + 1,) each, by units kept.

    Removing units never lowers a loss: what bounds those of k units bounds those of fewer.
    """
    falling: Tensor = torch.stack(list(curves)).max(0).values.flip(0).cummax(0).values.flip(0)
    return falling
