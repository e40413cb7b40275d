"""The walk: what it measures, on any model, and that nothing of it stays behind."""

import copy
import gc
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5ForConditionalGeneration

import osscar
import solvers
from osscar.base.errors import DataError, ModelError, NonFiniteError
from osscar.preparation.prepare import prepare
from osscar.study.problems import model_problems
from osscar.walk.coroutines import Coroutine
from osscar.walk.targets import Target
from osscar.walk.walk import walk
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net

BATCH = 3


# ---- models ------------------------------------------------------------------------------


class Twice(nn.Module):
    """One feed-forward layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 4)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


class Steps(nn.Module):
    """A cell that is called once for each position, as often as the data are long."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            state = torch.tanh(self.down(torch.relu(self.up(step + state))))
        return self.head(state)


class Skipping(nn.Module):
    """A late layer reads an early one's output, and layers work in place."""

    def __init__(self):
        super().__init__()
        self.early, self.middle = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.joined, self.late = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        early = self.early(x)
        middle = torch.relu_(self.middle(early.relu()))
        return self.late(self.joined(torch.cat([early, middle], 1)).relu_())


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


class Chunked(nn.Module):
    """A layer that is called for so many samples at a time, and so more often on real batches."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return torch.cat([self.down(torch.relu(self.up(part))) for part in x.split(2)])


class Unwritten(nn.Module):
    """Under inference mode nobody counts writes, such as the one between the two readers."""

    def __init__(self):
        super().__init__()
        self.up, self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(9, 4)

    def forward(self, x):
        with torch.inference_mode():
            hidden = self.up(x)
            y = self.first(hidden)
            hidden.relu_()
            return (y + self.second(hidden)).clone()


class Shortcut(nn.Module):
    """A stem that a block and its shortcut read, as in ResNet-50."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.second, self.shortcut = nn.Conv2d(6, 10, 1), nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.second(torch.relu(self.first(x)))
        return self.head((y + self.shortcut(x)).relu().mean((2, 3)))


class Overwritten(Shortcut):
    """The same, but the stem's output is written to in between."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.second(torch.relu(self.first(x)))
        return self.head((y + self.shortcut(x.mul_(1.5))).relu().mean((2, 3)))


class Surrounded(nn.Module):
    """Consumers that are called under context managers of every sort."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        first, second, third, fourth, fifth, last = self.layers
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = second(torch.relu(first(x)))
        with torch.inference_mode():
            x = third(torch.tanh(x.to(third.weight)))
        with torch.enable_grad(), torch.device("cpu"), sdpa_kernel(SDPBackend.MATH):
            x = fourth(torch.relu(x.clone()))
        return last(torch.relu(fifth(torch.relu(x)))).detach()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model


def pairs_of_tokens():
    return {"input_ids": tokens(7, 10) + 0, "decoder_input_ids": tokens(7, 6, seed=5)}


def seeded(kind):
    def build():
        torch.manual_seed(0)
        return kind().eval()

    return build


CASES = {
    "opt": (lambda: tiny("opt"), lambda: tokens(7)),
    "gpt2": (lambda: tiny("gpt2"), lambda: tokens(7)),
    "t5": (t5, pairs_of_tokens),
    "cnn": (small_net, lambda: images(7)),
    "skipping": (seeded(Skipping), lambda: images(7)),
    "shortcut": (seeded(Shortcut), lambda: images(7)),
    "overwritten": (seeded(Overwritten), lambda: images(7)),
    "twice": (seeded(Twice), lambda: torch.randn(7, 6)),
    "steps": (seeded(Steps), lambda: torch.randn(7, 4, 5)),
    "hoarding": (seeded(Hoarding), lambda: torch.randn(7, 6)),
    "chunked": (seeded(Chunked), lambda: torch.randn(9, 6)),
    "unwritten": (seeded(Unwritten), lambda: torch.randn(7, 6)),
    "surrounded": (seeded(Surrounded), lambda: torch.randn(7, 8)),
}
TOLERANCE = {"surrounded": 1e-2}  # a layer of it computes in bfloat16


@pytest.fixture(params=CASES)
def case(request):
    build, data = CASES[request.param]
    torch.manual_seed(1)
    return request.param, build(), data()


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


def commit_all(way):
    for step in way:
        step.commit(half_gone(step))


def read_by(consumer, prepared, dense):
    """Return all that a consumer reads, and what its output lacks to that in the dense model."""
    inputs, corrections = [], []
    for batch in prepared.batches():
        (x, pruned), (_, wanted) = (
            _calls(network, consumer.name, batch) for network in (prepared.model, dense)
        )
        for read, a, b in zip(x, pruned, wanted, strict=True):
            inputs += [piece.double() for piece in consumer.read_inputs(read)]
            corrections.append(consumer.read_outputs(b - a, read).double())
    return torch.cat(inputs), torch.cat(corrections)


