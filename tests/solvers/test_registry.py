"""Backends are found by entry point, checked before they run, and errors name the fix."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from solvers import (
    BackendError,
    Capabilities,
    Kind,
    Selection,
    Status,
    backend,
    backend_names,
    backends,
    make_backend,
    solve,
)
from solvers.heuristics.local_search import LocalSearch
from solvers.heuristics.multistage import Multistage
from tests.solvers.instances import INSTANCES

PROBLEM = INSTANCES["scalar"].problem

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from solvers import Capabilities, Kind, Selection, Status

@dataclass(frozen=True)
class First:
    kind: ClassVar = Kind.HEURISTIC
    summary: ClassVar = "the first units"
    capabilities: ClassVar = Capabilities(wide_units=False, several_consumers=False, max_units=9)
    offset: int = 0

    @classmethod
    def available(cls):
        return None

    def select(self, problem):
        return Selection(torch.arange(problem.keep) + self.offset, Status.FEASIBLE)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package on the path that registers backends of its own."""
    (tmp_path / "their_package.py").write_text(PLUGIN)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[osscar.backends]\n"
        "theirs = their_package:First\n"
        "no_module = their_missing_package:First\n"
        "no_class = their_package:Second\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backend._registered.cache_clear()
    yield
    backend._registered.cache_clear()
    sys.modules.pop("their_package", None)


def test_own_backends_are_registered():
    own = {"random", "magnitude", "wanda", "greedy", "multistage", "local_search", "enumerate"}
    assert own <= set(backend_names())
    table = {info.name: info for info in backends()}
    assert table["enumerate"].kind == "exact"
    assert table["enumerate"].capabilities.max_units == 16
    assert table["multistage"].options["max_batches"] == 20
    assert all(info.summary for info in table.values())


def test_importing_solvers_imports_no_optional_package():
    """Nor does listing the backends: a broken native library must not break the rest."""
    import subprocess

    code = (
        "import sys, solvers; solvers.backends();"
        "print(sorted({'gurobipy', 'cvxpy', 'highspy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_users_backend(installed):
    assert "theirs" in backend_names()
    solution = solve(PROBLEM, "theirs", offset=2)
    assert solution.backend == "theirs"
    assert solution.support.tolist() == [2, 3, 4, 5]
    solution.verify()
    for name, reason in [
        ("blocks", "takes units of one row only, and these have 3"),
        ("ragged_consumers", "takes units of one row only, and these have 4"),
        ("correlated", "takes at most 9 units, and this problem has 10"),
    ]:
        with pytest.raises(BackendError, match=f"'theirs' {reason}; choose another: .*greedy"):
            solve(INSTANCES[name].problem, "theirs")


def test_a_backend_that_does_not_load(installed):
    with pytest.raises(BackendError, match="'no_module' is registered but does not load"):
        solve(PROBLEM, "no_module")
    with pytest.raises(BackendError, match="'no_class' is registered but does not load"):
        solve(PROBLEM, "no_class")
    rows = {info.name: info.unavailable for info in backends()}
    assert "does not load" in rows["no_module"]
    assert rows["theirs"] is None


def test_unknown_backend():
    with pytest.raises(BackendError, match=r"no backend 'gredy'; choose from .*greedy"):
        solve(PROBLEM, "gredy")


def test_nothing_registered(monkeypatch):
    monkeypatch.setattr(backend, "_registered", dict)
    with pytest.raises(BackendError, match="no backend is registered; install the package"):
        solve(PROBLEM)


def test_unknown_option():
    with pytest.raises(BackendError, match=r"'random' has no option sed; it has seed"):
        make_backend("random", sed=1)
    with pytest.raises(BackendError, match=r"'greedy' has no option a, b; it has none"):
        solve(PROBLEM, "greedy", b=1, a=2)


def test_unavailable_package(monkeypatch):
    reason = "highspy is missing; install it: pip install 'osscar[exact]'"
    monkeypatch.setattr(Multistage, "available", classmethod(lambda cls: reason))
    with pytest.raises(BackendError, match=r"'multistage' is not available: highspy is missing"):
        solve(PROBLEM, "multistage")
    assert {i.name: i.unavailable for i in backends()}["multistage"] == reason


def test_a_backend_object_brings_its_options():
    solution = solve(PROBLEM, LocalSearch(max_swaps=0, start=(0, 1, 2, 3)))
    assert solution.backend == "LocalSearch"
    with pytest.raises(BackendError, match="this backend object has its own"):
        solve(PROBLEM, LocalSearch(), max_swaps=3)


@dataclass(frozen=True)
class Elsewhere:
    kind: ClassVar = Kind.HEURISTIC
    summary: ClassVar = "computes on another device only"
    capabilities: ClassVar = Capabilities(several_consumers=False, devices=("cuda",))

    def select(self, problem):
        return Selection(torch.arange(problem.keep), Status.FEASIBLE)


def test_capabilities():
    with pytest.raises(BackendError, match="computes on cuda, and this problem is on cpu"):
        solve(PROBLEM, Elsewhere())
    with pytest.raises(BackendError, match="takes one consumer only, and this problem has 2"):
        solve(INSTANCES["two_consumers"].problem, Elsewhere())
    with pytest.raises(BackendError, match="at most 16 units"):
        solve(_many_units(17), "enumerate")


def _many_units(n):
    from solvers import SubsetProblem

    return SubsetProblem.from_gram(torch.eye(n), torch.ones(n, 1), keep=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("local_search", {"max_swaps": -1}, "max_swaps is -1"),
        ("local_search", {"tolerance": float("nan")}, "tolerance nan"),
        ("local_search", {"start": (0, 1)}, "start must name 4 distinct units below 9"),
        ("local_search", {"start": (0, 1, 2, 9)}, "start must name 4 distinct units below 9"),
        ("multistage", {"stage_size": 0}, "stage_size is 0"),
        ("multistage", {"batch_size": 0}, "batch_size is 0"),
        ("multistage", {"max_batches": -1}, "max_batches is -1"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(BackendError, match=message):
        solve(PROBLEM, name, **options)


def test_iteration_limit_is_a_status():
    start = tuple(solve(PROBLEM, "random", seed=3).support.tolist())
    stopped = solve(PROBLEM, "local_search", start=start, max_swaps=0)
    assert stopped.status is Status.ITERATION_LIMIT
    assert stopped.support.tolist() == list(start)
    finished = solve(PROBLEM, "local_search", start=start)
    assert finished.status is Status.SWAP_OPTIMAL
    assert finished.iterations > 0
    assert finished.loss < stopped.loss


def test_seed_decides_the_random_support():
    supports = {tuple(solve(PROBLEM, "random", seed=s).support.tolist()) for s in range(10)}
    assert len(supports) > 1


def test_multistage_with_stages_of_one_is_greedy():
    for name in ("correlated", "ragged", "ragged_consumers"):
        problem = INSTANCES[name].problem
        multistage = solve(problem, "multistage", stage_size=1, max_batches=0)
        assert torch.equal(multistage.support, solve(problem, "greedy").support)


def test_multistage_keeps_the_best_batch():
    problem = INSTANCES["correlated"].problem
    with_swaps = solve(problem, "multistage", stage_size=5, batch_size=1)
    without = solve(problem, "multistage", stage_size=5, max_batches=0)
    assert with_swaps.loss <= without.loss
    assert with_swaps.history[0] == pytest.approx(without.loss)
