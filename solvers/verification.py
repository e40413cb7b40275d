"""The check of a solution, which believes nothing: it starts from the problem alone.

What `verify` recomputes, and what it can only fail to refute:

- the problem is well posed, the support feasible, the weights the refit on it, and the loss theirs:
  always recomputed;
- ``SWAP_OPTIMAL``: every exchange is tried by the formula, and the best of them refitted;
- a lower bound with a certificate is recomputed from it, and so is what rests on it, ``OPTIMAL``
  or ``BOUNDED``; a bound that the loss with all units kept reaches needs no certificate, since
  removing units never lowers the loss;
- a lower bound without a certificate is the backend's word.  It is refused where the loss, or an
  exchange, refutes it; else `Verification.not_recomputed` names it, and the status that rests on
  it.

That a limit was met, and how a backend got to its answer (its iterations, history and seconds), is
not checked: nothing about the problem follows from it.

Claims may come from files: certificates check their own numbers, and what is compared is compared
such that NaN fails.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.certificates.tree_certificate import Certificate
from solvers.closed_forms.pivot import PivotState, best_swap
from solvers.closed_forms.refit import (
    loss_rounding,
    quadratic_loss,
    refit_loss,
    refit_loss_and_rounding,
)
from solvers.errors import ProblemError, VerificationError, require
from solvers.linalg.gram import TILE_ROWS
from solvers.problem import SubsetProblem
from solvers.protocol import Status

_EPS = torch.finfo(torch.float64).eps

_ROUNDINGS = 4.0
"""Losses are told apart if they differ by more than this many times their rounding."""

_STATIONARITY_TOLERANCE = 1e-6
_SWAP_TOLERANCE = 1e-6
"""An exchange refutes a swap optimum if it gains more than this share of the loss."""

_BOUND_TOLERANCE = 1e-9
"""A bound may exceed what its certificate proves by this share of the loss: searches take off what
rounding can do to both, but no two computers round alike."""


@dataclass(frozen=True)
class Verification:
    """Numbers recomputed from the problem alone, each beside what was claimed.

    Parameters
    ----------
    loss
        Loss of the solution's weights, recomputed in float64.
    loss_error
        Its distance from the claimed loss, relative to the scale of the problem.
    stationarity
        Largest entry of the gradient on the support, relative to the largest entry of G: zero when
        the weights are the least-squares refit; NaN of experts, which have none.
    swap_gain
        By how much the most promising exchange lowers the loss, refitted, relative to the scale of
        the problem; NaN where neither swap optimality nor a bound was claimed, or where rounding
        hides it and a certificate proves the bound.
    lower_bound
        What no support's loss can be below, recomputed, with what rounding can have done taken off;
        NaN where a bound is the backend's word, or none is claimed.
    tolerance
        What the claimed loss and bound may be wrong by, after all of this, in units of the loss.
    not_recomputed
        Which of the claims ``lower_bound`` and ``status`` are the backend's word: not refuted by
        any exchange, and not recomputed, for want of a certificate.  Empty where all that is
        claimed was recomputed.
    """

    loss: float
    loss_error: float
    stationarity: float = math.nan
    swap_gain: float = math.nan
    lower_bound: float = math.nan
    tolerance: float = 0.0
    not_recomputed: tuple[str, ...] = ()


# ---- fields --------------------------------------------------------------------------------------


def check_claim(claim: Any) -> None:
    """Refuse what a solution, or a selection, says of its support and is no claim at all."""
    require(isinstance(claim.status, Status), f"status is {claim.status!r}; it must be a Status")
    require(
        claim.lower_bound < math.inf,
        f"lower_bound is {claim.lower_bound}; it must be finite, or -inf where there is none",
    )
    require(
        0 <= claim.gap_tolerance < 1,
        f"gap_tolerance is {claim.gap_tolerance}; it must be in [0, 1)",
    )
    require(
        isinstance(claim.certificate, Certificate | None),
        f"certificate is {reprlib.repr(claim.certificate)}; it must be None or a known one",
    )


def check_support(problem: Any, support: Tensor) -> None:
    """Refuse a support, (k,) int64, that is not sorted or no choice of `keep` units."""
    require(
        support.dtype == torch.int64 and support.ndim == 1,
        f"support is {support.dtype} of shape {tuple(support.shape)}; it must be (k,) int64",
    )
    require(
        support.device == problem.device,
        f"support is on {support.device}, the problem on {problem.device}",
    )
    units = support.tolist()
    distinct = set(units)
    require(
        len(units) == len(distinct) == problem.keep,
        f"support has {len(distinct)} distinct units, keep is {problem.keep}",
    )
    require(
        distinct <= set(range(problem.units)),
        f"support names units outside 0 .. {problem.units - 1}",
    )
    require(units == sorted(units), "support is not sorted")


# ---- claims --------------------------------------------------------------------------------------


def verify(solution: Any) -> Verification:
    """Recompute in float64, from the problem alone, what a solution claims.

    Raises VerificationError if a field has a wrong type or range, the problem is ill posed, the
    support is not feasible, the weights are not the refit on it, the loss is not what they give,
    the bound lies above the loss or above what its certificate proves, or the status claims more.
    """
    check_claim(solution)
    try:
        with torch.no_grad():
            return _recomputed(solution)
    except ProblemError as error:
        raise VerificationError(f"the problem is ill posed: {error}") from error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise VerificationError(
            f"the claims cannot be recomputed, H is too close to singular: {error}"
        ) from error


def _recomputed(claim: Any) -> Verification:
    """Check one claim after the other; each rests on those above it."""
    problem: SubsetProblem = claim.problem
    problem.check_definite()
    check_support(problem, claim.support)
    _check_weights(problem, claim)
    loss = quadratic_loss(problem, claim.weights)
    slack = _ROUNDINGS * loss_rounding(problem, claim.weights)
    require(
        abs(loss - claim.loss) <= slack,
        f"loss is {loss:.9g} when recomputed, claimed {claim.loss:.9g}",
    )
    stationarity = _stationarity(problem, claim)
    require(
        stationarity <= _STATIONARITY_TOLERANCE,
        f"weights are not the refit on the support: gradient {stationarity:.3g}",
    )
    gain = _check_exchanges(problem, claim, loss, slack)
    bound = _check_bound(problem, claim)
    _check_status(problem, claim, loss, slack)
    open_bound = _has_bound(claim) and not math.isfinite(bound)
    rests = open_bound and claim.status in (Status.OPTIMAL, Status.BOUNDED)
    scale = problem.scale or 1.0
    return Verification(
        loss=loss,
        loss_error=abs(loss - claim.loss) / scale,
        stationarity=stationarity,
        swap_gain=gain / scale,
        lower_bound=bound,
        tolerance=slack + (_BOUND_TOLERANCE * loss if _has_bound(claim) else 0.0),
        not_recomputed=("lower_bound",) * open_bound + ("status",) * rests,
    )


def _has_bound(claim: Any) -> bool:
    return bool(claim.lower_bound > -math.inf)


def _check_weights(problem: SubsetProblem, claim: Any) -> None:
    require(
        len(claim.weights) == len(problem.consumers),
        f"weights for {len(claim.weights)} of {len(problem.consumers)} consumers",
    )
    for consumer, W in zip(problem.consumers, claim.weights, strict=True):
        require(
            W.shape == consumer.W0.shape
            and W.dtype == torch.float64
            and W.device == problem.device
            and bool(torch.isfinite(W).all()),
            "weights have a wrong shape or device, or are not finite float64 numbers",
        )
        outside = torch.ones(len(W), dtype=torch.bool, device=W.device)
        outside[consumer.support_rows(claim.support)] = False
        require(not bool(W[outside].any()), "weights are not zero on the rows of removed units")


def _stationarity(problem: SubsetProblem, claim: Any) -> float:
    worst = 0.0
    for consumer, W in zip(problem.consumers, claim.weights, strict=True):
        kept = consumer.support_rows(claim.support)
        fitted = W[kept]  # the other rows are zero, as was checked
        largest = max(map(abs, map(float, torch.aminmax(consumer.G)))) or 1.0
        for rows in torch.split(kept, TILE_ROWS):
            residual = consumer.hessian.entries(rows, kept) @ fitted - consumer.G[rows]
            gradient = float(residual.abs().max())
            require(math.isfinite(gradient), "weights overflow: their gradient is not finite")
            worst = max(worst, gradient / largest)
    return worst


def _check_exchanges(problem: SubsetProblem, claim: Any, loss: float, slack: float) -> float:
    """Return what the most promising exchange gains; refuse what it refutes.

    The search's own formula proposes it, and a refit confirms it: near a singular H that formula
    alone would refute honest optima.  NaN is returned where no claim could be refuted.
    """
    if claim.status is not Status.SWAP_OPTIMAL and not _has_bound(claim):
        return math.nan
    require(
        not _has_bound(claim) or claim.lower_bound <= loss + slack,
        f"bound {claim.lower_bound:.9g} lies above the loss {loss:.9g}",
    )
    allowed = _SWAP_TOLERANCE * loss + slack
    try:
        state = PivotState.on_support(problem, claim.support)
        swap = best_swap(state)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if claim.status is Status.SWAP_OPTIMAL or claim.certificate is None:
            raise
        # What rounding hides here, the certificate has to prove all the same.
        return math.nan
    gain = swap.gain
    del state  # a refit takes its room
    if len(swap.units):
        leave, enter = swap.units
        exchanged = torch.cat([claim.support[claim.support != leave], enter[None]])
        gain = min(gain, loss - refit_loss(problem, exchanged))
    require(
        claim.status is not Status.SWAP_OPTIMAL or gain <= allowed,
        f"not a swap optimum: an exchange lowers the loss {loss:.9g} by {gain:.3g}",
    )
    require(
        not _has_bound(claim) or claim.lower_bound <= loss - gain + slack,
        f"bound {claim.lower_bound:.9g} is refuted by an exchange that lowers the loss to "
        f"{loss - gain:.9g}",
    )
    return gain


def _check_bound(problem: SubsetProblem, claim: Any) -> float:
    """Return what is proved of the claimed bound, NaN if nothing; refuse what proves less."""

    def reached(proved: float) -> bool:
        # Nothing of the loss here: whoever makes a claim chooses that, by a bad support.
        tolerance = _BOUND_TOLERANCE * max(proved, 0.0) + _EPS * problem.empty_loss
        return bool(claim.lower_bound <= proved + tolerance)

    if not _has_bound(claim):
        return math.nan
    if claim.certificate is None:
        # Removing units never lowers the loss: that is a bound which needs no evidence.
        everything = torch.arange(problem.units, device=problem.device)
        least, rounding = refit_loss_and_rounding(problem, everything)
        least = max(least - rounding, 0.0)
        return least if reached(least) else math.nan
    proved: float = claim.certificate.bound(problem)
    require(
        reached(proved),
        f"bound {claim.lower_bound:.9g} is claimed, its certificate proves {proved:.9g}",
    )
    return proved


def _check_status(problem: SubsetProblem, claim: Any, loss: float, slack: float) -> None:
    """Refuse a status that claims more than the bound says."""
    if claim.status is Status.BOUNDED:
        require(_has_bound(claim), "a bound is claimed, and there is none")
    if claim.status is Status.OPTIMAL:
        require(_has_bound(claim), "optimality is claimed without a bound")
        left = loss - claim.lower_bound
        require(
            left <= claim.gap_tolerance * loss + slack,
            f"optimality is claimed with a gap of {left:.3g} at a loss of {loss:.3g}; the "
            f"tolerance is {claim.gap_tolerance:.3g} of it",
        )
