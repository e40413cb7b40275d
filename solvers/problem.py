"""The subset-selection problem of one pruned layer.

With inputs ``X`` (N x p), targets ``Y`` (N x m) and dense weights ``W0`` (p x m), a linear map that
reads pruned structures (a *consumer*) contributes

    E_c(S) = min over W with the rows outside S zero of  tr(W'HW) - 2 tr(W'G) + e

where ``H = X'X/N + lambda I``, ``G = X'Y/N + lambda W0``, ``e = |Y|^2/N + lambda |W0|^2``: least
squares with a proximal term of weight ``lambda = damp * mean(diag(X'X/N))`` that pulls towards the
dense weights.  A problem is the sum over its consumers, to be minimized over the supports ``S`` of
`keep` units (Meng et al., OSSCAR, ICML 2024, arXiv 2403.12983, with the proximal term added).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers import storage
from solvers.errors import ProblemError
from solvers.gram import damp_terms

FORMAT = "osscar-subset-problem/1"
NO_ROW = -1
"""Fills the rows of a unit that owns fewer than the widest unit of its consumer."""

_SYMMETRY_TOLERANCE = 1e-8
_TENSORS = ("H", "G", "W0", "rows")

Units = int | Sequence[Sequence[int]] | Tensor
"""A number of equally wide units of consecutive rows, or the rows of each unit."""


@dataclass(frozen=True, eq=False)
class Consumer:
    """The quadratic terms of one linear map and the rows of it that each unit owns.

    Parameters
    ----------
    H
        Hessian, damping included, (p, p) float64, positive definite.
    G
        Correlation of inputs and targets, damping included, (p, m) float64.
    e
        Loss of the empty support: mean squared norm of the targets, damping included.
    W0
        Dense weights, (p, m) float64.
    rows
        (n, w) int64: the rows of unit ``j`` are ``rows[j]``.  Units together own each of the p
        rows once; a unit with fewer than w rows is filled up with ``NO_ROW``.
    damping
        The lambda that `H`, `G` and `e` include.

    Raises
    ------
    ProblemError
        If a field has a wrong shape or type, is not finite, is not symmetric, or if the units
        overlap or leave a row uncovered.
    """

    H: Tensor
    G: Tensor
    e: float
    W0: Tensor
    rows: Tensor
    damping: float = 0.0

    def __post_init__(self) -> None:
        p = self._check_shapes()
        for name in ("H", "G", "W0"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ProblemError(f"{name} has NaN or infinite entries; check the activations")
        if not math.isfinite(self.e) or self.e < 0:
            raise ProblemError(f"e is {self.e}; a mean squared norm is finite and not negative")
        self._check_symmetry()
        owned = self.rows[self.rows != NO_ROW].sort().values
        if not torch.equal(owned, torch.arange(p, device=owned.device)):
            raise ProblemError(
                f"units must own each of the {p} rows exactly once; they own {owned.numel()} rows, "
                f"{len(set(owned.tolist()))} of them distinct"
            )

    @classmethod
    def from_gram(
        cls,
        H: Tensor,
        W0: Tensor,
        *,
        G: Tensor | None = None,
        e: float | None = None,
        units: Units | None = None,
        damp: float = 0.01,
    ) -> Consumer:
        """Damp the statistics of one linear map (`solvers.gram.damp_terms`) and take its units.

        Parameters
        ----------
        H, W0, G, e, damp
            Undamped Gram matrix, dense weights, target and relative damping.
        units
            What each unit owns; by default every row is a unit.

        Raises
        ------
        ProblemError
            If the input is not finite, has a wrong shape, or is far from positive semidefinite.
        """
        terms = damp_terms(H, W0, G=G, e=e, damp=damp)
        rows = _unit_rows(units, len(terms.H)).to(terms.H.device)
        return cls(terms.H, terms.G, terms.e, terms.W0, rows, terms.damping)

    def _check_shapes(self) -> int:
        for name in ("H", "G", "W0"):
            value = getattr(self, name)
            if value.ndim != 2 or value.dtype != torch.float64:
                raise ProblemError(
                    f"{name} must be a float64 matrix, not {value.dtype} of {tuple(value.shape)}"
                )
        p = self.H.shape[0]
        if self.H.shape != (p, p) or p == 0:
            raise ProblemError(f"H must be square and not empty, not {tuple(self.H.shape)}")
        if self.G.shape[0] != p or self.G.shape != self.W0.shape:
            raise ProblemError(
                f"G and W0 must both be ({p}, m), not {tuple(self.G.shape)} "
                f"and {tuple(self.W0.shape)}"
            )
        if self.rows.ndim != 2 or self.rows.dtype != torch.int64:
            raise ProblemError(
                f"rows must be an int64 matrix (units, width), not {self.rows.dtype} "
                f"of {tuple(self.rows.shape)}"
            )
        return p

    def _check_symmetry(self) -> None:
        diagonal = self.H.diagonal()
        if float(diagonal.min()) <= 0:
            raise ProblemError(
                f"H has {float(diagonal.min()):.3g} on its diagonal (row {int(diagonal.argmin())}) "
                "and must be positive definite: build it with from_gram and damp > 0"
            )
        # Row blocks: a whole H - H' would cost another p^2 doubles.
        asymmetry = max(
            float((self.H[i : i + 256] - self.H[:, i : i + 256].T).abs().max())
            for i in range(0, len(self.H), 256)
        )
        if asymmetry > _SYMMETRY_TOLERANCE * float(diagonal.max()):
            raise ProblemError(f"H is not symmetric: entries differ by up to {asymmetry:.3g}")

    @property
    def width(self) -> int:
        """Rows of the widest unit."""
        return self.rows.shape[1]

    def support_rows(self, support: Tensor) -> Tensor:
        """Return the sorted rows, (r,) int64, that the units in `support` own."""
        rows = self.rows[support].flatten()
        return rows[rows != NO_ROW].sort().values

    def to(self, device: torch.device | str) -> Consumer:
        """Return this consumer with its tensors on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})


