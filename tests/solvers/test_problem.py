"""What a problem refuses, and what damping means."""

from __future__ import annotations

import math
import warnings
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from solvers import Consumer, ProblemError, SubsetProblem, quadratic_loss, solve
from tests.solvers.instances import INSTANCES, random_data


def gram(p=4, m=2, samples=30, seed=0):
    data = random_data(seed, p, m, samples=samples)
    return torch.from_numpy(data.X.T @ data.X / samples), torch.from_numpy(data.W0)


def fields(p=4, m=2):
    H, W0 = gram(p, m)
    rows = torch.arange(p)[:, None]
    return {"H": H, "G": H @ W0, "e": float((W0 * (H @ W0)).sum()), "W0": W0, "rows": rows}


def poked(tensor, value, index=(0, 1)):
    copy = tensor.clone()
    copy[index] = value
    return copy


BAD_FIELDS = {
    "H not a matrix": ({"H": torch.ones(4).double()}, r"H must be a float64 matrix"),
    "G in float32": ({"G": torch.ones(4, 2)}, r"G must be a float64 matrix, not torch.float32"),
    "H not square": ({"H": torch.ones(4, 3).double()}, r"H must be square .* not \(4, 3\)"),
    "H empty": ({"H": torch.ones(0, 0).double()}, r"H must be square and not empty"),
    "W0 too short": ({"W0": torch.ones(3, 2).double()}, r"G and W0 must both be \(4, m\)"),
    "G too narrow": ({"G": torch.ones(4, 1).double()}, r"G and W0 must both be \(4, m\)"),
    "rows flat": ({"rows": torch.arange(4)}, r"rows must be an int64 matrix \(units, width\)"),
    "rows float": ({"rows": torch.ones(4, 1)}, r"rows must be an int64 matrix"),
    "G has NaN": ({"G": torch.full((4, 2), torch.nan).double()}, r"G has NaN or infinite"),
    "W0 has inf": ({"W0": torch.full((4, 2), torch.inf).double()}, r"W0 has NaN or infinite"),
    "e is NaN": ({"e": math.nan}, r"e is nan"),
    "e is negative": ({"e": -1.0}, r"e is -1.0; a mean squared norm"),
    "overlap": ({"rows": torch.tensor([[0], [1], [1], [3]])}, r"own 4 rows, 3 of them distinct"),
    "uncovered": ({"rows": torch.tensor([[0, 1], [2, -1]])}, r"own 3 rows, 3 of them distinct"),
    "outside": ({"rows": torch.tensor([[0], [1], [2], [4]])}, r"must own each of the 4 rows"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_consumer_refuses(changed, message):
    with pytest.raises(ProblemError, match=message):
        Consumer(**{**fields(), **changed})


@pytest.mark.parametrize(
    ("value", "index", "message"),
    [
        (math.nan, (0, 1), "H has NaN or infinite"),
        (0.5, (0, 1), "H is not symmetric: entries differ by up to"),
        (0.0, (2, 2), r"H has 0 on its diagonal \(row 2\)"),
        (-3.0, (1, 1), r"H has -3 on its diagonal \(row 1\)"),
    ],
)
def test_consumer_refuses_hessian(value, index, message):
    good = fields()
    with pytest.raises(ProblemError, match=message):
        Consumer(**{**good, "H": poked(good["H"], value, index)})


def indefinite():
    """Symmetric, with a positive diagonal and a negative eigenvalue."""
    return torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)


def test_an_indefinite_hessian_is_refused(tmp_path):
    W0 = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ProblemError, match="H is not positive semidefinite"):
        Consumer.from_gram(indefinite(), W0)
    rows = torch.arange(2)[:, None]
    consumer = Consumer(indefinite(), indefinite() @ W0, 6.0, W0, rows)
    problem = SubsetProblem((consumer,), keep=2)
    with pytest.raises(ProblemError, match="H of consumer 0 is not positive definite"):
        solve(problem, "greedy")
    problem.save(tmp_path / "bad.npz")
    with pytest.raises(ProblemError, match="H of consumer 0 is not positive definite"):
        SubsetProblem.load(tmp_path / "bad.npz")


