"""Sums over the positions that a consumer reads, and the second moments that they give.

Everything that a problem needs follows from ``X'X``, ``X'D``, ``|D|^2`` and the sums of X and of D.
All are summed in float64 from the same tensors, so that the energy of the targets is never less
than what the inputs explain.  Of inputs in half precision, and of float32 on a card, whose float64
may be 64 times as slow, products of `_POSITIONS` at a time are summed in float32: sums of n
products, each rounded to a unit u, are off by at most ``n u / (1 - n u)`` of the sum of magnitudes
(Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and n does not grow
with the positions.  Products with D are summed so on a processor, too: D is a difference of outputs
that are rounded as much themselves.  Where a bias takes up means, what is summed in float32 is
summed about the mean of the batch (Chan, Golub and LeVeque, "Algorithms for Computing the Sample
Variance", 1983).

A Gram matrix is symmetric, and half of it is summed: that takes half of the time and of the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from osscar.base.errors import NonFiniteError
from osscar.consumers.consumer import LinearMap
from osscar.network.modules import HALVES, device_of
from solvers.linalg.symmetric import Symmetric, add_product, panel_rows

CONSTANT = 1e-12
"""Share of an input's energy below which its variance is rounding."""

_POSITIONS = 512
"""Summed up at a time: a whole batch in float64 can take more than the Gram matrix, and is paged in
anew each time, which takes ten times as long."""

_CHECKED = 256
"""Columns of the panel that is summed in float64, too, before anything is summed in float32."""

_SINGLE_ERROR = 5e-6
"""The largest error of float32 relative to the norms of two inputs; about 1e-6 are seen, and 3e-5
where the user lets products be made of fewer digits (TF32)."""

_OUTPUTS = 256
"""Columns of weights whose errors are compared at a time."""

_REMEDY = "check the weights before it, or use dtype float32 (`--dtype float32`)"


def inner(A: Tensor, B: Tensor) -> float:
    """Return ``tr(A'B)``, summed row by row, without a matrix of the products."""
    return float(torch.einsum("ij,ij->i", A, B).sum())


def sum_bytes(linear_map: LinearMap, *, corrections: bool) -> int:
    """Return the memory of the sums of a consumer."""
    p = linear_map.rows
    numbers = p * (p + 1) // 2 + p * panel_rows(device_of(linear_map.module)) // 2
    return 8 * (numbers + (p * linear_map.outputs if corrections else 0))


