"""The walk: what it measures, on any model, and that nothing of it stays behind."""

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import osscar
from osscar.base.errors import DataError, ModelError, NonFiniteError
from osscar.preparation.prepare import prepare
from osscar.study.directory import model_problems
from osscar.walk.coroutines import Coroutine
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from solvers.heuristics.baselines import Greedy
from tests.graph.topologies import network
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Twice, images, small_net
from tests.zoo import transformers_case

BATCH = 3


# ---- models ------------------------------------------------------------------------------


class Hoarding(nn.Module):
    """Modules that keep what they read later in attributes, containers and buffers."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.next = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 7)
        self.head = nn.Linear(7, 6)
        self.by_name, self.stack = {}, []
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.kept = self.by_name["x"] = x
        self.stack.append(x.mean())
        self.last.copy_(x.abs().max())
        x = self.down(torch.relu(self.up(x)))
        x = x + self.kept + self.by_name["x"] + self.stack.pop() + self.last
        self.kept = None
        return self.head(torch.tanh(self.next(x)))


class Shortcut(nn.Module):
    """A stem that a block and its shortcut read, as in ResNet-50, written to in between."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.second, self.shortcut = nn.Conv2d(6, 10, 1), nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.second(torch.relu(self.first(x)))
        return self.head((y + self.shortcut(x.mul_(1.5))).relu().mean((2, 3)))


@network(layers=lambda: nn.ModuleList(nn.Linear(8, 8) for _ in range(6)))
def Surrounded(net, x):
    """Consumers that are called under context managers of every sort."""
    first, second, third, fourth, fifth, last = net.layers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = second(torch.relu(first(x)))
    with torch.inference_mode():
        x = third(torch.tanh(x.to(third.weight)))
    with torch.enable_grad(), torch.device("cpu"), sdpa_kernel(SDPBackend.MATH):
        x = fourth(torch.relu(x.clone()))
    return last(torch.relu(fifth(torch.relu(x)))).detach()


def seeded(kind):
    def build():
        torch.manual_seed(0)
        return kind().eval()

    return build


T5 = transformers_case("t5")
CASES = {
    "gpt2": (lambda: tiny("gpt2"), lambda: tokens(7)),
    "t5": (T5.build, lambda: {name: x.repeat(4, 1)[:7] for name, x in T5.make_inputs()[0].items()}),
    "cnn": (small_net, lambda: images(7)),
    "shortcut": (seeded(Shortcut), lambda: images(7)),
    "twice": (seeded(Twice), lambda: torch.randn(7, 6)),
    "hoarding": (seeded(Hoarding), lambda: torch.randn(7, 6)),
    "surrounded": (seeded(Surrounded), lambda: torch.randn(7, 8)),
}
TOLERANCE = {"surrounded": 1e-2}  # a layer of it computes in bfloat16


# ---- measured as if each group were alone ------------------------------------------------


def half_gone(step):
    """Return weights as a refit leaves them: half the units zero, the others changed."""
    weights = []
    for consumer in step.consumers:
        W = consumer.read_weight() * 1.1
        for rows in consumer.unit_rows[::2]:
            W[rows] = 0
        weights.append(W)
    return weights


def commit_all(way, early=False):
    for step in way:
        step.commit(half_gone(step))
        if early:
            raise EOFError("left early")


def calls(network, name, batch):
    """Return what a module reads and returns, call by call."""
    seen = []
    hook = network.get_submodule(name).register_forward_hook(
        lambda _, args, y: seen.append((args[0].clone(), y.clone()))
    )
    with hook:
        network(**batch)
    return seen


def read_by(consumer, prepared, dense):
    """Return all that a consumer reads, and what its output lacks to that in the dense model."""
    inputs, corrections = [], []
    for batch in prepared.batches():
        both = (calls(network, consumer.name, batch) for network in (prepared.model, dense))
        for (x, y), (_, wanted) in zip(*both, strict=True):
            inputs += [piece.double() for piece in consumer.read_inputs(x)]
            corrections.append(consumer.read_corrections(wanted - y, x).double())
    return torch.cat(inputs), torch.cat(corrections)