BAD_GRAMS = {
    "H flat": ({"H": torch.ones(4)}, r"H must be \(p, p\) and W0 \(p, m\)"),
    "W0 short": ({"W0": torch.ones(3, 2)}, r"H must be \(p, p\) and W0 \(p, m\)"),
    "no output": ({"W0": torch.ones(4, 0)}, r"H must be \(p, p\) and W0 \(p, m\)"),
    "W0 has NaN": ({"W0": torch.full((4, 2), torch.nan)}, r"W0 has NaN or infinite"),
    "damp negative": ({"damp": -0.1}, r"damp is -0.1"),
    "damp infinite": ({"damp": math.inf}, r"damp is inf"),
    "G alone": ({"G": torch.ones(4, 2)}, r"give both, or neither"),
    "e alone": ({"e": 1.0}, r"give both, or neither"),
    "G has NaN": ({"G": torch.full((4, 2), torch.nan), "e": 1.0}, r"G has NaN or infinite"),
    "units indivisible": ({"units": 3}, r"4 rows cannot be shared equally by 3 units"),
    "no units": ({"units": 0}, r"4 rows cannot be shared equally by 0 units"),
    "units empty": ({"units": []}, r"units is empty"),
    "units overlap": ({"units": [[0, 1], [1, 2, 3]]}, r"must own each of the 4 rows"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_GRAMS.values(), ids=BAD_GRAMS.keys())
def test_from_gram_refuses(changed, message):
    H, W0 = gram()
    with pytest.raises(ProblemError, match=message):
        Consumer.from_gram(**{"H": H, "W0": W0, **changed})


@pytest.mark.parametrize(
    ("value", "message"), [(math.inf, "H has NaN or infinite"), (-1.0, "H has -1 on its diagonal")]
)
def test_from_gram_refuses_hessian(value, message):
    H, W0 = gram()
    with pytest.raises(ProblemError, match=message):
        Consumer.from_gram(poked(H, value, (1, 1)), W0)


@pytest.mark.parametrize("keep", [0, -1, 5, 2.0, None])
def test_keep_out_of_range(keep):
    H, W0 = gram()
    with pytest.raises(
        ProblemError, match=r"keep is .*; it must be a whole number from 1 to the 4"
    ):
        SubsetProblem.from_gram(H, W0, keep=keep)


def test_consumers_must_agree():
    H, W0 = gram()
    consumer = Consumer.from_gram(H, W0)
    with pytest.raises(ProblemError, match="at least one consumer"):
        SubsetProblem((), 1)
    with pytest.raises(ProblemError, match=r"disagree on the number of units: \[4, 2\]"):
        SubsetProblem((consumer, Consumer.from_gram(H, W0, units=2)), 1)


def test_a_problem_is_frozen_and_shares_its_tensors():
    problem = INSTANCES["ragged"].problem
    with pytest.raises(FrozenInstanceError):
        problem.keep = 2
    other = problem.with_keep(2)
    assert (problem.keep, other.keep) == (3, 2)
    assert other.consumers[0].H is problem.consumers[0].H
    with pytest.raises(ProblemError, match="keep is 7"):
        problem.with_keep(7)


def test_damping_is_a_proximal_term_towards_the_dense_weights():
    """The quadratic loss equals ``|Y - XW|^2/N + lambda |W - W0|^2`` for any W."""
    data = random_data(3, 5, 3, noise=0.7)
    X, Y, W0 = data.X, data.Y, data.W0
    N = len(X)
    H, G, e = X.T @ X / N, X.T @ Y / N, np.square(Y).sum() / N
    problem = SubsetProblem.from_gram(
        torch.from_numpy(H), torch.from_numpy(W0), keep=2, G=torch.from_numpy(G), e=e, damp=0.3
    )
    damping = 0.3 * np.diag(H).mean()
    assert problem.consumers[0].damping == pytest.approx(damping)
    W = np.random.default_rng(0).normal(size=W0.shape)
    explicit = np.square(Y - X @ W).sum() / N + damping * np.square(W - W0).sum()
    assert quadratic_loss(problem, [torch.from_numpy(W)]) == pytest.approx(explicit, rel=1e-12)
    assert problem.scale == pytest.approx(e + damping * np.square(W0).sum())


def test_by_default_the_target_is_the_dense_output_and_keeping_all_loses_nothing():
    H, W0 = gram()
    solution = solve(SubsetProblem.from_gram(H, W0, keep=4), "greedy")
    assert solution.loss == pytest.approx(0, abs=1e-12 * solution.problem.scale)
    assert torch.allclose(solution.weights[0], W0)


def test_a_small_asymmetry_is_averaged_away():
    H, W0 = gram()
    skewed = poked(H, float(H[0, 1]) + 1e-3)
    problem = SubsetProblem.from_gram(skewed, W0, keep=2, damp=0)
    assert torch.equal(problem.consumers[0].H, (skewed + skewed.T) / 2)
    assert skewed[0, 1] != skewed[1, 0]


def test_dead_inputs_are_named_and_free_to_remove():
    instance = INSTANCES["dead"]
    assert instance.problem.dead.tolist() == [1, 6]
    assert INSTANCES["scalar"].problem.dead.tolist() == []
    solution = solve(instance.problem.with_keep(7), "local_search")
    assert not set(solution.support.tolist()) & {1, 6}
    assert solution.loss == pytest.approx(0, abs=1e-10 * instance.problem.scale)


def test_an_input_without_correlation_to_the_target_is_not_dead():
    """It can still explain away noise in the inputs that matter."""
    H = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    G = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    problem = SubsetProblem.from_gram(H, torch.zeros(2, 1).double(), keep=1, G=G, e=1.0, damp=0.0)
    assert problem.dead.tolist() == []


def test_a_layer_that_was_never_active_is_all_dead():
    problem = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)
    assert problem.dead.tolist() == [0, 1, 2]
    solution = solve(problem, "local_search")
    assert solution.loss == 0
    assert solution.relative_loss == 0
    solution.verify()


