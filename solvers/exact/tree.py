"""The record of a branch and bound: what becomes its certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.certificates.certificate import MultiplierCertificate
from solvers.certificates.tree_certificate import TreeCertificate
from solvers.exact.frontier import Nodes

MOST_ENTRIES = 1 << 25
"""Nodes times units that a record holds; each takes 7 bytes here, and 24 where it is checked."""


class TreeRecord:
    """The nodes that were bounded, in the order in which they were.

    A tree that grows past `MOST_ENTRIES` is not kept: there is no certificate then.

    Parameters
    ----------
    root
        The linearization of the first node, or None if that is enumerated.
    shape
        What the multipliers and q of all nodes but the root are scaled by, (n,).
    """

    def __init__(self, root: MultiplierCertificate | None, shape: Tensor) -> None:
        self._root = root
        self._shape = shape
        self._size = 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, nodes: Nodes, point: Tensor, growth: Tensor) -> Tensor:
        """Add nodes; return the places by which their children refer to them, (b,).

        Parameters
        ----------
        nodes
            As they were bounded.
        point
            Where each node is linearized, (b, n).
        growth
            Its q relative to ``shape * diag(Q)``, (b,); 0 if it was enumerated.
        """
        places = self._size + torch.arange(len(nodes), device=nodes.parent.device)
        self._size += len(nodes)
        if self.is_whole:
            part = (nodes.parent, nodes.sides, nodes.share.half(), point.float(), growth)
            self._parts.append(part)
        else:
            self._parts.clear()
        return places

    @property
    def is_whole(self) -> bool:
        """Whether every node is still here."""
        return self._size * len(self._shape) <= MOST_ENTRIES

    def certificate(self) -> TreeCertificate | None:
        """Return the evidence for what the search has proved, or None if it grew too large."""
        if not self.is_whole:
            return None
        parent, sides, share, point, growth = (
            torch.cat(parts) for parts in zip(*self._parts, strict=True)
        )
        return TreeCertificate(self._root, self._shape, parent, sides, share, point, growth)
