"""Passes that go on where changed weights are first read: they are whole passes, bit by bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

from graph.tracing.preserve import without_cache
from osscar.allocation.measured import dense_reference
from osscar.allocation.resumed import recorded
from osscar.network.modules import forward
from osscar.preparation.prepare import prepare
from tests.osscar.families import FAMILIES, tiny, tokens
from tests.osscar.mixtures import mixture


class Residual(nn.Module):
    """A network that writes in place, and adds up."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.relu_(self.first(x))
        out = self.norm(self.second(x))
        out += x
        return self.last(torch.relu_(out).mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self, between=lambda self, x: x):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(8))
        self.between = between

    def forward(self, x):
        x = self.between(self, torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.second(x)))


def by_numpy(self, x):
    return torch.from_numpy(x.numpy() * 2)


def counted(self, x):
    self.seen += x.mean(0)
    return x + self.seen


def chosen(self, x):
    return x if x.sum() > 0 else -x


def listed(self, x):
    return x * max(x.sum(1).tolist())


def only_some(self, x):
    return x.where(x > 0, 0.0)[x.sum(1) > -100]


def conditional(self, x):
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


def sparse(self, x):
    return (self.seen.diag().to_sparse() @ x.T).T + x


def drawn(self, x):
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def added_up(self, x):
    total = x.clone()
    return torch.add(total, self.second(x), out=total)


def unasked(self, x):
    """Look at values that no weight changes, and past autograd."""
    x = x.data
    return x if torch.ones(2).sum() > 0 and torch.tensor([1, 2]).tolist() else -x


def inputs_of(name):
    torch.manual_seed(0)
    if name == "residual":
        return Residual(), {"x": torch.randn(4, 3, 6, 6)}
    if name in FAMILIES:
        return tiny(name), {"input_ids": tokens(2, 12)}
    if name == "mixtral":
        return mixture(name), {"input_ids": tokens(2, 12)}
    between = {"unasked": unasked, "added up": added_up}.get(name, lambda self, x: x)
    return Perceptron(between), {"x": torch.randn(5, 6)}


def passed(model, batch):
    """Run a model, and return what it puts out as `recorded` does with it."""
    with torch.no_grad(), without_cache(model):
        result = forward(model, batch)
    return getattr(result, "logits", result)


@pytest.mark.parametrize(
    "name", ["perceptron", "unasked", "added up", "residual", "mixtral", *FAMILIES]
)
def test_a_pass_that_is_resumed_is_the_whole_one(name):
    model, batch = inputs_of(name)
    model.eval()
    with torch.no_grad(), without_cache(model):
        found, recording = recorded(forward, model, batch)
    assert torch.equal(getattr(found, "logits", found), passed(model, batch))
    if name == "mixtral":
        assert recording is None, "experts are called by the tokens that are sent to them"
        return
    assert recording is not None
    ran = []
    recording._run = lambda start, stop, values, run=recording._run: (
        ran.append((start, stop)),
        run(start, stop, values),
    )
    weights = [one for one in model.parameters() if one.dim() > 1]
    for some in [*itertools.combinations(weights, 1), weights[-2:], weights[:1]]:
        before = [one.detach().clone() for one in some]
        for one in some:
            one.detach().mul_(1 + torch.rand(one.shape))
        found = recording.resumed(some)
        assert torch.equal(getattr(found, "logits", found), passed(model, batch))
        for one, dense in zip(some, before, strict=True):
            one.detach().copy_(dense)
    lengths = [stop - start for start, stop in ran[1::2]]
    assert min(lengths) < len(recording._steps) / 3


@pytest.mark.parametrize("way", [by_numpy, counted, chosen, listed, only_some, sparse, drawn])
def test_what_operators_do_not_tell_is_not_resumed(way):
    model = Perceptron(way).eval()
    batch = {"x": torch.randn(5, 6)}
    with torch.no_grad():
        found, recording = recorded(forward, copy.deepcopy(model), batch)
    assert torch.equal(found, passed(model, batch))
    assert recording is None


def test_what_is_captured_is_left_alone():
    model = Perceptron(conditional)
    with prepare(model, torch.randn(16, 6)) as prepared:
        reference = dense_reference(prepared, 4)
        assert not any(reference.passes)
        assert reference.divergence(prepared.model, list(prepared.model.parameters())) == 0
