"""Terms of a consumer with its rows ordered unit by unit."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric
from solvers.problem import Consumer


class RowBlocks:
    """The terms of a consumer with the rows ordered unit by unit; only what is read is copied."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.order = consumer.rows.flatten()

    def H(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries in some rows and columns, (r, c)."""
        return self.consumer.hessian.entries(self.order[rows], self.order[columns])

    def gram(self, rows: Tensor, *, cut: int = 0) -> Symmetric:
        """Return H on some rows in half of its memory, panels cut between units and at `cut`."""
        made = Symmetric.empty(len(rows), self.consumer.G, cut=cut, width=self.consumer.width)
        for start, panel in made.spans():
            stop = start + len(panel)
            panel.copy_(self.H(rows[start:stop], rows[:stop]))
        return made

    def responses(self, rows: Tensor) -> Tensor:
        """Return a matrix with the same products ``G G'`` on some rows, (r, m) or narrower."""
        return narrowed(self.consumer.G[self.order[rows]])


def narrowed(G: Tensor) -> Tensor:
    """Return a matrix of as many columns as G has rows, if it has more, with the same ``G G'``."""
    return torch.linalg.qr(G.T, mode="r").R.T if G.shape[1] > G.shape[0] else G


def by_unit(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """Return H and G with the rows ordered unit by unit."""
    order = consumer.rows.flatten()
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return consumer.H, consumer.G
    return consumer.hessian.entries(order, order), consumer.G[order]


def unit_rows(units: Tensor, width: int) -> Tensor:
    """Return the rows, (len(units) * width,) int64, of units that are `width` rows each."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
