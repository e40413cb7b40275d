"""What costs come to as functions of widths, also where a group meets itself in a weight."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import osscar
from osscar.allocation import search
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, Costs, CountedCost, _Weight, count
from osscar.allocation.measured import Curve
from osscar.allocation.widths import asked_groups, possible_widths
from osscar.base.errors import RequestError
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import copied, count_parameters
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.request import PruningRequest as Asked
from osscar.shrinking.slice import slice_units
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net
from tests.osscar.test_budget import experts

# ---- a cost over one group's count -------------------------------------------------------

NAMES = "abc"


@st.composite
def costs(draw, outside=0):
    """Weights of up to four dimensions, each of which up to three slots take from, but for some."""
    units = {name: draw(st.integers(1, 9)) for name in NAMES}
    weights = []
    for _ in range(draw(st.integers(0, 4))):
        shape, taken = [], []
        for dim in range(draw(st.integers(1, 4))):
            slots = draw(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 3)), max_size=3))
            taken += [(dim, name, width) for name, width in slots]
            shape.append(draw(st.integers(outside, 4)) + sum(w * units[name] for name, w in slots))
        weights.append(_Weight(draw(st.integers(1, 4)), tuple(shape), tuple(taken)))
    each = draw(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9)))
    return CountedCost(tuple(weights), draw(st.integers(0, 99)), each, units)


@given(costs(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_cost_over_one_group_differs_from_that_of_the_model_by_a_constant(cost, data):
    kept = {name: data.draw(st.integers(0, units)) for name, units in cost.units.items()}
    for name, units in cost.units.items():
        counts = np.arange(units + 1)
        whole = np.array([cost.of({**kept, name: int(c)}) for c in counts])
        over = cost.over(name, counts, kept)
        np.testing.assert_array_equal(over - over[0], whole - whole[0])


@given(costs(outside=1), st.sets(st.sampled_from(NAMES)))
@settings(max_examples=100, deadline=None)
def test_costs_are_separable_where_no_mixed_difference_is_anything(cost, names):
    mixed = (
        cost.of({}) - cost.of({a: 0}) - cost.of({b: 0}) + cost.of({a: 0, b: 0})
        for a, b in itertools.combinations(sorted(names), 2)
    )
    assert (len(cost.classes(names)) == len(names)) == (not any(mixed))


@st.composite
def shared(draw):
    """A cost, curves of its groups, and the widths that these may have."""
    cost, random = draw(costs(outside=1)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    curves = {}
    for name, units in cost.units.items():
        losses = np.sort(random.exponential(size=units) ** draw(st.sampled_from([0.3, 1, 3])))
        curves[name] = Curve(name, np.append(losses[::-1], 0.0))
    options = {name: np.arange(1, units + 1) for name, units in cost.units.items()}
    return cost, curves, options


@given(shared(), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_any_costs_are_kept_within_any_limit_that_some_widths_meet(problem, share):
    cost, curves, options = problem
    choices = [
        dict(zip(options, widths, strict=True))
        for widths in itertools.product(*(some.tolist() for some in options.values()))
    ]
    found = best_at_each_cost(cost, curves, choices)
    limit = list(found)[int(share * (len(found) - 1))]
    losses = {name: curves[name].losses[some] for name, some in options.items()}
    for most in (search._MOST_TOGETHER, 0):  # none is listed then
        with mock.patch.object(search, "_MOST_TOGETHER", most):
            searched = search.Search(options, losses, {}, Costs((cost,)))
            kept, bound, prices = searched.choose([limit])
            assert cost.of(kept) <= limit
            assert (bound is None) == (most == 0)
            budget = SimpleNamespace(
                predicted=searched.loss(kept),
                lower_bound=bound,
                frontier=searched.frontier(prices),
            )
            check_bound(budget, found, limit)


def test_a_limit_is_kept_to_the_last_of_billions_of_parameters():
    cost = CountedCost((_Weight(1.0, (2, 7_000_000_000), ((0, "a", 1),)),), 0.0, {}, {"a": 2})
    losses = {"a": np.array([1.0, 0.0])}
    one = search.Search({"a": np.array([1, 2])}, losses, {}, Costs((cost,)))
    assert one.choose([7e9]).kept == {"a": 1}
    assert one.choose([7e9 - 3]) == ({"a": 1}, None, None)


# ---- budgets of networks in which a group meets itself -----------------------------------


class ConvLSTM(nn.Module):
    """Hidden channels are read by the convolution that makes them."""

    def __init__(self, hidden=8):
        super().__init__()
        self.gates = nn.Conv2d(2 + hidden, 4 * hidden, 3, padding=1)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.gates.out_channels // 4, *x.shape[-2:])
        c = h
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h.mean((2, 3)))


class Stacked(nn.Module):
    """One ConvLSTM behind another: some weights lose by two groups, and some by one twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = ConvLSTM(5), ConvLSTM(4)
        self.first.head, self.second.gates = nn.Identity(), nn.Conv2d(5 + 4, 16, 3, padding=1)

    def forward(self, x):
        first, second = self.first.gates, self.second.gates
        h1 = c1 = x.new_zeros(x.shape[0], first.out_channels // 4, *x.shape[-2:])
        h2 = c2 = x.new_zeros(x.shape[0], second.out_channels // 4, *x.shape[-2:])
        for t in range(x.shape[1]):
            i, f, o, g = first(torch.cat([x[:, t], h1], 1)).chunk(4, 1)
            c1 = torch.sigmoid(f) * c1 + torch.sigmoid(i) * torch.tanh(g)
            h1 = torch.sigmoid(o) * torch.tanh(c1)
            i, f, o, g = second(torch.cat([h1, h2], 1)).chunk(4, 1)
            c2 = torch.sigmoid(f) * c2 + torch.sigmoid(i) * torch.tanh(g)
            h2 = torch.sigmoid(o) * torch.tanh(c2)
        return self.second.head(h2.mean((2, 3)))


class Twice(nn.Module):
    """A convolution that is called on its own outputs, between two others."""

    def __init__(self):
        super().__init__()
        self.stem, self.mixed = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.mixed(torch.relu(self.mixed(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Residual(nn.Module):
    """Two blocks, in the first of which a convolution reads and makes residual channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.down, self.head = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.plain(x))
        x = x[..., 1:-1, 1:-1] + self.down(torch.relu(self.up(x)))
        return self.head(x.mean((2, 3)))


class Cell(nn.Module):
    """A recurrent cell of linear layers, whose states are a residual stream, and neurons."""

    def __init__(self):
        super().__init__()
        self.read, self.carry = nn.Linear(3, 7), nn.Linear(7, 7)
        self.up, self.head = nn.Linear(7, 9), nn.Linear(9, 4)

    def forward(self, x):
        h = torch.tanh(self.read(x[:, 0]))
        for t in range(1, x.shape[1]):
            h = torch.tanh(self.read(x[:, t]) + self.carry(h))
        return self.head(torch.relu(self.up(h)))


NETWORKS = {
    "conv-lstm": (ConvLSTM, (24, 2, 2, 5, 5), {}),
    "stacked": (Stacked, (24, 2, 2, 5, 5), {}),
    "twice": (Twice, (24, 2, 6, 6), {}),
    "residual": (Residual, (24, 2, 6, 6), {"residual": 0.5}),
    "cell": (Cell, (48, 4, 3), {"residual": "4/7"}),
}
WIDTHS = {"any": {}, "a third": {"at_least": "1/3", "round_to": 2}}


def built(name):
    torch.manual_seed(0)
    build, shape, asked = NETWORKS[name]
    return build().eval(), torch.randn(shape), asked


def every_choice(prepared, request):
    """Yield all widths that a budget may choose, with what other groups keep."""
    _, keep, shared = asked_groups(prepared, request)
    options = [possible_widths(group, request.widths).tolist() for group in shared]
    for widths in itertools.product(*options):
        yield {**keep, **dict(zip([g.name for g in shared], widths, strict=True))}


def random_curves(prepared, request):
    """Return a curve of random losses for each group that shares a budget."""
    random, found = np.random.default_rng(0), {}
    for group in asked_groups(prepared, request)[2]:
        falls = random.exponential(size=group.units) ** 2
        found[group.name] = Curve(group.name, np.append(np.sort(falls).cumsum()[::-1], 0.0))
    return found


BUDGETS = {Cost.PARAMETERS: "params", Cost.FLOPS: "flops", Cost.BYTES: "size"}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", BUDGETS)
def test_every_budget_that_some_widths_meet_is_met_and_no_other(name, widths, kind):
    model, data, asked = built(name)
    asked = {**asked, **WIDTHS[widths]}
    with prepare(model, data) as prepared:
        cost = count(kind, prepared.model, prepared.groups, prepared.sample)
        request = Asked(params=0.5, **asked)
        curves = random_curves(prepared, request)
        if kind is Cost.PARAMETERS:  # a group that meets itself is no product of two
            apart = len(cost.classes(curves)) == len(curves)
            assert apart == (name not in ("stacked", "twice"))
        found = best_at_each_cost(cost, curves, every_choice(prepared, request))
        least, *others = found
        assert others

        def reached(limit):
            limit = limit / cost.dense if kind is Cost.FLOPS else int(limit)
            request = Asked(**asked, **{BUDGETS[kind]: limit})
            budget = allocate(prepared, request, curves=curves).budget
            return budget.tightest.reached, budget

        tight = 1 + 1e-12 if kind is Cost.FLOPS else 1
        for limit in [least, *others[:: max(1, len(others) // 12)]]:
            if limit < cost.dense:
                met, budget = reached(limit * tight)
                assert met <= limit * (1 + 1e-9)
                check_bound(budget, found, limit)
        with pytest.raises(RequestError, match=f"comes to {least:,.0f} of"):
            reached(least * (1 - 1e-6) if kind is Cost.FLOPS else least - 1)


def best_at_each_cost(cost, curves, choices):
    """Return the least predicted divergence of the choices of each cost, these ascending."""
    best = {}
    for kept in choices:
        loss = sum(float(curves[name].losses[kept[name]]) for name in curves)
        whole = cost.of(kept)
        best[whole] = min(loss, best.get(whole, loss))
    return dict(sorted(best.items()))


def check_bound(budget, found, limit):
    """Compare a choice with the best of all, where something was proved of it."""
    best = min(loss for cost, loss in found.items() if cost <= limit)
    assert budget.predicted >= best * (1 - 1e-9)
    if budget.lower_bound is not None:
        assert budget.lower_bound <= best * (1 + 1e-9)
        assert budget.predicted <= best * 1.005 + 1e-300
    costs, nats = map(np.array, zip(*budget.frontier, strict=True))
    assert (np.diff(costs) > 0).all()
    assert (np.diff(nats) <= 0).all()
    assert set(costs) <= set(found)


@pytest.mark.parametrize("name", NETWORKS)
def test_models_have_no_more_than_the_parameters_that_were_asked_for(name):
    model, data, asked = built(name)
    with prepare(model, data) as prepared:
        cost = count(Cost.PARAMETERS, prepared.model, prepared.groups, prepared.sample)
        some = sorted({cost.of(k) for k in every_choice(prepared, Asked(params=0.5, **asked))})
    limit = int(some[len(some) // 3])
    result = osscar.prune(model, data, params=limit, allocation="uniform", backend="wanda", **asked)
    assert count_parameters(result.model) == result.budget.tightest.reached <= limit


# ---- bytes -------------------------------------------------------------------------------


class Tied(nn.Module):
    """A layer with two names, and a table that no file of its state has."""

    def __init__(self):
        super().__init__()
        self.one, self.back, self.last = nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        self.again = self.one
        self.register_buffer("table", torch.ones(4000), persistent=False)

    def forward(self, x):
        x = self.back(torch.relu(self.one(x)))
        return self.last(torch.relu(self.again(x))) + self.table.mean()


class Listed(nn.Module):
    """Units meet numbers that the code lists, which a program holds."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * torch.tensor([0.5 + 0.01 * i for i in range(64)]))


SAVED = {
    "tied in one format": (lambda: tiny("gpt2", layers=1), lambda: tokens(8, 24), {}),
    "stock": (lambda: tiny("llama-gqa").bfloat16(), lambda: tokens(8, 24), {}),
    "experts, written one by one": (experts, lambda: tokens(8, 24), {}),
    "buffers that lose units": (small_net, lambda: images(16), {}),
    "tied": (Tied, lambda: torch.randn(64, 8), {}),
    "a program, and its tables": (
        Tied,
        lambda: torch.randn(64, 8),
        {"form": "exported", "size": "18kB"},
    ),
    "a program, and its lists": (Listed, lambda: torch.randn(64, 8), {"form": "exported"}),
}


def stored(directory):
    """The bytes of the tensors in a directory's file."""
    (file,) = directory.glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", SAVED)
def test_the_tensors_of_a_file_have_the_bytes_that_were_promised(case, tmp_path):
    torch.manual_seed(0)
    build, data, asked = SAVED[case]
    asked = {"size": 0.8, "allocation": "uniform", "backend": "wanda", **asked}
    result = osscar.prune(build().eval(), data(), **asked)
    osscar.save(result.model, tmp_path / "saved")
    assert (
        stored(tmp_path / "saved") == result.budget.tightest.reached <= result.budget.tightest.limit
    )


def test_a_share_of_a_program_is_one_of_the_weights_that_one_has(tmp_path):
    torch.manual_seed(0)
    net, data = Listed().eval(), torch.randn(64, 8)
    asked = {"form": "exported", "allocation": "uniform", "backend": "wanda"}
    osscar.save(net, tmp_path / "dense")
    dense = stored(tmp_path / "dense")
    result = osscar.prune(net, data, size=0.8, **asked)
    assert dense == result.budget.tightest.dense
    assert result.budget.tightest.limit == pytest.approx(0.8 * result.budget.tightest.dense, abs=1)
    osscar.save(result.model, tmp_path / "saved")
    assert 0.75 * dense < stored(tmp_path / "saved") <= 0.8 * dense
    with pytest.raises(RequestError, match=r"allows 1,000,000 bytes, and the exported program has"):
        osscar.prune(net, data, size="1MB", **asked)
    # Its table, which no file of the modules has, lies in the program.
    with pytest.raises(RequestError, match=r"cannot be.*16,\d+, as an exported program, of 6,464"):
        osscar.prune(Tied().eval(), data, size=0.8, **asked)


# ---- operations of layers that are called in many ways -----------------------------------


def chain(*layers, classes=4):
    """A network of convolutions, with a head on the mean of their outputs."""
    between = itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers)
    return nn.Sequential(*between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(classes))


def grouped():
    return chain(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4, stride=2), nn.Conv2d(12, 6, 1)
    )  # fmt: skip


def depthwise():
    return chain(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 6, 1),
    )  # fmt: skip


def transposed():
    return chain(
        nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 6, 2, groups=3), nn.Conv2d(6, 5, 1),
    )  # fmt: skip


class Attends(nn.Module):
    """Attention, neurons, and logits that no layer makes, in one module."""

    def __init__(self, words=50):
        super().__init__()
        self.q, self.k, self.v, self.out = *(nn.Linear(12, 16) for _ in range(3)), nn.Linear(16, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.words = nn.Parameter(torch.randn(words, 12))

    def forward(self, x):
        heads = [
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return (x + self.down(torch.relu(self.up(x)))) @ self.words.T


class CalledTwice(Twice):
    """A layer that is called twice, on maps of two sizes."""

    def forward(self, x):
        x = torch.relu(self.mixed(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.last(self.mixed(F.max_pool2d(x, 2)))).mean((2, 3)))


class ByFunctions(nn.Module):
    """A weight that no layer has, one with a name of its own, and two that are copied first."""

    def __init__(self):
        super().__init__()
        self.enter, self.on = nn.Parameter(torch.randn(10, 6)), nn.Linear(10, 8)
        self.first = nn.Parameter(torch.randn(3, 8, 7))
        self.second = nn.Parameter(torch.randn(3, 7, 8))

    def forward(self, x):
        x = torch.relu(self.on(torch.relu(F.linear(x, self.enter))))
        hidden = torch.relu(torch.einsum("bi,eih->ebh", x, self.first))
        return torch.einsum("ebh,eho->bo", hidden, self.second)


class Registers(nn.Module):
    """Attention that has tokens and a bias of its own, in three dimensions like stacked experts."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, 12))
        self.bias = nn.Parameter(torch.randn(1, 9, 9))
        self.qkv, self.out, self.head = nn.Linear(12, 48), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2).flatten(2)
        return self.head(self.out(x)[:, 0])


class Scores(nn.Module):
    """Queries, keys and values, and what comes of them, without the layer that reads that."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))

    def forward(self, x):
        heads = [
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Apart(nn.Module):
    """Attention whose output layer lies in another module, and a query that is a parameter."""

    def __init__(self):
        super().__init__()
        self.attention, self.output = Scores(), nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12))
        self.query = nn.Parameter(torch.randn(1, 1, 12))
        self.read, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.output(self.attention(x)) + torch.tanh(self.query)
        return self.head(torch.relu(self.read(x)) + torch.relu(self.read(self.query)))


class ClassToken(nn.Module):
    """Layers that are given views of parameters, or a tensor of no module that has a gradient."""

    def __init__(self):
        super().__init__()
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 6)), nn.LayerNorm(6)
        self.table = torch.randn(2, 1, 6, requires_grad=True)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        token = self.norm(self.token.expand(len(x), -1, -1)) + self.norm(self.table[:1])
        return self.down(torch.relu(self.up(torch.cat([token, x], 1))))


