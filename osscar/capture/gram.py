"""Gram matrices of what consumers read, accumulated while the calibration data flow through.

With targets ``Y = X W0 + share D`` (see `osscar.capture.targets`) everything that a problem needs
follows from sums over positions: ``X'X``, ``X'D``, ``|D|^2`` and, where the consumer has a bias
that can take up a constant, the sums of X and of D.  All are summed in float64 from the same
tensors, so that the energy of the targets is never less than what the inputs explain.

Some samples may be held out: their sums are kept apart, no weight is fitted to them, and they
choose the share.

Where the data are shared out among processes, their sums are added up once a group is measured
(`add_up`).  They are those of one process but for the order of addition, which changes the last of
53 bits.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osscar.capture.linear_maps import LinearMap
from osscar.core.errors import ModelError, NonFiniteError
from osscar.core.modules import device_of
from osscar.core.ranks import Ranks
from solvers import Consumer, SubsetProblem


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over positions: what least squares with these inputs and targets comes to.

    Parameters
    ----------
    H
        ``X'X/N``, (p, p).
    C
        ``X'D/N``, (p, m); None where there are no corrections.
    energy
        ``|D|^2/N``.
    x, d
        Means of X and of D, (p,) and (m,), which are subtracted from the others where a bias takes
        them up; zero where none does.
    variance
        Variances of the inputs, (p,), whether or not a bias takes up their means.
    """

    H: Tensor
    C: Tensor | None
    energy: float
    x: Tensor
    d: Tensor
    variance: Tensor

    def targets(self, W0: Tensor, share: float) -> tuple[Tensor, float] | None:
        """Return ``X'Y/N`` and ``|Y|^2/N``; None where ``Y = X W0``.

        Parameters
        ----------
        W0
            Dense weights, (p, m).
        share
            Of the corrections.
        """
        if self.C is None or share == 0:
            return None
        G, C = self.H @ W0, share * self.C
        return G + C, float((W0 * G).sum() + 2 * (W0 * C).sum()) + share**2 * self.energy


_CONSTANT = 1e-12
"""Share of an input's energy below which its variance is rounding."""


class GramAccumulator:
    """Sums of one consumer over all positions seen so far, in float64.

    Parameters
    ----------
    linear_map
        The consumer.
    """

    def __init__(self, linear_map: LinearMap) -> None:
        self.linear_map = linear_map
        self._fitted = _Sums(linear_map)
        self._held: _Sums | None = None

    @property
    def positions(self) -> int:
        """How many positions weights are fitted to."""
        return self._fitted.positions

    def add(self, X: Tensor, D: Tensor | None = None, *, held: bool = False) -> None:
        """Add the products of some positions.

        Parameters
        ----------
        X
            Inputs, (positions, p).
        D
            Corrections of the targets, (positions, m); None where there are none.
        held
            Whether they are held out.

        Raises
        ------
        NonFiniteError
            If one has NaN or infinite entries.
        """
        if not X.is_floating_point():
            raise ModelError(
                f"the inputs of {self.linear_map.name!r} are of {X.dtype}; only layers that read "
                "real numbers are refitted"
            )
        if held and self._held is None:
            self._held = _Sums(self.linear_map)
        (self._held if held and self._held is not None else self._fitted).add(X, D)

    def _parts(self) -> tuple[_Sums, ...]:
        return (self._fitted,) if self._held is None else (self._fitted, self._held)

    def _expect(self, *, held: bool, corrections: bool) -> None:
        """Start with nothing what other processes have seen some of."""
        if held and self._held is None:
            self._held = _Sums(self.linear_map)
        if corrections:
            for part in self._parts():
                part.expect_corrections()

    @property
    def fitted(self) -> Moments:
        """What weights are fitted to."""
        return self._fitted.moments()

    @property
    def held(self) -> Moments | None:
        """What was held out, about the means of what weights are fitted to; None if nothing."""
        return None if self._held is None else self._held.moments(about=self._fitted)

    def consumer(self, damp: float, share: float = 1.0) -> Consumer:
        """Return the quadratic terms of the problem to reproduce the targets on these inputs.

        Parameters
        ----------
        damp
            Weight of the proximal term, as of `damped_by_input`.
        share
            Of the corrections in the targets.

        Raises
        ------
        ModelError
            If the consumer was never called.

        Warns
        -----
        UserWarning
            If there were fewer positions than inputs, so that only the damping makes the problem
            well posed.
        """
        p = self.linear_map.rows
        if not self.positions:
            raise ModelError(
                f"{self.linear_map.name!r} was never called on the calibration data, so that it "
                "cannot be refitted; give inputs that reach it"
            )
        if self.positions < p:
            warnings.warn(
                f"{self.linear_map.name}: {self.positions} calibration positions for {p} inputs; "
                "the Gram matrix is rank-deficient and only damping makes up for it. "
                "Use more samples or larger ones.",
                stacklevel=2,
            )
        moments, W0 = self.fitted, self.linear_map.read_weight()
        return damped_by_input(
            moments.H,
            W0,
            targets=moments.targets(W0, share),
            units=self.linear_map.unit_rows,
            damp=damp,
            variance=moments.variance,
        )

    def bias(self, W: Tensor) -> Tensor | None:
        """Return by how much the bias changes with new weights; None where there is none.

        It takes up the mean of the corrections in full: of all that is fitted, a mean is known
        best.

        Parameters
        ----------
        W
            The new weights, (p, m); the module still has the dense ones.
        """
        if not self.linear_map.has_bias:
            return None
        moments = self.fitted
        return (self.linear_map.read_weight() - W).T @ moments.x + moments.d


