"""What a backend found: claims that `verify` checks, a summary, and files of what proves them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from solvers import storage
from solvers.certificates.certificate import EnumerationCertificate, MultiplierCertificate
from solvers.certificates.tree_certificate import Certificate, TreeCertificate
from solvers.errors import ProblemError
from solvers.problem import SubsetProblem
from solvers.protocol import Selection
from solvers.verification import Verification, verify

_ROUNDING = 1e-9
"""A search often stops right at its tolerance, which the gap only meets up to rounding."""


@dataclass(frozen=True)
class SolutionRecord:
    """A solution in numbers and names, as JSON can hold it: nothing infinite, nothing NaN.

    Parameters
    ----------
    backend
        The name of the backend.
    status
        The name of the status.
    support
        The units that stay, sorted.
    loss
        Loss of the weights; recomputed, where a verification was at hand.
    relative_loss
        The same as a share of the loss of removing everything (`SubsetProblem.scale`).
    lower_bound
        No support has a lower loss, the backend says; None where it says nothing.
    relative_bound
        The same as a share of that.
    gap
        ``(loss - lower_bound) / loss``, from 0 (optimal) to 1; None without a bound.
    bound_from
        What proved the bound, in a few words.
    recomputed_bound
        What was recomputed of `lower_bound`; None where it is the backend's word, or nothing was
        verified.
    proved_optimal
        Whether the bound leaves no more than the backend's tolerance; `recomputed_bound` tells
        whose word that is.
    iterations
        Removals, swaps, nodes: whatever the backend counts.
    seconds
        Wall time of the selection and of the refit.
    """

    backend: str
    status: str
    support: tuple[int, ...]
    loss: float
    relative_loss: float
    lower_bound: float | None
    relative_bound: float | None
    gap: float | None
    bound_from: str
    recomputed_bound: float | None
    proved_optimal: bool
    iterations: int
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution(Selection):
    """A backend's selection with its refitted weights; all else is as of the `Selection`.

    Parameters
    ----------
    problem, backend
        What was solved, and the name of the backend.
    weights
        For each consumer the refitted weights, (p, m) float64, zero on removed rows.
    loss
        ``E(support)``; divide by ``problem.scale`` for the relative loss.
    seconds
        Wall time of the selection and of the refit.
    """

    problem: SubsetProblem = field(repr=False)
    backend: str
    weights: tuple[Tensor, ...] = field(default=(), repr=False)
    loss: float
    seconds: float = 0.0

    @property
    def relative_loss(self) -> float:
        """Loss as a share of the scale of the problem."""
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
        if not math.isfinite(self.lower_bound):
            return math.nan
        if self.loss <= 0:
            return 0.0
        return max(0.0, (self.loss - max(self.lower_bound, 0.0)) / self.loss)

    def verify(self) -> Verification:
        """Recompute in float64, from the problem alone, what this solution claims.

        Raises VerificationError if a claim is false, or not even well formed.
        """
        return verify(self)

    def record(self, verification: Verification | None = None) -> SolutionRecord:
        """Return the summary of this solution, with what a verification, if given, recomputed."""
        checked = verification or Verification(self.loss, 0.0)
        loss = checked.loss if math.isfinite(checked.loss) else self.loss
        scale = self.problem.scale or 1.0
        # A search ends at a gap, of which its certificate may leave less.
        proved = min(checked.lower_bound, loss) if math.isfinite(checked.lower_bound) else -math.inf
        best = replace(self, lower_bound=max(self.lower_bound, proved))
        bound, gap = _finite(best.lower_bound), _finite(best.gap)
        return SolutionRecord(
            backend=self.backend,
            status=self.status.name,
            support=tuple(self.support.tolist()),
            loss=loss,
            relative_loss=loss / scale,
            lower_bound=bound,
            relative_bound=None if bound is None else bound / scale,
            gap=gap,
            bound_from=self.bound_from,
            recomputed_bound=_finite(checked.lower_bound),
            proved_optimal=gap is not None and gap <= self.gap_tolerance * (1 + _ROUNDING),
            iterations=self.iterations,
            seconds=self.seconds,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_KIND, _TENSORS, _ROOT = "certificate", "bound.", "root."
"""What a file of a certificate calls its kind, its tensors, and of these those of a tree's root."""

_KINDS = {
    "multipliers": MultiplierCertificate,
    "tree": TreeCertificate,
    "enumeration": EnumerationCertificate,
}

_MARK = "marks"
"""A tensor of no meaning: a file of tensors holds at least one."""


def save_certificate(path: str | os.PathLike[str], solution: Solution) -> bool:
    """Write what proves a solution to a ``.safetensors`` file; return whether anything does.

    Raises ProblemError if the file cannot be written.
    """
    if solution.certificate is None:
        return False
    (kind,) = (name for name, one in _KINDS.items() if type(solution.certificate) is one)
    tensors = {_MARK: torch.zeros(1, dtype=torch.int8)} | _tensors(solution.certificate, _TENSORS)
    storage.write(path, {_KIND: kind}, tensors)
    return True


def load_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read what `save_certificate` wrote: ``certificate.bound(problem)`` is what it proves.

    Raises ProblemError if the file is missing, or holds no certificate.
    """
    header, tensors = storage.read(path)
    try:
        made: Any = _KINDS[header[_KIND]]
        own = _part(tensors, _TENSORS)
        root = _part(own, _ROOT)
        parts: dict[str, Any] = {n: t for n, t in own.items() if not n.startswith(_ROOT)}
        if made is TreeCertificate:
            parts["root"] = MultiplierCertificate(**root) if root else None
        proof: Certificate = made(**parts)
        return proof
    except (KeyError, TypeError) as error:
        raise ProblemError(f"{path} is not a certificate: {error}") from error


def _tensors(certificate: Any, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a certificate, and of its root if it is a tree, by their names."""
    found: dict[str, Tensor] = {}
    for name, value in vars(certificate).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif value is not None:
            found |= _tensors(value, prefix + _ROOT)
    return found


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