@dataclass(frozen=True, eq=False)
class SubsetProblem:
    """Choose which `keep` of n units stay, so that the refitted layer changes least.

    Parameters
    ----------
    consumers
        The linear maps that read the units; all have the same number n of units.
    keep
        How many units stay, ``0 < keep <= n``.
    name
        What the problem is called in reports.

    Raises
    ------
    ProblemError
        If there is no consumer, the consumers disagree on n, or `keep` is out of range.

    Examples
    --------
    >>> import torch
    >>> X, W0 = torch.randn(64, 6).double(), torch.randn(6, 3).double()
    >>> problem = SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4)
    >>> problem.units, problem.keep
    (6, 4)
    """

    consumers: tuple[Consumer, ...]
    keep: int
    name: str = ""

    def __post_init__(self) -> None:
        if not self.consumers:
            raise ProblemError("a problem needs at least one consumer")
        counts = [len(consumer.rows) for consumer in self.consumers]
        if len(set(counts)) != 1:
            raise ProblemError(f"consumers disagree on the number of units: {counts}")
        if not isinstance(self.keep, int) or not 0 < self.keep <= counts[0]:
            raise ProblemError(
                f"keep is {self.keep!r}; it must be a whole number from 1 to the {counts[0]} units"
            )

    @classmethod
    def from_gram(
        cls,
        H: Tensor,
        W0: Tensor,
        *,
        keep: int,
        G: Tensor | None = None,
        e: float | None = None,
        units: Units | None = None,
        damp: float = 0.01,
        name: str = "",
    ) -> SubsetProblem:
        """Build a problem with one consumer from undamped statistics.

        Parameters
        ----------
        H, W0, G, e, units, damp
            As in `Consumer.from_gram`.
        keep, name
            As in `SubsetProblem`.
        """
        return cls((Consumer.from_gram(H, W0, G=G, e=e, units=units, damp=damp),), keep, name)

    @property
    def units(self) -> int:
        """The number n of units."""
        return len(self.consumers[0].rows)

    @property
    def width(self) -> int:
        """Rows of the widest unit in any consumer."""
        return max(consumer.width for consumer in self.consumers)

    @property
    def scale(self) -> float:
        """Loss of the empty support, to which losses are relative."""
        return sum(consumer.e for consumer in self.consumers)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.consumers[0].H.device

    @property
    def dead(self) -> Tensor:
        """The units, (d,) int64, whose inputs were always zero: removing them is free."""
        alive = torch.zeros(self.units, dtype=torch.bool, device=self.device)
        for consumer in self.consumers:
            # A dead row has no correlation with any other row, nor with the target.
            active = consumer.G.any(1) | (consumer.H.count_nonzero(1) > 1)
            alive |= (active[consumer.rows] & (consumer.rows != NO_ROW)).any(1)
        return torch.nonzero(~alive).flatten()

    def check_definite(self) -> None:
        """Factorize every H, which costs p^3/3 and is therefore not part of construction.

        Raises
        ------
        ProblemError
            If one is not positive definite; `from_gram` never lets such a one through.
        """
        for index, consumer in enumerate(self.consumers):
            if int(torch.linalg.cholesky_ex(consumer.H).info):
                raise ProblemError(
                    f"H of consumer {index} is not positive definite: check that it is X'X/N, and "
                    "build the problem with from_gram and damp > 0"
                )

    def to(self, device: torch.device | str) -> SubsetProblem:
        """Return this problem with its tensors on `device`."""
        return replace(self, consumers=tuple(c.to(device) for c in self.consumers))

    def with_keep(self, keep: int) -> SubsetProblem:
        """Return the same problem with another number of units to keep; tensors are shared."""
        return replace(self, keep=keep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the problem to ``.npz`` or ``.safetensors``, so that anyone can re-solve it.

        Parameters
        ----------
        path
            Where to; the suffix chooses the format.

        Raises
        ------
        ProblemError
            If the suffix is neither.
        """
        header = {
            "format": FORMAT,
            "name": self.name,
            "keep": self.keep,
            "consumers": [{"e": c.e, "damping": c.damping} for c in self.consumers],
        }
        tensors = {
            f"{i}.{name}": getattr(consumer, name)
            for i, consumer in enumerate(self.consumers)
            for name in _TENSORS
        }
        storage.write(path, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubsetProblem:
        """Read a problem that `save` wrote; nothing is unpickled.

        Parameters
        ----------
        path
            A ``.npz`` or ``.safetensors`` file.

        Raises
        ------
        ProblemError
            If the file is missing, is not such a problem, or its H is not positive definite.
        """
        header, tensors = storage.read(path)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ProblemError(f"{path} is not a problem file of format {FORMAT!r}")
        try:
            consumers = tuple(
                Consumer(
                    **{key: tensors[f"{i}.{key}"] for key in _TENSORS},
                    e=float(terms["e"]),
                    damping=float(terms["damping"]),
                )
                for i, terms in enumerate(header["consumers"])
            )
            problem = cls(consumers, header["keep"], header["name"])
        except ProblemError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"{path} is not a complete problem file: {error!r}") from error
        problem.check_definite()
        return problem


def _unit_rows(units: Units | None, p: int) -> Tensor:
    """Return the (n, w) rows of each unit."""
    if isinstance(units, Tensor):
        return units.to(torch.int64)
    if units is None or isinstance(units, int):
        n = p if units is None else units
        if n <= 0 or p % n:
            raise ProblemError(f"{p} rows cannot be shared equally by {n} units")
        return torch.arange(p).view(n, p // n)
    if not units:
        raise ProblemError("units is empty; name the rows of at least one unit")
    width = max(1, *(len(rows) for rows in units))
    filled = [list(rows) + [NO_ROW] * (width - len(rows)) for rows in units]
    return torch.tensor(filled, dtype=torch.int64)
