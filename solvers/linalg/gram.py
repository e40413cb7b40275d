"""From the statistics of a layer to the damped quadratic terms of the objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import ProblemError, warn
from solvers.linalg.symmetric import Symmetric

_LARGEST, _SMALLEST = 1e100, 1e-100
"""Products of two numbers within these stay far from overflow and from underflow."""


def as_tensor(value: Any) -> Tensor:
    """Return an array, a list or a tensor as a tensor without gradient, copied or not."""
    # Lists of numbers are float64 to numpy, and float32 to torch.
    return (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).detach()


def as_owned(value: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers of one type in memory that nobody else can write to."""
    return as_tensor(value).to(dtype, copy=True).contiguous()


def check_entries(name: str, matrix: Tensor) -> None:
    """Refuse entries that are not finite, or whose products would not be."""
    # One pass without a copy; NaN comes out of it as NaN.
    largest = max(abs(float(end)) for end in torch.aminmax(matrix))
    if not largest <= _LARGEST:
        raise ProblemError(
            f"{name} has entries of {largest:.3g}; they must be finite and at most {_LARGEST:g}: "
            "check weights and activations, or scale the data"
        )


def check_energy(e: float) -> None:
    """Refuse a mean squared norm that cannot be one."""
    if not (e == 0 or _SMALLEST <= e <= _LARGEST):
        raise ProblemError(
            f"e is {e:.6g}; a mean squared norm is 0, or between {_SMALLEST:g} and {_LARGEST:g}: "
            "scale the data"
        )


def check_diagonal(diagonal: Tensor) -> None:
    """Refuse a diagonal of H, (p,), that is not positive."""
    least = float(diagonal.min())
    if least < _SMALLEST:
        raise ProblemError(
            f"H has {least:.3g} on its diagonal (row {int(diagonal.argmin())}) and must be "
            f"positive definite, with no less than {_SMALLEST:g} there: build it with from_gram "
            "and damp > 0, or scale the data"
        )


DEFINITE_MARGIN = 1e-8
"""The least eigenvalue that H, scaled to a unit diagonal, has in a problem that is well posed.

Searches, bounds and certificates factorize blocks of the inverse of H again, which squares its
condition: below the square root of the machine's precision, even the signs of what they find are
rounding.  At 1e-9, one certificate in twenty did not survive being recomputed.
"""

_ROOM = 2.0
"""Damping exceeds the margin by this factor, so that no other computer refuses what it gave."""

_DAMP_LADDER = (1e-10, 1e-8, 1e-6, 1e-4)
_ASYMMETRY = 1e-2
"""Relative to the largest diagonal entry: what a product in bfloat16 can leave is averaged away."""

_EPS = torch.finfo(torch.float64).eps

TILE_ROWS = 512
"""Of a p x p matrix that are worked on at a time, where all at once would be too much."""


# ---- the quadratic loss ------------------------------------------------------------------------


def quadratic(H: Symmetric, G: Tensor, e: float, W: Tensor, rows: Tensor | None = None) -> float:
    """Return ``tr(W'HW) - 2 tr(W'G) + e``.

    rows: Where given, (k,) int64, W holds these rows of the weights, (k, m); the others are zero.
    """
    # Row by row: rounding grows with p + m, not with p m.
    tiles = _tiles(H, W, rows)
    sums = [(own * (tile @ used).sub_(G[at], alpha=2)).sum(1) for at, own, tile, used in tiles]
    return float(torch.cat(sums).sum()) + e if sums else e


def magnitudes(H: Symmetric, G: Tensor, e: float, W: Tensor, rows: Tensor | None = None) -> float:
    """Return the sum of magnitudes of the products that `quadratic` sums up."""
    size = e
    for at, own, tile, used in _tiles(H, W, rows):
        size += float((own.abs() * (tile.abs_() @ used.abs() + 2 * G[at].abs())).sum())
    return size


def quadratic_rounding(
    H: Symmetric, G: Tensor, e: float, W: Tensor, rows: Tensor | None = None
) -> float:
    """Return by how much rounding can have changed what `quadratic` returns.

    The sums of products of p, of m, and of p numbers again: at most ``2 p + m`` roundings, each
    relative to the sum of magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms",
    2002, section 3.1).
    """
    p, m = G.shape
    return _EPS * (2 * p + m + 8) * magnitudes(H, G, e, W, rows)


