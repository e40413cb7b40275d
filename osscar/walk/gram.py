"""Gram matrices of what consumers read, accumulated while the calibration data flow through.

With targets ``Y = X W0 + share D`` (see `osscar.walk.targets`) everything that a problem needs
follows from sums over positions: ``X'X``, ``X'D``, ``|D|^2`` and, where the consumer has a bias
that can take up a constant, the sums of X and of D.  All are summed in float64 from the same
tensors, so that the energy of the targets is never less than what the inputs explain.  Where
nothing but ``X'X`` is summed, of inputs in half precision, products of `_EXACT_POSITIONS` at a time
are summed in float32, which holds each of them exactly: `gram_error` bounds what that costs.

A Gram matrix is symmetric, and half of it is summed: that takes half of the time and of the memory.

Some samples may be held out: their sums are kept apart, no weight is fitted to them, and they
choose the share.

Where the data are shared out among processes, their sums are added up once a group is measured
(`all_reduce`).  They are those of one process but for the order of addition, which changes the last
of 53 bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osscar.base.errors import ModelError, NonFiniteError
from osscar.base.printable import counted
from osscar.base.ranks import Ranks
from osscar.network.modules import device_of
from osscar.preparation.consumer import LinearMap
from osscar.walk.centred import CONSTANT, Centred, inner
from solvers import Consumer, SubsetProblem
from solvers.linalg.symmetric import PANEL_ROWS, Symmetric


@dataclass(frozen=True, eq=False)
class _Moments:
    """Means over positions: what least squares with these inputs and targets comes to.

    Parameters
    ----------
    H
        Half of ``X'X/N``, (p, p).
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

    H: Symmetric
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
        G = self.H.product(W0)
        energy = inner(W0, G) + 2 * share * inner(W0, self.C) + share**2 * self.energy
        return G.add_(self.C, alpha=share), energy


_POSITIONS = 1024
"""Summed up in float64 at a time: a whole batch in float64 can take more than the Gram matrix."""

_UNSEEN = 0.1
"""How many positions of mean energy an input may have hidden behind those that were seen: a share q
of all positions is missed by n of them with probability ``(1 - q)^n``, nine times in ten where
``q = 0.1 / n``."""

_REMEDY = "check the weights before it, or use --dtype float32"
_EXACT_POSITIONS = 256
_HALVES = (torch.bfloat16, torch.float16)


def gram_error(dtype: torch.dtype, positions: int) -> float:
    """Return how far an entry of ``X'X`` may be off, relative to ``|X_i| |X_j|``.

    Sums of n products, each rounded to a unit u, are off by at most ``n u / (1 - n u)`` of the sum
    of magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1),
    which is at most ``|X_i| |X_j|``.  Inputs in half precision are summed in float32 some positions
    at a time, and their sums in float64: the bound does not grow with the positions.  It is less
    than a hundredth of what rounding each input to bfloat16 can do.

    Parameters
    ----------
    dtype
        Of the inputs.
    positions
        How many there are.
    """

    def rounded(count: int, unit: float) -> float:
        return count * unit / (1 - count * unit)

    double = rounded(positions + 1, torch.finfo(torch.float64).eps / 2)
    if dtype not in _HALVES:
        return double
    return double + rounded(_EXACT_POSITIONS, torch.finfo(torch.float32).eps / 2) * (1 + double)