def test_a_singular_gram_matrix_warns_and_goes_on():
    data = random_data(4, 6, 2, samples=3)
    H, W0 = torch.from_numpy(data.X.T @ data.X / 3), torch.from_numpy(data.W0)
    with pytest.warns(UserWarning, match=r"H is singular with damp=0; going on with damp=1e-"):
        problem = SubsetProblem.from_gram(H, W0, keep=3, damp=0)
    assert problem.consumers[0].damping > 0
    solve(problem, "local_search").verify()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SubsetProblem.from_gram(H, W0, keep=3)


def test_input_tensors_are_not_changed():
    H, W0 = gram()
    copies = H.clone(), W0.clone()
    SubsetProblem.from_gram(H, W0, keep=2, damp=0.5)
    assert torch.equal(H, copies[0])
    assert torch.equal(W0, copies[1])


def test_properties():
    problem = INSTANCES["ragged_consumers"].problem
    assert (problem.units, problem.width, problem.keep) == (6, 4, 4)
    assert problem.scale == pytest.approx(sum(c.e for c in problem.consumers))
    assert problem.device == torch.device("cpu")
    moved = problem.to("cpu")
    assert torch.equal(moved.consumers[1].rows, problem.consumers[1].rows)
    consumer = replace(problem.consumers[0])
    support = torch.tensor([1, 4])
    rows = sorted(r for unit in consumer.rows[support].tolist() for r in unit if r >= 0)
    assert consumer.support_rows(support).tolist() == rows
