"""Problems of which half of H is held are the same problems."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from solvers import (
    Consumer,
    ProblemError,
    SubsetProblem,
    backend_class,
    backends,
    solve,
)
from solvers.errors import VerificationError
from solvers.linalg import symmetric
from solvers.linalg.hessian import (
    coupled,
    entries,
    half,
    product,
    rows_of,
    skew,
    whole,
    why_not_plain,
)
from solvers.linalg.symmetric import Symmetric
from tests.solvers.instances import random_data, shuffled_units

WIDTHS = [2, 1, 3, 2, 1, 2]
P = sum(WIDTHS)


@pytest.fixture(autouse=True, params=[1, 4, 256])
def panels(request, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", request.param)


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


def test_what_is_asked_of_either_is_the_same():
    H, _ = given(dead=[2])
    held, index = Symmetric.of(H), torch.tensor([4, 0, 9])
    B = torch.randn(P, 3).double()
    assert torch.equal(whole(held), H)
    assert torch.equal(half(held).dense(), half(H).dense())
    assert torch.equal(
        half(held, index.sort().values).dense(), half(H, index.sort().values).dense()
    )
    assert torch.equal(entries(held, index, index.flip(0)), entries(H, index, index.flip(0)))
    assert torch.equal(rows_of(held, index), rows_of(H, index))
    torch.testing.assert_close(product(held, B), product(H, B))
    assert coupled(held).tolist() == coupled(H).tolist() == [i != 2 for i in range(P)]
    assert skew(held) == skew(H) == 0


@pytest.mark.parametrize("backend", [info.name for info in backends()])
def test_every_backend_chooses_the_same(backend):
    reason = backend_class(backend).available()
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    dense, held = both(keep=3)
    expected, found = solve(dense, backend), solve(held, backend)
    assert torch.equal(found.support, expected.support)
    assert found.loss == pytest.approx(expected.loss, rel=1e-9)
    found.verify()


def test_a_consumer_holds_half_until_it_is_asked_for_all(tmp_path):
    dense, held = (problem.consumers[0] for problem in both(dead=[5]))
    assert isinstance(held.hessian, Symmetric)
    assert torch.equal(held.H, dense.H)
    assert held.damping == dense.damping
    torch.testing.assert_close(held.G, dense.G)
    assert held.flaw is None
    for same in (held.divided(1.0), copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert isinstance(same.hessian, Symmetric)
        assert torch.equal(same.H, dense.H)
    assert held.to("cpu") is held
    problem = SubsetProblem((held,), 3, "half")
    assert problem.dead.tolist() == both(dead=[5])[0].dead.tolist()
    problem.save(tmp_path / "half.npz")
    assert torch.equal(SubsetProblem.load(tmp_path / "half.npz").consumers[0].H, dense.H)


def test_half_of_a_matrix_is_written_to_only_where_it_may_be():
    H, W0 = given()
    held = Symmetric.of(H)
    kept = Consumer.from_gram(held, W0.clone())
    assert torch.equal(held.dense(), H)
    taken = Consumer.from_gram(held, W0.clone(), overwrite=True)
    assert taken.hessian is held
    assert torch.equal(taken.H, kept.H)
    with torch.inference_mode():  # what comes out of it cannot be written to
        held = Symmetric.of(H)
        whole, weights = H.clone(), W0.clone()
    assert torch.equal(Consumer.from_gram(held, W0.clone(), overwrite=True).H, kept.H)
    assert torch.equal(Consumer.from_gram(whole, weights, overwrite=True).H, kept.H)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda held: held._panels[-1].fill_(torch.nan), "H has NaN"),
        (lambda held: held._panels[0].diagonal().fill_(-1.0), "H has -1 on its diagonal"),
        (lambda held: held._panels.pop(), "H must be|no plain|something else"),
        (lambda held: held._panels.append(torch.ones(1, 3).double()), "half a matrix"),
        (lambda held: setattr(held, "dense", lambda: None), "half a matrix with something else"),
    ],
)
def test_what_is_no_half_is_refused(spoil, message):
    H, W0 = given()
    held = Symmetric.of(H)
    spoil(held)
    with pytest.raises(ProblemError, match=message):
        Consumer.from_gram(held, W0)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda panel: panel.requires_grad_(),
        lambda panel: panel.requires_grad_() * 1,
        lambda panel: panel.new_zeros(1, 1).expand(panel.shape),
    ],
)
def test_panels_that_cannot_be_written_to_are_copied(spoil, overwrite):
    zero, W0 = Symmetric.zeros(P, torch.zeros(1).double()), given()[1]
    zero._panels = [spoil(panel) for panel in zero._panels]
    expected = Consumer.from_gram(torch.zeros(P, P), W0.clone())
    found = Consumer.from_gram(zero, W0.clone(), overwrite=overwrite)
    assert torch.equal(found.H, expected.H)
    assert not found.H.requires_grad


@pytest.mark.parametrize("held", [False, True])
def test_the_check_needs_no_gradients(held):
    solution = solve(both()[held], "local_search")
    for name in ("H", "G", "W0"):
        tensor = vars(solution.problem.consumers[0])[name]
        for panel in tensor._panels if isinstance(tensor, Symmetric) else (tensor,):
            panel.requires_grad_()
    solution.verify()


def test_numbers_of_another_format_are_refused():
    H, W0 = given()
    with pytest.raises(ProblemError, match="half a matrix of torch"):
        Consumer.from_gram(Symmetric.of(H.float()), W0)


def test_the_check_looks_at_the_half_as_it_is():
    solution = solve(both()[1], "local_search")
    solution.verify()
    (consumer,) = solution.problem.consumers
    held = consumer.hessian
    before = held._panels[0].clone()
    held._panels[0].diagonal().fill_(-1.0)
    with pytest.raises(VerificationError, match="H has -1 on its diagonal"):
        solution.verify()
    held._panels[0].copy_(before)
    solution.verify()
    first, held._panels[0] = held._panels[0], held._panels[0].as_subclass(Obliging)
    with pytest.raises(VerificationError, match="H is half a matrix of something else"):
        solution.verify()
    vars(consumer)["H"] = ObligingHalf.of(torch.from_numpy(np.eye(P)))
    with pytest.raises(VerificationError, match="H is no plain tensor, but a ObligingHalf"):
        solution.verify()
    held._panels[0] = first
    vars(consumer)["H"] = held
    vars(consumer)["G"] = Symmetric([consumer.G])
    with pytest.raises(VerificationError, match="G is no plain tensor, but a Symmetric"):
        solution.verify()


class Obliging(torch.Tensor):
    """Could answer as it likes."""


class ObligingHalf(Symmetric):
    """Could as well."""


def test_plain_matrices_are_plain():
    assert why_not_plain(torch.ones(2, 2)) is None
    assert why_not_plain(Symmetric.of(torch.eye(3))) is None
    assert why_not_plain("large") == "no plain tensor, but a str"
    assert why_not_plain(Symmetric([])) == "half a matrix with something else in it"
