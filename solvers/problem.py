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
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from solvers import storage
from solvers.errors import ProblemError
from solvers.linalg.gram import (
    as_owned,
    as_tensor,
    asymmetry,
    check_diagonal,
    check_energy,
    check_entries,
    consistency,
    damp_terms,
    definite_factor,
    inconsistency,
    symmetric_part,
    unexplained,
)
from solvers.linalg.symmetric import Symmetric

FORMAT = "osscar-subset-problem/1"

_SYMMETRY_TOLERANCE = 1e-8
_TENSORS = ("H", "G", "W0", "rows")
_NUMBERS = ("e", "damping")

Units = int | Sequence[Sequence[int]] | Tensor
"""A number of equally wide units of consecutive rows, or the rows of each unit."""


class _Dense:
    """`Consumer.H`: the dense matrix, made of `Consumer.hessian` each time."""

    def __get__(self, consumer: Consumer | None, owner: type[Consumer]) -> Tensor:
        if consumer is None:
            raise AttributeError("H")  # a field without a default, as dataclasses ask for it
        return consumer.hessian.dense()

    def __set__(self, consumer: Consumer, H: Tensor | Symmetric) -> None:
        vars(consumer)["H"] = H


@dataclass(frozen=True, eq=False)
class Consumer:
    """The quadratic terms of one linear map and the rows of it that each unit owns.

    Arrays and tensors are copied and converted, so that a later write to them changes nothing here,
    and gradients are left behind.

    Parameters
    ----------
    H
        Hessian, damping included, (p, p) float64, positive definite (`violation`).  It is held in
        half of its memory (`hessian`), and made of that each time.
    G
        Correlation of inputs and targets, damping included, (p, m) float64.
    e
        Loss of the empty support: mean squared norm of the targets, damping included.
    W0
        Dense weights, (p, m) float64.
    rows
        (n, w) int64: the rows of unit ``j`` are ``rows[j]``.  Units together own each of the p
        rows once.
    damping
        The lambda that `H`, `G` and `e` include for every input alike.  They may include others,
        input by input, which nothing tells from the data.
    scale
        What losses are relative to, no less than `e`; None: `e`.  Where rows that stay have been
        eliminated (`solvers.closed_forms.schur`), `e` is what is lost without any unit once
        they are refitted, and this may be what is lost where they are not.

    Raises
    ------
    ProblemError
        If a field has a wrong shape, is not finite, is not symmetric, or if the units overlap or
        leave a row uncovered.
    """

    if TYPE_CHECKING:
        H: Tensor
    else:
        H: Tensor = _Dense()
    G: Tensor
    e: float
    W0: Tensor
    rows: Tensor
    damping: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        given = as_tensor(vars(self)["H"])
        numbers = {name: float(value) for name, value in self._numbers.items()}
        tensors = {
            name: as_owned(value, torch.int64 if name == "rows" else torch.float64)
            for name, value in self._tensors.items()
            if name != "H"
        }
        vars(self).update(numbers, **tensors)
        p, m = (*self.W0.shape, 0, 0)[:2]
        found = [tuple(tensor.shape) for tensor in (given, self.G, self.W0)]
        if not p * m or found != [(p, p), (p, m), (p, m)]:
            raise ProblemError(
                f"H, G and W0 have the shapes {found}; they must be (p, p), (p, m) and (p, m), and "
                "not empty"
            )
        held, difference = symmetric_part(given)
        vars(self)["H"] = held
        panels = (("H", panel) for panel in held.panels)
        for name, matrix in (*panels, ("G", self.G), ("W0", self.W0)):
            check_entries(name, matrix)
        check_energy(self.e)
        check_diagonal(held.diagonal())
        if not difference <= _SYMMETRY_TOLERANCE:
            raise ProblemError(asymmetry(difference))
        if not 0 <= self.damping < math.inf:
            raise ProblemError(f"damping is {self.damping}; it must be finite and not negative")
        if self.scale is not None and not self.e <= self.scale < math.inf:
            raise ProblemError(f"scale is {self.scale}; it must be finite, and at least e")
        self._check_rows()

    def _check_rows(self) -> None:
        """Refuse units that do not own each row once."""
        p, owned = len(self.W0), self.rows.flatten().sort().values
        if self.rows.ndim != 2 or not torch.equal(owned, torch.arange(p, device=owned.device)):
            raise ProblemError(
                f"units must own each of the {p} rows exactly once; they own {owned.numel()} rows, "
                f"{len(set(owned.tolist()))} of them distinct"
            )

    def __repr__(self) -> str:
        p, m = self.G.shape
        return f"Consumer(units={len(self.rows)}, inputs={p}, outputs={m}, e={self.e:.6g})"

    @property
    def hessian(self) -> Symmetric:
        """H in half of its memory, as it is held."""
        held: Symmetric = vars(self)["H"]
        return held

    @property
    def _tensors(self) -> dict[str, Any]:
        """The tensors by name, H as it is held."""
        return {name: vars(self)[name] for name in _TENSORS}

    @property
    def _numbers(self) -> dict[str, Any]:
        """The numbers by name, `scale` where it is another than e."""
        names = _NUMBERS if self.scale is None else (*_NUMBERS, "scale")
        return {name: vars(self)[name] for name in names}

    def _with(self, **changes: Any) -> Consumer:
        """Return a copy with other fields, as they are; what was found out of it stays."""
        made = object.__new__(Consumer)
        vars(made).update(vars(self) | changes)
        return made

    @classmethod
    def from_gram(
        cls,
        H: Tensor | Symmetric,
        W0: Tensor,
        *,
        G: Tensor | None = None,
        e: float | None = None,
        units: Units | None = None,
        damp: float = 0.01,
        scale: float | None = None,
        overwrite: bool = False,
    ) -> Consumer:
        """Damp the statistics of one linear map (`gram.damp_terms`) and take its units.

        Parameters
        ----------
        H, W0, G, e, damp
            Undamped Gram matrix, dense weights, target and relative damping.
        units
            What each unit owns; by default every row is a unit.
        scale
            What losses are relative to, where `e` with its damping is not more; by default that.
        overwrite
            Whether to take over `W0`, `G` and a `Symmetric` H, where they are in float64, instead
            of copying them: they are written to, and the caller gives them up.

        Raises
        ------
        ProblemError
            If the input is not finite, has a wrong shape, is far from positive semidefinite, or if
            `e` is less than `G` explains.
        """
        terms = damp_terms(H, W0, G=G, e=e, damp=damp, overwrite=overwrite)
        consumer = object.__new__(cls)
        vars(consumer).update(
            **terms,
            rows=_unit_rows(units, len(terms["H"])).to(terms["H"].device),
            scale=None if scale is None else max(float(scale), terms["e"]),
            # Damping has just made sure of the one, and made G of W0 or not.
            violation=None,
            fits=G is None,
        )
        consumer._check_rows()
        return consumer

    @cached_property
    def violation(self) -> str | None:
        """Why these terms describe no least-squares problem, or None.

        H has to be positive definite with a margin, and e at least what G explains, so that no
        loss is negative.  Finding that out takes a factorization, of a close call two, and is done
        once.
        """
        factor = definite_factor(self.hessian)
        if factor is None:
            return (
                "H is not positive definite, or too close to singular: check that it is X'X/N, and "
                "build the problem with from_gram and damp > 0"
            )
        if factor.explains_at_most(self.G) <= self.e:
            return None
        del factor  # as large as the one that comes next
        least, size = unexplained(self.hessian, self.G, self.e)
        return inconsistency(self.e, least) if least < -consistency() * size else None

    @cached_property
    def fits(self) -> bool:
        """Whether `W0` is known to be the refit with all units kept, as where G was made of it.

        Where it is not known it may still be so; finding out would take what the refit takes.
        """
        return False

    @property
    def width(self) -> int:
        """Rows of each unit."""
        return self.rows.shape[1]

    def support_rows(self, support: Tensor) -> Tensor:
        """Return the sorted rows, (r,) int64, that the units in `support` own."""
        return self.rows[support].flatten().sort().values

    def divided(self, number: float) -> Consumer:
        """Return the same least-squares problem with its loss divided by a positive number."""
        return self._with(
            H=self.hessian / number,
            G=self.G / number,
            e=self.e / number,
            damping=self.damping / number,
            scale=None if self.scale is None else self.scale / number,
        )

    def to(self, device: torch.device | str) -> Consumer:
        """Return this consumer with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self if moved["G"] is self.G else self._with(**moved)


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
        vars(self).update(consumers=tuple(self.consumers), keep=operator.index(self.keep))
        counts = [len(consumer.rows) for consumer in self.consumers]
        if len(set(counts)) != 1:
            raise ProblemError(
                f"consumers have {counts} units; give at least one consumer, and all of them the "
                "same units"
            )
        if not 0 < self.keep <= self.units:
            raise ProblemError(f"keep is {self.keep}; it must be from 1 to the {self.units} units")

    @classmethod
    def from_gram(
        cls,
        H: Tensor | Symmetric,
        W0: Tensor,
        *,
        keep: int,
        G: Tensor | None = None,
        e: float | None = None,
        units: Units | None = None,
        damp: float = 0.01,
        name: str = "",
        overwrite: bool = False,
    ) -> SubsetProblem:
        """Build a problem with one consumer from undamped statistics.

        `keep` and `name` are those of the problem, and all else is as of `Consumer.from_gram`.
        """
        consumer = Consumer.from_gram(H, W0, G=G, e=e, units=units, damp=damp, overwrite=overwrite)
        return cls((consumer,), keep, name)

    @property
    def units(self) -> int:
        """The number n of units."""
        return len(self.consumers[0].rows)

    @property
    def width(self) -> int:
        """Rows of a unit in the consumer that reads most of it."""
        return max(consumer.width for consumer in self.consumers)

    @property
    def empty_loss(self) -> float:
        """Loss of the empty support."""
        return sum(consumer.e for consumer in self.consumers)

    @property
    def scale(self) -> float:
        """What losses are relative to: that of the empty support, or `Consumer.scale`."""
        return sum(c.e if c.scale is None else c.scale for c in self.consumers)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.consumers[0].hessian.device

    @property
    def dead(self) -> Tensor:
        """The units, (d,) int64, whose inputs were always zero: removing them is free."""
        alive = torch.zeros(self.units, dtype=torch.bool, device=self.device)
        for consumer in self.consumers:
            # A dead row has no correlation with any other row, nor with the target.
            active = consumer.G.any(1) | consumer.hessian.coupled()
            alive |= active[consumer.rows].any(1)
        return torch.nonzero(~alive).flatten()

    def highest(self, scores: Tensor) -> Tensor:
        """Return the `keep` units with the highest scores, (n,); the first of equals."""
        return scores.argsort(descending=True, stable=True)[: self.keep]

    def check_definite(self) -> None:
        """Check what construction does not, as it takes factorizations: `Consumer.violation`.

        Done once for each consumer; problems that differ in `keep` share them.  Raises ProblemError
        if an H is not positive definite, or an e less than G explains, as of `from_gram` none is.
        """
        for index, consumer in enumerate(self.consumers):
            if consumer.violation is not None:
                raise ProblemError(f"consumer {index}: {consumer.violation}")

    def to(self, device: torch.device | str) -> SubsetProblem:
        """Return this problem with its tensors on `device`."""
        return replace(self, consumers=tuple(c.to(device) for c in self.consumers))

    def with_keep(self, keep: int) -> SubsetProblem:
        """Return the same problem with another number of units to keep; tensors are shared."""
        return replace(self, keep=keep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the problem to ``.safetensors``, so that anyone can re-solve it (ProblemError)."""
        header = {
            "format": FORMAT,
            "name": self.name,
            "keep": self.keep,
            "consumers": [consumer._numbers for consumer in self.consumers],
        }
        tensors = {
            f"{i}.{name}": held.dense() if isinstance(held, Symmetric) else held
            for i, consumer in enumerate(self.consumers)
            for name, held in consumer._tensors.items()
        }
        storage.write(path, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubsetProblem:
        """Read a problem that `save` wrote; nothing is unpickled, nor believed.

        Raises ProblemError if the file is missing, or describes no least-squares problem.
        """
        header, tensors = storage.read(path)
        if header.get("format") != FORMAT:
            raise ProblemError(f"{path} is not a problem file of format {FORMAT!r}")
        try:
            consumers = tuple(
                Consumer(
                    **{key: tensors[f"{i}.{key}"] for key in _TENSORS},
                    e=terms["e"],
                    damping=terms["damping"],
                    scale=terms.get("scale"),
                )
                for i, terms in enumerate(header["consumers"])
            )
            problem = cls(consumers, header["keep"], str(header["name"]))
            problem.check_definite()
        except ProblemError as error:
            raise ProblemError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"{path} is not a complete problem file: {error!r}") from error
        return problem


def _unit_rows(units: Any, p: int) -> Tensor:
    """Return the (n, w) rows of each unit."""
    if units is None or isinstance(units, Integral):
        count = p if units is None else int(units)
        if count <= 0 or p % count:
            raise ProblemError(f"{p} rows cannot be shared equally by {count} units")
        return torch.arange(p).view(count, p // count)
    if isinstance(units, Tensor | np.ndarray):
        return as_owned(units, torch.int64)
    listed = [list(map(operator.index, rows)) for rows in units]
    if len(widths := {len(rows) for rows in listed}) > 1:
        raise ProblemError(f"units own {sorted(widths)} rows; give as many to each")
    return torch.tensor(listed, dtype=torch.int64)
