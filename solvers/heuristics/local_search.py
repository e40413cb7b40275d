"""The default backend: exact greedy elimination, then the best swaps until none helps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.pivot import Exchange, PivotState, candidates
from solvers.closed_forms.refit import refit_loss
from solvers.errors import BackendError
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Natural, Selection, Status

_DRIFT_TOLERANCE = 1e-12
"""A state that has drifted by less is as good as one that was factorized anew."""

_FEW_PAIRS = 1 << 18
"""Of fewer pairs the best is exchanged, and all are scored again: that takes a few milliseconds."""

_AT_ONCE = 256
"""Of more pairs, so many units of either side are exchanged among themselves until none of them
gains, before all are scored again: docs/results.md has seconds."""

_ROUNDING = 1e-15
"""No exchange counts that gains less than this share of the loss of the empty support: at a loss of
next to nothing, gains are rounding, and the same units would come and go."""

_LEAST_GAIN = 1e-9
"""An exchange counts if it gains more than this share of the current loss."""

_SWAP_TOLERANCE = 1e-6
"""A swap optimum leaves out no exchange that gains more than this share of the loss."""


@dataclass(frozen=True)
class LocalSearch(Backend):
    """Start from greedy elimination, then make the best exchanges until none helps.

    Of small problems that is the best one at a time; of large ones the units of the best exchanges
    are exchanged among themselves before all pairs are scored again (`swaps.candidates`).
    The gain of every one of the k (n - k) exchanges is computed, at last on a sound factorization.
    So the search ends where none lowers the loss by that formula, or says that H is too close to
    singular for it.

    Parameters
    ----------
    start
        Units to start from, or None for greedy elimination.
    max_swaps
        The most exchanges.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "greedy start, then the best swaps until none lowers the loss"
    start: tuple[int, ...] | None = None
    max_swaps: Natural = 10_000

    def select(self, problem: SubsetProblem) -> Selection:
        """Search until the gains of a sound factorization say that no exchange helps."""
        state = self._initial_state(problem)
        loss = _loss(state)
        support, history, swaps = state.support, [loss], 0
        while True:
            made, gain, converged = self._descend(state, history[-1], self.max_swaps - swaps)
            swaps += made
            loss = _loss(state) if made else loss
            gained = loss < history[-1]
            if gained:
                support = state.support
                history.append(loss)
            sound = made == 0 or (gained and _is_sound(state))
            if not sound:
                del state  # there is no room for two
                state = PivotState.on_support(problem, support)
            # Exchanges that gained only by the account of a swept state are within its rounding.
            if sound or not gained or not converged:
                gain = gain if sound else _best(state, 1).gain  # that of the support in `state`
                least = max(_SWAP_TOLERANCE * history[-1], _ROUNDING * problem.empty_loss)
                status = Status.SWAP_OPTIMAL if gain <= least else Status.PRECISION_LIMIT
                status = status if converged else Status.ITERATION_LIMIT
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

    def _descend(self, state: PivotState, loss: float, limit: int) -> tuple[int, float, bool]:
        """Make at most `limit` exchanges; return how many, the best left, and if that is none."""
        few = len(state.support) * len(state.removed) < _FEW_PAIRS
        count = 1 if few else _AT_ONCE
        made, best = 0, _best(state, count)
        while made < limit and best.gain > (least := _least(state, loss)):
            moved, gains = _exchanged(state, best, least, limit - made)
            state.sweep(moved)
            loss -= sum(gains)
            made += len(gains)
            best = _best(state, count)
        return made, best.gain, not best.gain > _least(state, loss)


def _least(state: PivotState, loss: float) -> float:
    """Return what an exchange has to gain; no loss is negative, so that none gains at zero."""
    return max(_LEAST_GAIN * loss, _ROUNDING * state.problem.empty_loss) if loss > 0 else math.inf


def _is_sound(state: PivotState) -> bool:
    return state.drift() < _DRIFT_TOLERANCE


def _loss(state: PivotState) -> float:
    """Return the loss of the refit on the support of a state, which tells it where it is sound."""
    loss = state.loss() if _is_sound(state) else None
    return refit_loss(state.problem, state.support) if loss is None else loss


def _best(state: PivotState, count: int) -> Exchange:
    """Return the units with the best exchanges; NaN where too many digits are lost to tell."""
    try:
        return candidates(state, count)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return Exchange(state.support[:0], math.nan)


def _exchanged(
    state: PivotState, best: Exchange, least: float, limit: int
) -> tuple[Tensor, list[float]]:
    """Make the best exchange, then others among the same units, until none of them gains.

    moved: The units that change sides, int64.
    gains: What each exchange gains: the first, and at most `limit` in all of more than `least`
        each.
    """
    gains = [best.gain]
    if len(best.units) == 2:
        return best.units, gains
    part = state.part(best.units)
    part.sweep([0, len(best.units) // 2])
    while len(gains) < limit and (swap := _best(part, 1)).gain > least:
        part.sweep(swap.units)
        gains.append(swap.gain)
    return best.units[part.kept != state.kept[best.units]], gains
