"""A problem posed with half of H is the same problem."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from solvers import Consumer, ProblemError, SubsetProblem, backend_class, backend_names, solve
from solvers.linalg import symmetric
from solvers.linalg.symmetric import Symmetric
from tests.solvers.instances import random_data, shuffled_units

WIDTHS = [2, 1, 3, 2, 1, 2]
P = sum(WIDTHS)


def given(seed=0, dead=()):
    data = random_data(seed, P, 4)
    H, W0 = torch.from_numpy(data.X.T @ data.X / len(data.X)), torch.from_numpy(data.W0)
    H[list(dead)] = 0
    H[:, list(dead)] = 0
    return H, W0


def both(keep=3, **data):
    H, W0 = given(**data)
    units = shuffled_units(1, WIDTHS)
    return tuple(
        SubsetProblem.from_gram(held, W0, keep=keep, units=units, name="both")
        for held in (H, Symmetric.of(H))
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("panel", [4, 1])
def test_every_backend_chooses_the_same(panel, monkeypatch):
    """Whatever the panels that H is held in."""
    available = [name for name in backend_names() if backend_class(name).available() is None]
    expected = {name: solve(both()[0], name) for name in available}
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel)
    dense, held = both()
    for name, solution in expected.items():
        for problem in (dense, held):
            found = solve(problem, name)
            assert torch.equal(found.support, solution.support)
            assert found.loss == pytest.approx(solution.loss, rel=1e-9)
        found.verify()


@pytest.mark.parametrize("panel", [1, 4, 256])
def test_a_consumer_of_either_is_the_same(panel, tmp_path, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel)
    dense, held = (problem.consumers[0] for problem in both(dead=[5]))
    assert torch.equal(held.H, dense.H)
    assert held.damping == dense.damping
    assert torch.equal(held.G, dense.G)
    assert held.violation is None
    for same in (held.divided(1.0), *copies(held)):
        assert torch.equal(same.H, dense.H)
    assert held.to("cpu") is held
    problem = SubsetProblem((held,), 3, "half")
    assert problem.dead.tolist() == both(dead=[5])[0].dead.tolist()
    problem.save(tmp_path / "half.safetensors")
    assert torch.equal(SubsetProblem.load(tmp_path / "half.safetensors").consumers[0].H, dense.H)


def copies(consumer):
    return copy.deepcopy(consumer), pickle.loads(pickle.dumps(consumer))


def test_half_of_a_matrix_is_written_to_only_where_it_may_be():
    H, W0 = given()
    held = Symmetric.of(H)
    kept = Consumer.from_gram(held, W0.clone())
    assert torch.equal(held.dense(), H)
    taken = Consumer.from_gram(held, W0.clone(), overwrite=True)
    assert taken.hessian is held
    assert torch.equal(taken.H, kept.H)
    for spoil, message in [
        (lambda held: held.panels[-1].fill_(torch.nan), "H has NaN"),
        (lambda held: held.panels[0].diagonal().fill_(-1.0), "H has -1 on its diagonal"),
    ]:
        spoiled = Symmetric.of(H)
        spoil(spoiled)
        with pytest.raises(ProblemError, match=message):
            Consumer.from_gram(spoiled, W0)
