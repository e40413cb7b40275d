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


def exact(instance) -> Solution:
    return solve(instance.problem, "enumerate")


def on(instance, support, **claims) -> Solution:
    """An honest refit on `support`, with claims that may not be."""
    support = torch.tensor(support)
    weights, loss = refit(instance.problem, support)
    claims = {"status": Status.FEASIBLE, **claims}
    return Solution(
        problem=instance.problem,
        backend="planted",
        support=support,
        weights=weights,
        loss=loss,
        **claims,
    )


def worst(instance) -> list[int]:
    """A support that one exchange improves: the optimum with its best unit exchanged."""
    best = exact(instance)
    supports = [
        sorted({*best.support.tolist()} - {out} | {into})
        for out in best.support.tolist()
        for into in best.removed.tolist()
    ]
    return max(supports, key=instance.loss)


def refused(solution, message, **changes) -> None:
    with pytest.raises(VerificationError, match=message):
        replace(solution, **changes).verify()


@pytest.mark.parametrize("instance", [INSTANCES[n] for n in NAMES], ids=NAMES)
def test_planted_faults(instance):
    """An honest solution is accepted, and each fault that is planted in one is named."""
    solution, scale = exact(instance), instance.problem.scale
    report = solution.verify()
    assert report.loss == pytest.approx(instance.optimum(), rel=1e-8)
    assert report.loss_error < 1e-12
    assert report.stationarity < 1e-9
    assert report.swap_gain <= 1e-12
    other = on(instance, worst(instance))
    assert math.isnan(other.verify().swap_gain)
    for factor in (0.99, 1.01):
        wrong = {"loss": solution.loss * factor, "lower_bound": -math.inf}
        refused(solution, "when recomputed, claimed", **wrong)
    # Dense weights on the kept rows have a loss of their own, and it is not the refit's.
    weights = tuple(W * 1.001 for W in other.weights)
    loss = quadratic_loss(instance.problem, weights)
    refused(other, "not the refit on the support", weights=weights, loss=loss)
    moved = {"weights": other.weights, "loss": other.loss}
    refused(solution, "not zero on the rows of removed units", **moved)
    refused(solution, "lies above the loss", lower_bound=solution.loss + 1e-5 * scale)
    refused(other, "not a swap optimum", status=Status.SWAP_OPTIMAL)
    refused(solution, "optimality is claimed with a gap", lower_bound=0.9 * solution.loss)
    # The false bound agrees with the false optimum; only the exchange gives both away.
    false = {"status": Status.OPTIMAL, "lower_bound": other.loss}
    refused(other, r"bound .* is refuted by an exchange", **false)


def test_infeasible_supports():
    for support, message in [
        ([0, 1, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 3, 4], "support has 5 distinct units, keep is 4"),
        ([0, 1, 2, 9], "outside 0 .. 8"),
        ([-1, 0, 1, 2], "outside 0 .. 8"),
    ]:
        refused(exact(INSTANCES["scalar"]), message, support=torch.tensor(support))


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
    planted = Solution(
        problem=problem,
        backend="planted",
        support=support,
        weights=weights,
        loss=loss,
        status=Status.OPTIMAL,
        lower_bound=loss,
    )
    refused(planted, r"bound .* is refuted by an exchange")
    unbounded = {"status": Status.SWAP_OPTIMAL, "lower_bound": -math.inf}
    refused(planted, "not a swap optimum", **unbounded)
    for claim in (0.9 * best.loss, 1.1 * best.loss):
        changes = {"loss": claim, "lower_bound": 0.0, "status": Status.FEASIBLE}
        refused(best, "when recomputed, claimed", **changes)
    refused(best, "lies above the loss", lower_bound=1.1 * best.loss)
    open_gap = {"status": Status.OPTIMAL, "lower_bound": 0.9 * best.loss}
    refused(best, "optimality is claimed with a gap", **open_gap)


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
        refused(solution, "cannot be recomputed, H is too close to singular", **changes)


def test_an_ill_posed_problem_is_not_verified():
    solution = exact(INSTANCES["scalar"])
    consumer = solution.problem.consumers[0]
    low = SubsetProblem((replace(consumer, e=consumer.e / 2),), solution.problem.keep)
    refused(solution, "the problem is ill posed: consumer 0: e is", problem=low)


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
    proved = exact(INSTANCES["target"])
    assert proved.record().proved_optimal
    assert proved.record().relative_bound == pytest.approx(proved.record().relative_loss)
    word = replace(proved, certificate=None)
    record = word.record(word.verify())
    assert record.recomputed_bound is None
    assert record.lower_bound is not None
    silent = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)
    assert solve(silent, "greedy").record().relative_loss == 0.0
