"""The nodes of a branch and bound, open and recorded, in arrays: there can be a million of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.certificates.certificate import MultiplierCertificate
from solvers.certificates.tree_certificate import FREE, TreeCertificate

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
