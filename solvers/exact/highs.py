"""Outer approximation as a mixed-integer linear program, solved by HiGHS."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from solvers.exact.outer_approximation import TOLERANCE, Array, Cut, MixedInteger, Search
from solvers.protocol import Capabilities, Selection

_FRACTIONAL_ROUNDS = 40
_ROUND_PROGRESS = 1e-4


@dataclass(frozen=True)
class Highs(MixedInteger):
    """Prove which support is best with an open-source solver.

    The linear relaxation is tightened by cuts at its own optima first.  Then the integer search is
    solved again and again, each time with a cut at what it found: its bound rises to the optimum.
    """

    summary: ClassVar[str] = "outer approximation as a linear integer program, without a licence"
    capabilities: ClassVar[Capabilities] = Capabilities(max_units=200, devices=("cpu",))
    package: ClassVar[str] = "highspy"

    def solve(self, search: Search) -> Selection:
        """Alternate between the master problem and cuts at its solutions."""
        model = _Model(search.problem.units, search.terms.removals, self.threads)
        for cut in (search.root_cut(), search.cut(search.removed())):
            model.add(cut)
        bound = _tighten_relaxation(model, search)
        model.make_integer()
        seen = set[bytes]()
        while bound < search.cutoff and (left := search.seconds_left) > 0:
            proved, point = model.solve(left)
            bound = max(bound, proved)
            if point is None:
                break
            point = np.round(point)
            search.offer_point(point)
            if point.tobytes() in seen:
                break
            seen.add(point.tobytes())
            for cut in search.cuts_at(point):
                model.add(cut)
        return search.answer(bound, "HiGHS", timed_out=search.seconds_left <= 0)


def _tighten_relaxation(model: _Model, search: Search) -> float:
    """Add cuts at fractional optima while they raise the bound; return the bound."""
    bound = 0.0
    for _ in range(_FRACTIONAL_ROUNDS):
        left = search.seconds_left
        if left <= 0:
            break
        value, point = model.solve(left)
        if point is None:
            break
        progress, bound = value - bound, max(bound, value)
        if bound >= search.cutoff or progress < _ROUND_PROGRESS:
            break
        model.add(search.cut(point))
    return bound


_REDIRECTED = threading.RLock()


@contextmanager
def without_prints() -> Iterator[None]:
    """Keep off standard output, which may be JSON, what HiGHS prints: no option of it does.

    It is that of the whole process, so that threads take turns.
    """
    with _REDIRECTED, ExitStack() as undo:
        try:
            terminal = os.dup(1)
        except OSError:  # it is closed, and nothing can be printed
            yield
            return
        undo.callback(os.close, terminal)
        undo.callback(os.dup2, terminal, 1)
        undo.callback(_flush_c)
        with suppress(AttributeError, OSError, ValueError):  # Python may have none
            sys.stdout.flush()
        _flush_c()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        undo.callback(os.close, nowhere)
        os.dup2(nowhere, 1)
        yield


def _flush_c() -> None:
    """Write out what C has kept back for standard output, as it does for a pipe."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


class _Model:
    """The master problem: indicators of removed units, and the cost above all cuts."""

    def __init__(self, units: int, removals: int, threads: int) -> None:
        import highspy

        self._highspy: Any = highspy
        self._units = units
        with without_prints():
            self._solver: Any = highspy.Highs()
        self._solver.setOptionValue("output_flag", False)
        self._solver.setOptionValue("threads", threads)
        self._solver.setOptionValue("mip_rel_gap", 1e-7)
        for name in ("primal", "dual", "mip"):
            self._solver.setOptionValue(f"{name}_feasibility_tolerance", TOLERANCE)
        infinity = highspy.kHighsInf
        for _ in range(units):
            self._solver.addVar(0.0, 1.0)
        self._solver.addVar(0.0, infinity)
        self._solver.changeColCost(units, 1.0)
        self._add_row(float(removals), float(removals), np.r_[np.ones(units), 0.0])

    def add(self, cut: Cut) -> None:
        """Add ``cost - slopes @ x >= -constant``."""
        slopes, constant = cut
        self._add_row(-constant, self._highspy.kHighsInf, np.r_[-slopes, 1.0])

    def _add_row(self, lower: float, upper: float, values: Array) -> None:
        index = np.flatnonzero(values).astype(np.int32)
        self._solver.addRow(lower, upper, len(index), index, values[index])

    def make_integer(self) -> None:
        """Require binary indicators from now on."""
        for column in range(self._units):
            self._solver.changeColIntegrality(column, self._highspy.HighsVarType.kInteger)

    def solve(self, seconds: float) -> tuple[float, Array | None]:
        """Return the proved bound of the cost, and the point found, if any."""
        # HiGHS counts the time of all its runs together.
        used = self._solver.getRunTime()
        self._solver.setOptionValue("time_limit", used + seconds)
        self._solver.run()
        info = self._solver.getInfo()
        integer = info.mip_node_count >= 0
        bound = float(info.mip_dual_bound if integer else info.objective_function_value)
        found = info.primal_solution_status == self._highspy.kSolutionStatusFeasible
        finished = self._solver.getModelStatus() == self._highspy.HighsModelStatus.kOptimal
        if not found or not (integer or finished):
            return max(bound, 0.0) if integer else 0.0, None
        values = np.asarray(self._solver.getSolution().col_value, dtype=np.float64)
        return bound, np.clip(values[: self._units], 0.0, 1.0)
