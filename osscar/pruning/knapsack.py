"""One option out of every class, at the least loss within a budget: the multiple-choice knapsack.

Minimize ``sum_g f_g(i_g)`` subject to ``sum_g c_g(i_g) <= C``.  The Lagrangian relaxation at one
multiplier gives a lower bound and nearly always a choice within a fraction of it (Sinha and
Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979).  Options that
cannot be part of anything better are struck out by their reduced costs; what is left is a few
options a class, which HiGHS solves to the end.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

_BISECTIONS = 200
_SECONDS = 20.0
_MOST_LEFT = 200_000
"""Options beyond which the program is not built: memory."""


@dataclass(frozen=True)
class Choice:
    """What the knapsack holds.

    Parameters
    ----------
    options
        The index of the option of each class.
    loss, cost
        Sums over the classes.
    lower_bound
        No choice within the budget has a smaller loss.
    """

    options: tuple[int, ...]
    loss: float
    cost: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far the loss can be above the least one, relative to it."""
        above = max(self.loss - self.lower_bound, 0.0)
        return above / abs(self.loss) if self.loss else 0.0


class BudgetError(ValueError):
    """No choice is within the budget.

    Parameters
    ----------
    least
        The least cost of any choice.
    """

    def __init__(self, least: float) -> None:
        super().__init__(f"the least cost of any choice is {least:g}")
        self.least = least


def choose(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> Choice:
    """Choose one option of each class.

    Parameters
    ----------
    losses, costs
        For each class, one finite number an option.
    budget
        What the costs may come to.

    Raises
    ------
    BudgetError
        If nothing is within the budget.
    """
    least = sum(float(c.min()) for c in costs)
    # Sums of floating-point numbers may exceed the sum that was meant.
    budget += 1e-12 * sum(float(np.abs(c).max()) for c in costs)
    if not least <= budget:
        raise BudgetError(least)
    multiplier, options = _relaxed(losses, costs, budget)
    reduced = [f + multiplier * c for f, c in zip(losses, costs, strict=True)]
    bound = sum(float(r.min()) for r in reduced) - multiplier * budget
    options = _filled(losses, costs, budget, options)
    loss = _sum(losses, options)
    left = [np.flatnonzero(r - r.min() <= loss - bound) for r in reduced]
    if loss - bound > 1e-9 * abs(loss) and sum(map(len, left)) <= _MOST_LEFT:
        options, bound = _solved(losses, costs, budget, options, bound, left)
    return Choice(
        tuple(map(int, options)), _sum(losses, options), _sum(costs, options), float(bound)
    )


def _sum(values: Sequence[NDArray[np.float64]], options: Sequence[int]) -> float:
    return float(sum(v[i] for v, i in zip(values, options, strict=True)))


def _relaxed(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> tuple[float, list[int]]:
    """Return the multiplier of the best bound, and the choice just within the budget at it.

    Where the budget does not bind, that is the least loss of each class, at the least cost.
    """

    def at(multiplier: float) -> list[int]:
        return [int((f + multiplier * c).argmin()) for f, c in zip(losses, costs, strict=True)]

    options = [int(np.lexsort((c, f))[0]) for f, c in zip(losses, costs, strict=True)]
    if _sum(costs, options) <= budget:
        return 0.0, options
    low, high = 0.0, 1e-30
    while _sum(costs, options := at(high)) > budget:
        low, high = high, 10 * high
        if high > 1e300:  # all that is left is to be as cheap as can be
            return high, [int(c.argmin()) for c in costs]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2 if low > 0.1 * high else (low or high * 1e-6) ** 0.5 * high**0.5
        if not low < middle < high:
            break
        found = at(middle)
        if _sum(costs, found) > budget:
            low = middle
        else:
            high, options = middle, found
    return high, options


def _filled(
    losses: Sequence[NDArray[np.float64]],
    costs: Sequence[NDArray[np.float64]],
    budget: float,
    options: Sequence[int],
) -> list[int]:
    """Exchange single options for better ones as long as the budget has room for one."""
    chosen = list(options)
    room = budget - _sum(costs, chosen)
    while True:
        best: tuple[float, int, int] | None = None
        for index, (f, c) in enumerate(zip(losses, costs, strict=True)):
            gains = np.where(c - c[chosen[index]] <= room, f[chosen[index]] - f, -np.inf)
            option = int(gains.argmax())
            if gains[option] > 0 and (best is None or gains[option] > best[0]):
                best = float(gains[option]), index, option
        if best is None:
            return chosen
        _, index, option = best
        room -= float(costs[index][option] - costs[index][chosen[index]])
        chosen[index] = option


def _solved(
    losses: Sequence[NDArray[np.float64]],
    costs: Sequence[NDArray[np.float64]],
    budget: float,
    options: Sequence[int],
    bound: float,
    left: Sequence[NDArray[np.int64]],
) -> tuple[list[int], float]:
    """Solve what is left with HiGHS; better bounds count, and better choices."""
    f = np.concatenate([losses[g][i] for g, i in enumerate(left)])
    c = np.concatenate([costs[g][i] for g, i in enumerate(left)])
    owner = np.repeat(np.arange(len(left)), [len(i) for i in left])
    one_each = csr_matrix((np.ones(len(f)), (owner, np.arange(len(f)))))
    # HiGHS works to absolute tolerances.
    f_scale = max(float(np.abs(f).max()), 1e-300)
    c_scale = max(float(np.abs(c).max()), 1e-300)
    with _hushed():
        result = milp(
            f / f_scale,
            integrality=np.ones(len(f), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(c[None] / c_scale, -np.inf, budget / c_scale),
            ],
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-7},
        )
    best, loss = list(options), _sum(losses, options)
    if result.x is not None:
        chosen = [int(i[result.x[owner == g].argmax()]) for g, i in enumerate(left)]
        # Its tolerances may let the budget be passed.
        if _sum(costs, chosen) <= budget and _sum(losses, chosen) < loss:
            best, loss = chosen, _sum(losses, chosen)
    proved = getattr(result, "mip_dual_bound", None)
    if proved is not None and np.isfinite(proved):
        # Options that were struck out are worse than the choice that was known.
        bound = max(bound, min(proved * f_scale, loss))
    return best, bound


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what native code prints from the standard output.

    The HiGHS of scipy leaves a line there whenever a rounded solution has to be repaired, whatever
    it is told of logging (ERGO-Code/HiGHS, `transformNewIntegerFeasibleSolution`).
    """
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    sys.stdout.flush()
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        if os.name == "posix":  # C has a buffer of its own
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