class _Sums:
    """Plain sums over positions."""

    def __init__(self, linear_map: LinearMap) -> None:
        self.map = linear_map
        self.name, self.centered = linear_map.name, linear_map.has_bias
        self.positions = 0
        p, device = linear_map.rows, device_of(linear_map.module)
        self.gram = torch.zeros(p, p, dtype=torch.float64, device=device)
        self.inputs = torch.zeros(p, dtype=torch.float64, device=device)
        self.cross: Tensor | None = None
        self.corrections: Tensor | None = None
        self.energy = 0.0

    def add(self, X: Tensor, D: Tensor | None) -> None:
        if not bool(torch.isfinite(X).all()):
            raise NonFiniteError(
                f"the inputs of {self.name!r} have NaN or infinite entries; check the "
                "weights before it, or use --dtype float32"
            )
        X = X.double()
        self.gram.addmm_(X.T, X)
        self.positions += len(X)
        self.inputs += X.sum(0)
        if D is not None:
            self._add_corrections(X, D.double())

    def _add_corrections(self, X: Tensor, D: Tensor) -> None:
        energy = float(D.square().sum())
        if not math.isfinite(energy):
            raise NonFiniteError(
                f"the outputs of {self.name!r} have NaN or infinite entries; check the "
                "weights before it, or use --dtype float32"
            )
        self.energy += energy
        if self.cross is None or self.corrections is None:
            self.cross, self.corrections = X.T @ D, D.sum(0)
        else:
            self.cross.addmm_(X.T, D)
            self.corrections += D.sum(0)

    def expect_corrections(self) -> None:
        """Start the sums of corrections with nothing, where nothing has come."""
        if self.cross is None:
            m = self.map.read_weight().shape[1]
            self.cross, self.corrections = (
                self.gram.new_zeros(len(self.gram), m),
                self.gram.new_zeros(m),
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is summed, but for the energy."""
        found = (self.gram, self.inputs, self.cross, self.corrections)
        return [tensor for tensor in found if tensor is not None]

    def moments(self, about: _Sums | None = None) -> Moments:
        """Return means, about the means of these or of other sums where the layer has a bias."""
        n, other = self.positions, about or self
        H, energy = self.gram / n, self.energy / n
        C = None if self.cross is None else self.cross / n
        x, own = other.inputs / other.positions, self.inputs / n
        d = own_d = torch.zeros((), dtype=torch.float64, device=x.device)
        if self.corrections is not None and other.corrections is not None:
            d, own_d = other.corrections / other.positions, self.corrections / n
        if self.centered:
            # mean (x - c)(x - c)' = H - m c' - c m' + c c', with m the own mean
            H = H - torch.outer(own, x) - torch.outer(x, own) + torch.outer(x, x)
            # An input that is constant has nothing left but rounding, and is dead.
            constant = H.diagonal() <= _CONSTANT * self.gram.diagonal() / n
            H[constant] = 0
            H[:, constant] = 0
            if C is not None:
                C = C - torch.outer(own, d) - torch.outer(x, own_d) + torch.outer(x, d)
                C[constant] = 0
                energy = max(energy - 2 * float(own_d @ d) + float(d @ d), 0.0)
            return Moments(H, C, energy, x, d, H.diagonal())
        variance = H.diagonal() - own.square()
        variance[variance <= _CONSTANT * H.diagonal()] = 0
        return Moments(H, C, energy, torch.zeros_like(x), torch.zeros_like(d), variance)


def add_up(accumulators: Sequence[GramAccumulator], ranks: Ranks, name: str) -> None:
    """Add up over the ranks what each has measured of one group, in place.

    Parameters
    ----------
    accumulators
        Of the group's consumers, in the same order everywhere.
    ranks
        The processes among which the data are shared out.
    name
        The group.

    Raises
    ------
    RanksError
        If another of them has failed.
    """
    if ranks.alone:
        return
    # Which sums there are depends on which batches a rank has: one may have none that is held out.
    seen = torch.tensor(
        [[a._held is not None, any(p.cross is not None for p in a._parts())] for a in accumulators],
        dtype=torch.float64,
    )
    ranks.add_up(f"the sums of {name!r}", [seen])
    for accumulator, (held, corrections) in zip(accumulators, seen.tolist(), strict=True):
        accumulator._expect(held=held > 0, corrections=corrections > 0)
    parts = [part for accumulator in accumulators for part in accumulator._parts()]
    scalars = torch.tensor([[p.positions, p.energy] for p in parts], dtype=torch.float64)
    ranks.add_up(f"Gram matrices of {name!r}", [scalars, *(x for p in parts for x in p.tensors)])
    for part, (positions, energy) in zip(parts, scalars.tolist(), strict=True):
        part.positions, part.energy = int(positions), energy


def damped_by_input(
    H: Tensor,
    W0: Tensor,
    *,
    targets: tuple[Tensor, float] | None = None,
    units: Sequence[Sequence[int]],
    damp: float,
    variance: Tensor | None = None,
) -> Consumer:
    """Return a consumer that is pulled towards its dense weights, input by input.

    The proximal term is ``sum_j damp H_jj |W_j - W0_j|^2``.  Relative to the mean of the diagonal
    it would swamp ordinary inputs wherever a few tokens with massive activations carry most of the
    trace.

    Parameters
    ----------
    H, W0
        Undamped Gram matrix, and dense weights.
    targets
        G and e of targets that are not what these weights put out.
    units
        The rows that each unit owns.
    damp
        Weight of the term.
    variance
        Variances of the inputs, (p,), where they are known.
    """
    added = damp * H.diagonal()
    G = e = None
    if targets is not None:
        pulled = added[:, None] * W0
        G, e = targets[0] + pulled, targets[1] + float((pulled * W0).sum())
    return Consumer.from_gram(
        H + added.diag(), W0, G=G, e=e, units=units, damp=0.0, variance=variance
    )


def pose(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    name: str,
    damp: float,
    share: float = 1.0,
) -> SubsetProblem:
    """Return the problem of one group, whose loss is the sum over the layers that read it.

    Where there are several, each layer's loss counts relative to that of removing everything, as
    otherwise the layer with the largest outputs would choose alone.  The refit is the same either
    way.  All groups of a grouped convolution are one layer.

    Parameters
    ----------
    accumulators
        The measured consumers.
    keep
        How many units stay.
    name
        What the problem is called.
    damp
        Weight of the proximal term, as of `damped_by_input`.
    share
        Of the corrections in the targets.
    """
    consumers = [accumulator.consumer(damp, share) for accumulator in accumulators]
    layers = [accumulator.linear_map.name for accumulator in accumulators]
    totals = dict.fromkeys(layers, 0.0)
    for layer, consumer in zip(layers, consumers, strict=True):
        totals[layer] += consumer.e
    if len(totals) > 1:
        consumers = [
            _divided(consumer, totals[layer] or 1.0)
            for layer, consumer in zip(layers, consumers, strict=True)
        ]
    return SubsetProblem(tuple(consumers), keep, name)


def _divided(consumer: Consumer, scale: float) -> Consumer:
    """Return the same least-squares problem with its loss divided by a number."""
    return dataclasses.replace(
        consumer,
        H=consumer.H / scale,
        G=consumer.G / scale,
        e=consumer.e / scale,
        damping=consumer.damping / scale,
        variance=None if consumer.variance is None else consumer.variance / scale,
    )
