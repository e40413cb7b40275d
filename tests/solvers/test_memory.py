"""Half matrices, tiles and what a large problem takes, next to the plain formulas."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from benchmarks.measuring import measured
from solvers import Consumer, Status, SubsetProblem, solve
from solvers.closed_forms import elimination
from solvers.closed_forms.elimination import eliminate, support_after
from solvers.closed_forms.pivot import PivotState
from solvers.closed_forms.refit import refit
from solvers.closed_forms.row_blocks import RowBlocks, equal_width
from solvers.closed_forms.swaps import swap_gains
from solvers.linalg import gram as gram_module
from solvers.linalg import symmetric
from solvers.linalg.gram import definite_factor, magnitudes, quadratic, unexplained
from solvers.linalg.symmetric import Symmetric
from tests.solvers.instances import random_data, shuffled_units

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=[5, 512])
def panels(request, monkeypatch):
    """Panels that units do not fit in, and one panel."""
    monkeypatch.setattr(symmetric, "PANEL_ROWS", request.param)
    monkeypatch.setattr(gram_module, "TILE_ROWS", request.param)


def definite(p, seed=0):
    X = np.random.default_rng(seed).normal(size=(2 * p, p))
    return torch.from_numpy(X.T @ X / len(X))


def held(H):
    return Symmetric.of(H)


# ---- half of a matrix ----------------------------------------------------------------------------


def test_what_is_written_is_read(panels):
    H, index = definite(40), torch.tensor([33, 0, 17, 18])
    A = held(H)
    assert torch.equal(A.dense(), H)
    for first in (0, 17, 18, 39):
        assert torch.equal(A.rows(index, first), H[index, first:])
    assert torch.equal(A.diagonal(), H.diagonal())
    new = definite(40, seed=1)[index]
    A.set_rows(index, new)
    H[index] = new
    H[:, index] = new.T
    assert torch.equal(A.dense(), H)
    unsorted, columns = torch.tensor([5, 39, 0, 22, 38]), torch.randperm(40)[:31]
    assert torch.equal(A.entries(unsorted, columns), H[unsorted[:, None], columns])
    gone = torch.isin(torch.arange(40), index)
    A.clear(gone)
    assert torch.equal(A.dense(), H * ~gone * ~gone[:, None])


def test_low_rank_terms_are_taken_off(panels):
    H, B = definite(40), torch.randn(7, 40).double()
    A = held(H)
    A.subtract(B.T, 2 * B)
    torch.testing.assert_close(A.dense(), H - 2 * B.T @ B, **CLOSE)
    A.add_gram(B)
    torch.testing.assert_close(A.dense(), H - B.T @ B, **CLOSE)
    A.rescale(torch.arange(40).double())
    scale = torch.arange(40).double()
    torch.testing.assert_close(A.dense(), scale[:, None] * (H - B.T @ B) * scale, **CLOSE)


@pytest.mark.parametrize("width", [1, 4])
def test_rows_are_dropped(panels, width):
    H = definite(48)
    A = Symmetric.empty(48, H, width=width)
    for start, panel in A.spans():
        panel.copy_(H[start : start + len(panel), : start + len(panel)])
    for left in ([0, 2, 3, 7, 9, 10, 11], [1, 2, 6], [0]):
        rows = (torch.tensor(left)[:, None] * width + torch.arange(width)).flatten()
        H = H[rows[:, None], rows]
        A.keep_only(rows, width=width)
        assert torch.equal(A.dense(), H)
        blocks = A.diagonal_blocks(width)
        for j, block in enumerate(blocks):
            own = slice(j * width, (j + 1) * width)
            assert torch.equal(block, H[own, own])


def test_parts_products_and_diagonals(panels):
    H, B, rows = definite(40), torch.randn(40, 3).double(), torch.tensor([0, 3, 4, 17, 30, 39])
    A = held(H)
    assert torch.equal(A.part(rows).dense(), H[rows][:, rows])
    torch.testing.assert_close(A.product(B), H @ B, **CLOSE)
    weights = torch.rand(40).double()
    torch.testing.assert_close(A.row_sizes(weights), H.square() @ weights, **CLOSE)
    copy = A.copy()
    copy.add_diagonal(torch.arange(40).double())
    torch.testing.assert_close(copy.dense(), H + torch.arange(40).double().diag(), **CLOSE)
    assert torch.equal(A.dense(), H)


def test_factorizing_solving_and_inverting(panels):
    H, B = definite(40), torch.randn(40, 3).double()
    A, X = held(H), B.clone()
    A.factorize()
    A.forward(X)
    A.backward(X)
    torch.testing.assert_close(X, torch.linalg.solve(H, B), **CLOSE)
    A.invert()
    torch.testing.assert_close(A.dense(), torch.linalg.inv(H), **CLOSE)


@pytest.mark.parametrize("k", [4, 20, 36])
def test_a_leading_part_is_swept(panels, k):
    H, B = definite(40), torch.randn(40, 3).double()
    A, U = Symmetric.empty(40, H, cut=k, width=4), B.clone()
    for start, panel in A.spans():
        panel.copy_(H[start : start + len(panel), : start + len(panel)])
    A.factorize(k)
    A.forward(U, k)
    A.backward(U, k)
    A.divide(k)
    A.invert(k)
    inverse, C = torch.linalg.inv(H[:k, :k]), H[k:, :k]
    expected = torch.cat([inverse, C @ inverse])
    torch.testing.assert_close(A.dense()[:, :k], expected, **CLOSE)
    torch.testing.assert_close(A.dense()[k:, k:], H[k:, k:] - C @ inverse @ C.T, **CLOSE)
    torch.testing.assert_close(U[:k], inverse @ B[:k], **CLOSE)
    torch.testing.assert_close(U[k:], B[k:] - C @ inverse @ B[:k], **CLOSE)


# ---- problems of any shape -----------------------------------------------------------------------


def problem_of(
    widths, consumers=1, outputs=3, damp=0.01, rank=None, seed=0, own=False
) -> SubsetProblem:
    made = []
    for c in range(consumers):
        p = sum(widths)
        mix = None
        if rank is not None:
            draw = np.random.default_rng([seed, c])
            mix = draw.normal(size=(p, rank)) @ draw.normal(size=(rank, p))
            mix = mix / np.sqrt(rank * p) + 3e-3 * np.eye(p)
        data = random_data([seed, c], p, outputs, samples=3 * p, noise=0.3, mix=mix)
        X, Y = torch.from_numpy(data.X), torch.from_numpy(data.Y)
        made.append(
            Consumer.from_gram(
                X.T @ X / len(X),
                torch.from_numpy(data.W0),
                G=None if own else X.T @ Y / len(X),
                e=None if own else float(Y.square().sum()) / len(X),
                units=shuffled_units(seed + c, widths),
                damp=damp,
            )
        )
    return SubsetProblem(tuple(made), len(widths) // 2)


SHAPES = {
    "own targets": {"widths": [1] * 30, "own": True},
    "own targets, ragged": {"widths": [1, 3, 2, 4, 1, 2, 3, 3], "consumers": 2, "own": True},
    "two consumers": {"widths": [1] * 24, "consumers": 2},
    "ragged": {"widths": [1, 3, 2, 4, 1, 2, 3, 3, 1, 2] * 2, "consumers": 2},
    "more outputs than inputs": {"widths": [2] * 8, "outputs": 50},
    "nearly singular, undamped": {"widths": [1] * 30, "rank": 12, "damp": 0.0},
}


@pytest.fixture(params=SHAPES)
def problem(request):
    return problem_of(**SHAPES[request.param])


def plain_state(consumer, kept):
    """N and K by the formulas of `solvers.closed_forms.pivot`."""
    H, G = equal_width(consumer)
    inside = kept.repeat_interleave(consumer.width)
    A = torch.linalg.inv(H[inside][:, inside])
    N, U = torch.empty_like(H), torch.empty_like(G)
    S, R = torch.nonzero(inside).flatten(), torch.nonzero(~inside).flatten()
    cross = A @ H[S][:, R]
    N[S[:, None], S], N[S[:, None], R], N[R[:, None], S] = -A, cross, cross.T
    N[R[:, None], R] = H[R][:, R] - H[R][:, S] @ cross
    U[S] = A @ G[S]
    U[R] = G[R] - H[R][:, S] @ U[S]
    return N, U @ U.T


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("hold", [False, True])
def test_states_and_exchanges(panels, problem, hold):
    support = torch.arange(problem.units)[1::2][: problem.keep]
    state = PivotState.on_support(problem, support)
    if hold:
        state.hold_products()
    units = torch.arange(problem.units)
    for _ in range(4):
        for part, consumer in zip(state.consumers, problem.consumers, strict=True):
            N, K = plain_state(consumer, state.kept)
            w, leave, enter = consumer.width, state.support, state.removed
            assert relative(part.N_rows(units), N) < 1e-9
            assert relative(part.K_rows(units), K) < 1e-9
            rows = (leave[:, None] * w + torch.arange(w)).flatten()
            columns = (enter[:, None] * w + torch.arange(w)).flatten()
            N_pairs, K_pairs = part.pairs(leave, enter)
            assert float((N_pairs - N[rows][:, columns]).abs().max()) < 1e-9 * float(N.abs().max())
            assert float((K_pairs - K[rows][:, columns]).abs().max()) < 1e-9 * float(K.abs().max())
        gains = swap_gains(state, state.support, state.removed)
        best = int(gains.argmax())
        row, column = divmod(best, gains.shape[1])
        pair = [int(state.support[row]), int(state.removed[column])]
        before, gain = refit(problem, state.support)[1], float(gains[row, column])
        state.sweep(pair)
        after = refit(problem, state.support)[1]
        wide = any(c.G.shape[1] > len(c.rows) * c.width for c in problem.consumers)
        held = state.loss()
        assert held is None if wide else held == pytest.approx(after, abs=1e-8 * problem.scale)
        assert before - after == pytest.approx(gain, abs=1e-8 * problem.scale)


@pytest.mark.parametrize(("panel", "pending", "cached"), [(5, 3, 2), (16, 3, 1)])
def test_elimination_takes_the_cheapest_each_time(problem, panel, pending, cached, monkeypatch):
    """In one batch or many, with rows at hand that stay for some or are not enough."""
    monkeypatch.setattr(symmetric, "PANEL_ROWS", panel)
    monkeypatch.setattr(elimination, "_PENDING_ROWS", pending)
    monkeypatch.setattr(elimination, "_CACHED", cached)
    removals = eliminate(problem, problem.units - problem.keep)
    kept = torch.arange(problem.units)
    loss = refit(problem, kept)[1]
    for removed, risen in removals:
        kept = kept[kept != removed]
        now = refit(problem, kept)[1]
        assert risen == pytest.approx(now - loss, abs=1e-8 * problem.scale)
        loss = now
    assert torch.equal(kept, support_after(removals, problem))


@pytest.mark.parametrize(
    "order",
    [
        [*range(9)],
        [7, 8, *range(7)],
        [0, 1, 7, 8, 2, 3, 4, 5, 6],
        [0, 1, 7, 2, 3, 4, 5, 6, 8],
    ],
)
def test_rows_of_units_that_left_are_not_read_again(order):
    """Once rows were compacted, their places would be those of other units."""
    # inv(H) is U U' and a diagonal; the weights of the last two units are zero.
    u = torch.tensor([(1, 0), (0.95, 0.2), *((0.5, 0.62 + 0.001 * i) for i in range(5))]).double()
    H, weights = torch.eye(9).double(), torch.zeros(9).double()
    H[:7, :7] = torch.linalg.inv(u @ u.T + (1 - u.square().sum(1)).clamp(min=0.0).diag())
    weights[:7] = u.sum(1)
    W0 = torch.zeros(9 * 16, 1).double()
    W0[::16, 0] = weights[order]
    wide = torch.kron(H[order][:, order].contiguous(), torch.eye(16).double())
    problem = SubsetProblem.from_gram(wide, W0, units=9, keep=4, damp=1e-6)
    assert {order[removed] for removed, _ in eliminate(problem, 2)} == {7, 8}
    found = solve(problem, "local_search")
    found.verify()
    assert found.status is Status.SWAP_OPTIMAL


@pytest.mark.parametrize("name", ["A", "W", "K"])
def test_lost_digits_are_noticed(name):
    problem = problem_of([1] * 30)
    front = elimination._Elimination(problem, torch.arange(30))
    assert not front.drifted()
    (part,) = front._parts
    if name == "A":
        part.A.add_diagonal(1e-5 * part.A.diagonal())
    elif name == "K":
        part.begin(1, front._penalty > 0)
        part.cache_rows(torch.arange(30))
        part.cache.rows[0].mul_(1 + 1e-5)
    else:
        part.W.mul_(1 + 1e-5)
    assert front.drifted()


def test_what_a_factor_explains_is_no_less_than_what_is(problem):
    for consumer in problem.consumers:
        H, G = consumer.H, consumer.G
        factor = definite_factor(consumer.hessian, 1e-9)
        exact = float((G * torch.linalg.solve(H, G)).sum())
        scale = H.diagonal().rsqrt()
        least = float(torch.linalg.eigvalsh(scale[:, None] * H * scale)[0])
        assert exact * (1 - 1e-9) <= factor.explains_at_most(G)
        assert factor.explains_at_most(G) <= exact * (1 + 1e-7 + 2e-9 / least)
    assert definite_factor(consumer.hessian, 1.0) is None


def test_losses_in_tiles(panels, problem):
    support = torch.arange(problem.units)[::2]
    for consumer, W in zip(problem.consumers, refit(problem, support)[0], strict=True):
        H, G, e = consumer.H, consumer.G, consumer.e
        terms = consumer.hessian, G, e
        for weights in (W, consumer.W0, torch.zeros_like(W)):
            plain = float((weights * (H @ weights - 2 * G)).sum()) + e
            size = e + float((weights.abs() * (H.abs() @ weights.abs() + 2 * G.abs())).sum())
            assert quadratic(*terms, weights) == pytest.approx(plain, abs=1e-12 * size)
            order = torch.randperm(len(H), generator=torch.Generator().manual_seed(0))
            part = order[weights[order].any(1)]
            found = quadratic(*terms, weights[part], part)
            assert found == pytest.approx(plain, abs=1e-12 * size)
            assert magnitudes(*terms, weights) == pytest.approx(size, rel=1e-12)
        best = torch.linalg.solve(H, G)
        least, size = unexplained(*terms)
        assert least == pytest.approx(e - float((best * G).sum()), abs=1e-10 * size)


def test_aligned_terms_are_those_of_a_whole_copy(problem):
    for consumer in problem.consumers:
        terms, (H, G) = RowBlocks(consumer), equal_width(consumer)
        rows = torch.arange(len(terms))[1::3]
        assert torch.equal(terms.H(rows, rows), H[rows][:, rows])
        assert torch.equal(terms.G(rows), G[rows])
        aligned = terms.W0(rows, torch.empty_like(G[rows]))
        own, sources = terms.owned(rows)
        assert torch.equal(aligned[own], consumer.W0[sources])
        assert not aligned[~own].any()
        assert torch.equal(terms.gram(rows).dense(), H[rows][:, rows])
        assert torch.equal(terms.diagonal(), H.diagonal())
        products = terms.responses(rows)
        assert products.shape[1] <= max(len(rows), 1)
        torch.testing.assert_close(products @ products.T, G[rows] @ G[rows].T, **CLOSE)


# ---- who owns what -------------------------------------------------------------------------------


def test_what_is_given_away_is_not_copied_and_comes_to_the_same():
    data = random_data(3, 20, 4)
    H, W0 = torch.from_numpy(data.X.T @ data.X / len(data.X)), torch.from_numpy(data.W0)
    H[3] = H[:, 3] = 0
    H[0, 1] += 1e-9
    before, weights = H.clone(), W0.clone()
    kept = Consumer.from_gram(H, W0)
    assert torch.equal(H, before)
    assert torch.equal(W0, weights)
    taken = Consumer.from_gram(H, W0, overwrite=True)
    assert taken.W0.data_ptr() == W0.data_ptr()
    for name in ("H", "G", "W0"):
        assert torch.equal(getattr(kept, name), getattr(taken, name))
    assert (kept.e, kept.damping) == (taken.e, taken.damping)
    assert torch.equal(taken.H, taken.H.T)
    assert not taken.W0[3].any()


def test_a_loss_divided_by_a_number_is_the_same_problem():
    consumer = problem_of([1] * 10).consumers[0]
    part, support = consumer.divided(4.0), torch.arange(5)
    whole, divided = (SubsetProblem((c,), 5) for c in (consumer, part))
    (W,), loss = refit(whole, support)
    (V,), quarter = refit(divided, support)
    torch.testing.assert_close(V, W, **CLOSE)
    assert quarter == pytest.approx(loss / 4, rel=1e-12)
    assert part.violation is None
    assert part.damping == consumer.damping / 4


# ---- what a solve takes --------------------------------------------------------------------------

RUN = """
import sys, torch, solvers
backend, p, m, of = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(p, 64 if of != "rectified" else p, generator=generator).double()
if of == "rectified":
    inputs.mul_(0.02).relu_()
