"""What every backend that chooses experts promises, and that its claims are checked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import ClassVar

import pytest
import torch

from solvers import (
    EXPERT_BACKENDS,
    BackendError,
    BackendKind,
    Selection,
    Status,
    VerificationError,
    backend_class,
    backend_names,
    solve_experts,
)
from solvers.experts import backends
from solvers.protocol import Capabilities
from tests.solvers.experts.cases import CASES, EXPERTS, RULES, mixture_of, problem_of

NAMES = backend_names(EXPERT_BACKENDS)
FEW = ("softmax", "normalized sigmoid with bias", "groups")
FEW_SETS = {
    name: dataclasses.replace(mixture, keep=9 if mixture.rule.groups > 1 else 10)
    for name, mixture in CASES.items()
}
"""Mixtures of which all sets are tried: 64 or 66."""
NORMALIZED = CASES["normalized"].problem


@cache
def optimum(mixture):
    """The least loss of any set that the router allows, by the problem's own loss."""
    problem = mixture.problem
    size, stay = problem.size, problem.keep // problem.rule.groups
    groups = [range(g * size, (g + 1) * size) for g in range(problem.rule.groups)]
    sets = product(*(combinations(group, stay) for group in groups))
    return min(problem.loss([j for part in parts for j in part]) for parts in sets)


def _case(backend, name):
    marks = [pytest.mark.slow] if backend == "enumerate" and name not in FEW else []
    return pytest.param(backend, name, marks=marks)


@pytest.mark.parametrize(("backend", "name"), [_case(b, n) for b in NAMES for n in CASES])
def test_keeps_its_promises(backend, name):
    exact = backend_class(backend, EXPERT_BACKENDS).kind is BackendKind.EXACT
    mixture = FEW_SETS[name] if exact else CASES[name]
    problem = mixture.problem
    found = solve_experts(problem, backend)
    support, removed = found.support.tolist(), found.removed.tolist()
    assert support == sorted(set(support))
    assert len(support) == problem.keep
    assert sorted(support + removed) == list(range(EXPERTS))
    assert found.loss == pytest.approx(mixture.loss(support), rel=1e-10)
    assert found.verify().loss == pytest.approx(found.loss)
    assert found.record().proved_optimal == exact
    if exact:
        assert found.status is Status.OPTIMAL
        assert found.loss == pytest.approx(optimum(mixture), rel=1e-10)
        assert found.lower_bound <= found.loss
        return
    if backend == "local_search":
        assert found.status is Status.SWAP_OPTIMAL
        assert found.loss <= solve_experts(problem, "greedy").loss * (1 + 1e-12)
        assert list(found.history) == sorted(set(found.history), reverse=True)
    else:
        assert found.status is Status.FEASIBLE
    again = solve_experts(problem, backend)
    assert torch.equal(found.support, again.support)
    assert found.loss == again.loss


def test_searches_beat_scores_on_average():
    assert NAMES == ("enumerate", "frequency", "greedy", "local_search", "random", "reap")
    sums = dict.fromkeys(NAMES[1:], 0.0)
    for seed in range(4):
        problem = problem_of(mixture_of(RULES["normalized"], tokens=60, seed=seed))
        for name in sums:
            sums[name] += solve_experts(problem, name).relative_loss
    assert sums["local_search"] <= sums["greedy"] < sums["reap"] < sums["random"]


def test_reap_and_frequency_are_what_is_published():
    mixture = CASES["normalized sigmoid"]
    experts, weights = mixture.rule.route(mixture.logits)
    saliency, counts = [0.0] * EXPERTS, [0] * EXPERTS
    for t, (chosen, w) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        for j, weight in zip(chosen, w, strict=True):
            saliency[j] += weight * float(mixture.outputs[t, j].norm())
            counts[j] += 1
    means = [s / max(c, 1) for s, c in zip(saliency, counts, strict=True)]
    for backend, scores in (("reap", means), ("frequency", counts)):
        best = sorted(range(EXPERTS), key=lambda j, scores=scores: -scores[j])[:7]
        assert solve_experts(mixture.problem, backend).support.tolist() == sorted(best)


