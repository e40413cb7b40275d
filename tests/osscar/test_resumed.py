"""Passes without the modules that end before changed weights are read: whole ones, bit by bit."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from graph.tracing.preserve import without_cache
from osscar.allocation.measured import dense_references
from osscar.network.hooks import Recording
from osscar.network.modules import forward
from osscar.preparation.prepare import prepare
from tests.graph.topologies import conv, network
from tests.osscar.families import FAMILIES, tiny, tokens
from tests.osscar.mixtures import mixture


@network(
    first=conv(3, 8, 3, padding=1),
    second=conv(8, 8, 3, padding=1),
    norm=lambda: nn.BatchNorm2d(8),
    last=(8, 5),
)
def Residual(net, x):
    """A network that writes in place, and adds up."""
    x = nn.functional.relu_(net.first(x))
    out = net.norm(net.second(x))
    out += x
    return net.last(torch.relu_(out).mean((2, 3)))


class Perceptron(nn.Module):
    def __init__(self, between=lambda self, x: x):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.middle, self.inplace = nn.Linear(8, 8), Inplace()
        self.between = between

    def forward(self, x):
        x = self.between(self, torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.second(x)))


def written(self, x):
    """Write to what a module has returned."""
    return self.second(x.mul_(2)).mul_(2)


def borrowed(self, x):
    """Multiply by a weight before its module is called, and call it twice."""
    x = self.middle(x @ self.second.weight)
    return self.second(torch.relu(self.second(x)))


def repeated(self, x):
    """Call a module as often as values say."""
    x = self.second(x)
    return self.middle(x) if x.sum() > 0 else self.middle(self.middle(x))


class Inplace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def passed(model, batch):
    """Run a model, and return what it returns as `recorded` does with it."""
    with torch.no_grad(), without_cache(model):
        result = forward(model, batch)
    return getattr(result, "logits", result)


def recorded(model, batch, **limit):
    recording = Recording(model, **limit)
    with recording.noted():
        found = passed(model, batch)
    assert torch.equal(found, passed(model, batch))
    return recording


def changed(some):
    """Change parameters, and return what puts them back."""
    before = [one.detach().clone() for one in some]
    for one in some:
        one.detach().mul_(-1 - torch.rand(one.shape))
    return lambda: [one.detach().copy_(old) for one, old in zip(some, before, strict=True)]


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (Perceptron, {"x": torch.randn(5, 6)}),
        *(
            (partial(Perceptron, between), {"x": torch.randn(5, 6)})
            for between in (written, borrowed, repeated, lambda self, x: self.inplace(x) + x)
        ),
        (Residual, {"x": torch.randn(4, 3, 6, 6)}),
        *((partial(tiny, name), {"input_ids": tokens(2, 12)}) for name in FAMILIES),
        (partial(mixture, "mixtral", num_hidden_layers=2), {"input_ids": tokens(2, 12)}),
    ],
)
@pytest.mark.parametrize("limit", [{}, {"most_bytes": 1000}, {"most_bytes": 0}])
def test_a_pass_that_is_resumed_is_the_whole_one(build, batch, limit):
    model = build().eval()
    recording = recorded(model, batch, **limit)
    weights = [one for one in model.parameters() if one.dim() > 1]
    for some in [*itertools.combinations(weights, 1), weights[-2:], weights[:1]]:
        put_back = changed(some)
        with recording.resumed(some):
            found = passed(model, batch)
        assert torch.equal(found, passed(model, batch))
        put_back()
        held = pytree.tree_leaves(recording._returned)
        assert sum(x.nbytes for x in held if x is not None) <= recording._most
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_ends_before_a_changed_weight_is_not_run_again():
    model, x = Residual().eval(), {"x": torch.randn(4, 3, 6, 6)}
    recording, ran = recorded(model, x), []
    for name in ("first", "second", "norm"):  # nothing hears of a forward pass that is replaced
        model.get_submodule(name).forward = partial(
            lambda name, own, x: (ran.append(name), own(x))[1],
            name,
            model.get_submodule(name).forward,
        )
    for weight in (model.second.weight, model.last.weight, model.last.weight, model.first.weight):
        ran.append("|")
        with recording.resumed([weight]):
            passed(model, x)
    assert "".join(name[0] for name in ran) == "|fsn|sn||fsn"


def test_a_model_whose_passes_write_on_it_is_not_resumed():
    model = Perceptron(lambda self, x: vars(self).update(seen=x) or self.seen)
    with prepare(model, torch.randn(16, 6)) as prepared:
        assert not dense_references(prepared, 4)[0].passes
    with prepare(Perceptron(), torch.randn(16, 6)) as prepared:
        assert dense_references(prepared, 4)[0].passes
