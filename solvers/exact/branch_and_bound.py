"""Branch and bound on the perspective relaxation; the exact backend that needs no other package.

A node is a set of units that are removed and a set that are kept.  Its relaxation is solved on the
inverse Hessian conditioned on both (`solvers.bounds.removal`): removed rows are swept out, kept
rows are dropped, so problems shrink and bounds sharpen on the way down.  Slopes of the bound are
reduced costs; they fix units whose other choice cannot beat the incumbent.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field
from itertools import combinations, count
from typing import ClassVar

import torch
from torch import Tensor

from solvers.backend import Capabilities, Kind
from solvers.bounds.relaxation import Effort, Relaxation, Start, relax
from solvers.bounds.removal import RemovalTerms
from solvers.errors import BackendError
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.refit import refit
from solvers.solution import DEFAULT_GAP_TOLERANCE, Selection, Status

_LEAF_SUPPORTS = 500
_LEAF_ELEMENTS = 1 << 20
_ROOT_EFFORT = Effort(rounds=6, steps=200, repeat=True, progress=1e-3)
_NODE_EFFORT = Effort(rounds=2, steps=60, tighten=False, progress=1e-2)
_THREADED_ROWS = 256
"""Below this many rows, waking threads costs more than they save."""


@dataclass(frozen=True)
class BranchAndBound:
    """Prove which support is best, or how far the best one known can be from it.

    Parameters
    ----------
    time_limit
        Seconds after which no further node is opened.
    gap_tolerance
        Relative gap at which the search ends and calls its answer optimal.
    node_limit
        The most nodes.
    start
        Units to start the warm-starting local search from; by default it starts from greedy.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    summary: ClassVar[str] = "own branch and bound on the perspective relaxation; needs no licence"
    capabilities: ClassVar[Capabilities] = Capabilities()
    time_limit: float = 60.0
    gap_tolerance: float = DEFAULT_GAP_TOLERANCE
    node_limit: int = 1_000_000
    start: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.time_limit >= 0 or not 0 <= self.gap_tolerance < 1 or self.node_limit < 0:
            raise BackendError(
                f"branch_and_bound: time_limit is {self.time_limit}, node_limit "
                f"{self.node_limit}, gap_tolerance {self.gap_tolerance}; limits must not be "
                "negative, and the tolerance lies in [0, 1)"
            )

    @classmethod
    def available(cls) -> str | None:
        """Return None: it needs nothing but torch."""
        return None

    def select(self, problem: SubsetProblem) -> Selection:
        """Search best-first from the swap optimum."""
        threads = torch.get_num_threads()
        rows = max(len(c.rows) * c.width for c in problem.consumers)
        torch.set_num_threads(threads if rows > _THREADED_ROWS else 1)
        try:
            return self._search(problem)
        finally:
            torch.set_num_threads(threads)

    def _search(self, problem: SubsetProblem) -> Selection:
        deadline = time.perf_counter() + self.time_limit
        warm = LocalSearch(start=self.start).select(problem)
        search = _Search(problem, warm.support, self.gap_tolerance)
        status = Status.OPTIMAL
        while search.open_nodes:
            if search.nodes >= self.node_limit:
                status = Status.NODE_LIMIT
                break
            if search.nodes and time.perf_counter() > deadline:
                status = Status.TIME_LIMIT
                break
            search.expand()
        if search.lower_bound >= search.cutoff:
            status = Status.OPTIMAL
        return Selection(
            search.support,
            status,
            lower_bound=search.lower_bound,
            bound_from=f"branch and bound, {search.nodes} nodes",
            iterations=search.nodes,
            history=tuple(search.history),
            gap_tolerance=self.gap_tolerance,
        )


@dataclass(frozen=True, order=True)
class _Node:
    """Positions of the units that are removed and kept, and a bound that holds for all below."""

    bound: float
    order: int
    removed: tuple[int, ...] = field(compare=False)
    kept: tuple[int, ...] = field(compare=False)
    start: Start | None = field(compare=False)

    def start_for(self, terms: RemovalTerms) -> Start:
        """Return where to start the relaxation of the units that are still free."""
        if self.start is None:
            return Start.cold(terms)
        return Start(self.start.share[terms.units], self.start.shape[terms.units])


