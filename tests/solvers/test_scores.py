"""Backends that score once: the scores, from the data alone."""

import numpy as np
import pytest
import torch

from solvers import Consumer, SubsetProblem, solve
from tests.solvers.instances import INSTANCES, random_data


def shifted(seed, p, m, spread=3.0):
    """Data whose inputs have means that differ."""
    data = random_data(seed, p, m)
    means = np.random.default_rng(seed + 1000).normal(size=p) * spread
    return data.X + means, data.W0


def consumer(X, W0, units=None, *, known=True):
    H = torch.from_numpy(X.T @ X / len(X))
    variance = torch.from_numpy(X.var(0)) if known else None
    return Consumer.from_gram(H, torch.from_numpy(W0), units=units, damp=0.01, variance=variance)


UNITS = ([[3], [0, 4], [6, 5], [1], [2]], [[0], [5, 1], [2], [3], [4]])


@pytest.mark.parametrize("seed", range(4))
def test_flap_adds_up_the_variances_that_the_weights_see(seed):
    data = [shifted(seed, 7, 3), shifted(seed + 100, 6, 4)]
    scores = np.zeros(5)
    for (X, W0), units in zip(data, UNITS, strict=True):
        rows = X.var(0) * np.square(W0).sum(1)
        scores += [rows[own].sum() for own in units]
    consumers = tuple(consumer(*d, u) for d, u in zip(data, UNITS, strict=True))
    found = solve(SubsetProblem(consumers, 3), "flap")
    assert found.support.tolist() == sorted(np.argsort(-scores)[:3].tolist())
    found.verify()


def test_an_input_that_never_changes_is_the_first_to_go():
    X, W0 = shifted(0, 6, 3)
    X[:, 2] = 100.0
    problem = SubsetProblem((consumer(X, W0),), 5)
    assert 2 in solve(problem, "wanda").support
    assert solve(problem, "flap").removed.tolist() == [2]


def test_where_inputs_are_centred_flap_is_wanda():
    for name in ("scalar", "correlated", "ragged_consumers"):
        problem = INSTANCES[name].problem
        assert torch.equal(solve(problem, "flap").support, solve(problem, "wanda").support)
    X, W0 = shifted(3, 9, 2)
    X = X - X.mean(0)
    known, unknown = (SubsetProblem((consumer(X, W0, known=k),), 4) for k in (True, False))
    assert torch.equal(solve(known, "flap").support, solve(unknown, "flap").support)