def gram_numbers(p: int) -> int:
    """Return how many numbers of float64 are held of a Gram matrix of p inputs."""
    return p * (p + 1) // 2 + p * PANEL_ROWS // 2


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

    @property
    def rows(self) -> int:
        """At how many of them the consumer reads anything."""
        return self._fitted.rows

    @property
    def unread(self) -> bool:
        """Whether it reads nothing at any position, so that nothing is known of it."""
        return self.positions > 0 and self.rows == 0

    def lacking_bytes(self, *, held: bool, corrections: bool) -> int:
        """Return the bytes of sums that a batch will be the first to add to.

        Parameters
        ----------
        held
            Whether it is held out.
        corrections
            Whether its targets have corrections.
        """
        part, p = self._held if held else self._fitted, self.linear_map.rows
        numbers = gram_numbers(p) if part is None else 0
        if corrections and (part is None or part.cross is None):
            numbers += p * self.linear_map.outputs
        return 8 * numbers

    def pass_over(self, positions: int, *, held: bool = False) -> None:
        """Count positions at which the consumer reads nothing and adds nothing."""
        self._part(held=held).positions += positions

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
                f"the inputs of {self.linear_map.label!r} are of {X.dtype}; only layers that read "
                "real numbers are refitted"
            )
        self._part(held=held).add(X, D)

    def _part(self, *, held: bool) -> _Sums:
        if not held:
            return self._fitted
        if self._held is None:
            self._held = _Sums(self.linear_map)
        return self._held

    def _parts(self) -> tuple[_Sums, ...]:
        return (self._fitted,) if self._held is None else (self._fitted, self._held)

    def _expect(self, *, held: bool, corrections: bool) -> None:
        """Start with nothing what other processes have seen some of."""
        if held:
            self._part(held=True)
        if corrections:
            for part in self._parts():
                part.expect_corrections()

    @property
    def fitted(self) -> _Moments:
        """What weights are fitted to."""
        return self._fitted.moments()

    @property
    def holds_out(self) -> bool:
        """Whether some positions were held out."""
        return self._held is not None

    @property
    def held_rows(self) -> int:
        """At how many positions that were held out the consumer reads anything."""
        return 0 if self._held is None else self._held.rows

    def held_rise(self, W0: Tensor, before: Tensor, after: Tensor) -> float:
        """Return by how much the error on what was held out rises from one W to another.

        Targets have their corrections in full, and a bias takes up what it does of `fitted`.

        Parameters
        ----------
        W0
            Dense weights, (p, m).
        before, after
            The new ones.
        """
        assert self._held is not None
        return self._held.centred(about=self._fitted).rise(W0, before, after)

    def let_go(self) -> None:
        """Free the sums of what was held out."""
        self._held = None

    def centred(self) -> tuple[Centred, Centred | None]:
        """Return what weights are fitted to and what was held out, without dense matrices."""
        held = None if self._held is None else self._held.centred(about=self._fitted)
        return self._fitted.centred(), held

    def consumer(self, damp: float, share: float = 1.0, *, last: bool = False) -> Consumer:
        """Return the quadratic terms of the problem to reproduce the targets on these inputs.

        Parameters
        ----------
        damp
            Weight of the proximal term, as of `damped_by_input`.
        share
            Of the corrections in the targets.
        last
            Whether the sums that weights are fitted to may become the Hessian, instead of being
            copied: only `bias`, `held_rise` and numbers of positions are left to be asked then.

        Raises
        ------
        ModelError
            If the consumer was never called.
        """
        if not self.positions:
            raise ModelError(
                f"{self.linear_map.name!r} was never called on the calibration data, so that it "
                "cannot be refitted; give inputs that reach it"
            )
        moments, W0 = self._fitted.moments(last=last), self.linear_map.read_weight()
        return damped_by_input(
            moments.H,
            W0,
            targets=moments.targets(W0, share),
            units=self.linear_map.unit_rows,
            damp=damp,
            positions=self.rows,
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
        x, d = self._fitted.means()
        return (self.linear_map.read_weight() - W).T @ x + d


class _Sums:
    """Plain sums over positions."""

    def __init__(self, linear_map: LinearMap) -> None:
        self.map = linear_map
        self.name, self.centered = linear_map.label, linear_map.has_bias
        self.positions = self.rows = 0
        p, device = linear_map.rows, device_of(linear_map.module)
        self.inputs = torch.zeros(p, dtype=torch.float64, device=device)
        self.gram: Symmetric | None = Symmetric.zeros(p, self.inputs)
        self.cross: Tensor | None = None
        self.corrections: Tensor | None = None
        self.energy = 0.0

    def add(self, X: Tensor, D: Tensor | None) -> None:
        if not bool(torch.isfinite(X).all()):
            raise NonFiniteError(
                f"the inputs of {self.name!r} have NaN or infinite entries", _REMEDY
            )
        energy = 0.0 if D is None else float(D.double().square().sum())
        if not math.isfinite(energy):
            raise NonFiniteError(
                f"the outputs of {self.name!r} have NaN or infinite entries", _REMEDY
            )
        self.energy += energy
        self.positions += len(X)
        self.rows += len(X)
        if D is None and not self.centered and X.dtype in _HALVES:
            for some in torch.split(X, _EXACT_POSITIONS):
                self._sums().add_gram(some.float())
                self.inputs += some.sum(0, dtype=torch.float64)
            return
        for start in range(0, len(X), _POSITIONS):
            some = X[start : start + _POSITIONS].double()
            self._sums().add_gram(some)
            self.inputs += some.sum(0)
            if D is not None:
                self._add_corrections(some, D[start : start + _POSITIONS].double())

    def _add_corrections(self, X: Tensor, D: Tensor) -> None:
        if self.cross is None or self.corrections is None:
            self.cross, self.corrections = X.T @ D, D.sum(0)
        else:
            self.cross.addmm_(X.T, D)
            self.corrections += D.sum(0)

    def expect_corrections(self) -> None:
        """Start the sums of corrections with nothing, where nothing has come."""
        if self.cross is None:
            m = self.map.outputs
            self.cross = self.inputs.new_zeros(len(self.inputs), m)
            self.corrections = self.inputs.new_zeros(m)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is summed, but for the energy."""
        others = (self.inputs, self.cross, self.corrections)
        panels = (panel for _, panel in self._sums().spans())
        return [*panels, *(tensor for tensor in others if tensor is not None)]

    def _sums(self) -> Symmetric:
        if self.gram is None:
            raise ModelError(
                f"what {self.name!r} reads was given away with its problem; measure it again"
            )
        return self.gram

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the means of X and of D."""
        x = self.inputs / self.positions
        if self.corrections is None:
            return x, torch.zeros((), dtype=torch.float64, device=x.device)
        return x, self.corrections / self.positions

    def centred(self, about: _Sums | None = None) -> Centred:
        """Return the same as `moments`, as half a matrix of sums and what is taken off it.

        Parameters
        ----------
        about
            About whose means; by default their own.
        """
        about = about or self
        (x, d), (own, own_d) = about.means(), self.means()
        both = self.corrections is not None and about.corrections is not None
        return Centred(
            self._sums(),
            self.cross,
            self.positions,
            own,
            own_d,
            about=x if self.centered else None,
            corrections_about=d if self.centered and both else None,
        )

    def moments(self, *, last: bool = False) -> _Moments:
        """Return means, about those of X and D where the layer has a bias.

        Parameters
        ----------
        last
            Whether the matrices of sums may be given up on the way.
        """
        n, sums = self.positions, self._sums()
        C, energy = self.cross, self.energy / n
        energies = sums.diagonal() / n
        if last:
            self.gram = self.cross = None
        H = sums if last else sums.copy()
        for _, panel in H.spans():
            panel.div_(n)
        if C is not None:
            C = C.div_(n) if last else C / n
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
            return _Moments(H, C, energy, x, d, H.diagonal())
        variance = energies - x.square()
        variance[variance <= CONSTANT * energies] = 0
        return _Moments(H, C, energy, torch.zeros_like(x), torch.zeros_like(d), variance)


def all_reduce(accumulators: Sequence[GramAccumulator], ranks: Ranks, name: str) -> None:
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
    ranks.all_reduce(f"the sums of {name!r}", [seen])
    for accumulator, (held, corrections) in zip(accumulators, seen.tolist(), strict=True):
        accumulator._expect(held=held > 0, corrections=corrections > 0)
    parts = [part for accumulator in accumulators for part in accumulator._parts()]
    scalars = torch.tensor([[p.positions, p.rows, p.energy] for p in parts], dtype=torch.float64)
    ranks.all_reduce(
        f"Gram matrices of {name!r}", [scalars, *(x for p in parts for x in p.tensors)]
    )
    for part, (positions, rows, energy) in zip(parts, scalars.tolist(), strict=True):
        part.positions, part.rows, part.energy = int(positions), int(rows), energy


def pulls(energies: Tensor, positions: int) -> Tensor:
    """Return what damping is relative to, (p,): each input's energy, and no less than a floor.

    Relative to its own energy alone, an input that is nearly zero on all data that were seen may
    take any weight, and fresh data, on which it is not, are multiplied by that.  So no input counts
    for less than if it had the mean energy at `_UNSEEN` positions more.  Inputs that were zero
    throughout have no weights to hold back: removing them is free.

    Parameters
    ----------
    energies
        The diagonal of the undamped Gram matrix, (p,).
    positions
        How many it was summed over.
    """
    varies = energies > 0
    mean = energies.sum() / varies.sum().clamp(min=1)
    floor = mean * (_UNSEEN / max(positions, 1))
    return torch.where(varies, energies.maximum(floor), energies)


def damped_by_input(
    H: Symmetric,
    W0: Tensor,
    *,
    targets: tuple[Tensor, float] | None = None,
    units: Sequence[Sequence[int]],
    damp: float,
    positions: int,
    variance: Tensor | None = None,
) -> Consumer:
    """Return a consumer that is pulled towards its dense weights, input by input.

    The proximal term is ``sum_j damp s_j |W_j - W0_j|^2`` with s as of `pulls`.  Relative to the
    mean of the diagonal it would swamp ordinary inputs wherever a few tokens with massive
    activations carry most of the trace.  The tensors given are written to, and become those of the
    consumer.

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
    positions
        How many H was summed over.
    variance
        Variances of the inputs, (p,), where they are known.
    """
    added = damp * pulls(H.diagonal(), positions)
    G = e = None
    if targets is not None:
        G = targets[0].addcmul_(added[:, None], W0)
        e = targets[1] + float(added @ torch.linalg.vector_norm(W0, dim=1).square())
    H.add_diagonal(added)
    return Consumer.from_gram(
        H, W0, G=G, e=e, units=units, damp=0.0, variance=variance, overwrite=True
    )


def pose(
    accumulators: Sequence[GramAccumulator],
    keep: int,
    name: str,
    damp: float,
    share: float = 1.0,
    *,
    last: bool = False,
) -> SubsetProblem:
    """Return the problem of one group, whose loss is the sum over the layers that read it.

    Where there are several, each layer's loss counts relative to that of removing everything, as
    otherwise the layer with the largest outputs would choose alone.  The refit is the same either
    way.  All groups of a grouped convolution are one layer, and all experts of a mixture.

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
    last
        Whether the sums may be given up, as of `GramAccumulator.consumer`.

    Warns
    -----
    UserWarning
        If a layer read fewer positions than it has inputs, so that only the damping makes the
        problem well posed.
    """
    _warn_of_few(accumulators)
    consumers = [accumulator.consumer(damp, share, last=last) for accumulator in accumulators]
    layers = [accumulator.linear_map.name for accumulator in accumulators]
    totals = dict.fromkeys(layers, 0.0)
    for layer, consumer in zip(layers, consumers, strict=True):
        totals[layer] += consumer.e
    if len(totals) > 1:
        for place, layer in enumerate(layers):
            # One after the other: what is divided makes way for what comes of it.
            consumers[place] = consumers[place].divided(totals[layer] or 1.0)
    return SubsetProblem(tuple(consumers), keep, name)


def _warn_of_few(accumulators: Sequence[GramAccumulator]) -> None:
    """Say of each layer where only the damping makes up for too few positions."""
    layers: dict[str, list[GramAccumulator]] = {}
    for one in accumulators:
        layers.setdefault(one.linear_map.name, []).append(one)
    for own in layers.values():
        few = [one for one in own if 0 < one.rows < one.linear_map.rows]
        if not few:
            continue
        least = min(few, key=lambda one: one.rows)
        more = f", and too few at {len(few) - 1} more of the {len(own)}" if len(few) > 1 else ""
        warnings.warn(
            f"{least.linear_map.label}: {counted(least.rows, 'calibration position')} for "
            f"{counted(least.linear_map.rows, 'input')}{more}; the Gram matrix is rank-deficient "
            "and only damping makes up for it. Use more samples or larger ones.",
            stacklevel=3,
        )
