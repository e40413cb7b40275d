"""From the statistics of a layer to the damped quadratic terms of the objective."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import ProblemError

_DAMP_LADDER = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True, eq=False)
class DampedTerms:
    """``H + lambda I``, ``G + lambda W0``, ``e + lambda |W0|^2``, and lambda itself."""

    H: Tensor
    G: Tensor
    e: float
    W0: Tensor
    damping: float


def damp_terms(
    H: Tensor, W0: Tensor, *, G: Tensor | None, e: float | None, damp: float
) -> DampedTerms:
    """Validate undamped statistics and add the proximal term.

    An input that was always zero (a dead neuron) has no effect on the layer: its weights are taken
    as zero, so that removing it is free.

    Parameters
    ----------
    H
        Gram matrix ``X'X/N``, (p, p).
    W0
        Dense weights, (p, m).
    G, e
        ``X'Y/N``, (p, m), and ``|Y|^2/N``; by default those of the target ``Y = X W0``.
    damp
        lambda relative to the mean of the diagonal of `H`.  Raised, with a warning, where `H` is so
        close to singular that it cannot be factorized.

    Raises
    ------
    ProblemError
        If the input is not finite, has a wrong shape, or is far from positive semidefinite.
    """
    H, W0 = H.to(torch.float64), W0.to(torch.float64)
    if H.ndim != 2 or W0.ndim != 2 or H.shape != (len(W0), len(W0)) or W0.numel() == 0:
        raise ProblemError(
            f"H must be (p, p) and W0 (p, m), not {tuple(H.shape)} and {tuple(W0.shape)}"
        )
    if not math.isfinite(damp) or damp < 0:
        raise ProblemError(f"damp is {damp}; it must be finite and not negative")
    if (G is None) != (e is None):
        raise ProblemError("G and e describe one target: give both, or neither")
    for name, value in (("H", H), ("W0", W0), ("G", G)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ProblemError(f"{name} has NaN or infinite entries; check weights and activations")
    H = (H + H.T).div_(2)
    diagonal = H.diagonal().clone()
    if float(diagonal.min()) < 0:
        raise ProblemError(
            f"H has {float(diagonal.min()):.3g} on its diagonal; a Gram matrix has nothing negative"
        )
    dead = diagonal == 0
    W0 = torch.where(dead[:, None], 0.0, W0)
    if G is None or e is None:
        G = H @ W0
        e = float((W0 * G).sum())
    else:
        G = torch.where(dead[:, None], 0.0, G.to(torch.float64))
    # A dead row is decoupled from all others; any positive diagonal keeps it so.
    mean = float(diagonal.mean())
    H.diagonal().add_(torch.where(dead, mean or 1.0, 0.0))
    damping = _damp_until_definite(H, damp, mean)
    return DampedTerms(
        H=H,
        G=G.add(W0, alpha=damping),
        e=max(e, 0.0) + damping * float(W0.square().sum()),
        W0=W0,
        damping=damping,
    )


def _damp_until_definite(H: Tensor, damp: float, mean: float) -> float:
    """Add the damping to the diagonal of `H` in place, and return how much was added."""
    added = 0.0
    for level in (damp, *(step for step in _DAMP_LADDER if step > damp)):
        H.diagonal().add_(level * mean - added)
        added = level * mean
        if int(torch.linalg.cholesky_ex(H).info) == 0:
            if level > damp:
                warnings.warn(
                    f"H is singular with damp={damp:g}; going on with damp={level:g}. "
                    "Use more calibration tokens than the layer has inputs, or raise damp.",
                    stacklevel=4,
                )
            return added
    raise ProblemError(
        f"H is not positive semidefinite: damp={max(damp, _DAMP_LADDER[-1]):g} does not make it "
        "definite; check that it is X'X/N"
    )