def _tiles(
    H: Symmetric, W: Tensor, rows: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield which rows of W are next, W there, and two matrices whose product is ``H W`` there."""
    if rows is None:
        rows = torch.nonzero(W.any(1)).flatten()
        W = W if len(rows) == len(W) else W[rows]
    all_in_order = len(rows) == len(H) and bool((rows.diff() > 0).all())
    for at, own in zip(torch.split(rows, TILE_ROWS), torch.split(W, TILE_ROWS), strict=True):
        yield at, own, H.rows(at) if all_in_order else H.entries(at, rows), W


def definite_factor(H: Symmetric, margin: float = DEFINITE_MARGIN) -> _DefiniteFactor | None:
    """Return what proves that H, scaled to a unit diagonal, has no eigenvalue below a margin.

    The scale of single inputs is no matter of conditioning: refits and bounds do not depend on it.
    """
    scale = H.diagonal().rsqrt()
    scaled = H.copy()
    scaled.rescale(scale)
    for start, panel in scaled.spans():
        panel.diagonal(start).fill_(1.0 - margin)
    try:
        scaled.factorize()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return _DefiniteFactor(scaled, scale)


@dataclass(frozen=True, eq=False)
class _DefiniteFactor:
    """The Cholesky factor of ``D H D - margin``, whose D, (p,), gives H a unit diagonal."""

    factor: Symmetric
    scale: Tensor

    def explains_at_most(self, G: Tensor) -> float:
        """Return a number that ``tr(G' inv(H) G)`` does not exceed.

        What was factorized lies below ``D H D`` by the margin, which rounding does not use up; so
        its inverse lies above.
        """
        scaled = G * self.scale[:, None]
        self.factor.forward(scaled)
        return float(torch.linalg.vector_norm(scaled)) ** 2


def unexplained(H: Symmetric, G: Tensor, e: float) -> tuple[float, float]:
    """Return the least loss of any weights, and the sum of magnitudes that it is the rest of."""
    W = solve_definite(H.copy(), G.clone())
    return quadratic(H, G, e, W), magnitudes(H, G, e, W)


def solve_definite(A: Symmetric, B: Tensor) -> Tensor:
    """Return ``inv(A) B``, in the place of B; A is factorized in its place, too."""
    A.factorize()
    A.forward(B)
    A.backward(B)
    return B


def consistency(dtype: torch.dtype = torch.float64) -> float:
    """Return how far e may lie below what G explains, relative to the sum of magnitudes.

    Two thirds of the digits of statistics are believed; the others went in summing up many samples.
    """
    return float((torch.finfo(dtype).eps if dtype.is_floating_point else _EPS) ** (2 / 3))


def inconsistency(e: float, least: float) -> str:
    """Return the sentence that refuses an e with a negative least loss."""
    return (
        f"e is {e:.6g}, with which the best weights have a loss of {least:.3g}, and no loss is "
        f"negative: e = |Y|^2/N must be at least {e - least:.6g} for these G and H"
    )


# ---- damping -----------------------------------------------------------------------------------


def damp_terms(
    H: Tensor | Symmetric,
    W0: Tensor,
    *,
    G: Tensor | None,
    e: float | None,
    damp: float,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Validate undamped statistics, add the proximal term, and return the fields of a `Consumer`.

    The arguments are those of `solvers.Consumer.from_gram`.  Weights of an input that was always
    zero (a dead neuron) are taken as zero, so that removing it is free.  Where e is less than G
    explains, by no more than the rounding of their format, it is raised to that; damp is raised,
    with a warning, where hardly a digit of the inverse of H is left (`DEFINITE_MARGIN`).
    """
    H, W0, given, digits = _matrices(H, W0, G, overwrite)
    if not 0 <= damp < math.inf:
        raise ProblemError(f"damp is {damp}; it must be finite and not negative")
    if (given is None) != (e is None):
        raise ProblemError("G and e describe one target: give both, or neither")
    dead = H.diagonal() == 0
    W0[dead] = 0.0
    if given is None or e is None:
        target = H.product(W0)
        # A mean squared norm up to rounding.
        energy = max(float(torch.einsum("ij,ij->i", W0, target).sum()), 0.0)
    else:
        target = given
        target[dead] = 0.0
        energy = float(e)
    check_energy(energy)
    # A dead row is decoupled from all others; any positive diagonal keeps it so.
    mean = float(H.diagonal().mean())
    H.add_diagonal(dead.to(W0) * (mean or 1.0))
    damping, factor = _damp_until_definite(H, damp, mean)
    target.add_(W0, alpha=damping)
    energy += damping * float(torch.linalg.vector_norm(W0)) ** 2
    check_energy(energy)
    if given is not None and not factor.explains_at_most(target) <= energy:
        del factor  # as large as the one that comes next
        least, size = unexplained(H, target, energy)
        if least < -digits * size:
            raise ProblemError(inconsistency(energy, least))
        energy -= min(least, 0.0)  # only rounding makes it less
    return {"H": H, "G": target, "e": energy, "W0": W0, "damping": damping}


def _matrices(
    H: Any, W0: Any, G: Any, overwrite: bool
) -> tuple[Symmetric, Tensor, Tensor | None, float]:
    """Return the matrices in float64, copies unless they may be overwritten, and `consistency`."""
    H = H if isinstance(H, Symmetric) else as_tensor(H)
    W0 = as_tensor(W0)
    matrices = {"W0": W0} if G is None else {"W0": W0, "G": as_tensor(G)}
    alike = all(matrix.shape == W0.shape for matrix in matrices.values())
    if W0.ndim != 2 or H.shape != (len(W0), len(W0)) or W0.numel() == 0 or not alike:
        found = {"H": tuple(H.shape), **{n: tuple(one.shape) for n, one in matrices.items()}}
        raise ProblemError(f"the shapes are {found}; H must be (p, p), W0 and G (p, m), not empty")
    digits = max(consistency(H.dtype), consistency(matrices.get("G", W0).dtype))
    for name, value in matrices.items():
        matrices[name] = value.to(torch.float64, copy=not overwrite).contiguous()
        check_entries(name, matrices[name])
    return _averaged(H, overwrite), matrices["W0"], matrices.get("G"), digits


def _averaged(H: Tensor | Symmetric, overwrite: bool) -> Symmetric:
    """Return a Gram matrix in float64, symmetric and not only so up to rounding."""
    if isinstance(H, Tensor):
        made, difference = symmetric_part(H)
    else:
        made, difference = H if overwrite else H.copy(), 0.0
        for start, panel in made.spans():
            square = panel[:, start:]
            square.copy_((square + square.T).div_(2))
    for panel in made.panels:
        check_entries("H", panel)
    if not difference <= _ASYMMETRY:
        raise ProblemError(f"{asymmetry(difference)}; check that it is X'X/N")
    return made


def symmetric_part(H: Tensor) -> tuple[Symmetric, float]:
    """Return ``(H + H') / 2`` in float64, and the largest ``|H - H'|`` relative to the diagonal."""
    made = Symmetric.empty(len(H), H.new_empty(0, dtype=torch.float64))
    differences = []
    for start, panel in made.spans():
        stop = start + len(panel)
        panel.copy_(H[start:stop, :stop])
        across = H[:stop, start:stop].T.to(torch.float64)
        differences.append((panel - across).abs_().max())
        panel.add_(across).div_(2)
    difference = float(torch.stack(differences).max())
    return made, difference / (float(made.diagonal().max()) or 1.0) if difference else 0.0


def asymmetry(difference: float) -> str:
    """Return the sentence that refuses what `symmetric_part` found."""
    return (
        f"H is not symmetric: entries differ by up to {difference:.3g} of the largest on the "
        "diagonal"
    )


def _damp_until_definite(H: Symmetric, damp: float, mean: float) -> tuple[float, _DefiniteFactor]:
    """Add the damping to the diagonal of `H` in place; return how much, and a factor after it."""
    added = 0.0
    for level in (damp, *(step for step in _DAMP_LADDER if step > damp)):
        H.add_diagonal(torch.full_like(H.diagonal(), level * mean - added))
        added = level * mean
        check_entries("H with its damping", H.diagonal())
        factor = definite_factor(H, _ROOM * DEFINITE_MARGIN)
        if factor is not None:
            if level > damp:
                warn(
                    f"H is singular with damp={damp:g}; going on with damp={level:g}. "
                    "Use more calibration tokens than the layer has inputs, or raise damp."
                )
            return added, factor
    raise ProblemError(
        f"H is not positive semidefinite: damp={max(damp, _DAMP_LADDER[-1]):g} does not make it "
        "definite; check that it is X'X/N"
    )
