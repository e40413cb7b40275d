"""Symmetric matrices in half of their memory, factorized and inverted in place.

Rows are held in panels of a few hundred; the panel of rows ``a .. b`` has columns ``0 .. b``, so
that its last square lies on the diagonal.  That costs ``p^2 / 2`` numbers, half a panel aside, and
all work is products of panels: a factorization ``L L'`` looks up and to the left, and the inverse
is that of L, times its transpose, as LAPACK's ``potri`` has it (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, chapters 10 and 14).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

PANEL_ROWS = 256
"""Enough for products to run at full speed; a matrix of fewer rows is held whole."""

_ON_CARD = 8
"""Times as many rows on a card, which is waited for once a panel where rows are looked up."""


def panel_rows(device: torch.device) -> int:
    """Return how many rows a panel on a device has."""
    return PANEL_ROWS if device.type == "cpu" else _ON_CARD * PANEL_ROWS


class Symmetric:
    """A symmetric matrix, or the lower triangle that a factorization leaves in its place.

    panels: The panel of rows ``a .. b`` is (b - a, b); the square on the diagonal is held whole.
    """

    def __init__(self, panels: list[Tensor]) -> None:
        self._panels = panels

    @classmethod
    def empty(cls, rows: int, like: Tensor, *, cut: int = 0, width: int = 1) -> Symmetric:
        """Return a matrix of any numbers.

        rows: Its order p.
        cut: A row at which a panel starts: where a part ends that is factorized alone.
        width: Rows that stay in one panel; divides `cut` and `rows`.
        """
        return cls([like.new_empty(b - a, b) for a, b in _edges(rows, cut, width, like.device)])

    @classmethod
    def of(cls, matrix: Tensor, *, width: int = 1) -> Symmetric:
        """Return a copy of a dense matrix; `width` rows stay in one panel, as of `empty`."""
        made = cls.empty(len(matrix), matrix, width=width)
        for start, panel in made.spans():
            stop = start + len(panel)
            panel.copy_(matrix[start:stop, :stop])
        return made

    @classmethod
    def zeros(cls, rows: int, like: Tensor, *, cut: int = 0) -> Symmetric:
        """Return zeros, of the type and on the device of `like`; `cut` is as of `empty`."""
        made = cls.empty(rows, like, cut=cut)
        for _, panel in made.spans():
            panel.zero_()
        return made

    def copy(self) -> Symmetric:
        """Return a copy."""
        return Symmetric([panel.clone() for panel in self._panels])

    def to(self, device: torch.device | str) -> Symmetric:
        """Return the matrix on a device; itself, if it is there."""
        moved = [panel.to(device) for panel in self._panels]
        return self if moved[0] is self._panels[0] else Symmetric(moved)

    def __truediv__(self, number: float) -> Symmetric:
        """Return the matrix divided by a number."""
        return Symmetric([panel / number for panel in self._panels])

    def __len__(self) -> int:
        return sum(map(len, self._panels))

    def spans(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of each panel, and the panel."""
        start = 0
        for panel in self._panels:
            yield start, panel
            start += len(panel)

    @property
    def shape(self) -> tuple[int, int]:
        """That of the whole matrix."""
        return len(self), len(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self._panels[0].dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._panels[0].device

    @property
    def panels(self) -> tuple[Tensor, ...]:
        """The tensors that hold it, from the top to the bottom."""
        return tuple(self._panels)

    # ---- reading and writing -----------------------------------------------------------------

    def dense(self) -> Tensor:
        """Return the whole matrix, (p, p)."""
        p = len(self)
        whole = self._panels[0].new_empty(p, p)
        for start, panel in self.spans():
            stop = start + len(panel)
            whole[start:stop, :stop] = panel
            whole[:start, start:stop] = panel[:, :start].T
        return whole

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return copies of the entries in some rows and columns, (r, c), in any order."""
        if len(self._panels) == 1:
            return self._panels[0][rows[:, None], columns]
        found = self._panels[0].new_empty(len(rows), len(columns))
        for start, panel in self.spans():
            stop = start + len(panel)
            own, left = _within(rows, start, stop), _within(columns, 0, stop)
            if len(own):
                found[own[:, None], left] = panel[rows[own, None] - start, columns[left]]
            above, own = _within(rows, 0, start), _within(columns, start, stop)
            if len(above) and len(own):
                across = panel[columns[own, None] - start, rows[above]]
                found[above[:, None], own] = across.T
        return found

    def rows(self, index: Tensor, first: int = 0) -> Tensor:
        """Return copies of some rows, of all their columns or of those from `first` on."""
        if len(self._panels) == 1:
            return self._panels[0][index, first:]
        found = self._panels[0].new_empty(len(index), len(self) - first)
        for start, panel in self.spans():
            stop = start + len(panel)
            if stop <= first:
                continue
            at, above = _within(index, start, stop), _within(index, 0, start)
            if len(at):
                found[at, : stop - first] = panel[index[at] - start, first:]
            if len(above):
                own = slice(max(start, first) - first, stop - first)
                found[above, own] = panel[max(first - start, 0) :, index[above]].T
        return found

    def set_rows(self, index: Tensor, values: Tensor) -> None:
        """Write some rows, (r, p), and their columns; `values` is symmetric where they meet."""
        for start, panel in self.spans():
            stop = start + len(panel)
            at, here = _within(index, start, stop), _within(index, 0, stop)
            panel[index[at] - start] = values[at, :stop]
            panel[:, index[here]] = values[here, start:stop].T

    def diagonal(self) -> Tensor:
        """Return a copy of the diagonal, (p,)."""
        return torch.cat([panel.diagonal(start) for start, panel in self.spans()])

    def diagonal_blocks(self, width: int) -> Tensor:
        """Return copies of the diagonal blocks, (p / w, w, w); panels hold whole ones."""
        found = []
        for start, panel in self.spans():
            n = len(panel) // width
            blocks = panel[:, start:].view(n, width, n, width)
            found.append(blocks.diagonal(dim1=0, dim2=2).movedim(2, 0))
        return torch.cat(found)

    def add_gram(self, X: Tensor) -> None:
        """Add ``X'X``, (n, p) by itself; computed in the type of X."""
        for start, panel in self.spans():
            stop = start + len(panel)
            add_product(panel, X[:, start:stop].T, X[:, :stop])

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Subtract a product ``left right``, (p, t) by (t, p), that is symmetric."""
        for start, panel in self.spans():
            stop = start + len(panel)
            panel.addmm_(left[start:stop], right[:, :stop], alpha=-1)

    def keep_only(self, rows: Tensor, *, width: int = 1) -> None:
        """Drop all rows and columns but some, sorted; memory is given back on the way."""
        old, self._panels = list(self.spans()), []
        for start, stop in _edges(len(rows), 0, width, rows.device):
            self._panels.append(_picked(old, rows, start, stop))
            last = int(rows[stop - 1])
            old = [(first, source) for first, source in old if first + len(source) > last]

    def part(self, rows: Tensor) -> Symmetric:
        """Return a copy of some rows and columns, sorted."""
        spans = list(self.spans())
        edges = _edges(len(rows), 0, 1, rows.device)
        return Symmetric([_picked(spans, rows, start, stop) for start, stop in edges])

    def split(self, cut: int) -> tuple[Symmetric, Tensor, Symmetric]:
        """Return the rows before a cut, the columns that others have of these, and the rest.

        The matrix is gone then: what is copied is given back on the way.  A panel starts there.
        """
        before, self._panels = list(self.spans()), []
        across = before[0][1].new_empty(sum(len(panel) for _, panel in before) - cut, cut)
        rest: list[Tensor] = []
        while before[-1][0] >= cut:
            start, panel = before.pop()
            across[start - cut : start - cut + len(panel)] = panel[:, :cut]
            rest.insert(0, panel[:, cut:].clone())
            del panel
        return Symmetric([panel for _, panel in before]), across, Symmetric(rest)

    def clear(self, gone: Tensor) -> None:
        """Set to zero the rows and columns of which (p,) bool says so."""
        for start, panel in self.spans():
            stop = start + len(panel)
            panel[gone[start:stop]] = 0
            panel[:, gone[:stop]] = 0

    def product(self, B: Tensor) -> Tensor:
        """Return the product with B, (p, m)."""
        made = torch.empty_like(B)
        for start, panel in self.spans():
            stop = start + len(panel)
            torch.mm(panel, B[:stop], out=made[start:stop])
            made[:start].addmm_(panel[:, :start].T, B[start:stop])
        return made

    def coupled(self) -> Tensor:
        """Return which rows have entries beside the diagonal, (p,) bool."""
        found = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        for start, panel in self.spans():
            beside, stop = panel != 0, start + len(panel)
            beside.diagonal(start).fill_(False)
            found[start:stop] |= beside.any(1)
            found[:start] |= beside[:, :start].any(0)
        return found

    def add_diagonal(self, values: Tensor) -> None:
        """Add (p,) numbers to the diagonal."""
        for start, panel in self.spans():
            panel.diagonal(start).add_(values[start : start + len(panel)])

    def rescale(self, factors: Tensor) -> None:
        """Multiply rows and columns by (p,) numbers."""
        for start, panel in self.spans():
            stop = start + len(panel)
            panel.mul_(factors[:stop]).mul_(factors[start:stop, None])

    # ---- factorizing -------------------------------------------------------------------------

    def factorize(self, count: int | None = None) -> None:
        """Put the factor L of the first `count` rows in their place, by default of all.

        Of the rows that follow, ``[B, D]`` becomes ``[B inv(L'), D - B inv(L L') B']``.

        count: A row at which a panel starts, or all.
        Raises torch.linalg.LinAlgError if the first `count` rows are not positive definite.
        """
        count = len(self) if count is None else count
        for start, panel in self.spans():
            for first, factor in self._before(min(start, count)):
                block, solved = panel[:, first : first + len(factor)], panel[:, :first]
                block.addmm_(solved, factor[:, :first].T, alpha=-1)
                block.copy_(_solved(factor[:, first:], block.T).T)
            if start < count:
                square, solved = panel[:, start:], panel[:, :start]
                square.addmm_(solved, solved.T, alpha=-1)
                square.copy_(torch.linalg.cholesky(square))
                continue
            for first, other in self.spans():
                if count <= first <= start:
                    block = panel[:, first : first + len(other)]
                    block.addmm_(panel[:, :count], other[:, :count].T, alpha=-1)

    def _before(self, row: int) -> Iterator[tuple[int, Tensor]]:
        return ((start, panel) for start, panel in self.spans() if start < row)

    def forward(self, B: Tensor, count: int | None = None) -> None:
        """Solve ``L x = b`` for the first `count` rows of B, (p, m), in place.

        Of the rows that follow, what they have of the first ones is subtracted.
        """
        count = len(self) if count is None else count
        for start, panel in self.spans():
            own, known = B[start : start + len(panel)], min(start, count)
            own.addmm_(panel[:, :known], B[:known], alpha=-1)
            if start < count:
                own.copy_(_solved(panel[:, start:], own))

    def backward(self, B: Tensor, count: int | None = None) -> None:
        """Solve ``L' x = b`` for the first `count` rows of B, (p, m), in place."""
        leading = self._before(len(self) if count is None else count)
        for start, panel in reversed(list(leading)):
            own = B[start : start + len(panel)]
            own.copy_(torch.linalg.solve_triangular(panel[:, start:].T, own, upper=True))
            B[:start].addmm_(panel[:, :start].T, own, alpha=-1)

    def divide(self, count: int) -> None:
        """Multiply the first `count` columns of the rows that follow by ``inv(L)``, in place."""
        leading = list(self._before(count))
        for start, panel in self.spans():
            for first, factor in reversed(leading) if start >= count else ():
                block = panel[:, first : first + len(factor)]
                block.copy_(
                    torch.linalg.solve_triangular(factor[:, first:].T, block.T, upper=True).T
                )
                panel[:, :first].addmm_(block, factor[:, :first], alpha=-1)

    def invert(self, count: int | None = None) -> None:
        """Put ``inv(L L')`` in the place of the factor L of the first `count` rows."""
        leading = list(self._before(len(self) if count is None else count))
        for number, (start, panel) in enumerate(leading):
            square = panel[:, start:]
            unit = torch.eye(len(panel), dtype=panel.dtype, device=panel.device)
            square.copy_(_solved(square, unit))
            product = torch.zeros_like(panel[:, :start])
            for first, above in leading[:number]:
                stop = first + len(above)
                product[:, :stop].addmm_(panel[:, first:stop], above)
            torch.mm(square, product.neg_(), out=panel[:, :start])
        for number, (start, panel) in enumerate(leading):
            own, stop = slice(start, start + len(panel)), start + len(panel)
            panel.copy_(panel[:, own].T @ panel)
            for _, below in leading[number + 1 :]:
                panel.addmm_(below[:, own].T, below[:, :stop])


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add ``A B`` to a total, (r, c), which may be of another type than A and B."""
    if A.dtype == total.dtype:
        total.addmm_(A, B)
    else:
        total.add_(A @ B)


def _within(index: Tensor, start: int, stop: int) -> Tensor:
    """Return the places, (k,) int64, at which numbers from `start` to below `stop` stand."""
    return torch.nonzero((index >= start) & (index < stop)).flatten()


def _picked(sources: list[tuple[int, Tensor]], rows: Tensor, start: int, stop: int) -> Tensor:
    """Return the panel ``start .. stop`` of some sorted rows of a matrix, given its panels."""
    own, columns = rows[start:stop], rows[:stop]
    panel = sources[0][1].new_empty(stop - start, stop)
    for first, source in sources:
        at = _within(own, first, first + len(source))
        known = int((columns < first + len(source)).sum())
        if len(at):
            panel[at, :known] = source[own[at, None] - first, columns[:known]]
    square = panel[:, start:]
    square.copy_(square.tril() + square.tril(-1).T)
    return panel


def _edges(rows: int, cut: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Return where panels start and end."""
    step = max(1, panel_rows(device) // width) * width
    starts = {*range(0, cut, step), *range(cut, rows, step)}
    return list(pairwise([*sorted(starts), rows]))


def _solved(factor: Tensor, B: Tensor) -> Tensor:
    """Return ``inv(L) B``."""
    solved: Tensor = torch.linalg.solve_triangular(factor, B, upper=False)
    return solved