class Sums:
    """Sums over positions: of inputs X, (n, p), and of corrections D of the targets, (n, m)."""

    def __init__(self, linear_map: LinearMap, *, corrections: bool) -> None:
        self.name, self.centered = linear_map.label, linear_map.bias is not None
        self.positions = self.rows = 0
        p, m, device = linear_map.rows, linear_map.outputs, device_of(linear_map.module)
        self.inputs = torch.zeros(p, dtype=torch.float64, device=device)
        self.gram = Symmetric.zeros(p, self.inputs, cut=linear_map.fixed)
        self.corrections = self.inputs.new_zeros(m)
        self.cross = self.inputs.new_zeros(p, m) if corrections else None
        self.energy = 0.0
        self._type: torch.dtype | None = None

    def add(self, X: Tensor, D: Tensor | None) -> None:
        """Add some positions."""
        total = _summed(X)  # NaN and infinity stay in it
        energy, known = 0.0 if D is None else _energy(D), bool(total.isfinite().all())
        if not (known and math.isfinite(energy)):
            what = "outputs" if known else "inputs"
            raise NonFiniteError(
                f"the {what} of {self.name!r} have NaN or infinite entries", _REMEDY
            )
        self.energy += energy
        self.positions += len(X)
        self.rows += len(X)
        if self._type is None and len(X):
            self._type = _type_of_sums(X)
        self.inputs += total
        plain = X.dtype == torch.float32 and X.device.type == "cpu"
        gram, cross = self._type, torch.float32 if plain else self._type
        rough = torch.float32 in ((gram,) if D is None else (gram, cross))
        about = (total / max(len(X), 1)).float() if self.centered and rough else None
        if about is not None and gram == torch.float32:
            # With the mean c and the total t, X'X is that about c, and c t' + (t - n c) c'.
            mean = about.double()
            left = torch.stack([mean, total - len(X) * mean], 1)
            self.gram.subtract(left.neg_(), torch.stack([total, mean]))
        if D is not None:
            assert self.cross is not None
            changes = _summed(D)
            self.corrections += changes
            if about is not None:
                self.cross.addr_(about.double(), changes)
        for start in range(0, len(X), _POSITIONS):
            stop = start + _POSITIONS
            some = {gram: X[start:stop].to(gram), cross: X[start:stop].to(cross)}
            if about is not None:
                some[torch.float32] = some[torch.float32] - about
            self.gram.add_gram(some[gram])
            if D is not None and self.cross is not None:
                d = D[start:stop].to(cross)
                for first, panel in self.gram.spans():
                    rows = slice(first, first + len(panel))
                    add_product(self.cross[rows], some[cross][:, rows].T, d)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is summed, but for the energy."""
        panels = [panel for _, panel in self.gram.spans()]
        cross = [] if self.cross is None else [self.cross]
        return [*panels, self.inputs, self.corrections, *cross]

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of X and of D."""
        return self.inputs / self.positions, self.corrections / self.positions

    def centred(self, about: Sums | None = None) -> Centred:
        """Return second moments about the means of these sums or of others."""
        c, b = (about or self).means()
        if not self.centered:
            c, b = torch.zeros_like(c), torch.zeros_like(b)
        return Centred(self.gram, self.cross, self.positions, *self.means(), c, b)

    def given_up(
        self, W0: Tensor, correction_weight: float
    ) -> tuple[Symmetric, tuple[Tensor, float] | None]:
        """Return least squares with these inputs and the targets ``Y = X W0 + s D``.

        That is half of ``X'X/N``; ``X'Y/N`` and ``|Y|^2/N``, or None where ``Y = X W0``: about the
        means, if a bias takes these up.  The sums are gone then.
        """
        n, H, C, energy = self.positions, self.gram, self.cross, self.energy / self.positions
        del self.gram, self.cross
        energies = H.diagonal() / n
        for _, panel in H.spans():
            panel.div_(n)
        if C is not None:
            C.div_(n)
        x, d = self.means()
        if self.centered:
            for start, panel in H.spans():
                rows, columns = slice(start, start + len(panel)), slice(start + len(panel))
                panel.addr_(x[rows], x[columns], alpha=-1)
            # An input that is constant has nothing left but rounding, and is dead.
            constant = H.diagonal() <= CONSTANT * energies
            H.clear(constant)
            if C is not None:
                C.addr_(x, d, alpha=-1)
                C[constant] = 0
                energy = max(energy - float(d @ d), 0.0)
        if C is None or correction_weight == 0:
            return H, None
        G = H.product(W0)
        energy = inner(W0, G) + 2 * correction_weight * inner(W0, C) + correction_weight**2 * energy
        return H, (G.add_(C, alpha=correction_weight), energy)


def _summed(X: Tensor) -> Tensor:
    """Return the sums of columns in float64, made of a few rows at a time."""
    sums = [some.sum(0, dtype=torch.float64) for some in torch.split(X, _POSITIONS)]
    return torch.stack(sums).sum(0)


def _energy(D: Tensor) -> float:
    """Return the sum of squares in float64, made of a few rows at a time."""
    norms = [torch.linalg.vector_norm(d, dtype=torch.float64) for d in torch.split(D, _POSITIONS)]
    return float(torch.stack(norms).square().sum())


