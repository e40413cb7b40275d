"""Backends that choose which experts stay, and the check of what they say of their answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, ClassVar

import torch
from torch import Tensor

from solvers.errors import BackendError, ProblemError, VerificationError, require
from solvers.experts.losses import Losses, losses_of
from solvers.experts.problem import ExpertProblem
from solvers.heuristics.baselines import Random, Scored
from solvers.protocol import Backend, BackendKind, Natural, Selection, Status
from solvers.registry import EXPERT_BACKENDS
from solvers.solution import Solution
from solvers.solve import answer_of, checked_selection, chosen_backend
from solvers.verification import Verification, check_claim, check_support

ROUNDING = 1e-12
"""Losses are told apart if they differ by more than this share of the target's squared norm."""

_LEAST_GAIN = 1e-9
"""The share of the loss that an exchange gains if it counts."""

MOST_SETS = 1 << 17
"""Of which the losses are all computed."""

__all__ = ["Enumerate", "Frequency", "Greedy", "LocalSearch", "Random", "Reap"]


@dataclass(frozen=True)
class Frequency(Scored):
    """Keep the experts to which the most tokens are sent."""

    summary: ClassVar[str] = "the experts to which the most tokens are sent"

    def scores(self, problem: ExpertProblem) -> Tensor:
        """Return the number of tokens, as a share."""
        return problem.load / problem.load.sum()


@dataclass(frozen=True)
class Reap(Scored):
    """Keep the experts that add the most to a token that is sent to them, on average.

    Router weight times norm of the output, averaged over an expert's tokens (Lasby et al., "REAP
    the Experts", Cerebras, 2025, arXiv 2510.13999).
    """

    summary: ClassVar[str] = "largest mean of router weight times output norm (REAP)"

    def scores(self, problem: ExpertProblem) -> Tensor:
        """Return the mean of weight times norm; zero for an expert that no token reaches."""
        sums = torch.zeros(problem.experts, dtype=torch.float64, device=problem.device)
        for block in problem.tokens:
            chosen, experts, weights = problem.routed(block)
            rows = torch.arange(len(chosen), device=chosen.device)[:, None]
            norms = block.entries(rows, chosen, chosen).clamp(min=0).sqrt()
            sums.index_add_(0, experts.flatten(), (weights * norms).flatten())
        return sums / problem.load.clamp(min=1)


@dataclass(frozen=True)
class Greedy(Backend):
    """Remove the expert without which the loss is least, route anew, repeat."""

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "one removal at a time, each the best by the loss after routing anew"

    def select(self, problem: ExpertProblem) -> Selection:
        """Remove one after the other; of equals, the one to which the fewest tokens are sent."""
        kept, history = _greedy(problem, losses_of(problem))
        return Selection(
            torch.nonzero(kept).flatten(),
            Status.FEASIBLE,
            iterations=problem.experts - problem.keep,
            history=tuple(history),
        )


def _greedy(problem: ExpertProblem, losses: Losses) -> tuple[Tensor, list[float]]:
    kept = torch.ones(problem.experts, dtype=torch.bool, device=problem.device)
    history = [losses.loss(kept)]
    stay = problem.keep // problem.rule.groups
    fewest_first = problem.load.argsort(stable=True)
    while int(kept.sum()) > problem.keep:
        after = losses.removals(kept)
        full = kept.view(problem.rule.groups, -1).sum(1) <= stay
        after[full.repeat_interleave(problem.size)] = torch.inf
        equal = after <= after.min() + ROUNDING * problem.scale
        gone = fewest_first[equal[fewest_first]][0]
        kept[gone] = False
        history.append(max(float(after[gone]), 0.0))
    return kept, history


