"""Branch and bound on the perspective relaxation; the exact backend that needs no other package.

A node is a set of units that are removed and a set that are kept.  Its relaxation is solved on the
inverse Hessian conditioned on both (`solvers.bounds.removal`): removed rows are swept out, kept
rows are dropped, so problems shrink and bounds sharpen on the way down.  Slopes of the bound are
reduced costs; they fix units whose other choice cannot beat the incumbent, and raise the bounds of
the children.  Nodes are taken best-first, hundreds at a time (`solvers.bounds.batch`): as every
node whose bound is below the optimum has to be opened anyway, that costs hardly any node.

Every node that was bounded is recorded (`TreeRecord`), so that anyone can check the tree.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from solvers.bounds.batch import BoundBatch, TermsBatch, bound_nodes
from solvers.bounds.relaxation import Effort, relax
from solvers.bounds.removal import RemovalTerms
from solvers.certificates.certificate import MultiplierCertificate
from solvers.certificates.tree_certificate import FREE, KEPT, REMOVED, TreeCertificate
from solvers.closed_forms.elimination import serial
from solvers.closed_forms.refit import Incumbent, refit_loss_and_rounding
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import (
    DEFAULT_GAP_TOLERANCE,
    Backend,
    BackendKind,
    Natural,
    Seconds,
    Selection,
    Status,
    Tolerance,
)

_FIRST_CAPACITY = 1024

MOST_ENTRIES = 1 << 25
"""Nodes times units that a record holds; each takes 7 bytes here, and 24 where it is checked."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Some nodes of a search over n units.

    bound: A loss that no support below the node beats, (b,) float64.
    sides: On which side each unit is, (b, n) int8: `FREE`, `REMOVED` or `KEPT`.
    share: For each unit, how likely it is removed; where the relaxation starts, (b, n).
    parent: The places of the nodes that they come from in the record of the search, (b,) int64.
    """

    bound: Tensor
    sides: Tensor
    share: Tensor
    parent: Tensor

    def __len__(self) -> int:
        return len(self.bound)

    def __getitem__(self, some: Tensor) -> Nodes:
        """Return some of the nodes, given by a mask or by their places."""
        return Nodes(*(tensor[some] for tensor in _tensors(self)))


class Frontier:
    """Open nodes of n units on a device, of which those of the least bounds are taken first."""

    def __init__(self, units: int, device: torch.device) -> None:
        self._size = 0
        self._held = Nodes(
            torch.empty(_FIRST_CAPACITY, dtype=torch.float64, device=device),
            torch.empty(_FIRST_CAPACITY, units, dtype=torch.int8, device=device),
            torch.empty(_FIRST_CAPACITY, units, dtype=torch.float16, device=device),
            torch.empty(_FIRST_CAPACITY, dtype=torch.int64, device=device),
        )

    def root(self) -> Nodes:
        """Return the node that leaves everything open; it is not in the frontier."""
        sides = torch.full_like(self._held.sides[:1], FREE)
        share = torch.full_like(self._held.share[:1], 0.5, dtype=torch.float64)
        parent = torch.full_like(self._held.parent[:1], -1)
        return Nodes(torch.zeros_like(share[:, 0]), sides, share, parent)

    @property
    def least(self) -> float:
        """The least bound of an open node, or infinity if none is open."""
        return float(self._held.bound[: self._size].min()) if self._size else math.inf

    def push(self, nodes: Nodes) -> None:
        """Open nodes."""
        end = self._size + len(nodes)
        if end > len(self._held):
            more = max(end, 2 * len(self._held)) - len(self._held)
            grown = (torch.cat([t, t.new_empty(more, *t.shape[1:])]) for t in _tensors(self._held))
            self._held = Nodes(*grown)
        for held, new in zip(_tensors(self._held), _tensors(nodes), strict=True):
            held[self._size : end] = new
        self._size = end

    def pop(self, count: int, cutoff: float) -> Nodes:
        """Take the nodes of the least bounds, at most `count`, that lie below `cutoff`."""
        bounds = self._held.bound[: self._size]
        values, places = bounds.topk(min(count, self._size), largest=False)
        places = places[values < cutoff]
        taken = self._held[places]
        self._fill(places)
        return replace(taken, share=taken.share.double())

    def _fill(self, places: Tensor) -> None:
        """Move the last nodes to where nodes were taken."""
        left = self._size - len(places)
        stays = torch.ones(len(places), dtype=torch.bool, device=places.device)
        stays[places[places >= left] - left] = False
        movers = left + torch.nonzero(stays).flatten()
        holes = places[places < left]
        for held in _tensors(self._held):
            held[holes] = held[movers]
        self._size = left


def _tensors(nodes: Nodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return nodes.bound, nodes.sides, nodes.share, nodes.parent


class TreeRecord:
    """The nodes in the order in which they were bounded, unless they exceed `MOST_ENTRIES`."""

    def __init__(self) -> None:
        self._size = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, nodes: Nodes, point: Tensor, growth: Tensor) -> Tensor:
        """Add nodes as they were bounded; return the places by which children refer to them, (b,).

        `point` is where each is linearized, (b, n), and `growth` its q relative to
        ``shape * diag(Q)``, (b,); 0 if it was enumerated.
        """
        places = self._size + torch.arange(len(nodes), device=nodes.parent.device)
        self._size += len(nodes)
        part = (nodes.parent, nodes.sides, nodes.share.half(), point.float(), growth)
        self._parts.append(part)
        if self._size * point.shape[1] > MOST_ENTRIES:
            self._parts.clear()
        return places

    def certificate(
        self, root: MultiplierCertificate | None, shape: Tensor
    ) -> TreeCertificate | None:
        """Return the evidence, given that of the root and the shape of all q; None if too large."""
        if sum(len(parent) for parent, *_ in self._parts) < self._size:
            return None
        fields = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return TreeCertificate(root, shape, *fields)


_LEAF_SUPPORTS = 10
_ROOT_EFFORT = Effort(steps=200)
_NODE_STEPS = 8
_LONE_NODE_STEPS = 60
"""Gradient steps in a node that is a batch of its own: its linear algebra costs far more."""

_MORE_STEPS = 60
_WORTH_MORE = 0.7
"""Further gradient steps in a node, if they may raise its bound by this share of what it lacks."""

_BRANCH_ON_DIAGONAL = 0.1
"""What a unit's q counts beside the rise of the bound if it stays."""

