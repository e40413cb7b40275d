"""Second moments about means, read from half a matrix of sums that is never made whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric

_OUTPUTS = 256
"""Columns of weights whose errors are compared at a time."""

CONSTANT = 1e-12
"""Share of an input's energy below which its variance is rounding."""


def inner(A: Tensor, B: Tensor) -> float:
    """Return ``tr(A'B)``, summed row by row, without a matrix of the products."""
    return float(torch.einsum("ij,ij->i", A, B).sum())


@dataclass(frozen=True, eq=False)
class Centred:
    """``H = mean (x - c)(x - c)'`` of inputs x, and ``C = mean (x - c)(d - b)'`` of corrections d.

    Parameters
    ----------
    sums
        ``X'X``, (p, p).
    cross
        ``X'D``, (p, m); None where there are no corrections.
    positions
        How many were summed up.
    means, correction_means
        Of x, (p,), and of d, (m,).
    about, corrections_about
        c and b, (p,) and (m,); None: no bias takes up means, and c and b are zero.
    """

    sums: Symmetric = field(repr=False)
    cross: Tensor | None = field(repr=False)
    positions: int
    means: Tensor = field(repr=False)
    correction_means: Tensor = field(repr=False)
    about: Tensor | None = field(repr=False)
    corrections_about: Tensor | None = field(repr=False)

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal of H, (p,); zero for an input of which nothing is left but rounding."""
        energies = self.sums.diagonal() / self.positions
        if self.about is None:
            return energies
        found = energies - 2 * self.means * self.about + self.about.square()
        return found.masked_fill_(found <= CONSTANT * energies, 0.0)

    @property
    def _varies(self) -> Tensor:
        """1 for inputs that are no constants, (p,)."""
        return (self.diagonal > 0).to(self.means)

    def part(self, rows: Tensor) -> Symmetric:
        """Return some rows and columns of H, sorted."""
        made = self.sums.part(rows)
        for _, panel in made.spans():
            panel.div_(self.positions)
        if self.about is not None:
            left, right = self._shift()
            made.subtract(left[rows], right[:, rows])
            made.rescale(self._varies[rows])
        return made

    def product(self, B: Tensor) -> Tensor:
        """Return ``H B`` of B, (p, q)."""
        if self.about is None:
            return self.sums.product(B).div_(self.positions)
        left, right = self._shift()
        B = B * self._varies[:, None]
        found = self.sums.product(B).div_(self.positions).addmm_(left, right @ B, alpha=-1)
        return found.mul_(self._varies[:, None])

    def corrections(self, directions: Tensor) -> Tensor | None:
        """Return ``C`` times some directions of the outputs, (m, q); None where there are none."""
        if self.cross is None:
            return None
        found = (self.cross @ directions).div_(self.positions)
        if self.about is None or self.corrections_about is None:
            return found
        c, d = self.about, self.correction_means @ directions
        b = self.corrections_about @ directions
        found.addr_(self.means, b, alpha=-1).addr_(c, d, alpha=-1).addr_(c, b)
        return found.mul_(self._varies[:, None])

    def rise(self, W0: Tensor, before: Tensor, after: Tensor) -> float:
        """Return by how much the error of new weights rises from one choice of them to another.

        That of W is ``mean |(x - c)'D - (d - b)|^2`` with ``D = W - W0``, or ``tr(D'HD) -
        2 tr(D'C)`` and a constant: for two W, the product of their difference with H times the
        sum of their D, so that H is multiplied once.

        Parameters
        ----------
        W0
            Dense weights, (p, m).
        before, after
            The new ones, (p, m).
        """
        risen = 0.0
        for start in range(0, W0.shape[1], _OUTPUTS):
            some = slice(start, start + _OUTPUTS)
            step, both = after[:, some] - before[:, some], after[:, some] + before[:, some]
            risen += inner(step, self.product(both.sub_(W0[:, some], alpha=2)))
            if self.cross is not None:
                risen -= 2 * self._corrected(step, some)
        return risen

    def _corrected(self, D: Tensor, some: slice) -> float:
        """Return ``tr(D'C)`` of some outputs."""
        assert self.cross is not None
        if self.about is None or self.corrections_about is None:
            return inner(D, self.cross[:, some]) / self.positions
        D = D * self._varies[:, None]
        found = inner(D, self.cross[:, some]) / self.positions
        d, b = self.correction_means[some], self.corrections_about[some]
        return found - float((self.means @ D) @ b) - float((self.about @ D) @ (d - b))

    def _shift(self) -> tuple[Tensor, Tensor]:
        """Return factors, (p, 2) and (2, p), of ``m c' + c m' - c c'`` with the means m."""
        c = self.about
        assert c is not None
        return torch.stack([self.means - c, c], 1), torch.stack([c, self.means])