class _Search:
    """The open nodes, the incumbent, and what has been proved."""

    def __init__(self, problem: SubsetProblem, support: Tensor, gap_tolerance: float) -> None:
        self.problem = problem
        self.gap_tolerance = gap_tolerance
        self.support = support
        self.history = [refit(problem, support)[1]]
        self.root = RemovalTerms.of(problem)
        self.nodes = 0
        self.closed = math.inf
        self._order = count()
        self.open_nodes: list[_Node] = []
        self._push(-math.inf, (), (), None)

    @property
    def cutoff(self) -> float:
        """A node whose bound reaches this cannot hold anything better enough."""
        return self.history[-1] * (1 - self.gap_tolerance)

    @property
    def lower_bound(self) -> float:
        """What no support's loss can be below."""
        open_bound = self.open_nodes[0].bound if self.open_nodes else math.inf
        # The incumbent's own loss is an upper limit to what can be claimed.
        return min(open_bound, self.closed, self.history[-1])

    def expand(self) -> None:
        """Take the node of the least bound, and prune it, solve it, or branch."""
        node = heapq.heappop(self.open_nodes)
        if node.bound >= self.cutoff:
            self.closed = min(self.closed, node.bound)
            return
        self.nodes += 1
        device = self.root.units.device
        removed = torch.tensor(node.removed, dtype=torch.int64, device=device)
        kept = torch.tensor(node.kept, dtype=torch.int64, device=device)
        terms = self.root.restrict(removed, kept)
        if self._is_leaf(terms):
            self._enumerate(terms, node)
            return
        effort = _NODE_EFFORT if node.removed or node.kept else _ROOT_EFFORT
        relaxation = relax(terms, effort, node.start_for(terms), cutoff=self.cutoff)
        self._round(relaxation, node)
        self._branch(node, relaxation)

    def _is_leaf(self, terms: RemovalTerms) -> bool:
        n, r = len(terms.units), terms.removals
        if r in (0, n):
            return True
        supports = math.comb(n, r)
        widest = max(c.width for c in terms.consumers)
        return supports <= _LEAF_SUPPORTS and supports * (r * widest) ** 2 <= _LEAF_ELEMENTS

    def _enumerate(self, terms: RemovalTerms, node: _Node) -> None:
        choices = list(combinations(range(len(terms.units)), terms.removals))
        positions = torch.tensor(choices, dtype=torch.int64, device=terms.units.device)
        costs = terms.costs(positions) if terms.removals else positions.new_zeros(1).double()
        index = int(costs.argmin())
        cost = float(costs[index])
        self._offer(terms, positions[index], cost, node)
        value = max(terms.certified(cost, terms.spent + cost), node.bound)
        self.closed = min(self.closed, value)

    def _round(self, relaxation: Relaxation, node: _Node) -> None:
        terms = relaxation.terms
        chosen = relaxation.bound.point.argsort(descending=True)[: terms.removals]
        self._offer(terms, chosen, float(terms.costs(chosen[None])[0]), node)

    def _offer(self, terms: RemovalTerms, chosen: Tensor, cost: float, node: _Node) -> None:
        """Take the support that removes the `chosen` free units if it is the best so far."""
        if terms.constant + terms.spent + cost >= self.history[-1]:
            return
        stays = torch.ones(self.problem.units, dtype=torch.bool, device=terms.units.device)
        stays[list(node.removed)] = False
        stays[terms.units[chosen]] = False
        support = torch.nonzero(stays).flatten()
        loss = refit(self.problem, support)[1]
        if loss < self.history[-1]:
            self.support = support
            self.history.append(loss)

    def _branch(self, node: _Node, relaxation: Relaxation) -> None:
        value = max(relaxation.value, node.bound)
        if value >= self.cutoff:
            self.closed = min(self.closed, value)
            return
        go, stay = self._fixed(relaxation)
        if bool(go.any()) or bool(stay.any()):
            # What fixing cuts off has a bound that reaches the cutoff.
            self.closed = min(self.closed, self.cutoff)
        bound, units = relaxation.bound, relaxation.terms.units
        removed = node.removed + tuple(units[go].tolist())
        kept = node.kept + tuple(units[stay].tolist())
        start = self._inherited(relaxation)
        if len(removed) >= self.root.removals or len(kept) >= self.problem.keep:
            self._push(value, removed, kept, start)
            return
        doubt = torch.where(go | stay, -1.0, bound.q * bound.point * (1 - bound.point))
        unit = int(units[int(doubt.argmax())])
        self._push(value, (*removed, unit), kept, start)
        self._push(value, removed, (*kept, unit), start)

    def _inherited(self, relaxation: Relaxation) -> Start:
        """Return where the children start, with an entry for each unit of the problem."""
        restart, units = relaxation.restart, relaxation.terms.units
        share, shape = torch.zeros(2, self.problem.units, dtype=torch.float64, device=units.device)
        share[units], shape[units] = restart.share, restart.shape
        return Start(share, shape)

    def _push(
        self, bound: float, removed: tuple[int, ...], kept: tuple[int, ...], start: Start | None
    ) -> None:
        """Open a node, unless it removes or keeps too many; where one count is met, complete it."""
        goes, stays = self.root.removals, self.problem.keep
        if len(removed) > goes or len(kept) > stays:
            return
        heapq.heappush(self.open_nodes, _Node(bound, next(self._order), removed, kept, start))

    def _fixed(self, relaxation: Relaxation) -> tuple[Tensor, Tensor]:
        """Return which free units have to go and which have to stay to beat the incumbent."""
        terms, bound = relaxation.terms, relaxation.bound
        slack = terms.cost_reaching(self.cutoff, relaxation.magnitude) - bound.value
        slopes = bound.slopes
        ordered = slopes.sort().values
        r = terms.removals
        if slack <= 0 or not math.isfinite(relaxation.value):
            return torch.zeros_like(slopes, dtype=torch.bool), torch.zeros_like(slopes).bool()
        return ordered[r] - slopes > slack, slopes - ordered[r - 1] > slack