CALLED = {
    "registers": (Registers, (8, 6, 12)),
    "apart": (Apart, (8, 6, 12)),
    "grouped": (grouped, (8, 3, 9, 9)),
    "depthwise": (depthwise, (8, 3, 9, 9)),
    "transposed": (transposed, (8, 3, 9, 9)),
    "attention": (Attends, (8, 6, 12)),
    "called twice": (CalledTwice, (8, 2, 10, 10)),
    "by functions": (ByFunctions, (8, 6)),
}


def by_torch(model, *inputs):
    """Return what torch's own counter says, in which gradients have to be."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CALLED)
def test_operations_are_those_of_the_model_that_is_really_smaller(case):
    torch.manual_seed(0)
    build, shape = CALLED[case]
    model, data = build().eval(), torch.randn(shape)
    model(data)
    with prepare(model, data) as prepared:
        cost = count(Cost.FLOPS, prepared.model, prepared.groups, prepared.sample)
        groups = [group for group in prepared.groups if group.prunable and group.units > 1]
        # Of einsum, what is left of one unit is multiplied by element, which torch does not count.
        least = 2 if case == "by functions" else 1
        some = [{least, (group.units + 1) // 2, group.units} for group in groups]
        assert groups
        assert cost.fixed == pytest.approx(0.0, abs=1e-6)
        assert cost.dense == pytest.approx(by_torch(model, data[:1]), rel=1e-12)
        for widths in itertools.product(*some):
            kept = dict(zip([group.name for group in groups], widths, strict=True))
            plan = [GroupPlan.of(g, tuple(range(kept[g.name]))) for g in groups]
            plan = PruningPlan(tuple(p for p in plan if len(p.kept) < p.units))
            smaller = copied(prepared.model)
            slice_units(smaller, plan)
            assert cost.of(kept) == pytest.approx(count_flops(smaller, prepared.sample), rel=1e-12)


def test_layers_that_torch_runs_as_one_operator_are_counted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(8, 5, 16)
    assert count_flops(model, {"src": x}) == by_torch(model, x) > 0
    result = osscar.prune(model, x, flops=0.7, backend="wanda")
    assert result.budget.tightest.dense == pytest.approx(by_torch(model, x[:1]), rel=1e-12)
    assert count_flops(result.model, {"src": x[:1]}) <= 0.7 * result.budget.tightest.dense


def dense_and_halved(model, data):
    """Return the operations of a model, and those with half of all units."""
    with prepare(model, data) as prepared:
        cost = count(Cost.FLOPS, prepared.model, prepared.groups, prepared.sample)
        return cost.dense, cost.of({g.name: (g.units + 1) // 2 for g in prepared.groups})


def test_operations_of_weights_on_disk_are_those_of_the_same_in_memory():
    loaded = [osscar.load_model(DEMO_DIRECTORY, max_memory=limit) for limit in (None, "1GB")]
    memory, disk = (dense_and_halved(one.model, tokens(2, 24)) for one in loaded)
    assert disk == pytest.approx(memory, rel=1e-12)


def test_matrices_of_experts_that_are_picked_are_counted_as_theirs():
    kernels = ("grouped_mm", "batched_mm", "eager")
    at_once, *others = (dense_and_halved(experts(kernel), tokens(2, 24)) for kernel in kernels)
    assert others == [pytest.approx(at_once, rel=1e-12)] * 2


def test_operations_are_counted_where_layers_are_given_views_of_parameters():
    torch.manual_seed(0)
    model, data = ClassToken().eval(), torch.randn(48, 3, 6)
    assert count_flops(model, {"x": data[:2]}) == 2 * 2 * 4 * (6 * 10 + 10 * 4)
    smaller = osscar.prune(model, data, flops=0.8, device="cpu").model
    assert count_flops(smaller, {"x": data[:2]}) == 2 * 2 * 4 * (6 * 8 + 8 * 4)