_BATCH_NODES = 1024
_BATCH_ELEMENTS = 1 << 20
"""Elements of the Hessians of one batch; bounds the memory, and keeps the caches warm."""

_THREADED_ROWS = 256
"""Below this many rows, waking threads costs more than they save."""


@dataclass(frozen=True)
class BranchAndBound(Backend):
    """Prove which support is best, or how far the best one known can be from it.

    Parameters
    ----------
    time_limit
        Seconds after which no further nodes are opened.
    gap_tolerance
        Relative gap at which the search ends and calls its answer optimal.
    node_limit
        The most nodes.
    start
        Units to start the warm-starting local search from; by default it starts from greedy.
    """

    kind: ClassVar[BackendKind] = BackendKind.EXACT
    summary: ClassVar[str] = "own branch and bound on the perspective relaxation; needs no licence"
    time_limit: Seconds = 60.0
    gap_tolerance: Tolerance = DEFAULT_GAP_TOLERANCE
    node_limit: Natural = 10_000_000
    start: tuple[int, ...] | None = None

    def select(self, problem: SubsetProblem) -> Selection:
        """Search best-first from the swap optimum."""
        rows = max(len(c.W0) for c in problem.consumers)
        with serial(rows <= _THREADED_ROWS):
            return self._search(problem)

    def _search(self, problem: SubsetProblem) -> Selection:
        deadline = time.perf_counter() + self.time_limit
        warm = LocalSearch(start=self.start).select(problem).support
        search = _Search(problem, warm, self.gap_tolerance)
        status = None
        while status is None and search.is_open:
            left = self.node_limit - search.nodes
            if left <= 0:
                status = Status.NODE_LIMIT
            elif search.nodes and time.perf_counter() > deadline:
                status = Status.TIME_LIMIT
            else:
                search.step(left)
        # Near a singular H what rounding can have done to a leaf may exceed the tolerance.
        rounding = refit_loss_and_rounding(problem, search.support)[1]
        proved = search.lower_bound >= search.cutoff - rounding
        return Selection(
            search.support,
            status or (Status.OPTIMAL if proved else Status.PRECISION_LIMIT),
            lower_bound=search.lower_bound,
            bound_from=f"branch and bound, {search.nodes} nodes",
            iterations=search.nodes,
            history=tuple(search.history),
            gap_tolerance=self.gap_tolerance,
            certificate=search.certificate,
        )