@pytest.mark.parametrize("backend", ["frequency", "reap", "greedy", "local_search", "enumerate"])
def test_experts_that_no_token_reaches_go_first(backend):
    mixture = mixture_of(RULES["normalized"], keep=10)
    mixture.logits[:, [2, 9]] -= 20
    problem = problem_of(mixture)
    assert torch.nonzero(problem.load == 0).flatten().tolist() == [2, 9]
    assert solve_experts(problem, backend).removed.tolist() == [2, 9]


def test_nothing_to_lose_and_nothing_to_reproduce():
    mixture = mixture_of(RULES["softmax"], keep=EXPERTS)
    experts, weights = mixture.rule.route(mixture.logits)
    rows = torch.arange(len(experts))[:, None]
    exact = (weights[:, :, None] * mixture.outputs[rows, experts]).sum(1)
    found = solve_experts(problem_of(dataclasses.replace(mixture, target=exact)))
    assert found.relative_loss < 1e-14
    assert found.status is Status.SWAP_OPTIMAL
    found.verify()
    mixture = mixture_of(RULES["normalized"], keep=10)
    nothing = torch.zeros_like(mixture.outputs)
    problem = problem_of(dataclasses.replace(mixture, outputs=nothing, target=nothing[:, 0]))
    found = solve_experts(problem, "enumerate")
    assert found.loss == found.relative_loss == found.verify().loss == 0
    assert found.record().recomputed_bound is None
    assert found.record(found.verify()).recomputed_bound == found.lower_bound


# ---- claims, and backends of one's own -----------------------------------------------------------


def test_claims_that_are_false_or_not_well_formed_are_refused():
    found, worse = solve_experts(NORMALIZED), solve_experts(NORMALIZED, "random")
    few = FEW_SETS["normalized"].problem
    best, worst = solve_experts(few, "enumerate"), solve_experts(few, "random")
    for claim, changes, message in [
        (found, {"loss": found.loss * 1.001}, "recomputed"),
        (found, {"loss": math.nan}, "claimed nan"),
        (found, {"support": found.support[:-1]}, "distinct units"),
        (found, {"support": found.support.clone().fill_(1)}, "distinct units"),
        (found, {"support": found.support.double()}, "int64"),
        (found, {"lower_bound": found.loss * 1.01}, "lies above"),
        (found, {"lower_bound": math.nan}, "lower_bound is nan"),
        (found, {"status": "OPTIMAL"}, "status is"),
        (found, {"status": Status.BOUNDED}, "."),
        (worse, {"status": Status.SWAP_OPTIMAL}, "not a swap optimum"),
        (worst, {"status": Status.OPTIMAL}, "is possible"),
    ]:
        with pytest.raises(VerificationError, match=message):
            dataclasses.replace(claim, **changes).verify()
    assert best.verify().not_recomputed == ()
    word = dataclasses.replace(worst, lower_bound=best.loss / 2)
    assert word.verify().not_recomputed == ("lower_bound",)


def test_too_many_sets_are_neither_enumerated_nor_believed(monkeypatch):
    monkeypatch.setattr("solvers.experts.backends.MOST_SETS", 100)
    with pytest.raises(BackendError, match="792 sets of 7 experts"):
        solve_experts(CASES["softmax"].problem, "enumerate")
    found = solve_experts(NORMALIZED, "greedy")
    monkeypatch.setattr(backends, "MOST_SETS", 1)
    with pytest.raises(VerificationError, match="cannot be recomputed"):
        dataclasses.replace(found, status=Status.OPTIMAL).verify()


@dataclass(frozen=True)
class First:
    """A backend of somebody's own, which may divide by zero."""

    kind: ClassVar = BackendKind.HEURISTIC
    summary: ClassVar = "the first experts"
    capabilities: ClassVar = Capabilities()
    more: int = 0
    divisor: int = 1

    def select(self, problem):
        return Selection(torch.arange(problem.keep // self.divisor + self.more), Status.FEASIBLE)


def test_backends_of_ones_own_are_taken_and_believed_nothing():
    problem = CASES["sigmoid"].problem
    found = solve_experts(problem, First())
    assert found.backend == "First"
    assert found.support.tolist() == list(range(7))
    for backend, options, message in [
        (First(more=1), {}, "not return a valid selection"),
        (First(divisor=0), {}, "'First' failed with ZeroDivisionError"),
        (First(), {"seed": 1}, "its own"),
        ("reap", {"colour": 1}, "no option colour"),
    ]:
        with pytest.raises(BackendError, match=message):
            solve_experts(problem, backend, **options)
