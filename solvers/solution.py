"""What a backend found, and what of it can be checked without trusting the backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from solvers.certificate import Certificate
from solvers.errors import ProblemError, VerificationError
from solvers.pivot import PivotState
from solvers.problem import SubsetProblem
from solvers.protocol import DEFAULT_GAP_TOLERANCE, Status
from solvers.refit import loss_rounding, quadratic_loss, refit
from solvers.swaps import best_swap

_ROUNDINGS = 4.0
"""Losses are told apart if they differ by more than this many times their rounding."""

_STATIONARITY_TOLERANCE = 1e-6
_SWAP_TOLERANCE = 1e-6
"""An exchange refutes a swap optimum if it gains more than this share of the loss."""

_BOUND_TOLERANCE = 1e-9
"""A bound may exceed what its certificate proves by this share of the loss: both round."""


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
        the weights are the least-squares refit.
    swap_gain
        By how much the most promising exchange lowers the loss, refitted, relative to the scale of
        the problem; NaN where neither swap optimality nor a bound was claimed.
    lower_bound
        The bound that the certificate proves, recomputed; NaN where there is no certificate.
    """

    loss: float
    loss_error: float
    stationarity: float
    swap_gain: float = math.nan
    lower_bound: float = math.nan


@dataclass(frozen=True, eq=False)
class Solution:
    """A support with its refitted weights, and the certificate that comes with it.

    Parameters
    ----------
    problem
        What was solved.
    backend
        The name of the backend.
    support
        The units that stay, (k,) int64, sorted.
    weights
        For each consumer the refitted weights, (p, m) float64, zero on removed rows.
    loss
        ``E(support)``; divide by ``problem.scale`` for the relative loss.
    status
        How the solve ended.
    lower_bound, bound_from
        No support has a lower loss than this, and what proved it.
    iterations, history, path, gap_tolerance, certificate
        As in `Selection`.
    seconds
        Wall time of the selection and of the refit.
    """

    problem: SubsetProblem = field(repr=False)
    backend: str
    support: Tensor
    weights: tuple[Tensor, ...] = field(repr=False)
    loss: float
    status: Status
    lower_bound: float = -math.inf
    bound_from: str = ""
    iterations: int = 0
    history: tuple[float, ...] = field(default=(), repr=False)
    path: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    gap_tolerance: float = DEFAULT_GAP_TOLERANCE
    certificate: Certificate | None = field(default=None, repr=False)

    @property
    def relative_loss(self) -> float:
        """Loss as a share of the loss of the empty support, from 0 to 1."""
        return self.loss / self.problem.scale if self.problem.scale else 0.0

    @property
    def removed(self) -> Tensor:
        """The units that go, (n - k,) int64, sorted."""
        mask = torch.ones(self.problem.units, dtype=torch.bool, device=self.support.device)
        mask[self.support] = False
        return torch.nonzero(mask).flatten()

    @property
    def gap(self) -> float:
        """``(loss - lower_bound) / loss``, from 0 (optimal) to 1; NaN without a bound."""
        if math.isinf(self.lower_bound):
            return math.nan
        if self.loss <= 0:
            return 0.0
        return max(0.0, (self.loss - max(self.lower_bound, 0.0)) / self.loss)

    def verify(self) -> Verification:
        """Recompute in float64, from the problem alone, everything that this solution claims.

        Returns
        -------
        Verification
            The recomputed numbers.

        Raises
        ------
        VerificationError
            If the problem is ill posed, the support is not feasible, the weights are not the refit
            on it, the loss is not what they give, the bound lies above the loss or above what its
            certificate proves, or a claimed swap optimum is not one.
        """
        try:
            self.problem.check_definite()
            return self._recompute()
        except ProblemError as error:
            raise VerificationError(f"the problem is ill posed: {error}") from error
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise VerificationError(
                f"the claims cannot be recomputed, H is too close to singular: {error}"
            ) from error

    def _recompute(self) -> Verification:
        problem = self.problem
        self._check_feasible()
        loss = quadratic_loss(problem, self.weights)
        slack = _ROUNDINGS * loss_rounding(problem, self.weights)
        scale = problem.scale or 1.0
        report = Verification(
            loss=loss,
            loss_error=abs(loss - self.loss) / scale,
            stationarity=self._stationarity(),
            swap_gain=self._best_swap_gain(loss) / scale,
            lower_bound=self.certificate.bound(problem) if self.certificate else math.nan,
        )
        if not abs(loss - self.loss) <= slack:
            raise VerificationError(f"loss is {loss:.9g} when recomputed, claimed {self.loss:.9g}")
        if not report.stationarity <= _STATIONARITY_TOLERANCE:
            raise VerificationError(
                f"weights are not the refit on the support: gradient {report.stationarity:.3g}"
            )
        self._check_claims(report, slack)
        return report

    def _check_claims(self, report: Verification, slack: float) -> None:
        """Check bound and status; `slack` is what rounding can have done to a loss."""
        loss, bound = report.loss, self.lower_bound
        gain = report.swap_gain * (self.problem.scale or 1.0)
        if bound > loss + slack:
            raise VerificationError(f"bound {bound:.9g} lies above the loss {loss:.9g}")
        if gain > _SWAP_TOLERANCE * loss + slack and self.status is Status.SWAP_OPTIMAL:
            raise VerificationError(
                f"not a swap optimum: an exchange gains {report.swap_gain:.3g} of the scale"
            )
        if bound > loss - gain + slack:
            raise VerificationError(
                f"bound {bound:.9g} is refuted by an exchange that lowers the loss to "
                f"{loss - gain:.9g}"
            )
        if bound > report.lower_bound + _BOUND_TOLERANCE * loss + slack:
            raise VerificationError(
                f"bound {bound:.9g} is claimed, its certificate proves {report.lower_bound:.9g}"
            )
        if self.status is not Status.OPTIMAL:
            return
        if math.isinf(bound):
            raise VerificationError("optimality is claimed without a bound")
        if loss - bound > self.gap_tolerance * loss + slack:
            raise VerificationError(
                f"optimality is claimed with a gap of {(loss - bound) / loss:.3g}; "
                f"the tolerance is {self.gap_tolerance:.3g}"
            )

    def _check_feasible(self) -> None:
        problem, support = self.problem, self.support
        if len(self.weights) != len(problem.consumers):
            raise VerificationError(
                f"weights for {len(self.weights)} of {len(problem.consumers)} consumers"
            )
        distinct = len(set(support.tolist()))
        if support.numel() != problem.keep or distinct != problem.keep:
            raise VerificationError(
                f"support has {distinct} distinct units, keep is {problem.keep}"
            )
        if not bool(((support >= 0) & (support < problem.units)).all()):
            raise VerificationError(f"support names units outside 0 .. {problem.units - 1}")
        for consumer, W in zip(problem.consumers, self.weights, strict=True):
            if W.shape != consumer.W0.shape or not bool(torch.isfinite(W).all()):
                raise VerificationError("weights have a wrong shape or are not finite")
            outside = torch.ones(len(W), dtype=torch.bool, device=W.device)
            outside[consumer.support_rows(support)] = False
            if bool(W[outside].any()):
                raise VerificationError("weights are not zero on the rows of removed units")

    def _stationarity(self) -> float:
        worst = 0.0
        for consumer, W in zip(self.problem.consumers, self.weights, strict=True):
            rows = consumer.support_rows(self.support)
            if rows.numel():
                gradient = consumer.H[rows] @ W - consumer.G[rows]
                size = float(consumer.G.abs().max()) or 1.0
                worst = max(worst, float(gradient.abs().max()) / size)
        return worst

    def _best_swap_gain(self, loss: float) -> float:
        """Return what the most promising exchange gains.

        The search's own formula proposes it, and a refit confirms it: near a singular H that
        formula alone would refute honest optima.
        """
        if self.status is not Status.SWAP_OPTIMAL and math.isinf(self.lower_bound):
            return math.nan
        swap = best_swap(PivotState.on_support(self.problem, self.support))
        if swap.leave < 0:
            return swap.gain
        stays = self.support[self.support != swap.leave]
        exchanged = torch.cat([stays, stays.new_tensor([swap.enter])])
        return min(swap.gain, loss - refit(self.problem, exchanged)[1])
