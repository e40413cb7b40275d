"""What a problem refuses, and what damping means."""

from __future__ import annotations

import math
import warnings
from dataclasses import FrozenInstanceError, dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch

from solvers import (
    BackendError,
    BackendKind,
    Capabilities,
    Consumer,
    ProblemError,
    SubsetProblem,
    quadratic_loss,
    solve,
)
from solvers import problem as problem_module
from solvers.linalg.gram import DEFINITE_MARGIN, definite_factor, is_definite
from tests.solvers.instances import INSTANCES, exact_loss, random_data


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


BAD_FIELDS = [
    ({"H": torch.ones(4).double()}, r"H must be \(4, 4\) in torch.float64, not \(4,\)"),
    ({"G": torch.ones(4, 2)}, r"G must be \(4, 2\) in .*64, not .* in torch.float32"),
    ({"H": torch.ones(4, 3).double()}, r"H must be \(4, 4\) .* not \(4, 3\)"),
    ({"H": torch.ones(0, 0).double()}, r"H is empty; leave out a consumer"),
    ({"W0": torch.ones(3, 2).double()}, r"W0 must be \(4, 2\) in torch.float64, not \(3, 2\)"),
    ({"rows": torch.arange(4)}, r"rows must be \(units, width\) in torch.int64"),
    ({"e": math.nan}, r"e is nan"),
    ({"e": -1.0}, r"e is -1.0; a mean squared norm"),
    ({"e": "5"}, r"e is '5'; it must be a number"),
    ({"e": 10**400}, r"e has more digits than a number may have"),
    ({"e": 1e150}, r"e is 1e\+150, whose products overflow or vanish"),
    (
        {"G": 1e200 * torch.ones(4, 2).double()},
        r"G has entries up to 1e\+200, whos",
    ),
    ({"damping": -3}, r"damping is -3.0; it must be finite"),
    ({"H": torch.eye(4, dtype=torch.complex128)}, r"H must hold real numbers"),
    ({"H": torch.eye(4, device="meta")}, r"H must hold real numbers, not .* meta"),
    ({"H": None}, r"H must be a tensor of numbers, not of NoneType"),
    ({"rows": [["a"]] * 4}, r"rows must be a tensor of numbers, not of list"),
    ({"variance": torch.ones(3).double()}, r"variance must be \(4,\) in torch.float64, not \(3,\)"),
    ({"variance": torch.ones(4)}, r"variance must be .* in torch.float32"),
    ({"variance": torch.full((4,), torch.nan).double()}, r"variance has NaN or"),
    (
        {"variance": -torch.ones(4).double()},
        r"variance has -1; no variance",
    ),
    (
        {"variance": torch.tensor([0, 0, 1e6, 0]).double()},
        r"variance has 1e\+06 for row 2, where H has .* no variance exceeds the second moment",
    ),
    ({"rows": torch.tensor([[0], [1], [1], [3]])}, r"own 4 rows, 3 of them distinct"),
    ({"rows": torch.tensor([[0, 1], [2, -1]])}, r"own 3 rows, 3 of them distinct"),
    ({"rows": torch.tensor([[0], [1], [2], [4]])}, r"must own each of the 4 rows"),
]

BAD_ENTRIES = [
    (math.nan, (0, 1), "H has NaN or infinite"),
    (0.5, (0, 1), "H is not symmetric: entries differ by up to"),
    (0.0, (2, 2), r"H has 0 on its diagonal \(row 2\)"),
    (1e-200, (2, 2), r"H has 1e-200 on its diagonal \(row 2\) .* scale the data"),
    (-3.0, (1, 1), r"H has -3 on its diagonal \(row 1\)"),
]


def test_consumer_refuses():
    good = fields()
    entries = [({"H": poked(good["H"], v, i)}, message) for v, i, message in BAD_ENTRIES]
    for changed, message in [*BAD_FIELDS, *entries]:
        with pytest.raises(ProblemError, match=message):
            Consumer(**{**good, **changed})


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
    with pytest.raises(ProblemError, match="consumer 0: H is not positive definite"):
        solve(problem, "greedy")
    problem.save(tmp_path / "bad.safetensors")
    with pytest.raises(
        ProblemError, match=r"bad.safetensors: consumer 0: H is not positive definite"
    ):
        SubsetProblem.load(tmp_path / "bad.safetensors")


