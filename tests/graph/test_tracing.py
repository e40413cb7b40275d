"""What cannot be traced is explained, and a trace leaves a model and torch as they were."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import graph
from graph.tracing.preserve import caching, without_cache
from tests.zoo import transformers_case

from .topologies import network

_ROWS = torch.randn(3, 4)

# ---- what cannot be traced -----------------------------------------------------------------------


class Branching(nn.Module):
    """Keeps a tensor, counts in a list and prints, before it branches on numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = []

    def forward(self, x):
        print("said by the model", file=sys.stderr)
        self.calls.append(1)
        self.kept = self.linear(x)
        return self.kept + 1 if self.kept.sum() > 0 else self.kept


def test_a_decision_on_data_is_explained_and_leaves_nothing_behind(capfd):
    model = nn.Sequential(nn.Sequential(Branching())).train()
    with pytest.raises(graph.TraceError, match="depends on the values") as caught:
        graph.trace(model, (_ROWS,))
    assert caught.value.module == "0.0"  # the innermost
    assert caught.value.reason
    assert caught.value.__cause__ is not None
    assert all(module.training for module in model.modules())
    assert not hasattr(model[0][0], "kept")
    assert model[0][0].calls == []
    assert set(capfd.readouterr().err.splitlines()) == {"said by the model"}


@dataclass
class Pair:
    one: Tensor
    two: Tensor


masked = network()(lambda net, x: x[x > 0])
returns_pair = network()(lambda net, x: Pair(x, x + 1))


@network()
def branches(net, x):
    """One of whose branches returns another form: "Expected ..." of it is not about the inputs."""
    return torch.cond(x.sum() > 0, lambda x: x.double(), lambda x: x[:1], (x,))


@pytest.mark.parametrize(
    ("build", "inputs", "said", "module"),
    [
        (lambda: nn.Sequential(masked()), (_ROWS,), "products with the mask", "0"),
        (
            transformers_case("opt", num_hidden_layers=1).build,
            {"input_ids": torch.randn(2, 7)},
            "runs on the example inputs",
            None,
        ),
        (returns_pair, (_ROWS,), "register_dataclass", None),
        (lambda: torch.jit.script(nn.Linear(4, 5)), (_ROWS,), "pass the Python module", None),
        (branches, (_ROWS,), r"torch\.cond", None),
    ],
)
def test_what_cannot_be_exported_is_explained(build, inputs, said, module):
    with pytest.raises(graph.TraceError, match=said) as caught:
        graph.trace(build(), inputs)
    assert module in (None, caught.value.module)


# ---- what is left as it was ----------------------------------------------------------------------


class Keeping(nn.Module):
    """Holds containers of its own and one that others hold too."""

    def __init__(self, shared):
        super().__init__()
        self.linear, self.shared, self.seen = nn.Linear(4, 4), shared, []

    def forward(self, x):
        self.shared["calls"].append(1)
        self.shared["counts"]["x"] += 1
        return self.linear(x)


def test_the_model_is_left_as_it_was():
    shared = {"calls": [], "counts": Counter(x=3)}
    model = nn.Sequential(Keeping(shared), nn.Dropout(0.5), nn.BatchNorm1d(4), Keeping(shared))
    model.train()
    model[2].eval()
    model[0].register_forward_hook(lambda module, args, output: module.seen.append(output))
    seen, before = model[0].seen, {name: t.clone() for name, t in model.state_dict().items()}
    graph.trace(model, (_ROWS,))
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Containers are neither copied nor changed.
    assert model[0].seen is seen
    assert model[0].shared is model[3].shared is shared
    assert (seen, shared) == ([], {"calls": [], "counts": {"x": 3}})


class Caching(nn.Module):
    """Puts out a thing of no known type unless its own config says no, as language models do."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))), object() if self.config.use_cache else None


@dataclass(frozen=True)
class Frozen:
    """A config that cannot be changed."""

    use_cache: bool = True


def test_caches_are_off_while_a_model_is_traced_and_on_again():
    model = network(language=Caching, frozen=(2, 2))(lambda net, x: net.language(x))()
    model.config, model.frozen.config = SimpleNamespace(use_cache=None), Frozen()
    (group,) = graph.trace(model, (_ROWS,)).prunable
    assert group.units == 8
    assert list(caching(model)) == ["language", "frozen"]
    with without_cache(model):
        assert not model.language.config.use_cache
    with pytest.raises(ZeroDivisionError), without_cache(model):
        raise ZeroDivisionError
    assert model.language.config.use_cache is True
    assert model.config.use_cache is None


# ---- numbers in inputs that decide: followed where these are whole, and refused else -------------


class Grids(nn.Module):
    """Mixes the patches of each image; its code reads off how many there are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, patches, grid):
        ends = torch.repeat_interleave(grid.prod(1), torch.ones_like(grid[:, 0])).cumsum(0)
        parts = torch.split(patches, (ends - grid.prod(1)).diff(append=ends[-1:]).tolist())
        hidden = torch.cat([self.first(one) + one.mean() for one in parts])
        return self.second(hidden.relu())


class Chooses(nn.Module):
    """Has two layers that read the same units, of which a number chooses one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.tasks = nn.ModuleList([nn.Linear(10, 4), nn.Linear(10, 4)])

    def forward(self, x, task):
        return self.tasks[int(task)](self.first(x).relu())


def test_whole_numbers_that_decide_are_followed():
    inputs = {"patches": torch.randn(10, 6), "grid": torch.tensor([[2, 3], [1, 4]])}
    model = Grids().eval()
    before = model(**inputs)
    [group] = [one for one in graph.trace(model, inputs).groups if one.prunable]
    assert {slot.tensor for slot in group.slots} == {"first.weight", "first.bias", "second.weight"}
    assert torch.equal(model(**inputs), before)


def test_what_other_numbers_lead_to_is_not_left_out():
    with pytest.raises(graph.TraceError, match="depends on the values in a tensor"):
        graph.trace(Chooses().eval(), {"x": torch.randn(2, 6), "task": torch.tensor(1)})
