"""What consumers read, summed while the calibration data flow through, and posed as a problem.

Targets are ``Y = X W0 + s D`` with a correction weight s (see `osscar.walk.targets`).  Everything
that a problem needs follows from ``X'X``, ``X'D``, ``|D|^2`` and the sums of X and of D.  All are
summed in float64 from the same tensors, so that the energy of the targets is never less than what
the inputs explain.  Of inputs in half precision, and of float32 on a card, whose float64 may be 64
times as slow, products of `_POSITIONS` at a time are summed in float32: sums of n products, each
rounded to a unit u, are off by at most ``n u / (1 - n u)`` of the sum of magnitudes (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), and n does not grow with the
positions.  Products with D are summed so on a processor, too: D is a difference of outputs that are
rounded as much themselves.  Where a bias takes up means, what is summed in float32 is summed about
the mean of the batch (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
1983).  A Gram matrix is symmetric, and half of it is summed.

Sums of held-out samples are kept apart: no weight is fitted to them, and they choose s.  Sums of
several processes are added up once a group is measured, which changes the last of 53 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from osscar.base.errors import NonFiniteError, warn_of
from osscar.base.printable import pluralize
from osscar.base.ranks import Ranks
from osscar.consumers.consumer import LinearMap
from osscar.network.modules import HALVES, device_of
from solvers import Consumer, SubsetProblem
from solvers.closed_forms.schur import FixedRows, eliminate_fixed
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


# ---- posed as a problem -------------------------------------------------------------------


_UNSEEN = 0.1
"""How many positions of mean energy an input may have hidden behind those that were seen: a share q
of all positions is missed by n of them with probability ``(1 - q)^n``, nine times in ten where
``q = 0.1 / n``."""

_FIXED_PULL = 10.0
"""Fixed rows have good weights already, and many of them are fitted to few samples: pulled no more
than others, they lower the losses of layers, and raise the divergence on fresh images."""

_LEAST_DAMP = 1e-6
"""Where fixed rows are eliminated: what they do not explain of a unit is no rounding then."""

_ROUNDING = 1e-12
"""Share of all that is to be explained by which rounding may miss what fixed rows leave of it: that
may be next to nothing, and no loss is negative."""


class GramAccumulator:
    """Sums of one consumer over all positions seen so far, and of those that are held out."""

    def __init__(
        self, linear_map: LinearMap, *, held_out: bool = False, corrections: bool = False
    ) -> None:
        self.linear_map = linear_map
        self.fitted = Sums(linear_map, corrections=corrections)
        self.held_out = Sums(linear_map, corrections=corrections) if held_out else None
        self._fixed: FixedRows | None = None
        """What gives fixed rows back, once the problem is posed."""

    @property
    def parts(self) -> tuple[Sums, ...]:
        """What weights are fitted to, and what is held out."""
        return (self.fitted,) if self.held_out is None else (self.fitted, self.held_out)

    @property
    def rows(self) -> int:
        """At how many positions, of those weights are fitted to, the consumer reads anything."""
        return self.fitted.rows

    @property
    def held_out_rows(self) -> int:
        """The same of the positions that were held out."""
        return 0 if self.held_out is None else self.held_out.rows

    def add_call(self, x: Any, D: Tensor | None, *, held_out: bool = False) -> None:
        """Add what the consumer reads in a call, with corrections in the shape of its output."""
        corrections = None if D is None else self.linear_map.read_corrections(D, x)
        self.parts[held_out].positions += self.linear_map.passed_over(x)
        done = 0
        for X in self.linear_map.read_inputs(x):
            D_part = None if corrections is None else corrections[done : done + len(X)]
            self.add(X, D_part, held_out=held_out)
            done += len(X)

    def add(self, X: Tensor, D: Tensor | None = None, *, held_out: bool = False) -> None:
        """Add inputs, (positions, p), and corrections of the targets, (positions, m)."""
        self.parts[held_out].add(X, D)

    def held_out_rise(self, W0: Tensor, before: Tensor, after: Tensor) -> float:
        """Return by how much the held-out error rises from one W, (p, m), to another."""
        assert self.held_out is not None
        return self.held_out.centred(about=self.fitted).rise(W0, before, after)

    def consumer(self, damp: float, correction_weight: float = 1.0) -> Consumer:
        """Return the quadratic terms of the problem to reproduce the targets on these inputs.

        The sums that weights are fitted to are given up for its Hessian.  Fixed rows are
        eliminated, and pulled towards no change; losses stay relative to what is lost without any
        unit.
        """
        W0, units = self.linear_map.read_unit_weight(), self.linear_map.unit_rows
        fixed, n = self.linear_map.fixed, self.rows
        H, targets = self.fitted.given_up(W0, correction_weight)
        if not fixed:
            return damped_by_input(H, W0, targets=targets, units=units, damp=damp, positions=n)
        # Squares of what is nearly zero vanish in float32 before its products with others do.
        silent = self.linear_map.vacant | (H.diagonal() == 0)
        H.clear(silent)
        G, e = (H.product(W0), None) if targets is None else targets
        G[silent] = 0
        added = max(damp, _LEAST_DAMP) * pulls(H.diagonal(), n, fixed)
        e = (inner(W0, G) if e is None else e) + float(added @ W0.square().sum(1))
        G.addcmul_(added[:, None], W0)
        silent[fixed:] = False  # `Consumer` knows what to do with those of units
        H.add_diagonal(added + silent.to(added))
        self._fixed, H, G, least = eliminate_fixed(H, G, e, fixed)
        return Consumer.from_gram(
            H,
            W0[fixed:].clone(),
            G=None if targets is None else G,
            e=None if targets is None else least + _ROUNDING * e,
            units=units - fixed,
            damp=0.0,
            scale=e,
            overwrite=True,
        )

    def all_rows(self, W: Tensor) -> Tensor:
        """Return the weights of all rows, (p, m), given those of the problem."""
        if self._fixed is None:
            return W
        found, fixed = self.linear_map.read_weight(), self.linear_map.fixed
        found[:fixed] += self._fixed.refit(W)
        found[fixed:] = W
        return found

    def bias(self, W: Tensor) -> Tensor | None:
        """Return by how much the bias, if any, changes with new weights, (p, m)."""
        if self.linear_map.bias is None:
            return None
        x, d = self.fitted.means()
        return (self.linear_map.read_weight() - W).T @ x + d


def all_reduce(accumulators: Sequence[GramAccumulator], ranks: Ranks, name: str) -> None:
    """Add up over the ranks what each has measured of the consumers of one group, in place."""
    parts = [part for accumulator in accumulators for part in accumulator.parts]
    scalars = torch.tensor([[p.positions, p.rows, p.energy] for p in parts], dtype=torch.float64)
    ranks.all_reduce(
        f"Gram matrices of {name!r}", [scalars, *(x for p in parts for x in p.tensors)]
    )
    for part, (positions, rows, energy) in zip(parts, scalars.tolist(), strict=True):
        part.positions, part.rows, part.energy = int(positions), int(rows), energy


def pulls(energies: Tensor, positions: int, fixed: int = 0) -> Tensor:
    """Return what damping is relative to, (p,): each input's energy, and no less than a floor.

    No input counts for less than if it had the mean energy at `_UNSEEN` positions more: else one
    that is nearly zero on all data that were seen could take any weight, by which fresh data are
    multiplied.  Inputs that were zero throughout have no weights to hold back.  The first rows are
    fixed, and pulled by `_FIXED_PULL` times as much.
    """
    varies = energies > 0
    mean = energies.sum() / varies.sum().clamp(min=1)
    floor = mean * (_UNSEEN / max(positions, 1))
    found = torch.where(varies, energies.maximum(floor), energies)
    found[:fixed] *= _FIXED_PULL
    return found


def damped_by_input(
    H: Symmetric,
    W0: Tensor,
    *,
    targets: tuple[Tensor, float] | None = None,
    units: Tensor,
    damp: float,
    positions: int,
) -> Consumer:
    """Return a consumer that is pulled towards its dense weights, input by input.

    The proximal term is ``sum_j damp s_j |W_j - W0_j|^2`` with s as of `pulls`.  Relative to the
    mean of the diagonal it would swamp ordinary inputs wherever a few tokens with massive
    activations carry most of the trace.  The tensors become those of the consumer.
    """
    added = damp * pulls(H.diagonal(), positions)
    G = e = None
    if targets is not None:
        G = targets[0].addcmul_(added[:, None], W0)
        e = targets[1] + float(added @ torch.linalg.vector_norm(W0, dim=1).square())
    H.add_diagonal(added)
    return Consumer.from_gram(H, W0, G=G, e=e, units=units, damp=0.0, overwrite=True)


def pose(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    name: str,
    damp: float,
    correction_weight: float = 1.0,
) -> SubsetProblem:
    """Return the problem of one group, whose loss is the sum over the layers that read it.

    Each of several layers counts relative to its loss without any unit, as otherwise the one with
    the largest outputs would choose alone.  All groups of a convolution are one layer, and all
    experts of a mixture.  A warning names layers that read fewer positions than they have inputs.
    """
    layers = [accumulator.linear_map.name for accumulator in accumulators]
    for layer in dict.fromkeys(layers):
        own = [one for one in accumulators if one.linear_map.name == layer]
        few = [one for one in own if 0 < one.rows < one.linear_map.rows]
        if few:
            least = min(few, key=lambda one: one.rows)
            more = f", and too few at {len(few) - 1} more of the {len(own)}" if few[1:] else ""
            warn_of(
                "the Gram matrix is rank-deficient, and only damping makes up for it, of {}; use "
                "more samples or larger ones",
                f"{least.linear_map.label} ({pluralize(least.rows, 'calibration position')} for "
                f"{pluralize(least.linear_map.rows, 'input')}{more})",
            )
    consumers = [accumulator.consumer(damp, correction_weight) for accumulator in accumulators]
    totals = dict.fromkeys(layers, 0.0)
    for layer, consumer in zip(layers, consumers, strict=True):
        totals[layer] += consumer.e if consumer.scale is None else consumer.scale
    if len(totals) > 1:
        for place, layer in enumerate(layers):
            # One after the other: what is divided makes way for what comes of it.
            consumers[place] = consumers[place].divided(totals[layer] or 1.0)
    return SubsetProblem(tuple(consumers), keep, name)
