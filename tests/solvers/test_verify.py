"""`Solution.verify` believes nothing: each planted fault is found and named."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch

from solvers import (
    Consumer,
    Solution,
    Status,
    SubsetProblem,
    VerificationError,
    quadratic_loss,
    refit,
    solve,
    verification,
)
from tests.solvers.instances import INSTANCES

NAMES = ["target", "ragged_consumers"]
instances = pytest.mark.parametrize("instance", [INSTANCES[n] for n in NAMES], ids=NAMES)


def exact(instance) -> Solution:
    return solve(instance.problem, "enumerate")


def on(instance, support, **claims) -> Solution:
    """An honest refit on `support`, with claims that may not be."""
    support = torch.tensor(support)
    weights, loss = refit(instance.problem, support)
    claims = {"status": Status.FEASIBLE, **claims}
    return Solution(instance.problem, "planted", support, weights, loss, **claims)


def worst(instance) -> list[int]:
    """A support that one exchange improves: the optimum with its best unit exchanged."""
    best = exact(instance)
    supports = [
        sorted({*best.support.tolist()} - {out} | {into})
        for out in best.support.tolist()
        for into in best.removed.tolist()
    ]
    return max(supports, key=instance.loss)


@instances
def test_accepts_an_honest_solution(instance):
    report = exact(instance).verify()
    assert report.loss == pytest.approx(instance.optimum(), rel=1e-8)
    assert report.loss_error < 1e-12
    assert report.stationarity < 1e-9
    assert report.swap_gain <= 1e-12
    assert math.isnan(on(instance, worst(instance)).verify().swap_gain)


@instances
@pytest.mark.parametrize("factor", [0.99, 1.01, math.nan])
def test_wrong_loss(instance, factor):
    solution = exact(instance)
    with pytest.raises(VerificationError, match=r"when recomputed, claimed|loss is nan; it must"):
        replace(solution, loss=solution.loss * factor, lower_bound=-math.inf).verify()


@instances
def test_weights_that_are_not_the_refit(instance):
    """Dense weights on the kept rows have a loss of their own, and it is not the refit's."""
    solution = on(instance, worst(instance))
    weights = tuple(W * 1.001 for W in solution.weights)
    loss = quadratic_loss(instance.problem, weights)
    with pytest.raises(VerificationError, match="not the refit on the support"):
        replace(solution, weights=weights, loss=loss).verify()


@instances
def test_weights_outside_of_the_support(instance):
    solution = exact(instance)
    other = on(instance, worst(instance))
    with pytest.raises(VerificationError, match="not zero on the rows of removed units"):
        replace(solution, weights=other.weights, loss=other.loss).verify()


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ([0, 1, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 3, 4], "support has 5 distinct units, keep is 4"),
        ([0, 1, 2, 9], "outside 0 .. 8"),
        ([-1, 0, 1, 2], "outside 0 .. 8"),
    ],
)
def test_infeasible_support(support, message):
    solution = exact(INSTANCES["scalar"])
    with pytest.raises(VerificationError, match=message):
        replace(solution, support=torch.tensor(support)).verify()


def faint():
    """Losses of 1e-10 of the scale on units 0 and 2, and of 1e-9 on units 0 and 1."""
    G = torch.tensor([1.0, 1e-10, 1e-9], dtype=torch.float64).sqrt()[:, None]
    rows = torch.arange(3)[:, None]
    consumer = Consumer(torch.eye(3).double(), G, 1 + 1.1e-9, torch.zeros_like(G), rows)
    return SubsetProblem((consumer,), keep=2)


def test_losses_far_below_the_scale_are_told_apart():
    """The optimum is a tenth of what is claimed, and both are less than 1e-8 of the scale."""
    problem = faint()
    best = solve(problem, "enumerate")
    best.verify()
    assert best.support.tolist() == [0, 2]
    support = torch.tensor([0, 1])
    weights, loss = refit(problem, support)
    assert best.loss == pytest.approx(1e-10, rel=1e-4)
    assert loss == pytest.approx(1e-9, rel=1e-4)
    planted = Solution(problem, "planted", support, weights, loss, Status.OPTIMAL, loss)
    with pytest.raises(VerificationError, match=r"bound .* is refuted by an exchange"):
        planted.verify()
    with pytest.raises(VerificationError, match="not a swap optimum"):
        replace(planted, status=Status.SWAP_OPTIMAL, lower_bound=-math.inf).verify()
    for claim in (0.9 * best.loss, 1.1 * best.loss):
        with pytest.raises(VerificationError, match="when recomputed, claimed"):
            replace(best, loss=claim, lower_bound=0.0, status=Status.FEASIBLE).verify()
    with pytest.raises(VerificationError, match="lies above the loss"):
        replace(best, lower_bound=1.1 * best.loss).verify()
    with pytest.raises(VerificationError, match="optimality is claimed with a gap"):
        replace(best, lower_bound=0.9 * best.loss, status=Status.OPTIMAL).verify()