class _Search(Incumbent):
    """The open nodes, the incumbent, and what has been proved."""

    def __init__(self, problem: SubsetProblem, support: Tensor, gap_tolerance: float) -> None:
        super().__init__(problem, support)
        self.gap_tolerance = gap_tolerance
        self.terms = RemovalTerms.of(problem)
        self.nodes = 0
        self.closed = math.inf
        self._frontier = Frontier(problem.units, problem.device)
        self._record = TreeRecord()
        self._root: MultiplierCertificate | None = None
        self._shape: Tensor | None = None
        rows = sum((problem.units * c.width) ** 2 for c in problem.consumers)
        self._batch = min(max(_BATCH_ELEMENTS // rows, 1), _BATCH_NODES)
        self._steps = _NODE_STEPS if self._batch > 1 else _LONE_NODE_STEPS

    @property
    def cutoff(self) -> float:
        """A node whose bound reaches this cannot hold anything better enough."""
        return self.loss * (1 - self.gap_tolerance)

    @property
    def is_open(self) -> bool:
        """Whether some node may hold a support that is better enough."""
        return self._shape is None or self._frontier.least < self.cutoff

    @property
    def lower_bound(self) -> float:
        """What no support's loss can be below."""
        open_bound = -math.inf if self._shape is None else self._frontier.least
        # The incumbent's own loss is an upper limit to what can be claimed.
        return min(open_bound, self.closed, self.loss)

    @property
    def certificate(self) -> TreeCertificate | None:
        """Evidence for the bound; None before the root is opened, and of too large a tree."""
        return None if self._shape is None else self._record.certificate(self._root, self._shape)

    def step(self, limit: int) -> None:
        """Open the root, or at most `limit` of the nodes of the least bounds."""
        if self._shape is None:
            self._open_root()
            return
        nodes = self._frontier.pop(min(self._batch, limit), self.cutoff)
        self.nodes += len(nodes)
        terms = TermsBatch.of(self.terms, nodes.sides)
        leaf = terms.log_supports <= math.log(_LEAF_SUPPORTS) + 1e-9
        for some, treat in ((leaf, self._enumerate), (~leaf, self._branch)):
            if bool(some.all()):
                treat(nodes, terms)
            elif bool(some.any()):
                treat(nodes[some], terms[some])

    def _open_root(self) -> None:
        self.nodes = 1
        root = self._frontier.root()
        terms = TermsBatch.of(self.terms, root.sides)
        if self.terms.removals == 0:
            self._shape = root.share[0]
            self._enumerate(root, terms)
            return
        relaxation = relax(self.terms, _ROOT_EFFORT, cutoff=self.cutoff)
        self._shape = relaxation.bound.shape
        self._root = relaxation.certificate
        self._divide(root, terms, BoundBatch.single(relaxation.bound), relaxation.share[None])

    def _enumerate(self, nodes: Nodes, terms: TermsBatch) -> None:
        """Close nodes that leave few supports open."""
        self._record.add(nodes, torch.zeros_like(nodes.share), torch.zeros_like(nodes.bound))
        counts = torch.stack([terms.free.sum(1), terms.removals], 1)
        for free, removals in sorted({(free, removals) for free, removals in counts.tolist()}):
            some = (counts == counts.new_tensor([free, removals])).all(1)
            group, within = nodes[some], terms[some]
            costs, places = within.cheapest(free, removals)
            values = torch.maximum(within.certified(costs), group.bound)
            self.closed = min(self.closed, float(values.min()))
            best = int((within.spent + costs).argmin())
            self._offer_places(group, within, best, places[best], float(costs[best]))

    def _branch(self, nodes: Nodes, terms: TermsBatch) -> None:
        """Bound nodes, and divide those that remain."""
        assert self._shape is not None
        share, shape = nodes.share.gather(1, terms.units), self._shape[terms.units]
        bound = bound_nodes(terms, share, shape, share, self._steps)
        lacking = terms.cost_reaching(self.cutoff) - bound.cost
        more = (lacking > 0) & (bound.most - bound.cost > _WORTH_MORE * lacking)
        if bool(more.any()):
            values = share[more], shape[more], bound.point[more]
            bound = bound.with_rows(more, bound_nodes(terms[more], *values, _MORE_STEPS))
        self._divide(nodes, terms, bound, share)

    def _divide(self, nodes: Nodes, terms: TermsBatch, bound: BoundBatch, share: Tensor) -> None:
        """Close the nodes whose bound reaches the cutoff, and divide the others."""
        value = torch.maximum(terms.certified(bound.cost), nodes.bound)
        point = torch.zeros_like(nodes.share).scatter(1, terms.units, bound.point)
        places = self._record.add(nodes, point, bound.growth)
        self._round(nodes, terms, bound, int(value.argmin()))
        remains = value < self.cutoff
        if not bool(remains.all()):
            self.closed = min(self.closed, float(value[~remains].min()))
            nodes, terms, bound = nodes[remains], terms[remains], bound[remains]
            value, share, places = value[remains], share[remains], places[remains]
        if len(value):
            share = nodes.share.scatter(1, terms.units, (share + bound.point) / 2)
            nodes = Nodes(value, nodes.sides, share, places)
            self._push_children(*self._fix(nodes, terms, bound), terms, bound)

    def _round(self, nodes: Nodes, terms: TermsBatch, bound: BoundBatch, index: int) -> None:
        """Offer the support that the relaxation of one node suggests."""
        removals = int(terms.removals[index])
        places = bound.point[index].argsort(descending=True)[:removals]
        some = torch.tensor([index], device=places.device)
        cost = terms[some].costs(places[None])
        self._offer_places(nodes, terms, index, places, float(cost))

    def _offer_places(
        self, nodes: Nodes, terms: TermsBatch, index: int, places: Tensor, cost: float
    ) -> None:
        """Take the support that removes the free units at some `places` if it is the best."""
        if terms.constant + float(terms.spent[index]) + cost >= self.loss:
            return
        stays = nodes.sides[index] != REMOVED
        stays[terms.units[index, places]] = False
        self.offer(torch.nonzero(stays).flatten())

    def _fix(self, nodes: Nodes, terms: TermsBatch, bound: BoundBatch) -> tuple[Nodes, Tensor]:
        """Decide on free units whose other side cannot beat the incumbent; return what is free."""
        slack = (terms.cost_reaching(self.cutoff) - bound.cost)[:, None]
        go = (bound.if_kept(terms) > slack) & terms.free
        stay = (bound.if_removed(terms) > slack) & terms.free
        if bool((go | stay).any()):
            # What fixing cuts off has a bound that reaches the cutoff.
            self.closed = min(self.closed, self.cutoff)
        sides = nodes.sides.gather(1, terms.units)
        sides[go], sides[stay] = REMOVED, KEPT
        sides = nodes.sides.scatter(1, terms.units, sides)
        return replace(nodes, sides=sides), terms.free & ~go & ~stay

    def _push_children(
        self, nodes: Nodes, undecided: Tensor, terms: TermsBatch, bound: BoundBatch
    ) -> None:
        """Branch on a unit that is likely to go, and that is costly to keep, or settles much.

        Where fixing has decided everything, the node itself is opened again, as its only child.
        """
        goes, stays = (nodes.sides == REMOVED).sum(1), (nodes.sides == KEPT).sum(1)
        decided = (goes >= self.terms.removals) | (stays >= self.problem.keep)
        self._push(nodes[decided])
        kept = bound.if_kept(terms)
        promise = (kept.clamp(min=0.0) + _BRANCH_ON_DIAGONAL * bound.q) * bound.point
        place = torch.where(undecided, promise, -1.0).argmax(1, keepdim=True)
        unit = terms.units.gather(1, place)
        for side, rises in ((REMOVED, bound.if_removed(terms)), (KEPT, kept)):
            cost = bound.cost + rises.gather(1, place)[:, 0].clamp(min=0.0)
            value = torch.maximum(terms.certified(cost), nodes.bound)
            sides = nodes.sides.scatter(1, unit, side)
            self._push(replace(nodes, bound=value, sides=sides)[~decided])

    def _push(self, nodes: Nodes) -> None:
        """Open nodes, but those that remove or keep too many, or whose bound closes them."""
        goes, stays = (nodes.sides == REMOVED).sum(1), (nodes.sides == KEPT).sum(1)
        nodes = nodes[(goes <= self.terms.removals) & (stays <= self.problem.keep)]
        closed = nodes.bound >= self.cutoff
        if bool(closed.any()):
            self.closed = min(self.closed, float(nodes.bound[closed].min()))
        self._frontier.push(nodes[~closed])
