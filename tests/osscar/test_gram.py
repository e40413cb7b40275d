"""What is summed of the inputs of a consumer: how exact, and who owns it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from osscar.base.errors import ModelError
from osscar.preparation.linear_maps import linear_maps
from osscar.preparation.prepare import prepare
from osscar.walk.gram import GramAccumulator, gram_error, pose
from solvers.linalg import symmetric

P, TOKENS = 24, 100_000


class Layer(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(8, P), nn.Linear(P, 6, bias=bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def accumulator(bias=False) -> GramAccumulator:
    torch.manual_seed(0)
    with prepare(Layer(bias).eval(), (torch.randn(4, 8),)) as ready:
        (group,) = (group for group in ready.groups if group.prunable)
        (consumer,) = linear_maps(ready.model, group)
        return GramAccumulator(consumer)


def activations(dtype):
    """Inputs of very different size, some about a mean, with one token that outweighs all."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(TOKENS, P, generator=generator)
    X = X * torch.linspace(-2, 2, P).exp() + torch.arange(P) % 3
    X[17] *= 300
    return X.to(dtype)


def worst_error(found, X):
    """The largest error of an entry relative to the norms of its two inputs."""
    exact = X.double().T @ X.double()
    size = exact.diagonal().sqrt()
    return float(((found.double() - exact).abs() / size / size[:, None]).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_hundred_thousand_tokens_are_summed_as_exactly_as_is_said(dtype, bias):
    X, gram = activations(dtype), accumulator(bias)
    for batch in torch.split(X, 30_001):
        gram.add(batch)
    halves = dtype in (torch.bfloat16, torch.float16) and not bias
    error = worst_error(gram._fitted.gram.dense(), X)
    assert gram.positions == TOKENS
    assert error <= gram_error(dtype, TOKENS)
    assert error <= (1e-6 if halves else 1e-13)
    assert gram_error(dtype, TOKENS) < 2e-5


def test_one_product_in_half_precision_would_round_tokens_away():
    X = activations(torch.bfloat16)
    assert worst_error(X.T @ X, X) > 50 * gram_error(torch.bfloat16, TOKENS)


def test_what_an_input_may_differ_by_in_bfloat16_is_much_more_than_the_sums_may():
    assert gram_error(torch.bfloat16, 10**7) < torch.finfo(torch.bfloat16).eps / 100


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_sums_that_are_given_away_come_to_the_same_problem(bias, corrected):
    gram, X = accumulator(bias), activations(torch.float32)[:500]
    X[:, 5] = 3.0  # constant: dead where a bias takes it up
    D = torch.randn(500, 6) if corrected else None
    gram.add(X, D)
    W = gram.linear_map.read_weight() / 2
    copied, change = pose([gram], 12, "layer", 0.01, 0.5), gram.bias(W)
    given = pose([gram], 12, "layer", 0.01, 0.5, last=True)
    for name in ("H", "G", "W0"):
        ours, theirs = getattr(given.consumers[0], name), getattr(copied.consumers[0], name)
        assert torch.equal(ours, theirs)
    assert given.consumers[0].e == copied.consumers[0].e
    assert given.dead.tolist() == ([5] if bias else [])
    assert gram.positions == 500
    assert (gram.bias(W) is None) == (not bias)
    if bias:
        assert torch.equal(gram.bias(W), change)
    with pytest.raises(ModelError, match="given away with its problem"):
        gram.consumer(0.01)


@pytest.mark.parametrize("bias", [False, True])
def test_the_terms_are_those_of_least_squares(bias):
    gram, X = accumulator(bias), activations(torch.float64)[:400]
    D = torch.randn(400, 6).double()
    gram.add(X[:150], D[:150])
    gram.add(X[150:], D[150:])
    consumer = gram.consumer(damp=0.01, share=0.5)
    W0 = gram.linear_map.read_weight()
    Y = X @ W0 + 0.5 * D
    if bias:
        X, Y = X - X.mean(0), Y - Y.mean(0)
    added = 0.01 * (X.T @ X).diagonal() / 400
    torch.testing.assert_close(consumer.H, X.T @ X / 400 + added.diag())
    torch.testing.assert_close(consumer.G, X.T @ Y / 400 + added[:, None] * W0)
    e = float(Y.square().sum() / 400 + (added[:, None] * W0.square()).sum())
    assert consumer.e == pytest.approx(e, rel=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_moments_without_a_dense_matrix_are_those_of_the_samples(bias, corrected, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 7)
    gram, X = accumulator(bias), activations(torch.float64)[:500]
    X[:, 5] = 3.0
    D = torch.randn(500, 6).double() + 2 if corrected else None
    gram.add(X[:300], None if D is None else D[:300])
    gram.add(X[300:], None if D is None else D[300:], held=True)
    rows, B = torch.tensor([0, 3, 5, 6, 7, 15, 23]), torch.randn(P, 4).double()
    x = X[:300].mean(0) if bias else torch.zeros(P)
    d = D[:300].mean(0) if bias and corrected else torch.zeros(6)
    for lean, some in zip(gram.centred(), (slice(300), slice(300, 500)), strict=True):
        off = X[some] - x  # about the means of what weights are fitted to
        H = off.T @ off / len(off)
        torch.testing.assert_close(lean.part(rows).dense(), H[rows][:, rows])
        torch.testing.assert_close(lean.product(B), H @ B)
        torch.testing.assert_close(lean.diagonal, H.diagonal())
        found = lean.corrections(torch.eye(6).double())
        assert (found is None) == (not corrected)
        if found is not None:
            torch.testing.assert_close(found, off.T @ (D[some] - d) / len(off))