@dataclass(frozen=True)
class Unreachable:
    """Fails the test that lets it start."""

    kind: ClassVar = BackendKind.HEURISTIC
    summary: ClassVar = "never runs"
    capabilities: ClassVar = Capabilities()

    def select(self, problem):
        pytest.fail("a backend was started on an ill-posed problem")


def test_ill_posed_problems_reach_no_backend():
    """Neither an indefinite H that a small support hides, nor an e below what G explains."""
    good = fields()
    rows = torch.arange(2)[:, None]
    hidden = Consumer(indefinite(), torch.ones(2, 1).double(), 9.0, torch.ones(2, 1).double(), rows)
    low = Consumer(**{**good, "e": 0.5 * good["e"]})
    for consumer, message in [(hidden, "H is not positive"), (low, "no loss is negative: e = ")]:
        with pytest.raises(ProblemError, match=f"consumer 0: .*{message}"):
            solve(SubsetProblem((consumer,), keep=1), Unreachable())
    with pytest.raises(ProblemError, match="consumer 1: e is"):
        solve(SubsetProblem((Consumer(**good), low), keep=1), Unreachable())


def singular(p=6, m=2, kind=torch.float64):
    """A Gram matrix without full rank; rounding lets Cholesky finish all the same."""
    data = random_data(4, p, m, samples=p // 2)
    H, W0 = torch.from_numpy(data.X.T @ data.X / len(data.X)), torch.from_numpy(data.W0)
    return H.to(kind), W0.to(kind)


@pytest.mark.parametrize("level", [0.0, 1e-12])
def test_a_numerically_singular_hessian_is_damped_or_refused(level):
    H, W0 = singular()
    H.diagonal().add_(level * float(H.diagonal().mean()))
    with pytest.warns(UserWarning, match=r"H is singular with damp=0; going on with damp=1e-06"):
        problem = SubsetProblem.from_gram(H, W0, keep=3, damp=0)
    assert is_definite(problem.consumers[0].hessian, 2 * DEFINITE_MARGIN)
    for backend in ("enumerate", "perspective", "branch_and_bound"):
        solve(problem, backend).verify()
    rows = torch.arange(6)[:, None]
    raw = Consumer(H, H @ W0, float((W0 * (H @ W0)).sum()), W0, rows)
    with pytest.raises(ProblemError, match="H is not positive definite, or too close to singular"):
        solve(SubsetProblem((raw,), 3), Unreachable())


def test_the_scale_of_single_inputs_is_no_matter_of_conditioning():
    H, W0 = gram()
    scale = torch.tensor([1e-9, 1.0, 1e6, 1e12]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = SubsetProblem.from_gram(
            H * scale * scale[:, None], W0 / scale[:, None], keep=2, damp=0
        )
    assert problem.consumers[0].damping == 0
    assert torch.equal(
        solve(problem, "enumerate").support,
        solve(SubsetProblem.from_gram(H, W0, keep=2, damp=0), "enumerate").support,
    )


def test_an_ill_posed_problem_is_found_out_once(monkeypatch):
    """Factorizing costs; problems that differ in `keep`, or were moved, share what was found."""
    checks = []

    def counted(H):
        checks.append(H)
        return definite_factor(H)

    monkeypatch.setattr(problem_module, "definite_factor", counted)
    problem = SubsetProblem((Consumer(**fields()),), 3)
    solutions = [solve(problem.with_keep(keep), "greedy", device="cpu") for keep in (1, 2, 3)]
    assert len(checks) == 1
    solutions[0].verify()
    solve(SubsetProblem.from_gram(*gram(), keep=2), "greedy")
    assert len(checks) == 1


def test_from_gram_never_refuses_the_target_that_it_computes():
    """Of singular Gram matrices in any format, whose rounding is all that is left of the loss."""
    for kind in (torch.float64, torch.float32):
        for damp in (0.0, 1e-10, 1e-2):
            for m in (1, 30):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    problem = SubsetProblem.from_gram(*singular(m=m, kind=kind), keep=4, damp=damp)
                fresh = replace(problem.consumers[0])
                assert fresh.violation is None
                solve(problem, "local_search").verify()


def test_an_energy_that_rounding_lowered_is_raised():
    H, W0 = gram(p=5)
    G, e = H @ W0, float((W0 * (H @ W0)).sum())
    for kind, lowered in [(torch.float64, 1e-13), (torch.float32, 1e-6)]:
        consumer = Consumer.from_gram(
            H.to(kind), W0, G=G.to(kind), e=e * (1 - lowered), damp=0.0, units=5
        )
        problem = SubsetProblem((consumer,), 5)
        assert abs(float(exact_loss(problem, range(5)))) < 1e-15 * e
        assert consumer.e == pytest.approx(e, rel=10 * lowered)
    with pytest.raises(ProblemError, match=r"e is .* have a loss of -.*must be at least"):
        Consumer.from_gram(H, W0, G=G, e=e * (1 - 1e-6), damp=0.0)


BAD_GRAMS = [
    ({"H": torch.ones(4)}, r"H must be \(p, p\) and W0 \(p, m\)"),
    ({"W0": torch.ones(3, 2)}, r"H must be \(p, p\) and W0 \(p, m\)"),
    ({"damp": -0.1}, r"damp is -0.1"),
    ({"damp": math.inf}, r"damp is inf"),
    ({"G": torch.ones(4, 2)}, r"give both, or neither"),
    ({"units": 3}, r"4 rows cannot be shared equally by 3 units"),
    ({"units": []}, r"units is \[\]; name for each unit the rows"),
    ({"units": [[0, 1], [1, 2, 3]]}, r"must own each of the 4 rows"),
    ({"units": [[-1, 0, 1], [2, 3]]}, r"the rows that it owns, from 0 on"),
    ({"units": torch.rand(2, 2)}, r"whole numbers, not torch.float32 of"),
    ({"H": torch.eye(4) * 1j}, r"H must hold real numbers, not torch.complex64"),
    ({"H": torch.eye(4).triu() + torch.ones(4, 4).triu(1)}, r"H is not symmetric"),
    ({"H": 1e200 * torch.eye(4).double()}, r"H has entries up to 1e\+200, whose"),
    ({"damp": "x"}, r"damp is 'x'; it must be a number"),
    ({"damp": 1e300}, r"H with its damping has entries up to"),
    ({"G": torch.ones(4, 2), "e": -5}, r"e is -5.0; a mean squared norm"),
    (
        {"G": torch.ones(4, 2), "e": 0.01},
        r"e is 0.0\d+, with which the best weights",
    ),
    (
        {"G": torch.ones(4, 1), "e": 9.0},
        r"G must have the shape of W0, \(4, 2\), not",
    ),
]


def test_from_gram_refuses():
    H, W0 = gram()
    entries = [(math.inf, "H has NaN or infinite"), (-1.0, "H has -1 on its diagonal")]
    poked_ones = [({"H": poked(H, value, (1, 1))}, message) for value, message in entries]
    for changed, message in [*BAD_GRAMS, *poked_ones]:
        with pytest.raises(ProblemError, match=message):
            Consumer.from_gram(**{"H": H, "W0": W0, **changed})


def test_arrays_and_other_formats_are_read():
    """Whatever holds the numbers, the problem is the same; gradients are left behind."""
    H, W0 = gram()
    G, e = H @ W0, float((W0 * (H @ W0)).sum())
    expected = solve(SubsetProblem.from_gram(H, W0, keep=2), "greedy").loss
    for H2, W2, keep, units in [
        (H.numpy(), W0.numpy(), np.int64(2), np.arange(4)[:, None]),
        (H.clone().requires_grad_(), torch.nn.Parameter(W0), torch.tensor(2), np.int32(4)),
        (H.to_sparse(), W0.tolist(), 2, [np.arange(1), [1], (2,), torch.tensor([3])]),
        (H.numpy()[::-1, ::-1], W0.numpy()[::-1], 2, None),
    ]:
        problem = SubsetProblem.from_gram(H2, W2, keep=keep, units=units)
        assert type(problem.keep) is int
        solution = solve(problem, "greedy")
        solution.verify()
        assert solution.loss == pytest.approx(expected, rel=1e-12)
    for H2 in (H.numpy(), H.clone().requires_grad_(), H.to_sparse()):
        consumer = Consumer(H2, G.numpy(), np.float32(2 * e), W0, np.arange(4)[:, None])
        assert type(consumer.e) is float
        solve(SubsetProblem([consumer], 2), "perspective").verify()


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
    for backend in ("perspective", "branch_and_bound", "enumerate"):
        bound = solve(problem, backend).lower_bound
        exact = exact_loss(problem, range(4))
        assert Fraction(bound) <= exact
        assert bound == pytest.approx(float(exact), rel=1e-7)


def test_too_close_to_singular_names_the_damping():
    """A backend whose own arithmetic fails is told apart from a problem that is ill posed."""

    @dataclass(frozen=True)
    class Fails(Unreachable):
        def select(self, problem):
            torch.linalg.cholesky(-torch.eye(2))

    problem = SubsetProblem.from_gram(*gram(), keep=2, damp=0.03)
    message = r"^backend 'Fails': H is too close to singular with damp=0.03; build the problem with"
    with pytest.raises(BackendError, match=message):
        solve(problem, Fails())


def test_a_problem_is_frozen_and_shares_its_tensors():
    problem = INSTANCES["ragged"].problem
    with pytest.raises(FrozenInstanceError):
        problem.keep = 2
    other = problem.with_keep(2)
    assert (problem.keep, other.keep) == (3, 2)
    assert other.consumers[0].hessian is problem.consumers[0].hessian
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


@pytest.mark.parametrize("kind", ["uint8", "int32", "bool", "bfloat16"])
def test_matrices_of_any_real_format(kind):
    H, W0 = 3 * torch.eye(4) + 1, torch.arange(8).reshape(4, 2) % 2
    kind = getattr(torch, kind)
    if kind is torch.bool:
        H = torch.eye(4)
    made = SubsetProblem.from_gram(H.to(kind), W0.to(kind), keep=2, damp=0.0)
    expected = SubsetProblem.from_gram(H.double(), W0.double(), keep=2, damp=0.0)
    assert torch.equal(made.consumers[0].H, expected.consumers[0].H)
    assert solve(made, "greedy").loss == pytest.approx(solve(expected, "greedy").loss)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_dead_inputs_of_any_scale(scale):
    """What fills their diagonal is not rounded to float32, in which this mean has no place."""
    H, W0 = gram()
    H[1], H[:, 1] = 0, 0
    expected = SubsetProblem.from_gram(H, W0, keep=2)
    problem = SubsetProblem.from_gram(H * scale, W0, keep=2)
    torch.testing.assert_close(problem.consumers[0].H / scale, expected.consumers[0].H)
    assert problem.dead.tolist() == [1]
    for backend in ("enumerate", "local_search", "perspective", "branch_and_bound"):
        solution = solve(problem, backend)
        solution.verify()
        assert solution.loss / scale == pytest.approx(solve(expected, backend).loss, rel=1e-6)


def test_what_is_no_problem():
    H, W0 = gram()
    consumer = Consumer.from_gram(H, W0)
    with pytest.raises(ProblemError, match="at least one consumer"):
        SubsetProblem((), 1)
    with pytest.raises(ProblemError, match=r"disagree on the number of units: \[4, 2\]"):
        SubsetProblem((consumer, Consumer.from_gram(H, W0, units=2)), 1)
    for keep in (0, 5, 2.0, None, np.True_, 10**400):
        with pytest.raises(ProblemError, match=r"keep is .*; it must be a whole number from 1"):
            SubsetProblem((consumer,), keep)
    for name in ("a\nb", "\x1b[31mred", "\u202eabc", "\ud800", None, 5):
        with pytest.raises(ProblemError, match=r"^name is .*; it must be a string") as error:
            SubsetProblem((consumer,), 2, name)
        assert str(error.value).isprintable()
    for value in (object(), "H", [[1], [1, 2]]):
        with pytest.raises(ProblemError, match="H must be"):
            Consumer.from_gram(value, W0)
        with pytest.raises(ProblemError, match=r"W0 must be|neither empty"):
            Consumer.from_gram(H, value)