def test_what_cannot_be_recomputed_is_not_verified(monkeypatch):
    solution = exact(INSTANCES["scalar"])

    def fails(*_):
        torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setattr(verification, "_check_exchanges", fails)
    with pytest.raises(VerificationError, match="cannot be recomputed, H is too close to singular"):
        solution.verify()


def test_a_certificate_needs_no_exchanges(monkeypatch):
    """Where the formula of exchanges breaks down near a singular H, honest proofs still hold."""

    def fails(*_):
        torch.linalg.cholesky(-torch.eye(2))

    monkeypatch.setattr(verification, "best_swap", fails)
    solution = exact(INSTANCES["scalar"])
    report = solution.verify()
    assert math.isnan(report.swap_gain)
    assert report.not_recomputed == ()
    for changes in ({"certificate": None}, {"status": Status.SWAP_OPTIMAL}):
        with pytest.raises(VerificationError, match="cannot be recomputed"):
            replace(solution, **changes).verify()


def test_an_ill_posed_problem_is_not_verified():
    solution = exact(INSTANCES["scalar"])
    consumer = solution.problem.consumers[0]
    low = SubsetProblem((replace(consumer, e=consumer.e / 2),), solution.problem.keep)
    with pytest.raises(VerificationError, match="the problem is ill posed: consumer 0: e is"):
        replace(solution, problem=low).verify()


@instances
def test_bound_above_the_loss(instance):
    solution = exact(instance)
    bound = solution.loss + 1e-5 * instance.problem.scale
    with pytest.raises(VerificationError, match="lies above the loss"):
        replace(solution, lower_bound=bound).verify()


@instances
def test_false_swap_optimum(instance):
    with pytest.raises(VerificationError, match="not a swap optimum"):
        on(instance, worst(instance), status=Status.SWAP_OPTIMAL).verify()


@instances
def test_optimality_that_the_bound_does_not_prove(instance):
    solution = exact(instance)
    with pytest.raises(VerificationError, match="optimality is claimed with a gap"):
        replace(solution, lower_bound=0.9 * solution.loss).verify()


@instances
def test_optimality_that_an_exchange_refutes(instance):
    """The false bound agrees with the false optimum; only the exchange gives both away."""
    false = on(instance, worst(instance))
    with pytest.raises(VerificationError, match=r"bound .* is refuted by an exchange"):
        replace(false, status=Status.OPTIMAL, lower_bound=false.loss).verify()


def test_gap():
    solution = on(INSTANCES["scalar"], [0, 1, 2, 3])
    assert math.isnan(solution.gap)
    assert replace(solution, lower_bound=solution.loss).gap == 0
    assert replace(solution, lower_bound=solution.loss / 4).gap == pytest.approx(0.75)
    assert replace(solution, lower_bound=-1.0).gap == 1
    assert replace(solution, lower_bound=0.0, loss=0.0).gap == 0


def test_the_record_is_what_json_can_hold():
    problem = INSTANCES["target"].problem
    for backend in ("greedy", "enumerate", "perspective"):
        solution = solve(problem, backend)
        for checked in (None, solution.verify()):
            record = solution.record(checked)
            fields = dataclasses.asdict(record)
            assert json.loads(json.dumps(fields, allow_nan=False))["backend"] == backend
            assert record.support == tuple(solution.support.tolist())
            assert record.status == solution.status.name
            assert record.relative_loss == pytest.approx(record.loss / problem.scale)
            assert (record.gap is None) == (record.lower_bound is None) == (backend == "greedy")
            assert (record.recomputed_bound is None) == (checked is None or backend == "greedy")
    assert record.proved_optimal is False
    exact_record = exact(INSTANCES["target"]).record()
    assert exact_record.proved_optimal
    assert exact_record.relative_bound == pytest.approx(exact_record.relative_loss)


def test_the_record_of_a_word_has_no_recomputed_bound():
    solution = replace(exact(INSTANCES["target"]), certificate=None)
    record = solution.record(solution.verify())
    assert record.recomputed_bound is None
    assert record.lower_bound is not None
    silent = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)
    assert solve(silent, "greedy").record().relative_loss == 0.0
