"""Improve a support window by window, each solved exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from solvers.certificates.tree_certificate import TreeCertificate
from solvers.closed_forms.refit import Incumbent
from solvers.closed_forms.schur import (
    apply_window,
    borderline_window,
    random_window,
    window_problem,
)
from solvers.exact.branch_and_bound import BranchAndBound
from solvers.heuristics.local_search import LocalSearch
from solvers.problem import SubsetProblem
from solvers.protocol import (
    Backend,
    BackendKind,
    Natural,
    Seconds,
    Seed,
    Selection,
    Status,
    Tolerance,
    WindowCertificate,
)


@dataclass(frozen=True)
class WindowSearch(Backend):
    """Start from the swap optimum, then choose anew within windows of units, exactly.

    The first window holds the units closest to changing sides: kept ones that cost least to remove,
    and removed ones that gain most if added.  The others are drawn at random.  What the search
    certifies is that no better choice exists within any window tried since the last improvement,
    that one included, up to the gap tolerance; it is no bound on all supports.

    Parameters
    ----------
    units
        Units of a window.
    windows
        How many windows to try.
    time_limit
        Seconds for one window.
    gap_tolerance
        Relative gap at which a window counts as solved.
    seed
        Of the random windows.
    """

    kind: ClassVar[BackendKind] = BackendKind.HEURISTIC
    summary: ClassVar[str] = "swap optimum, then improved exactly within windows of units"
    units: Annotated[int, Ge(2)] = 24
    windows: Natural = 8
    time_limit: Seconds = 10.0
    gap_tolerance: Tolerance = 1e-5
    seed: Seed = 0

    def select(self, problem: SubsetProblem) -> Selection:
        """Improve the swap optimum, one window after the other."""
        best = Incumbent(problem, LocalSearch().select(problem).support)
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.units, problem.units)
        count = 0 if problem.keep == problem.units else self.windows
        if size == problem.units:
            count = min(count, 1)
        proofs: list[WindowCertificate] | None = []
        for index in range(count):
            units = (
                random_window(problem, best.support, size, generator)
                if index
                else borderline_window(problem, best.support, size)
            )
            found = self._solve(problem, best.support, units)
            if best.offer(apply_window(best.support, units, found.support)):
                proofs = []
            tree = found.certificate
            if found.status is not Status.OPTIMAL or not isinstance(tree, TreeCertificate):
                proofs = None  # until the next improvement: this window may hold something better
            elif proofs is not None:
                proofs.append(WindowCertificate(units, tree))
        return Selection(
            best.support,
            Status.WINDOW_OPTIMAL if proofs else Status.FEASIBLE,
            iterations=count,
            history=tuple(best.history),
            gap_tolerance=self.gap_tolerance,
            windows=tuple(proofs or ()),
        )

    def _solve(self, problem: SubsetProblem, support: Tensor, units: Tensor) -> Selection:
        inside = torch.nonzero(torch.isin(units, support)).flatten()
        exact = BranchAndBound(
            time_limit=self.time_limit,
            gap_tolerance=self.gap_tolerance,
            start=tuple(inside.tolist()),
        )
        return exact.select(window_problem(problem, support, units))
