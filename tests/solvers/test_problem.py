"""What a problem refuses, what damping means, and who owns its numbers."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch

from solvers import (
    BackendKind,
    Capabilities,
    Consumer,
    ProblemError,
    SubsetProblem,
    VerificationError,
    quadratic_loss,
    solve,
)
from solvers.linalg import symmetric
from solvers.linalg.gram import DEFINITE_MARGIN, definite_factor
from solvers.linalg.symmetric import Symmetric
from tests.solvers.instances import INSTANCES, exact_loss, random_data, shuffled_units


def gram(p=4, m=2, samples=30, seed=0):
    H, _, _, W0 = random_data(seed, p, m, samples=samples).tensors()
    return H, W0


def fields():
    H, W0 = gram()
    rows = torch.arange(4)[:, None]
    return {"H": H, "G": H @ W0, "e": float((W0 * (H @ W0)).sum()), "W0": W0, "rows": rows}


def poked(value, index):
    H, _ = gram()
    H[index] = value
    return {"H": H}


# ---- refusals ------------------------------------------------------------------------------------

ONES = torch.ones(4, 2).double()
BAD_FIELDS = [
    ({"H": torch.ones(4).double()}, r"H, G and W0 have the shapes \[\(4,\), \(4, 2\), \(4, 2\)\]"),
    ({"rows": torch.tensor([[0], [1], [1], [3]])}, r"own 4 rows, 3 of them distinct"),
    ({"e": math.nan}, r"e is nan; a mean squared norm"),
    (poked(math.nan, (0, 1)), "H has entries of nan"),
    (poked(0.5, (0, 1)), "H is not symmetric: entries differ by up to"),
    (poked(0.0, (2, 2)), r"H has 0 on its diagonal \(row 2\)"),
]
BAD_GRAMS = [
    ({"H": torch.ones(4)}, r"H must be \(p, p\), W0 and G \(p, m\)"),
    ({"H": torch.tensor([[1.0, 2], [2, 1]]), "W0": torch.ones(2, 1)}, "not positive semidefinite"),
    ({"damp": math.inf}, r"damp is inf"),
    ({"units": 3}, r"4 rows cannot be shared equally by 3 units"),
    ({"units": [[0], [1, 2, 3]]}, r"units own \[1, 3\] rows; give as many to each"),
    ({"G": ONES}, r"give both, or neither"),
    ({"G": ONES, "e": 0.01}, r"e is 0.0\d+, with which the best weights"),
]


def test_what_is_no_consumer():
    H, W0 = gram()
    for changed, message in BAD_FIELDS:
        with pytest.raises(ProblemError, match=message):
            Consumer(**{**fields(), **changed})
    for changed, message in BAD_GRAMS:
        with pytest.raises(ProblemError, match=message):
            Consumer.from_gram(**{"H": H, "W0": W0, **changed})


def test_what_is_no_problem():
    H, W0 = gram()
    consumer = Consumer.from_gram(H, W0)
    for consumers in ((), (consumer, Consumer.from_gram(H, W0, units=2))):
        with pytest.raises(ProblemError, match="give at least one consumer, and all of them the"):
            SubsetProblem(consumers, 1)
    for keep in (0, 5):
        with pytest.raises(ProblemError, match=r"keep is .*; it must be from 1 to the 4 units"):
            SubsetProblem((consumer,), keep)


@dataclass(frozen=True)
class Unreachable:
    """Fails the test that lets it start."""

    kind: ClassVar = BackendKind.HEURISTIC
    summary: ClassVar = "never runs"
    capabilities: ClassVar = Capabilities()

    def select(self, problem):
        pytest.fail("a backend was started on an ill-posed problem")


def test_ill_posed_problems_reach_no_backend(tmp_path):
    """Neither an indefinite H that a small support hides, nor an e below what G explains."""
    H, one = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), torch.ones(2, 1).double()
    hidden = Consumer(H, one, 9.0, one, torch.arange(2)[:, None])
    low = Consumer(**{**fields(), "e": 0.5 * fields()["e"]})
    for consumer, message in [
        (hidden, "H is not positive definite, or too close to singular"),
        (low, "no loss is negative: e = "),
    ]:
        with pytest.raises(ProblemError, match=f"consumer 0: .*{message}"):
            solve(SubsetProblem((consumer,), keep=1), Unreachable())
    with pytest.raises(ProblemError, match="consumer 1: e is"):
        solve(SubsetProblem((Consumer(**fields()), low), keep=1), Unreachable())
    SubsetProblem((hidden,), 1).save(tmp_path / "bad.safetensors")
    with pytest.raises(ProblemError, match=r"bad\.safetensors: consumer 0: H is not positive"):
        SubsetProblem.load(tmp_path / "bad.safetensors")


# ---- damping, targets and scales -----------------------------------------------------------------


def test_damping_is_a_proximal_term_towards_the_dense_weights():
    """The quadratic loss equals ``|Y - XW|^2/N + lambda |W - W0|^2`` for any W."""
    data = random_data(3, 5, 3, noise=0.7)
    H, G, e, W0 = data.tensors()
    problem = SubsetProblem.from_gram(H, W0, keep=2, G=G, e=e, damp=0.3)
    damping = 0.3 * float(H.diagonal().mean())
    assert problem.consumers[0].damping == pytest.approx(damping)
    W = np.random.default_rng(0).normal(size=W0.shape)
    residual, moved = data.Y - data.X @ W, W - data.W0
    explicit = np.square(residual).sum() / len(data.X) + damping * np.square(moved).sum()
    assert quadratic_loss(problem, [torch.from_numpy(W)]) == pytest.approx(explicit, rel=1e-12)
    assert problem.scale == pytest.approx(e + damping * float(W0.square().sum()))


def singular(m=2, kind=torch.float64):
    """A Gram matrix without full rank; rounding lets Cholesky finish all the same."""
    H, W0 = gram(6, m, samples=3, seed=4)
    return H.to(kind), W0.to(kind)


def test_a_numerically_singular_hessian_is_damped_or_refused():
    H, W0 = singular()
    with pytest.warns(UserWarning, match=r"H is singular with damp=0; going on with damp=1e-06"):
        problem = SubsetProblem.from_gram(H, W0, keep=3, damp=0)
    assert definite_factor(problem.consumers[0].hessian, 2 * DEFINITE_MARGIN) is not None
    for backend in ("enumerate", "perspective", "branch_and_bound"):
        solve(problem, backend).verify()
    e, rows = float((W0 * (H @ W0)).sum()), torch.arange(6)[:, None]
    with pytest.raises(ProblemError, match="H is not positive definite, or too close to singular"):
        solve(SubsetProblem((Consumer(H, H @ W0, e, W0, rows),), 3), Unreachable())


def test_from_gram_never_refuses_the_target_that_it_computes():
    """Of singular Gram matrices in any format, whose rounding is all that is left of the loss."""
    for kind in (torch.float64, torch.float32):
        for damp, m in [(0.0, 1), (1e-10, 30), (1e-2, 1)]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                problem = SubsetProblem.from_gram(*singular(m=m, kind=kind), keep=4, damp=damp)
            assert replace(problem.consumers[0]).violation is None
            solve(problem, "local_search").verify()


def test_an_energy_that_rounding_lowered_is_raised():
    H, W0 = gram(p=5)
    G, e = H @ W0, float((W0 * (H @ W0)).sum())
    for kind, lowered in [(torch.float64, 1e-13), (torch.float32, 1e-6)]:
        given = {"G": G.to(kind), "e": e * (1 - lowered)}
        consumer = Consumer.from_gram(H.to(kind), W0, **given, damp=0.0)
        problem = SubsetProblem((consumer,), 5)
        assert abs(float(exact_loss(problem, range(5)))) < 1e-15 * e
        assert consumer.e == pytest.approx(e, rel=10 * lowered)
    with pytest.raises(ProblemError, match=r"e is .* have a loss of -.*must be at least"):
        Consumer.from_gram(H, W0, G=G, e=e * (1 - 1e-6), damp=0.0)


@pytest.mark.parametrize("seed", [136, 26])
def test_the_loss_with_everything_kept_is_bounded_from_below(seed):
    """Forty responses: the roundings of the constant are those of a sum of hundreds of terms."""
    generator = torch.Generator().manual_seed(seed)
    X, mix, W0, noise = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((13, 4), (4, 4), (4, 40), (13, 40))
    )
    X = X @ (torch.eye(4).double() + 3 * mix)
    Y = X @ W0 + 100 * noise
    G, e = X.T @ Y / 13, float(Y.square().sum() / 13)
    problem = SubsetProblem.from_gram(X.T @ X / 13, W0, keep=4, G=G, e=e, damp=1e-9)
    exact = exact_loss(problem, range(4))
    for backend in ("perspective", "branch_and_bound", "enumerate"):
        bound = solve(problem, backend).lower_bound
        assert Fraction(bound) <= exact
        assert bound == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_dead_inputs_of_any_scale_are_named_and_free_to_remove(scale):
    """What fills their diagonal is not rounded to float32, in which this mean has no place."""
    H, W0 = gram()
    H[1], H[:, 1] = 0, 0
    expected, problem = (SubsetProblem.from_gram(h, W0, keep=3) for h in (H, H * scale))
    torch.testing.assert_close(problem.consumers[0].H / scale, expected.consumers[0].H)
    assert problem.dead.tolist() == [1]
    for backend in ("enumerate", "local_search", "perspective", "branch_and_bound"):
        solution = solve(problem, backend)
        solution.verify()
        assert 1 not in solution.support
        assert solution.loss <= 1e-10 * problem.scale


def test_what_is_dead():
    H = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    G = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    # An input without correlation to the target can still explain away noise.
    problem = SubsetProblem.from_gram(H, torch.zeros(2, 1).double(), keep=1, G=G, e=1.0, damp=0.0)
    assert problem.dead.tolist() == []
    silent = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)
    assert silent.dead.tolist() == [0, 1, 2]
    solution = solve(silent, "local_search")
    assert solution.loss == solution.relative_loss == 0
    solution.verify()


def test_losses_are_relative_to_a_scale_which_is_saved_and_divided_and_proves_nothing(tmp_path):
    (consumer,) = INSTANCES["target"].problem.consumers
    for scale in (consumer.e / 2, math.nan, math.inf, "1"):
        with pytest.raises(ProblemError, match="scale"):
            replace(consumer, scale=scale)
    whole = SubsetProblem((replace(consumer, scale=4 * consumer.e),), 5)
    whole.save(tmp_path / "problem.safetensors")
    part = SubsetProblem.load(tmp_path / "problem.safetensors").consumers[0].divided(4.0)
    assert part.scale == part.to("cpu").scale == consumer.e
    assert (part.violation, part.damping) == (None, consumer.damping / 4)
    found, divided = (solve(p, "perspective") for p in (whole, SubsetProblem((part,), 5)))
    torch.testing.assert_close(divided.weights, found.weights)
    assert divided.loss == pytest.approx(found.loss / 4, rel=1e-12)
    assert found.relative_loss == pytest.approx(found.verify().loss / (4 * consumer.e))
    huge = replace(found, problem=replace(whole, consumers=(replace(consumer, scale=1e30),)))
    with pytest.raises(VerificationError, match="its certificate proves"):
        replace(huge, lower_bound=(found.lower_bound + found.loss) / 2).verify()


# ---- what holds the numbers, and who owns them ---------------------------------------------------


def test_arrays_and_other_formats_are_read():
    """Whatever holds the numbers, the problem is the same; gradients are left behind."""
    H, W0 = gram()
    expected = solve(SubsetProblem.from_gram(H, W0, keep=2), "greedy").loss
    for H2, W2, keep, units in [
        (H.numpy(), W0.numpy(), np.int64(2), np.arange(4)[:, None]),
        (H.clone().requires_grad_(), torch.nn.Parameter(W0), torch.tensor(2), np.int32(4)),
        (H.tolist(), W0.tolist(), 2, [np.arange(1), [1], (2,), torch.tensor([3])]),
    ]:
        problem = SubsetProblem.from_gram(H2, W2, keep=keep, units=units)
        assert type(problem.keep) is int
        solution = solve(problem, "greedy")
        solution.verify()
        assert solution.loss == pytest.approx(expected, rel=1e-12)
    H, W0 = 3 * torch.eye(4) + 1, torch.arange(8).reshape(4, 2) % 2
    for kind in (torch.uint8, torch.int32, torch.bfloat16):
        made, same = (
            Consumer.from_gram(H.to(k), W0.to(k), damp=0.0).H for k in (kind, torch.double)
        )
        assert torch.equal(made, same)


def test_what_is_given_away_is_not_copied_and_comes_to_the_same():
    H, W0 = gram(20, 4)
    H[3] = H[:, 3] = 0
    H[0, 1] += 1e-3  # an asymmetry that is averaged away
    before, weights = H.clone(), W0.clone()
    kept = Consumer.from_gram(H, W0)
    assert torch.equal(H, before)
    assert torch.equal(W0, weights)
    assert torch.equal(kept.H.tril(-1), ((H + H.T) / 2).tril(-1))
    taken = Consumer.from_gram(H, W0, overwrite=True)
    assert taken.W0.data_ptr() == W0.data_ptr()
    for name in ("H", "G", "W0"):
        assert torch.equal(getattr(kept, name), getattr(taken, name))
    assert (kept.e, kept.damping) == (taken.e, taken.damping)
    assert not taken.W0[3].any()


@pytest.mark.parametrize("panel", [1, 4, 256])
def test_a_consumer_of_half_a_matrix_is_the_same(panel, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel)
    H, W0 = gram(12, 4)
    H = (H + H.T) / 2  # which products of some processors are not, to the last bit
    H[5] = H[:, 5] = 0
    half, units = Symmetric.of(H), shuffled_units(1, 6, 2)
    dense, held = (Consumer.from_gram(given, W0, units=units) for given in (H, half))
    assert torch.equal(half.dense(), H)
    assert (held.damping, held.violation) == (dense.damping, None)
    assert torch.equal(held.G, dense.G)
    for same in (held, copy.deepcopy(held), pickle.loads(pickle.dumps(held)), held.divided(1.0)):
        assert torch.equal(same.H, dense.H)
    assert held.to("cpu") is held
    taken = Consumer.from_gram(half, W0.clone(), units=units, overwrite=True)
    assert taken.hessian is half
    assert torch.equal(taken.H, dense.H)
    half.panels[-1].fill_(torch.nan)
    with pytest.raises(ProblemError, match="H has entries of nan"):
        Consumer.from_gram(half, W0)
