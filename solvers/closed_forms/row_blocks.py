"""The rows of units, and terms of a consumer on them."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric
from solvers.problem import Consumer


def gram_on(consumer: Consumer, rows: Tensor, *, cut: int = 0) -> Symmetric:
    """Return H on the rows of whole units, in any order; panels end between units, and at `cut`."""
    made = Symmetric.empty(len(rows), consumer.G, cut=cut, width=consumer.width)
    for start, panel in made.spans():
        stop = start + len(panel)
        panel.copy_(consumer.hessian.entries(rows[start:stop], rows[:stop]))
    return made


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