@dataclass(frozen=True)
class LocalSearch(Backend):
    """Start from greedy removal, then exchange one that stays for one that left until none helps.

    Parameters
    ----------
    max_exchanges
        The most exchanges.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "greedy start, then the best exchanges until none lowers the loss"
    max_exchanges: Natural = 10_000

    def select(self, problem: ExpertProblem) -> Selection:
        """Search until no exchange helps."""
        losses = losses_of(problem)
        kept, _ = _greedy(problem, losses)
        history, status = [losses.loss(kept)], None
        while status is None:
            least = max(_LEAST_GAIN * history[-1], ROUNDING * problem.scale)
            table = losses.exchanges(kept)
            if not float(table.min()) < history[-1] - least:
                status = Status.SWAP_OPTIMAL
            elif len(history) > self.max_exchanges:
                status = Status.ITERATION_LIMIT
            else:
                leaves, enters = divmod(int(table.argmin()), len(kept))
                then = kept.clone()
                then[leaves], then[enters] = False, True
                loss = losses.loss(then)
                if loss < history[-1]:
                    kept = then
                    history.append(loss)
                else:  # what it seems to gain is rounding
                    status = Status.FEASIBLE
        support = torch.nonzero(kept).flatten()
        return Selection(support, status, iterations=len(history) - 1, history=tuple(history))


@dataclass(frozen=True)
class Enumerate(Backend):
    """Compute the loss of every set of experts among which the router can choose."""

    kind: ClassVar[BackendKind] = BackendKind.EXACT
    summary: ClassVar[str] = "every set of experts; the ground truth where they are few"

    def select(self, problem: ExpertProblem) -> Selection:
        """Return the best set; the first among equals."""
        count = set_count(problem)
        if count > MOST_SETS:
            raise BackendError(
                f"enumerate: there are {count} sets of {problem.keep} experts, more than "
                f"{MOST_SETS}; choose local_search"
            )
        best, loss = best_of_all(problem)
        return Selection(
            best,
            Status.OPTIMAL,
            lower_bound=problem.loss(best),
            bound_from="enumeration of all sets",
            iterations=count,
            history=(loss,),
        )


def set_count(problem: ExpertProblem) -> int:
    """Return how many sets of `keep` experts there are among which the router can choose."""
    stay = problem.keep // problem.rule.groups
    return int(math.comb(problem.size, stay) ** problem.rule.groups)


def best_of_all(problem: ExpertProblem) -> tuple[Tensor, float]:
    """Return the best set, (keep,) int64, and its loss, by computing that of every one."""
    losses = losses_of(problem)
    best, least = None, math.inf
    for support in supports(problem):
        kept = torch.zeros(problem.experts, dtype=torch.bool, device=problem.device)
        kept[list(support)] = True
        loss = losses.loss(kept)
        if loss < least:
            best, least = torch.nonzero(kept).flatten(), loss
    assert best is not None
    return best, least


def supports(problem: ExpertProblem) -> Iterator[Sequence[int]]:
    """Yield every set of `keep` experts among which the router can choose."""
    size, stay = problem.size, problem.keep // problem.rule.groups
    groups = [range(g * size, (g + 1) * size) for g in range(problem.rule.groups)]
    for parts in product(*(combinations(group, stay) for group in groups)):
        yield [expert for part in parts for expert in part]


_STATUSES = (Status.FEASIBLE, Status.ITERATION_LIMIT, Status.SWAP_OPTIMAL, Status.OPTIMAL)
"""What can be said of a choice of experts."""

_EXCHANGE_TOLERANCE = 1e-6
"""An exchange refutes a swap optimum if it gains more than this share of the loss."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSolution(Solution):
    """The experts that stay, and what is claimed of them: a `Solution` without weights."""

    problem: ExpertProblem = field(repr=False)  # type: ignore[assignment]

    def verify(self) -> Verification:
        """Recompute, from the problem alone, what this solution claims.

        The loss is computed by routing all tokens.  Where no exchange is said to help, all are
        tried; where none is said to be better, all sets are.  Raises VerificationError if a claim
        is false, or not well formed.
        """
        check_claim(self)
        require(self.status in _STATUSES, f"status {self.status.name} is none of experts")
        problem, support = self.problem, self.support
        check_support(problem, support)
        try:
            loss = problem.loss(support)
        except ProblemError as error:
            raise VerificationError(f"support is not valid: {error}") from error
        slack = ROUNDING * (problem.scale + loss)
        require(
            abs(loss - self.loss) <= slack,
            f"loss is {loss:.9g} when recomputed, claimed {self.loss:.9g}",
        )
        require(
            self.lower_bound <= loss + slack, f"bound {self.lower_bound} lies above the loss {loss}"
        )
        gain = least = math.nan
        if self.status is Status.SWAP_OPTIMAL:
            kept = torch.zeros(problem.experts, dtype=torch.bool, device=support.device)
            kept[support] = True
            gain = loss - float(losses_of(problem).exchanges(kept).min())
            require(
                gain <= _EXCHANGE_TOLERANCE * loss + slack,
                f"not a swap optimum: an exchange lowers the loss {loss:.9g} by {gain:.3g}",
            )
        if self.status is Status.OPTIMAL:
            sets = set_count(problem)
            require(
                sets <= MOST_SETS, f"an optimum of {sets} sets cannot be recomputed: say FEASIBLE"
            )
            _, least = best_of_all(problem)
            require(loss <= least + 2 * slack, f"loss is {loss:.9g}, and {least:.9g} is possible")
            require(self.lower_bound <= least + slack, f"bound {self.lower_bound} exceeds {least}")
        said = self.lower_bound > -math.inf and not math.isfinite(least)
        scale = problem.scale or 1.0
        return Verification(
            loss,
            abs(loss - self.loss) / scale,
            swap_gain=gain / scale,
            lower_bound=least,
            tolerance=slack,
            not_recomputed=("lower_bound",) if said else (),
        )


def solve_experts(
    problem: ExpertProblem, backend: str | Backend = "local_search", **options: Any
) -> ExpertSolution:
    """Choose which experts stay, as `solve` does which units.

    Backends are those of ``solvers.backends(solvers.EXPERT_BACKENDS)``.  Raises BackendError if one
    is unknown, fails, or answers with what is no choice.
    """
    name, chosen = chosen_backend(backend, options, {}, EXPERT_BACKENDS)
    start = time.perf_counter()
    with torch.no_grad():
        selection = checked_selection(name, answer_of(name, chosen, problem), problem)
        try:
            loss = problem.loss(selection.support)
        except ProblemError as error:
            raise BackendError(
                f"backend {name!r} did not return a valid selection: {error}"
            ) from error
    seconds = time.perf_counter() - start
    return ExpertSolution(
        problem=problem, backend=name, loss=loss, seconds=seconds, **vars(selection)
    )
