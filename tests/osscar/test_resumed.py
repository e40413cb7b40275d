"""Passes that go on where changed weights are first read: they are whole passes, bit by bit."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from graph.tracing.preserve import without_cache
from osscar.allocation.measured import dense_references
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


def counted(self, x):
    self.seen += x.mean(0)
    return x + self.seen


def drawn(self, x):
    return x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))


def added_up(self, x):
    total = x.clone()
    return torch.add(total, self.second(x), out=total)


def unasked(self, x):
    """Look at values that no weight changes, and past autograd."""
    x = x.data
    return x if torch.ones(2).sum() > 0 and torch.tensor([1, 2]).tolist() else -x


def passed(model, batch):
    """Run a model, and return what it puts out as `recorded` does with it."""
    with torch.no_grad(), without_cache(model):
        result = forward(model, batch)
    return getattr(result, "logits", result)


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (Perceptron, {"x": torch.randn(5, 6)}),
        (lambda: Perceptron(unasked), {"x": torch.randn(5, 6)}),
        (lambda: Perceptron(added_up), {"x": torch.randn(5, 6)}),
        (Residual, {"x": torch.randn(4, 3, 6, 6)}),
        *((partial(tiny, name), {"input_ids": tokens(2, 12)}) for name in FAMILIES),
    ],
)
def test_a_pass_that_is_resumed_is_the_whole_one(build, batch):
    model = build().eval()
    with torch.no_grad(), without_cache(model):
        found, recording = recorded(forward, model, batch)
    assert torch.equal(getattr(found, "logits", found), passed(model, batch))
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


def test_where_no_value_may_be_held_a_pass_begins_anew():
    model, x = Residual().eval(), {"x": torch.randn(4, 3, 6, 6)}
    with torch.no_grad():
        _, recording = recorded(forward, model, x, most_bytes=0)
        for one in model.parameters():
            one.mul_(1.5)
    assert torch.equal(recording.resumed([*model.parameters()][-1:]), passed(model, x))
    assert not recording._held


@pytest.mark.parametrize(
    "between",
    [
        counted,
        drawn,
        lambda _, x: torch.from_numpy(x.numpy() * 2),
        lambda _, x: x if x.sum() > 0 else -x,
        lambda _, x: x * max(x.sum(1).tolist()),
        lambda _, x: x.where(x > 0, 0.0)[x.sum(1) > -100],
        lambda self, x: (self.seen.diag().to_sparse() @ x.T).T + x,
    ],
)
def test_what_operators_do_not_tell_is_not_resumed(between):
    model, batch = Perceptron(between).eval(), {"x": torch.randn(5, 6)}
    with torch.no_grad():
        found, recording = recorded(forward, copy.deepcopy(model), batch)
    assert torch.equal(found, passed(model, batch))
    assert recording is None


def test_experts_are_called_by_the_tokens_that_are_sent_to_them_and_not_resumed():
    model, batch = mixture("mixtral", num_hidden_layers=1), {"input_ids": tokens(2, 12)}
    with torch.no_grad(), without_cache(model):
        found, recording = recorded(forward, model, batch)
    assert torch.equal(found.logits, passed(model, batch))
    assert recording is None


def test_what_is_captured_is_left_alone():
    model = Perceptron(lambda _, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    with prepare(model, torch.randn(16, 6)) as prepared:
        reference, _ = dense_references(prepared, 4)
        assert not any(reference.passes)
        assert reference.divergence(prepared.model, list(prepared.model.parameters())) == 0