W0 = torch.randn(p, m, generator=generator).double()
H = inputs @ inputs.T
H.diagonal().add_(32.0 if of != "rectified" else 0.01 * float(H.diagonal().mean()))
del inputs
if of == "half":
    H = solvers.linalg.symmetric.Symmetric.of(H)
if backend != "nothing":
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    del H, W0
    solution = solvers.solve(problem, backend)
    assert of != "rectified" or solution.iterations > 20
"""


def peak(backend: str, p: int, m: int, of: str = "whole") -> int:
    """Largest resident set of a process, as the operating system tells when it has ended."""
    found = measured([sys.executable, "-c", RUN, backend, str(p), str(m), of])
    assert found.status == 0
    return found.peak


@pytest.fixture
def frugal(monkeypatch):
    """Pieces that are freed go back at once, so that what is counted is what is held."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    monkeypatch.setenv("MKL_DISABLE_FAST_MM", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no account of a single process")
@pytest.mark.parametrize(
    ("backend", "p", "most"),
    [
        pytest.param("local_search", 2048, 3.2, marks=pytest.mark.slow),
        ("multistage", 1536, 2.4),
    ],
)
def test_a_solve_holds_little_beside_its_problem(backend, p, most, frugal):
    """In p^2 numbers, G included; with N and K as whole matrices it was 6.1 and 4.1."""
    grown = peak(backend, p, p // 4) - peak("nothing", p, p // 4)
    assert grown < most * 8 * p * p


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no account of a single process")
@pytest.mark.parametrize("backend", ["local_search", "multistage"])
def test_exchanges_make_room_for_a_refit(backend, frugal):
    """In p^2 numbers, G included; with a whole refit beside N, U and K it was above 4.4."""
    p = 2048
    grown = peak(backend, p, p, "rectified") - peak("nothing", p, p, "rectified")
    assert grown < 3.6 * 8 * p * p
