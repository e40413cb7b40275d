"""Exact one-at-a-time backward elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.refit import refit_loss
from solvers.problem import SubsetProblem
from solvers.protocol import Backend, BackendKind, Selection, Status


@dataclass(frozen=True)
class Greedy(Backend):
    """Remove the unit that raises the loss least, refit exactly, repeat.

    The order of ZipLM (Kurtic et al., NeurIPS 2023), with the losses of all support sizes as a
    by-product: ``path[k]`` is the loss with k units kept.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "exact one-at-a-time backward elimination (ZipLM order), whole path"

    def select(self, problem: SubsetProblem) -> Selection:
        """Eliminate down to `keep` units, then on to one, for the path."""
        n, k = problem.units, problem.keep
        everything = torch.arange(n, device=problem.device)
        removals = eliminate(problem, n - 1)
        path = [refit_loss(problem, everything)]
        for _, risen in removals:
            path.append(path[-1] + risen)
        path.append(problem.empty_loss)
        return Selection(
            support_after(removals[: n - k], problem),
            Status.FEASIBLE,
            iterations=n - k,
            history=tuple(path[: n - k + 1]),
            path=tuple(reversed(path)),
        )