def close(found, expected, to):
    scale = float(expected.abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=0, atol=to * scale)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_groups_are_measured_alone_or_through_what_was_committed_before(name, monkeypatch):
    """And with targets that are what the dense model returns, where nobody adds to that."""
    monkeypatch.setattr("osscar.walk.walk.streams", lambda *_: {})
    torch.manual_seed(1)
    model, data = (make() for make in CASES[name])
    near, seen = TOLERANCE.get(name, 1e-4), []
    with prepare(model, data, batch_size=BATCH) as prepared, torch.no_grad():
        groups = [group for group in prepared.groups if group.prunable]
        way, dense = Walk(prepared, groups, in_turn=False), copy.deepcopy(prepared.model)
        for step in way:
            for gram in step.grams:
                X, _ = read_by(gram.linear_map, prepared, dense)
                close(gram.fitted.gram.dense(), X.T @ X, near / 10)
        assert way.passes == 1
        for step in Walk(prepared, groups, target=Target.RESIDUAL):
            for gram in step.grams:
                W0 = gram.linear_map.read_weight()
                X, D = read_by(gram.linear_map, prepared, dense)
                close(gram.fitted.gram.dense(), X.T @ X, near / 10)
                if gram.linear_map.bias is not None:
                    X, D = X - X.mean(0), D - D.mean(0)
                for share in (1.0, 0.5):
                    _, (G, e) = copy.deepcopy(gram.fitted).given_up(W0, share)
                    Y = X @ W0 + share * D
                    close(G, X.T @ Y / len(X), near)
                    expected = float(Y.square().sum() / len(X))
                    assert e == pytest.approx(expected, rel=10 * near, abs=1e-12)
            step.correction_weight = 0.5
            step.problem(max(1, step.group.units // 2), damp=0.01)  # well posed
            step.commit(half_gone(step))
            seen.append(step.group.name)
    assert sorted(seen) == sorted(group.name for group in groups)


def test_a_study_poses_the_problem_that_pruning_solves(monkeypatch):
    """Where nothing else is pruned, the stream of `prune` is the dense one."""
    seen, select = [], Greedy.select
    monkeypatch.setattr(Greedy, "select", lambda *given: seen.append(given[1]) or select(*given))
    model, data = seeded(Twice)(), torch.randn(7, 6)
    problem = next(one for _, one in model_problems(model, data) if one.units == 10)
    asked = {"groups": {problem.name: 5}, "target": "weights", "damp": 0.01, "backend": "greedy"}
    osscar.prune(model, data, **asked)
    (solved,) = seen
    assert (solved.name, solved.keep) == (problem.name, 5)
    for mine, theirs in zip(problem.consumers, solved.consumers, strict=True):
        for part in ("H", "G", "W0", "rows"):
            assert torch.equal(getattr(mine, part), getattr(theirs, part)), part
        assert (mine.e, mine.damping) == (theirs.e, theirs.damping)


# ---- how often the batches set out -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "residual", "passes"),
    [
        ("gpt2", True, 1),
        ("shortcut", False, 2),
        ("cnn", False, 3),  # two gated blocks: the gate is read before the projection
        ("twice", True, 2),
    ],
)
def test_only_groups_that_are_read_in_several_calls_cost_a_pass(name, residual, passes):
    build, data = CASES[name]
    with prepare(build(), data(), batch_size=BATCH) as prepared:
        left = () if residual else prepared.residual
        groups = [one for one in prepared.groups if one.prunable and one.name not in left]
        way = Walk(prepared, groups)
        commit_all(way)
        assert way.passes == passes


# ---- what goes wrong ---------------------------------------------------------------------


class Moody(nn.Module):
    """Does as it is told in its second batch."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 7)
        self.last = nn.Linear(7, 2)
        self.mood, self.inside = None, []

    def forward(self, x):
        second = self.mood and float(x[0, 0].detach()) == float(DATA[BATCH, 0])
        here = self.mood if second else None
        with self.visited():
            hidden = torch.relu(self.up(x))
            if here == "ends":
                return x
            if here == "fails":
                raise ValueError("no such luck")
            if here == "interrupted":
                raise KeyboardInterrupt
            if here != "skips":
                x = self.down(hidden)
            if here == "repeats":
                x = self.down(hidden)
            return self.last(torch.relu(self.head(x)))

    @contextmanager
    def visited(self):
        self.inside.append(1)
        try:
            yield
        finally:
            self.inside.pop()


DATA = torch.arange(54.0).view(9, 6) / 27


MOODS = {
    "fails": (DataError, r"batch 1 fails in 'the model': ValueError: no such luck"),
    "skips": (DataError, r"batch 1 calls 'head' where others call 'down'"),
    "repeats": (DataError, r"batch 1 calls 'down' where others call 'head'"),
    "ends": (DataError, r"batch 1 never reaches 'down'"),
    "interrupted": (KeyboardInterrupt, "^$"),
    None: (EOFError, "left early"),
}


def test_a_walk_that_ends_early_leaves_nothing_behind():
    model = seeded(Moody)()
    before = copy.deepcopy(model.state_dict())
    with prepare(model, DATA, batch_size=BATCH) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        dense, grad = copy.deepcopy(prepared.model.state_dict()), torch.is_grad_enabled()
        for mood, (error, message) in MOODS.items():
            prepared.model.load_state_dict(dense)  # what was committed stays
            prepared.model.mood = mood
            with pytest.raises(error, match=message):
                commit_all(Walk(prepared, groups), early=mood is None)
            assert prepared.model.inside == []  # every pass has left its context managers
            modules = list(prepared.model.modules())
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)
            assert torch.is_grad_enabled() == grad
    gc.collect()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [o for o in gc.get_objects() if isinstance(o, Coroutine) and o.arrived is not None]


@network(conv=(1, 8, 1), up=(8, 6), down=(6, 2))
def Centred(net, x):
    """Takes means over its batch."""
    hidden = torch.relu(net.up(net.conv(x).mean((2, 3))))
    return net.down(hidden - hidden.mean(0))


def test_a_model_that_mixes_the_samples_of_a_batch_keeps_its_batches():
    data = torch.randn(9, 1, 1, 1).repeat(1, 1, 640, 640)
    with prepare(seeded(Centred)(), data) as prepared:
        assert [len(*batch.values()) for batch in prepared.batches()] == [9]


class Plain(nn.Module):
    """Gives its layer an argument by keyword, and goes on where that fails."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.ends = nn.Linear(6, 9), nn.Linear(9, 6), 0

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        try:
            return self.down(input=hidden)
        except BaseException:
            self.ends += 1
            return self.down(input=hidden)


def test_code_that_catches_the_end_of_its_pass_does_not_go_on():
    with prepare(seeded(Plain)(), DATA, batch_size=BATCH) as prepared:
        commit_all(Walk(prepared, [group for group in prepared.groups if group.prunable]))
        assert prepared.model.ends == 3
        assert not any(m._forward_pre_hooks for m in prepared.model.modules())


def test_activations_that_are_not_finite_are_refused_with_their_consumer():
    data = torch.randn(7, 6)
    data[5] = 3e38
    with prepare(seeded(Twice)(), data, batch_size=BATCH) as prepared:
        prepared.model.up.weight.data.mul_(1e3)
        with pytest.raises(NonFiniteError, match="'down'"):
            list(Walk(prepared, [group for group in prepared.groups if group.prunable]))


def test_a_consumer_that_is_never_called_is_refused():
    with prepare(seeded(Plain)(), torch.randn(7, 6)) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        prepared.model.forward = lambda x: x
        with pytest.raises(ModelError, match="'down' was never called"):
            Walk(prepared, groups)


def test_inputs_by_keyword_are_seen_and_the_last_samples_are_held_out():
    data = torch.randn(7, 6)
    with prepare(seeded(Plain)(), data, batch_size=BATCH) as prepared:
        (step,) = Walk(prepared, [group for group in prepared.groups if group.prunable], held_out=2)
        (gram,), X = step.grams, torch.relu(prepared.model.up(data)).double()
    assert (gram.fitted.positions, gram.held_out_rows) == (5, 2)
    torch.testing.assert_close(gram.fitted.gram.dense(), (X[:5].T @ X[:5]).detach())
    torch.testing.assert_close(gram.held_out.gram.dense(), (X[5:].T @ X[5:]).detach())
