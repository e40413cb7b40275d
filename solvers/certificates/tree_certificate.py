"""The tree of a branch and bound as evidence for its bound: every node can be checked.

A node is a set of units that go and a set that stay.  Of the supports below it, its linearization
(`solvers.certificates.certificate`) bounds the loss of all, of those in which some unit goes, and
of those in which it stays.  A node is then bounded by the best of

- its own bound, what its parent proved of it, and, if few supports are left, all of their losses;
- the largest t for which units whose other side costs t or more are too many, or contradict each
  other: then every support has one of them on that side;
- its children, if each unit that they decide alike costs t or more on its other side, and at most
  one unit is decided by both in opposite ways: the least of those costs and of the children's
  bounds.

So nothing of the search has to be believed: not its order, not its fixing of units, not that it
has closed every node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from solvers.certificates.certificate import (
    LEAST_DIAGONAL,
    LEAST_SHARE,
    EnumerationCertificate,
    Inverses,
    Linearization,
    MultiplierCertificate,
    check_numbers,
    check_range,
)
from solvers.errors import require
from solvers.problem import SubsetProblem

FREE, REMOVED, KEPT = 0, 1, 2
"""On which side of the support a node has a unit."""

_BATCH_ELEMENTS = 1 << 20
"""Elements of the inverses of one batch of nodes."""

_MOST_SUPPORTS = 1000
"""A node is enumerated only if it leaves no more."""


@dataclass(frozen=True, eq=False)
class TreeCertificate:
    """The t nodes that a search has bounded; parents come before their children.

    root: The linearization of the first node, or None if that is enumerated.
    shape: (n,), positive: what the multipliers and q of all nodes but the root are scaled by.
    parent: The place of each node's parent, (t,) int64; -1 for the first.
    sides: `FREE`, `REMOVED` or `KEPT`, (t, n) int8.
    share, point: What each node's multipliers are computed from, and where it is linearized
        (`MultiplierCertificate`): (t, n) in [0, 1], of any floating format; of no effect where
        units are not free.
    growth: (t,): a node's q is ``growth * shape * diag(Q)``; 0 if it is to be enumerated.
    """

    root: MultiplierCertificate | None
    shape: Tensor
    parent: Tensor
    sides: Tensor
    share: Tensor
    point: Tensor
    growth: Tensor

    def bound(self, problem: SubsetProblem) -> float:
        """Recompute the lower bound from the problem, in float64; takes as long as the search did.

        Raises VerificationError if this is not a tree of nodes of this problem, or a node's q does
            not dominate.
        """
        self._check_nodes(problem)
        self._check_children()
        levels = self._levels()
        inverses = Inverses.of(problem)
        bounds = self._linearizations(problem, inverses)
        self._inherit(bounds, levels)
        proved = torch.maximum(bounds.value, self._contradiction(bounds, problem))
        siblings = self._siblings()
        for nodes in reversed(levels[1:]):
            self._divide(proved, bounds, nodes, siblings)
        return inverses.proved(float(proved[0]))

    # ---- what makes it a tree ----------------------------------------------------------------

    def _check_nodes(self, problem: SubsetProblem) -> None:
        """Refuse what is no array of nodes: types, sizes, and the range of every number."""
        matrix = isinstance(self.sides, Tensor) and self.sides.ndim == 2 and len(self.sides) > 0
        require(matrix, "the tree's sides must be a matrix of at least one node")
        t, n = self.sides.shape
        sizes = {"shape": (n,), "parent": (t,), "growth": (t,), "share": (t, n), "point": (t, n)}
        kinds = {"parent": torch.int64, "sides": torch.int8}
        for name, size in {**sizes, "sides": (t, n)}.items():
            value = getattr(self, name)
            check_numbers(f"tree's {name}", value, size, problem.device)
            right = value.dtype == kinds[name] if name in kinds else value.is_floating_point()
            require(right, f"the tree's {name} must not be of {value.dtype}")
        require(
            n == problem.units and float(self.shape.min()) > 0 and float(self.growth.min()) >= 0,
            f"the tree's shape must be {problem.units} positive numbers, and its growth must not "
            "be negative",
        )
        # The argument that children cover their parent knows these three sides only.
        exist = bool(((self.sides >= FREE) & (self.sides <= KEPT)).all())
        require(exist, "a node of the tree has a unit on a side that does not exist")
        for name in ("share", "point"):
            check_range(f"tree's {name}", getattr(self, name))
        known = isinstance(self.root, MultiplierCertificate | None)
        require(known, f"the root of the tree is a {type(self.root).__name__}")
        place = torch.arange(t, device=self.parent.device)
        follows = (self.parent >= 0) & (self.parent < place)
        rooted = int(self.parent[0]) == -1 and bool((self.sides[0] == FREE).all())
        after = rooted and bool(follows[1:].all())
        require(after, "nodes of the tree must follow their parents, the root first")
        goes, stays = (self.sides == REMOVED).sum(1), (self.sides == KEPT).sum(1)
        removals = problem.units - problem.keep
        few = int(goes.max()) <= removals and int(stays.max()) <= problem.keep
        require(few, "a node of the tree removes or keeps too many units")

    def _check_children(self) -> None:
        """Refuse children that forget a decision, and siblings that do not divide their parent."""
        own, above = self.sides[1:], self.sides[self.parent[1:]]
        kept = bool(((above == FREE) | (own == above)).all())
        require(kept, "a node of the tree forgets what its parent decided")
        # So no path is longer than there are units.
        more = bool((own != above).any(1).all())
        require(more, "a node of the tree decides nothing that its parent does not")
        first, second = self._siblings()
        few = bool((self.parent[1:].bincount() <= 2).all())
        require(few, "a node of the tree has more than two children")
        one, other = self.sides[first], self.sides[second]
        opposed = (one != other) & (one != FREE) & (other != FREE)
        divided = bool(((one == other) | opposed).all() & (opposed.sum(1) == 1).all())
        require(divided, "two children of a node of the tree do not divide it")

    def _siblings(self) -> tuple[Tensor, Tensor]:
        """Return the places of nodes that share a parent."""
        order = self.parent.argsort(stable=True)
        same = torch.nonzero(self.parent[order][1:] == self.parent[order][:-1]).flatten()
        return order[same], order[same + 1]

    def _levels(self) -> list[Tensor]:
        """Return the places of the nodes of each depth."""
        depth = torch.zeros_like(self.parent)
        while True:
            below = torch.where(self.parent < 0, 0, depth[self.parent] + 1)
            if torch.equal(below, depth):
                break
            depth = below
        return [torch.nonzero(depth == d).flatten() for d in range(int(depth.max()) + 1)]

    # ---- what each node proves ---------------------------------------------------------------

    def _linearizations(self, problem: SubsetProblem, inverses: Inverses) -> Linearization:
        """Bound every node by itself; -inf for the sides of units that are not free, (t, n)."""
        t, n = self.sides.shape
        bounds = Linearization(
            torch.zeros(t, dtype=torch.float64, device=problem.device),
            *torch.full((2, t, n), -torch.inf, dtype=torch.float64, device=problem.device),
        )
        if self.root is not None:
            whole = self.root.linearization(inverses, problem.keep)
            for into, values in zip(bounds, whole, strict=True):
                into[:1] = values
        for nodes in self._batches(problem):
            self._linearize(nodes, inverses, problem, bounds)
        return bounds

    def _batches(self, problem: SubsetProblem) -> Iterator[Tensor]:
        """Yield the places of nodes that are to be treated alike: all but a linearized root."""
        goes, stays = (self.sides == REMOVED).sum(1), (self.sides == KEPT).sum(1)
        kind = 2 * (goes * (problem.units + 1) + stays) + (self.growth > 0)
        if self.root is not None:
            kind[0] = -1
        rows = sum((problem.units * c.width) ** 2 for c in problem.consumers)
        for one in sorted(set(kind.tolist()) - {-1}):
            alike = torch.nonzero(kind == one).flatten()
            yield from torch.split(alike, max(_BATCH_ELEMENTS // rows, 1))

    def _linearize(
        self, nodes: Tensor, inverses: Inverses, problem: SubsetProblem, bounds: Linearization
    ) -> None:
        """Bound nodes with equal numbers of units on either side; fill their rows of `bounds`."""
        sides = self.sides[nodes]
        removed, free = _places(sides == REMOVED), _places(sides == FREE)
        removals = problem.units - problem.keep - removed.shape[1]
        given = inverses.given(removed, free)
        growth = self.growth[nodes, None]
        if not bool(growth.any()):
            bounds.value[nodes] = given.cheapest(_choices(free.shape[1], removals).to(nodes.device))
            return
        choice = 0 < removals < free.shape[1]
        require(choice, "a node of the tree without a choice must have growth 0")
        share, point = (
            values[nodes].double().gather(1, free) for values in (self.share, self.point)
        )
        shape = self.shape[free]
        share = share.clamp(LEAST_SHARE, 1.0)
        # Of independent units, whose variances count as often as `shape` says.
        terms = given.aggregate(share, torch.diag_embed(shape * (1 / share - 1)) + 1)
        d = terms[1].diagonal(dim1=1, dim2=2)
        largest = d.amax(1, keepdim=True)
        d = d.clamp(min=torch.where(largest > 0, LEAST_DIAGONAL * largest, 1.0))
        own = given.linearize(terms, growth * shape * d, point, removals)
        bounds.value[nodes] = own.value
        bounds.goes[nodes[:, None], free] = own.goes
        bounds.stays[nodes[:, None], free] = own.stays

    def _inherit(self, bounds: Linearization, levels: list[Tensor]) -> None:
        """Raise the bounds of nodes to what their parents prove of the sides they are on."""
        for nodes in levels[1:]:
            parent = self.parent[nodes]
            proved = torch.where(
                self.sides[nodes] == REMOVED, bounds.goes[parent], bounds.stays[parent]
            )
            proved[~self._decided(nodes)] = -torch.inf
            best = torch.maximum(proved.amax(1), bounds.value[parent])
            bounds.value[nodes] = torch.maximum(bounds.value[nodes], best)

    def _decided(self, nodes: Tensor) -> Tensor:
        """Return which units nodes decide that their parents leave free, (b, n)."""
        return (self.sides[nodes] != FREE) & (self.sides[self.parent[nodes]] == FREE)

    def _contradiction(self, bounds: Linearization, problem: SubsetProblem) -> Tensor:
        """Return the largest t for which too many units must be on one side, or one on both, (t,).

        At least t costs any support in which a unit is on the side that costs so much.
        """
        removals = (problem.units - problem.keep) - (self.sides == REMOVED).sum(1)
        stays = problem.keep - (self.sides == KEPT).sum(1)
        return torch.stack(
            [
                torch.minimum(bounds.goes, bounds.stays).amax(1),
                _ranked(bounds.stays, removals),
                _ranked(bounds.goes, stays),
            ]
        ).amax(0)

    # ---- what their children add -------------------------------------------------------------

    def _divide(
        self, proved: Tensor, bounds: Linearization, nodes: Tensor, siblings: tuple[Tensor, Tensor]
    ) -> None:
        """Raise what is proved of the parents of all `nodes` of one depth."""
        parent = self.parent[nodes]
        other = torch.where(self.sides[nodes] == REMOVED, bounds.stays[parent], bounds.goes[parent])
        other[~self._decided(nodes)] = torch.inf
        position = torch.full_like(self.parent, -1)
        position[nodes] = torch.arange(len(nodes), device=nodes.device)
        pairs = position[siblings[0]] >= 0
        first, second = (position[one[pairs]] for one in siblings)
        divided = self.sides[nodes[first]] != self.sides[nodes[second]]
        for one in (first, second):
            other[one] = other[one].masked_fill(divided, torch.inf)
        least = torch.minimum(other.amin(1), proved[nodes])
        children = torch.full_like(proved, -torch.inf)
        children.scatter_reduce_(0, parent, least, "amin", include_self=False)
        torch.maximum(proved, children, out=proved)


def _places(mask: Tensor) -> Tensor:
    """Return the places, (b, c), of the c true entries that each row of a mask has."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _choices(free: int, removals: int) -> Tensor:
    """Return every choice of units to go, (c, r)."""
    require(
        0 <= removals <= free and math.comb(free, removals) <= _MOST_SUPPORTS,
        f"a node of the tree is to be enumerated, {removals} of {free} units: at most "
        f"{_MOST_SUPPORTS} supports are",
    )
    chosen = list(combinations(range(free), removals))
    return torch.tensor(chosen, dtype=torch.int64).view(len(chosen), removals)


def _ranked(values: Tensor, rank: Tensor) -> Tensor:
    """Return the entry of each row, (b, n), that `rank`, (b,), others exceed; -inf if none is."""
    ordered = values.sort(1, descending=True).values
    padded = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf)
    return padded.gather(1, rank[:, None])[:, 0]


Certificate = EnumerationCertificate | MultiplierCertificate | TreeCertificate
"""Evidence for a lower bound: ``bound(problem)`` recomputes it, or raises VerificationError."""
