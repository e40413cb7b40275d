"""Terms of a consumer with its rows ordered unit by unit, all units equally wide."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric
from solvers.problem import NO_ROW, Consumer


class RowBlocks:
    """The terms of a consumer with the rows ordered unit by unit and all units equally wide.

    A unit with fewer rows than the widest is filled up with rows that are decoupled from all
    others and have no correlation with the target, which changes no loss.  Nothing is copied but
    what is asked for.
    """

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        order = consumer.rows.flatten()
        self._order = order.clamp(min=0)
        self._padding = order == NO_ROW
        self._is_padded = bool(self._padding.any())
        diagonal = consumer.hessian.diagonal()
        self._diagonal = diagonal[self._order]
        self._diagonal[self._padding] = float(diagonal.mean())

    def __len__(self) -> int:
        return len(self._order)

    def H(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries in some rows and columns, (r, c)."""
        found = self.consumer.hessian.entries(self._order[rows], self._order[columns])
        if self._is_padded:
            found[self._padding[rows]] = 0
            found[:, self._padding[columns]] = 0
            found += (rows[:, None] == columns) * (self._diagonal * self._padding)[columns]
        return found

    def rows_of(self, matrix: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Return some rows of G or of the dense weights, (r, m)."""
        found = torch.index_select(matrix, 0, self._order[rows], out=out)
        if self._is_padded:
            found[self._padding[rows]] = 0
        return found

    def owned(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of some rows are no padding, (r,) bool, and those rows in the consumer."""
        own = ~self._padding[rows]
        return own, self._order[rows[own]]

    def gram(self, rows: Tensor, *, cut: int = 0) -> Symmetric:
        """Return H on some rows in half of its memory, panels cut between units and at `cut`."""
        made = Symmetric.empty(len(rows), self.consumer.G, cut=cut, width=self.consumer.width)
        for start, panel in made.spans():
            stop = start + len(panel)
            panel.copy_(self.H(rows[start:stop], rows[:stop]))
        return made

    def responses(self, rows: Tensor) -> Tensor:
        """Return a matrix with the same products ``G G'`` on some rows, (r, m) or narrower."""
        return narrowed(self.rows_of(self.consumer.G, rows))


def narrowed(G: Tensor) -> Tensor:
    """Return a matrix of as many columns as G has rows, if it has more, with the same ``G G'``."""
    return torch.linalg.qr(G.T, mode="r").R.T if G.shape[1] > G.shape[0] else G


def equal_width(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """Return H and G with the rows ordered by unit, short units filled up with decoupled rows."""
    terms = RowBlocks(consumer)
    rows = torch.arange(len(terms), device=consumer.G.device)
    if torch.equal(consumer.rows.flatten(), rows):
        return consumer.H, consumer.G
    return terms.H(rows, rows), terms.rows_of(consumer.G, rows)


def unit_rows(units: Tensor, width: int) -> Tensor:
    """Return the rows, (len(units) * width,) int64, of units that are `width` rows each."""
    if width == 1:
        return units
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