def _type_of_sums(X: Tensor) -> torch.dtype:
    """Return the type in which products of a few positions of these inputs, (n, p), are summed."""
    if X.dtype not in HALVES and not (X.dtype == torch.float32 and X.is_cuda):
        return torch.float64
    some = X[:_POSITIONS].float()
    wide = some.double()
    panel = wide[:, :_CHECKED].T @ wide
    sizes = torch.linalg.vector_norm(wide, dim=0).clamp(min=1e-300)
    error = (some[:, :_CHECKED].T @ some - panel) / sizes / sizes[:_CHECKED, None]
    return torch.float32 if float(error.abs().max()) <= _SINGLE_ERROR else torch.float64


@dataclass(frozen=True, eq=False)
class Centred:
    """``H = mean (x - c)(x - c)'`` of inputs, and ``C = mean (x - c)(d - b)'`` of corrections."""

    sums: Symmetric = field(repr=False)
    cross: Tensor | None = field(repr=False)
    positions: int
    x: Tensor = field(repr=False)
    """Means of inputs, (p,)."""
    d: Tensor = field(repr=False)
    """Means of corrections, (m,)."""
    c: Tensor = field(repr=False)
    b: Tensor = field(repr=False)

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal of H, (p,); zero for an input of which nothing is left but rounding."""
        energies = self.sums.diagonal() / self.positions
        found = energies - 2 * self.x * self.c + self.c.square()
        return found.masked_fill_(found <= CONSTANT * energies, 0.0)

    @property
    def _varies(self) -> Tensor:
        """1 for inputs that are no constants, (p,)."""
        return (self.diagonal > 0).to(self.x)

    def part(self, rows: Tensor) -> Symmetric:
        """Return some rows and columns of H, sorted."""
        made = self.sums.part(rows)
        for _, panel in made.spans():
            panel.div_(self.positions)
        left, right = self._shift()
        made.subtract(left[rows], right[:, rows])
        made.rescale(self._varies[rows])
        return made

    def product(self, B: Tensor) -> Tensor:
        """Return ``H B`` of B, (p, q)."""
        left, right = self._shift()
        B = B * self._varies[:, None]
        found = self.sums.product(B).div_(self.positions).addmm_(left, right @ B, alpha=-1)
        return found.mul_(self._varies[:, None])

    def corrections(self, directions: Tensor) -> Tensor | None:
        """Return ``C`` times some directions of the outputs, (m, q); None where there are none."""
        if self.cross is None:
            return None
        found = (self.cross @ directions).div_(self.positions)
        d, b = self.d @ directions, self.b @ directions
        found.addr_(self.x, b, alpha=-1).addr_(self.c, d, alpha=-1).addr_(self.c, b)
        return found.mul_(self._varies[:, None])

    def rise(self, W0: Tensor, before: Tensor, after: Tensor) -> float:
        """Return by how much the error of new weights rises from one choice of them to another.

        That of W is ``mean |(x - c)'D - (d - b)|^2`` with ``D = W - W0``, or ``tr(D'HD) -
        2 tr(D'C)`` and a constant: for two W, the product of their difference with H times the
        sum of their D, so that H is multiplied once.  All are (p, m).
        """
        risen = 0.0
        for start in range(0, W0.shape[1], _OUTPUTS):
            some = slice(start, start + _OUTPUTS)
            step, both = after[:, some] - before[:, some], after[:, some] + before[:, some]
            risen += inner(step, self.product(both.sub_(W0[:, some], alpha=2)))
            if self.cross is not None:
                D, d, b = step * self._varies[:, None], self.d[some], self.b[some]
                corrected = inner(D, self.cross[:, some]) / self.positions
                corrected -= float((self.x @ D) @ b) + float((self.c @ D) @ (d - b))
                risen -= 2 * corrected
        return risen

    def _shift(self) -> tuple[Tensor, Tensor]:
        """Return factors, (p, 2) and (2, p), of ``x c' + c x' - c c'``."""
        return torch.stack([self.x - self.c, self.c], 1), torch.stack([self.c, self.x])