def _calls(network, name, batch):
    """Return what a module reads and puts out, call by call."""
    read, put_out = [], []

    def see(module, args, output):
        read.append(args[0].detach().clone())
        put_out.append(output.detach().clone())

    hook = network.get_submodule(name).register_forward_hook(see)
    network(**batch)
    hook.remove()
    return read, put_out


def close(found, expected, to):
    scale = float(expected.abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=0, atol=to * scale)


@pytest.mark.sampled(4)
def test_groups_are_measured_alone_or_through_what_was_committed_before(case, monkeypatch):
    """And with targets that are what the dense model puts out, where nobody adds to that."""
    monkeypatch.setattr("osscar.walk.walk.streams", lambda *_: {})
    name, model, data = case
    near, seen = TOLERANCE.get(name, 1e-4), []
    with prepare(model, data, batch_size=BATCH) as prepared, torch.no_grad():
        groups = [group for group in prepared.groups if group.prunable]
        way, dense = walk(prepared, groups, in_turn=False), copy.deepcopy(prepared.model)
        for step in way:
            for gram in step.grams:
                X, _ = read_by(gram.linear_map, prepared, dense)
                close(gram.fitted.gram.dense(), X.T @ X, near / 10)
            with pytest.raises(ModelError, match="walk in turn"):
                step.commit(half_gone(step))
        assert way.passes == 1
        for step in walk(prepared, groups, target=Target.RESIDUAL):
            for gram in step.grams:
                W0 = gram.linear_map.read_weight()
                X, D = read_by(gram.linear_map, prepared, dense)
                close(gram.fitted.gram.dense(), X.T @ X, near / 10)
                if gram.linear_map.has_bias:
                    X, D = X - X.mean(0), D - D.mean(0)
                for share in (1.0, 0.5):
                    _, (G, e), _ = copy.deepcopy(gram.fitted).given_up(W0, share)
                    Y = X @ W0 + share * D
                    close(G, X.T @ Y / len(X), near)
                    expected = float(Y.square().sum() / len(X))
                    assert e == pytest.approx(expected, rel=10 * near, abs=1e-12)
            step.correction_weight = 0.5
            step.problem(max(1, step.group.units // 2), damp=0.01)  # well posed
            step.commit(half_gone(step))
            seen.append(step.group.name)
    assert sorted(seen) == sorted(group.name for group in groups)


@pytest.mark.sampled(2)
def test_a_study_poses_the_problem_that_pruning_solves(case):
    """Where nothing else is pruned, the stream of `prune` is the dense one."""
    _, model, data = case
    posed = {group.name: problem for group, problem in model_problems(model, data)}
    names = [name for name, problem in posed.items() if problem.units > 1]
    for name in dict.fromkeys((names[0], names[-1])):
        problem, spy = posed[name], Spy()
        keep = max(1, problem.units // 2)
        asked = {"groups": {name: keep}, "target": "weights", "damp": 0.01}
        osscar.prune(model, data, backend=spy, batch_norm="keep", **asked)
        (solved,) = spy.seen
        assert (solved.name, solved.keep) == (name, keep)
        for mine, theirs in zip(problem.consumers, solved.consumers, strict=True):
            for part in ("H", "G", "W0", "rows"):
                assert torch.equal(getattr(mine, part), getattr(theirs, part)), (name, part)
            assert (mine.e, mine.damping) == (theirs.e, theirs.damping)


@dataclass(frozen=True)
class Spy:
    """Keeps the first units, and the problems that it was given."""

    kind: ClassVar = solvers.BackendKind.HEURISTIC
    summary: ClassVar = "keeps the first units"
    capabilities: ClassVar = solvers.Capabilities()
    seen: list = field(default_factory=list)

    @classmethod
    def available(cls):
        return None

    def select(self, problem):
        self.seen.append(problem)
        return solvers.Selection(torch.arange(problem.keep), solvers.Status.FEASIBLE)


# ---- how often the batches set out -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds", "passes"),
    [
        ("opt", ("heads", "neurons"), 1),
        ("t5", ("neurons",), 1),
        ("shortcut", ("channels",), 1),  # a block and its shortcut read the same tensor
        ("cnn", ("inner",), 3),  # two gated blocks: the gate is read before the projection
        ("twice", ("neurons",), 1),  # nothing comes after it
    ],
)
def test_only_groups_that_are_read_in_several_calls_cost_a_pass(name, kinds, passes):
    build, data = CASES[name]
    with prepare(build(), data(), batch_size=BATCH) as prepared:
        groups = [
            group
            for group in prepared.groups
            if group.prunable
            and (name != "shortcut" or group.name not in prepared.residual)
            and (
                group.kind in kinds or (kinds == ("inner",) and group.name not in prepared.residual)
            )
        ]
        way = walk(prepared, groups)
        for step in way:
            step.commit(half_gone(step))
        assert way.passes == passes


# ---- what goes wrong ---------------------------------------------------------------------


class Moody(nn.Module):
    """Does as it is told, by batch."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 7)
        self.last = nn.Linear(7, 2)
        self.mood, self.inside, self.largest = {}, [], 0

    def forward(self, x):
        here = self.mood.get(float(x[0, 0].detach())) if self.mood else None
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


def moody(mood, batch):
    torch.manual_seed(0)
    model = Moody().eval()
    prepared = prepare(model, DATA, batch_size=BATCH)
    return model, prepared, {float(DATA[batch * BATCH, 0]): mood}


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("fails", r"batch 1 fails in 'the model': ValueError: no such luck"),
        ("skips", r"batch 1 calls 'head' where others call 'down'"),
        ("repeats", r"batch 1 calls 'down' where others call 'head'"),
        ("ends", r"batch 1 never reaches 'down'"),
    ],
)
def test_a_batch_that_goes_astray_is_named_and_nothing_stays_behind(mood, message):
    model, manager, moods = moody(mood, 1)
    before = copy.deepcopy(model.state_dict())
    with manager as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        prepared.model.mood = moods
        with pytest.raises(DataError, match=message):
            commit_all(walk(prepared, groups))
        assert prepared.model.inside == []  # every pass has left its context managers
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in prepared.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Coroutine) and o.arrived is not None]


@pytest.mark.parametrize("mood", ["interrupted", "left early"])
def test_a_walk_that_ends_early_ends_its_passes(mood):
    _, manager, moods = moody(mood, 2)
    grad = torch.is_grad_enabled()
    with manager as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        if mood == "interrupted":
            prepared.model.mood = moods
            with pytest.raises(KeyboardInterrupt):
                list(walk(prepared, groups))
        else:
            for step in walk(prepared, groups):
                step.commit(half_gone(step))
                break
        gc.collect()
        assert prepared.model.inside == []
        assert not any(m._forward_pre_hooks for m in prepared.model.modules())
    assert torch.is_grad_enabled() == grad


def test_code_that_catches_the_end_of_its_pass_does_not_go_on():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.last = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)
            self.ends = 0

        def forward(self, x):
            hidden = torch.relu(self.up(x))
            try:
                y = self.down(hidden)
            except BaseException:
                self.ends += 1
                y = self.down(hidden)
            return self.last(y)

    torch.manual_seed(0)
    with prepare(Stubborn().eval(), DATA, batch_size=BATCH) as prepared:
        for step in walk(prepared, [group for group in prepared.groups if group.prunable][:1]):
            step.commit(half_gone(step))
        assert prepared.model.ends == 3
        assert not any(m._forward_pre_hooks for m in prepared.model.modules())


def test_activations_that_are_not_finite_are_refused_with_their_consumer():
    model = seeded(Twice)()
    data = torch.randn(7, 6)
    data[5] = 3e38
    with prepare(model, data, batch_size=BATCH) as prepared:
        prepared.model.up.weight.data.mul_(1e3)
        with pytest.raises(NonFiniteError, match="'down'"):
            list(walk(prepared, [group for group in prepared.groups if group.prunable]))


def test_a_consumer_that_is_never_called_is_refused():
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    model = seeded(Unread)()
    with prepare(model, torch.randn(7, 6)) as prepared:
        (group,) = [group for group in prepared.groups if group.prunable]
        prepared.model.forward = lambda x: x
        with pytest.raises(ModelError, match="'down' was never called"):
            walk(prepared, [group])


def test_modes_of_a_suspended_pass_are_not_seen_outside():
    """A walk that stops under autocast, inference mode and gradients leaves none of them."""
    with prepare(seeded(Surrounded)(), torch.randn(7, 8), batch_size=BATCH) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        stack = torch._C._len_torch_function_stack()
        for step in walk(prepared, groups):
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.backends.cuda.flash_sdp_enabled()
            assert torch._C._len_torch_function_stack() == stack
            step.commit(half_gone(step))
    assert torch.is_grad_enabled()


def test_inputs_by_keyword_are_seen_and_the_last_samples_are_held_out():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x):
            return self.down(input=torch.relu(self.up(x)))

    data = torch.randn(7, 6)
    with prepare(seeded(Keyword)(), data, batch_size=BATCH) as prepared:
        (step,) = walk(prepared, [group for group in prepared.groups if group.prunable], held=2)
        (gram,), X = step.grams, torch.relu(prepared.model.up(data)).double()
    assert (gram.positions, gram.held_rows) == (5, 2)
    torch.testing.assert_close(gram.fitted.gram.dense(), (X[:5].T @ X[:5]).detach())
    torch.testing.assert_close(gram.held.gram.dense(), (X[5:].T @ X[5:]).detach())
