"""Backends are found by entry point, checked before they run, and errors name the fix."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from solvers import (
    BackendError,
    BackendKind,
    Capabilities,
    Selection,
    Status,
    backend_names,
    backends,
    registry,
    solve,
)
from solvers.heuristics.local_search import LocalSearch
from tests.solvers.instances import INSTANCES

PROBLEM = INSTANCES["scalar"].problem

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from solvers import Capabilities, BackendKind, Selection, Status

@dataclass(frozen=True)
class First:
    kind: ClassVar = BackendKind.HEURISTIC
    summary: ClassVar = "the first units"
    capabilities: ClassVar = Capabilities(several_consumers=False, max_units=9)
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
    registry._registered.cache_clear()
    yield
    registry._registered.cache_clear()
    sys.modules.pop("their_package", None)


@pytest.mark.slow
def test_optional_packages_are_neither_imported_nor_heard_of():
    """Listing the backends imports none: a broken native library must not break the rest."""
    code = (
        "import sys, torch, solvers; solvers.backends();"
        "print(sorted({'gurobipy', 'cvxpy', 'highspy'} & set(sys.modules)));"
        "p = solvers.SubsetProblem.from_gram(torch.eye(4), torch.rand(4, 2), keep=2);"
        "solvers.backend_class('highs').available() or solvers.solve(p, 'highs')"
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
        ("two_consumers", "takes one consumer only, and this problem has 2"),
        ("correlated", "takes at most 9 units, and this problem has 10"),
    ]:
        with pytest.raises(BackendError, match=f"'theirs' {reason}; choose another"):
            solve(INSTANCES[name].problem, "theirs")
    for name in ("no_module", "no_class"):
        with pytest.raises(BackendError, match=f"'{name}' is registered but does not load"):
            solve(PROBLEM, name)
    rows = {info.name: info.unavailable for info in backends()}
    assert "does not load" in rows["no_module"]
    assert rows["theirs"] is None


# ---- options -------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("gredy", {}, r"^there is no backend 'gredy'; choose .*greedy"),
    ("random", {"sed": 1}, r"'random' has no option sed; it has seed"),
    ("random", {"seed": -1}, "'random': seed is -1; it should be greater than or equal to 0"),
    ("local_search", {"start": (0, 1)}, "start must name 4 distinct units below 9"),
    ("cvxpy", {"solver": "NONE_SUCH"}, "'cvxpy' failed with .*NONE_SUCH"),
]


def test_bad_options():
    unavailable = {info.name for info in backends() if info.unavailable}
    for name, options, message in BAD_OPTIONS:
        if name not in unavailable:
            with pytest.raises(BackendError, match=message):
                solve(PROBLEM, name, **options)


def test_options_in_a_mapping():
    """Names of options cannot collide with the parameters of `solve` there."""
    expected = solve(PROBLEM, "random", seed=3).support
    assert torch.equal(solve(PROBLEM, "random", options={"seed": 3}).support, expected)
    for name in ("bound", "name", "options"):
        with pytest.raises(BackendError, match=f"'random' has no option {name}; it has seed"):
            solve(PROBLEM, "random", options={name: 1})
    with pytest.raises(TypeError, match=r"multiple values .*'seed'"):
        solve(PROBLEM, "random", options={"seed": 3}, seed=3)
    with pytest.raises(BackendError, match="this backend object has its own"):
        solve(PROBLEM, LocalSearch(), options={"max_swaps": 3})


# ---- what backends answer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Answers what it is given, or raises it."""

    answer: object
    kind: ClassVar = BackendKind.HEURISTIC
    summary: ClassVar = "whatever"
    capabilities: ClassVar = Capabilities()

    def select(self, problem):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def test_what_a_backend_answers_is_checked_before_it_is_a_solution():
    """`solve` refuses it in the backend's name; nothing ends in a raw error."""
    good = torch.tensor([0, 1, 2, 3])
    for answer in [
        None,
        Selection([0, 1, 2, 9], Status.FEASIBLE),
        Selection(torch.tensor([0, 1, 1, 2]), Status.FEASIBLE),
        Selection(good, "OPTIMAL"),
        Selection(good, Status.OPTIMAL, lower_bound=math.nan),
    ]:
        with pytest.raises(
            BackendError, match="backend 'Answers' did not return a valid selection"
        ):
            solve(PROBLEM, Answers(answer))
    taken = solve(PROBLEM, Answers(Selection([2, 0, 1, 3], Status.FEASIBLE, history=[1])))
    assert taken.support.tolist() == [0, 1, 2, 3]
    taken.verify()


def test_what_a_backend_raises():
    """By accident, it is named; on purpose, or as an interrupt, it passes."""
    error = ValueError("no luck")
    with pytest.raises(BackendError, match="'Answers' failed with ValueError: no luck") as caught:
        solve(PROBLEM, Answers(error))
    assert caught.value.__cause__ is error
    for error in (BackendError("asked for too much"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            solve(PROBLEM, Answers(error))
        assert caught.value is error
