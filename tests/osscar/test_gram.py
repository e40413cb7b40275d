"""What is summed of the inputs of a consumer: how exact, and who owns it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import solvers
from osscar.consumers.linear_maps import linear_maps
from osscar.preparation.prepare import prepare
from osscar.walk.gram import GramAccumulator, _type_of_sums, pose
from solvers.linalg import symmetric
from tests.osscar.pretended_card import pretended

P, TOKENS = 24, 100_000
HALVES = (torch.bfloat16, torch.float16)


def accumulator(rows=P, outputs=6, *, bias=False, device="cpu", **parts) -> GramAccumulator:
    """Return sums of nothing yet, of a layer that reads so many neurons."""
    torch.manual_seed(0)
    layers = nn.Linear(8, rows), nn.ReLU(), nn.Linear(rows, outputs, bias=bias)
    model = nn.Sequential(*layers).eval().to(device)
    with prepare(model, torch.randn(4, 8, device=device)) as prepared:
        (group,) = (g for g in prepared.groups if g.prunable and g.slots[0].module == "0")
        (consumer,) = linear_maps(prepared.model, group)
        return GramAccumulator(consumer, **parts)


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
    X, gram = activations(dtype), accumulator(bias=bias)
    for batch in torch.split(X, 30_001):
        gram.add(batch)
    error = worst_error(gram.fitted.gram.dense(), X)
    assert gram.fitted.positions == TOKENS
    assert error <= (1e-6 if dtype in HALVES else 1e-13)
    if dtype is torch.bfloat16 and not bias:  # one product would round tokens away
        assert worst_error(X.T @ X, X) > 1000 * error


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_what_varies_about_a_large_mean_is_no_rounding_of_it(dtype):
    X = activations(torch.float32)[:3000]
    X[:, 4] = 100 + torch.arange(3000) % 2
    X[:, 5] = 1000.1
    X = X.to(dtype)
    D = X[:, 4:5].float() - 100 + torch.arange(6)
    with pretended():
        gram = accumulator(bias=True, device="cuda", corrections=True)
        for x, d in zip(X.cuda().split(1000), D.cuda().split(1000), strict=True):
            gram.add(x, d)
        terms = gram.fitted.centred()
        H = terms.part(torch.arange(P, device="cuda")).dense().cpu()
        found = terms.diagonal.cpu(), terms.corrections(torch.eye(6, device="cuda").double()).cpu()
    Z, Y = X.double() - X.double().mean(0), D.double() - D.double().mean(0)
    expected = Z.square().mean(0)
    torch.testing.assert_close(found[0], expected, rtol=5e-6, atol=0)
    sizes = expected.sqrt()
    assert ((H - Z.T @ Z / 3000).abs() <= 5e-6 * sizes * sizes[:, None]).all()
    assert ((found[1] - Z.T @ Y / 3000).abs() <= 1e-5 * sizes[:, None]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_terms_are_those_of_least_squares_and_the_sums_are_given_away(bias):
    gram, X = accumulator(bias=bias, corrections=True), activations(torch.float64)[:400]
    X[:, 5] = 3.0  # constant: dead where a bias takes it up
    D = torch.randn(400, 6).double() + 1
    gram.add(X[:150], D[:150])
    gram.add(X[150:], D[150:])
    W0 = gram.linear_map.read_weight()
    Y, W = X @ W0 + 0.5 * D, W0 / 2
    change = gram.bias(W)
    consumer = gram.consumer(damp=0.01, correction_weight=0.5)
    if bias:
        expected = ((W0 - W).T @ X.T + D.T).mean(1)
        torch.testing.assert_close(change, expected)
        assert torch.equal(gram.bias(W), change)
        X, Y = X - X.mean(0), Y - Y.mean(0)
    else:
        assert change is None
    added = 0.01 * (X.T @ X).diagonal() / 400
    rows = [row for row in range(P) if not bias or row != 5]
    torch.testing.assert_close(consumer.H[rows], (X.T @ X / 400 + added.diag())[rows])
    torch.testing.assert_close(consumer.G, X.T @ Y / 400 + added[:, None] * W0)
    e = float(Y.square().sum() / 400 + (added[:, None] * W0.square()).sum())
    assert consumer.e == pytest.approx(e, rel=1e-10)
    assert solvers.SubsetProblem((consumer,), 12).dead.tolist() == ([5] if bias else [])
    assert gram.fitted.positions == 400
    assert not hasattr(gram.fitted, "gram")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_moments_without_a_dense_matrix_are_those_of_the_samples(bias, corrected, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL_ROWS", 7)
    gram = accumulator(bias=bias, held_out=True, corrections=corrected)
    X = activations(torch.float64)[:500]
    X[:, 5] = 3.0
    D = torch.randn(500, 6).double() + 2 if corrected else None
    gram.add(X[:300], None if D is None else D[:300])
    gram.add(X[300:], None if D is None else D[300:], held_out=True)
    rows, B = torch.tensor([0, 3, 5, 6, 7, 15, 23]), torch.randn(P, 4).double()
    x = X[:300].mean(0) if bias else torch.zeros(P)
    d = D[:300].mean(0) if bias and corrected else torch.zeros(6)
    found = gram.fitted.centred(), gram.held_out.centred(about=gram.fitted)
    for lean, some in zip(found, (slice(300), slice(300, 500)), strict=True):
        off = X[some] - x  # about the means of what weights are fitted to
        H = off.T @ off / len(off)
        torch.testing.assert_close(lean.part(rows).dense(), H[rows][:, rows])
        torch.testing.assert_close(lean.product(B), H @ B)
        torch.testing.assert_close(lean.diagonal, H.diagonal())
        C = lean.corrections(torch.eye(6).double())
        assert (C is None) == (not corrected)
        if C is not None:
            torch.testing.assert_close(C, off.T @ (D[some] - d) / len(off))


class Branches(nn.Module):
    """Two layers read the same units, one of them through a convolution's taps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.wide, self.point = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        return self.wide(x) + self.point(x)


def test_each_layer_counts_relative_to_what_it_puts_out():
    torch.manual_seed(0)
    with prepare(Branches().eval(), torch.randn(6, 3, 9, 9)) as prepared:
        [group] = [group for group in prepared.groups if group.units == 8]
        grams = [GramAccumulator(one) for one in linear_maps(prepared.model, group)]
        for gram in grams:
            gram.add(torch.rand(400, gram.linear_map.rows) + 3)
        alone = [copy.deepcopy(gram).consumer(0.1) for gram in grams]
        together = pose(grams, 4, "some", damp=0.1)
    for one, part in zip(alone, together.consumers, strict=True):
        torch.testing.assert_close(part.H, one.H / one.e)


class Coarse(TorchDispatchMode):
    """Multiplies float32 as TF32, in eleven digits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            args = [(x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in args]
        return func(*args, **(kwargs or {}))


def test_products_of_fewer_digits_are_not_summed():
    X = activations(torch.float32)[:1000]
    halves = X.bfloat16()
    with pretended():
        assert _type_of_sums(X.cuda()) == torch.float32
        gram = accumulator(device="cuda")
        gram.add(X.cuda())
        assert worst_error(gram.fitted.gram.dense().cpu(), X) <= 5e-6
    with pretended(), Coarse():
        assert _type_of_sums(X.cuda()) == torch.float64
        assert _type_of_sums(halves.cuda()) == torch.float32  # eleven digits hold them
