"""Rows that stay, whatever leaves, minimized over: fixed ones, and those outside of a window.

Of the rows of a linear map some, f, stay, and the others, u, are chosen among.  The loss
``tr(W'HW) - 2 tr(W'G) + e`` is least in ``W_f`` where ``H_ff W_f = G_f - H_fu W_u``.  Put in, it is
a loss of the same form in ``W_u`` alone, with

    H_uu - H_uf inv(H_ff) H_fu,    G_u - H_uf inv(H_ff) G_f,    e - tr(G_f' inv(H_ff) G_f)

so that what a choice loses here is what it loses in the whole, with the other rows refitted.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from solvers.closed_forms.pivot import PivotState
from solvers.errors import ProblemError
from solvers.linalg.gram import definite_factor, unexplained
from solvers.linalg.symmetric import Symmetric
from solvers.problem import Consumer, SubsetProblem


@dataclass(frozen=True, eq=False)
class FixedRows:
    """What was eliminated: ``H_ff = L L'``, and what gives its weights back."""

    factor: Symmetric = field(repr=False)
    """L, (f, f)."""
    across: Tensor = field(repr=False)
    """``H_uf inv(L')``, (u, f)."""
    target: Tensor = field(repr=False)
    """``inv(L) G_f``, (f, m)."""

    def refit(self, W: Tensor) -> Tensor:
        """Return the optimal weights of the fixed rows, (f, m), for any of the others, (u, m)."""
        found = self.target - self.across.T @ W
        self.factor.backward(found)
        return found


def eliminate_fixed(
    H: Symmetric, G: Tensor, e: float, count: int
) -> tuple[FixedRows, Symmetric, Tensor, float]:
    """Eliminate the first rows; return what gives them back, and H, G and e of the others.

    H: Positive definite in these rows, at the end of which a panel starts; it is given up, and G is
        written to.
    """
    H.factorize(count)
    factor, across, rest = H.split(count)
    target, own = G[:count], G[count:]
    factor.forward(target)
    own.addmm_(across, target, alpha=-1)
    explained = float(torch.linalg.vector_norm(target)) ** 2
    return FixedRows(factor, across, target.clone()), rest, own.clone(), e - explained


def borderline_window(problem: SubsetProblem, support: Tensor, size: int) -> Tensor:
    """Return units closest to changing sides, (size,), about half of them in the support."""
    state = PivotState.on_support(problem, support)
    kept = state.support[state.removal_losses()[state.support].argsort()]
    removed = state.removed[state.addition_gains()[state.removed].argsort(descending=True)]
    return _first_of_each(kept, removed, size)


def random_window(
    problem: SubsetProblem, support: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """Return units drawn at random on the CPU, (size,), about half of them in the support."""
    order = torch.randperm(problem.units, generator=generator).to(support.device)
    inside = torch.isin(order, support)
    return _first_of_each(order[inside], order[~inside], size)


def _first_of_each(kept: Tensor, removed: Tensor, size: int) -> Tensor:
    goes = min(max(size // 2, size - len(kept)), len(removed))
    return torch.cat([kept[: size - goes], removed[:goes]])


def window_problem(problem: SubsetProblem, support: Tensor, units: Tensor) -> SubsetProblem:
    """Return the problem of choosing among `units`, (N,) int64, the others as in `support`.

    As many stay as `support` keeps of them; unit i is ``units[i]``.  Raises ProblemError if the
    window is empty, names a unit twice or out of range, or keeps none of its units.
    """
    named = set(units.tolist())
    if not 0 < len(named) == len(units) or not named <= set(range(problem.units)):
        raise ProblemError(
            f"a window names units from 0 to {problem.units - 1}, each once; this one has "
            f"{reprlib.repr(units.tolist())}"
        )
    inside, kept = _mask(problem, units), _mask(problem, support)
    keep = int((inside & kept).sum())
    outside = torch.nonzero(kept & ~inside).flatten()
    consumers = tuple(_condition(c, outside, units) for c in problem.consumers)
    return SubsetProblem(consumers, keep, f"{problem.name}[{len(units)} units]")


def _mask(problem: SubsetProblem, units: Tensor) -> Tensor:
    mask = torch.zeros(problem.units, dtype=torch.bool, device=problem.device)
    mask[units] = True
    return mask


def _condition(consumer: Consumer, outside: Tensor, units: Tensor) -> Consumer:
    """Return one consumer on the rows of `units`, minimized over those of `outside`."""
    v, f = consumer.rows[units].flatten(), consumer.support_rows(outside)
    H, G, e = consumer.hessian.entries(v, v), consumer.G[v], consumer.e
    W0 = consumer.W0[v]
    if len(f):
        factor = consumer.hessian.part(f)
        factor.factorize()
        columns, fitted = consumer.hessian.entries(f, v), consumer.G[f]
        factor.forward(columns)
        factor.forward(fitted)
        H = H.addmm_(columns.T, columns, alpha=-1)
        G = G.addmm_(columns.T, fitted, alpha=-1)
        e = max(e - float(fitted.square().sum()), 0.0)
    H = (H + H.T) / 2
    held = Symmetric.of(H)
    if definite_factor(held) is not None:
        # What is left of e may be all rounding, and must not be less than what G' explains.
        e -= min(unexplained(held, G, e)[0], 0.0)
    rows = torch.arange(len(v), device=v.device).view(len(units), -1)
    return replace(consumer, H=H, G=G, e=e, W0=W0, rows=rows)
