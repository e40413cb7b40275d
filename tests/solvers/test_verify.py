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

SCALAR = INSTANCES["scalar"].problem
SILENT = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)


def on(problem, support, **claims) -> Solution:
    """An honest refit on `support`, with claims that may not be."""
    support = torch.tensor(support)
    weights, loss = refit(problem, support)
    fields = {"problem": problem, "support": support, "weights": weights, "loss": loss}
    return Solution(backend="planted", **fields, **{"status": Status.FEASIBLE, **claims})


def refused(solution, message, **changes) -> None:
    with pytest.raises(VerificationError, match=message):
        replace(solution, **changes).verify()


@pytest.mark.parametrize("name", ["target", "shuffled_consumers"])
def test_planted_faults(name):
    """An honest solution is accepted, and each fault that is planted in one is named."""
    instance = INSTANCES[name]
    problem, scale = instance.problem, instance.problem.scale
    solution = solve(problem, "enumerate")
    report = solution.verify()
    assert report.loss == pytest.approx(instance.optimum, rel=1e-8)
    assert report.loss_error < 1e-12
    assert report.stationarity < 1e-9
    assert report.swap_gain <= 1e-12
    best, gone = solution.support.tolist(), solution.removed.tolist()
    exchanged = [sorted({*best} - {out} | {into}) for out in best for into in gone]
    other = on(problem, max(exchanged, key=instance.loss))
    assert math.isnan(other.verify().swap_gain)
    # Dense weights on the kept rows have a loss of their own, and it is not the refit's.
    weights = tuple(W * 1.001 for W in other.weights)
    loss = quadratic_loss(problem, weights)
    refused(other, "not the refit on the support", weights=weights, loss=loss)
    moved = {"weights": other.weights, "loss": other.loss}
    refused(solution, "not zero on the rows of removed units", **moved)
    refused(solution, "lies above the loss", lower_bound=solution.loss + 1e-5 * scale)
    refused(other, "not a swap optimum", status=Status.SWAP_OPTIMAL)
    # The false bound agrees with the false optimum; only the exchange gives both away.
    false = {"status": Status.OPTIMAL, "lower_bound": other.loss}
    refused(other, r"bound .* is refuted by an exchange", **false)


def test_losses_far_below_the_scale_are_told_apart():
    """The optimum is a tenth of what is claimed, and both are less than 1e-8 of the scale."""
    # Losses of 1e-10 of the scale on units 0 and 2, and of 1e-9 on units 0 and 1.
    G = torch.tensor([1.0, 1e-10, 1e-9], dtype=torch.float64).sqrt()[:, None]
    rows = torch.arange(3)[:, None]
    consumer = Consumer(torch.eye(3).double(), G, 1 + 1.1e-9, torch.zeros_like(G), rows)
    problem = SubsetProblem((consumer,), keep=2)
    best = solve(problem, "enumerate")
    best.verify()
    assert best.support.tolist() == [0, 2]
    planted = on(problem, [0, 1])
    assert best.loss == pytest.approx(1e-10, rel=1e-4)
    assert planted.loss == pytest.approx(1e-9, rel=1e-4)
    false = {"status": Status.OPTIMAL, "lower_bound": planted.loss}
    refused(planted, r"bound .* is refuted by an exchange", **false)
    refused(planted, "not a swap optimum", status=Status.SWAP_OPTIMAL)
    for claim in (0.9 * best.loss, 1.1 * best.loss):
        changes = {"loss": claim, "lower_bound": 0.0, "status": Status.FEASIBLE}
        refused(best, "when recomputed, claimed", **changes)
    refused(best, "lies above the loss", lower_bound=1.1 * best.loss)
    open_gap = {"status": Status.OPTIMAL, "lower_bound": 0.9 * best.loss}
    refused(best, "optimality is claimed with a gap", **open_gap)


def test_a_certificate_needs_no_exchanges(monkeypatch):
    """Where the formula of exchanges breaks down near a singular H, honest proofs still hold."""
    monkeypatch.setattr(verification, "best_swap", lambda *_: torch.linalg.cholesky(-torch.eye(2)))
    solution = solve(SCALAR, "enumerate")
    report = solution.verify()
    assert math.isnan(report.swap_gain)
    assert report.not_recomputed == ()
    for changes in ({"certificate": None}, {"status": Status.SWAP_OPTIMAL}):
        refused(solution, "cannot be recomputed, H is too close to singular", **changes)


# ---- claims without evidence ---------------------------------------------------------------------


def test_a_backends_word_is_named_as_such():
    for backend in ("enumerate", "branch_and_bound", "perspective", "local_search", "greedy"):
        assert solve(SCALAR, backend).verify().not_recomputed == ()
    word = replace(solve(SCALAR, "enumerate"), certificate=None)
    report = word.verify()
    assert math.isnan(report.lower_bound)
    assert report.not_recomputed == ("lower_bound", "status")
    limited = replace(word, status=Status.TIME_LIMIT).verify()
    assert limited.not_recomputed == ("lower_bound",)
    for status in (Status.BOUNDED, Status.OPTIMAL):
        refused(solve(SCALAR, "greedy"), "claimed", status=status)


def test_a_bound_that_needs_no_evidence():
    """Removing units never lowers the loss, so the loss with all of them bounds any other."""
    noisy = INSTANCES["target"].problem
    least = refit(noisy, torch.arange(noisy.units))[1]
    best = replace(solve(noisy, "local_search"), status=Status.BOUNDED)
    report = replace(best, lower_bound=least).verify()
    assert report.lower_bound == pytest.approx(least)
    assert report.not_recomputed == ()
    report = replace(best, lower_bound=least * 1.001).verify()
    assert report.not_recomputed == ("lower_bound", "status")


def test_a_loss_of_zero_with_a_bound_below_it():
    """No division by the loss, and no optimum within a tolerance of nothing."""
    best = replace(solve(SILENT, "local_search"), status=Status.OPTIMAL)
    refused(best, "with a gap of 1 at a loss of 0", lower_bound=-1.0)
    report = replace(best, lower_bound=0.0).verify()
    assert (report.lower_bound, report.not_recomputed) == (0.0, ())


# ---- gaps and records ----------------------------------------------------------------------------


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
            assert record.proved_optimal == (backend == "enumerate")
    word = replace(solve(problem, "enumerate"), certificate=None)
    record = word.record(word.verify())
    assert record.recomputed_bound is None
    assert record.relative_bound == pytest.approx(record.relative_loss)
    assert solve(SILENT, "greedy").record().relative_loss == 0.0


def test_supports_and_weights_that_are_none():
    solution = solve(SCALAR, "enumerate")
    for support, message in [
        ([0, 1, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 2], "support has 3 distinct units, keep is 4"),
        ([0, 1, 2, 9], "outside 0 .. 8"),
        ([-1, 0, 1, 2], "outside 0 .. 8"),
        ([3, 2, 1, 0], "not sorted"),
    ]:
        refused(solution, message, support=torch.tensor(support))
    (W,) = solution.weights
    for weights, message in [
        ((W[:-1],), "wrong shape or device, or are not finite"),
        ((torch.full_like(W, torch.nan),), "wrong shape or device, or are not finite"),
        ((W, W), "weights for 2 of 1 consumers"),
    ]:
        refused(solution, message, weights=weights)


def test_an_ill_posed_problem_is_not_verified():
    (consumer,) = SCALAR.consumers
    low = SubsetProblem((replace(consumer, e=consumer.e / 2),), SCALAR.keep)
    refused(solve(SCALAR, "greedy"), "the problem is ill posed: consumer 0: e is", problem=low)
