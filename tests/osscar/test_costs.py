"""What costs come to as functions of widths, also where a group meets itself in a weight."""

import itertools
import math
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
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import osscar
from graph import Size
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, CountedCost, count
from osscar.allocation.measured import Curve
from osscar.base.errors import EquivalenceError, RequestError
from osscar.checkpoint.formats import written_tensors
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import copied, count_parameters
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.slice import slice_units
from tests.osscar.families import tokens
from tests.osscar.mixtures import mixture

# ---- a cost over one group's count -------------------------------------------------------

NAMES = "abc"


@st.composite
def costs(draw):
    """Tensors of up to four dimensions, each a constant and units of groups, at a price each."""
    units = {name: draw(st.integers(1, 9)) for name in NAMES}
    widths = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=3)
    sizes = {}
    for _ in range(draw(st.integers(0, 4))):
        dims = [
            Size.summed({(): draw(st.integers(0, 4)), **{(n,): w for n, w in draw(widths).items()}})
            for _ in range(draw(st.integers(1, 4)))
        ]
        sizes[math.prod(dims[1:], start=dims[0])] = draw(st.integers(1, 4))
    return CountedCost.summed(sizes, units, draw(st.integers(0, 99)))


@given(costs(), st.data())
@settings(max_examples=60)
def test_a_cost_over_one_group_differs_from_that_of_the_model_by_a_constant(cost, data):
    kept = {name: data.draw(st.integers(0, units)) for name, units in cost.units.items()}
    for name, units in cost.units.items():
        counts = np.arange(units + 1)
        whole = np.array([cost.of({**kept, name: int(c)}) for c in counts])
        over = cost.over(name, counts, kept)
        np.testing.assert_array_equal(over - over[0], whole - whole[0])


@given(costs())
@settings(max_examples=60)
def test_widths_multiply_where_a_mixed_difference_is_anything(cost):
    for a, b in itertools.combinations(NAMES, 2):
        others = {name: 0 for name in NAMES if name not in (a, b)}
        for rest in ({}, others):
            mixed = cost.of(rest) - cost.of({**rest, a: 0}) - cost.of({**rest, b: 0})
            mixed += cost.of({**rest, a: 0, b: 0})
            assert not mixed or any({a, b} <= names for names in cost.coupled)
        if not any({a, b} <= names for names in cost.coupled):
            assert not mixed


def falling(random, units, power):
    return np.append(np.sort(random.exponential(size=units) ** power)[::-1], 0.0)


def random_curves(task):
    """Return a curve of random losses for each group that shares a budget."""
    random = np.random.default_rng(0)
    return {one.name: Curve(one.name, falling(random, one.units, 2)) for one in task.shared}


def allocated_by_random_curves(task):
    """Allocate as if these had been measured."""
    place, found = "osscar.allocation.allocate.measured_curves", (random_curves(task), "nats")
    with mock.patch(place, return_value=found):
        return allocate(task)


# ---- parameters and operations of networks -----------------------------------------------


class CNN(nn.Module):
    """Filters shrink along both dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2), nn.ReLU())
        self.third = nn.Conv2d(16, 10, 3, groups=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(torch.relu(self.third(self.second(self.first(x)))).mean((2, 3)))


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


class Twice(nn.Module):
    """A convolution that is called on its own outputs, on maps of two sizes, between two others."""

    def __init__(self):
        super().__init__()
        self.stem, self.mixed = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.mixed(torch.relu(self.stem(x)))), 2)
        return self.head(torch.relu(self.last(torch.relu(self.mixed(x)))).mean((2, 3)))


def chain(*layers):
    """A network of convolutions, with a head on the mean of their outputs."""
    between = itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers)
    return nn.Sequential(*between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))


def depthwise():
    return chain(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 12, 3, groups=4), nn.Conv2d(12, 6, 1),
    )  # fmt: skip


def transposed():
    return chain(
        nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 6, 2, groups=3), nn.Conv2d(6, 5, 1),
    )  # fmt: skip


class Scores(nn.Module):
    """Attention with a bias of its own, without the layer that reads it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 9, 9))  # of three dimensions, as stacked experts
        self.qkv = nn.Linear(12, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return y.transpose(1, 2).flatten(2)


class Attends(nn.Module):
    """Attention with tokens of its own, a layer that reads a parameter, too, and bare logits."""

    def __init__(self):
        super().__init__()
        self.tokens, self.attention = nn.Parameter(torch.randn(1, 3, 12)), Scores()
        self.output = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.query, self.words = (nn.Parameter(torch.randn(n, 12)) for n in (1, 50))

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        x = self.output(self.attention(x)) + torch.tanh(self.query)
        hidden = torch.relu(self.up(x)) + torch.relu(self.up(self.query))
        return (x + self.down(hidden)) @ self.words.T


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


NETWORKS = {
    "cnn": (CNN, (8, 3, 10, 10)),
    "conv-lstm": (ConvLSTM, (8, 2, 2, 5, 5)),
    "twice": (Twice, (8, 2, 10, 10)),
    "depthwise": (depthwise, (8, 3, 9, 9)),
    "transposed": (transposed, (8, 3, 9, 9)),
    "attention": (Attends, (8, 6, 12)),
    "by functions": (ByFunctions, (8, 6)),
}


def by_torch(model, *inputs):
    """Return what torch's own counter says, in which gradients have to be."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", NETWORKS)
def test_costs_are_those_of_the_model_that_is_really_smaller(case):
    torch.manual_seed(0)
    build, shape = NETWORKS[case]
    model, data = build().eval(), torch.randn(shape)
    model(data)
    with prepare(model, data) as prepared:
        operations, parameters = (
            count(cost, prepared, prepared.groups) for cost in (Cost.FLOPS, Cost.PARAMETERS)
        )
        groups = [group for group in prepared.groups if group.prunable and group.units > 1]
        assert groups
        assert operations.fixed == (2 * 9 * 12 * 50 if case == "attention" else 0)  # its logits
        assert operations.dense == by_torch(model, data[:1])
        # Of einsum, what is left of one unit is multiplied by element, which torch does not count.
        least = 2 if case == "by functions" else 1
        some = [sorted({least, (group.units + 1) // 2, group.units}) for group in groups]
        every = list(itertools.product(*some))
        for widths in every[:: max(1, len(every) // 8)]:
            kept = dict(zip([group.name for group in groups], widths, strict=True))
            plan = [GroupPlan.of(g, tuple(range(kept[g.name]))) for g in groups]
            smaller = copied(prepared.model)
            slice_units(smaller, PruningPlan(tuple(p for p in plan if len(p.kept) < p.units)))
            flops = count_flops(smaller, prepared.sample)
            assert operations.of(kept) == flops
            assert parameters.of(kept) == count_parameters(smaller)


def test_layers_that_torch_runs_as_one_operator_are_counted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(8, 5, 16)
    assert count_flops(model, {"src": x}) == by_torch(model, x) > 0
    with prepare(model, x) as prepared:
        cost = count(Cost.FLOPS, prepared, prepared.groups)
    assert cost.dense == pytest.approx(by_torch(model, x[:1]), rel=1e-12)


def test_operations_are_counted_where_layers_are_given_views_of_parameters():
    """Or a tensor of no module that has a gradient."""

    class ClassToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.norm = nn.Parameter(torch.randn(1, 1, 6)), nn.LayerNorm(6)
            self.table, self.up = torch.randn(2, 1, 6, requires_grad=True), nn.Linear(6, 10)

        def forward(self, x):
            token = self.norm(self.token.expand(len(x), -1, -1)) + self.norm(self.table[:1])
            return self.up(torch.cat([token, x], 1))

    assert count_flops(ClassToken().eval(), {"x": torch.randn(2, 3, 6)}) == 2 * 2 * 4 * 6 * 10


def dense_and_halved(model, data):
    """Return the operations of a model, and those with half of all units."""
    with prepare(model, data) as prepared:
        cost = count(Cost.FLOPS, prepared, prepared.groups)
        return cost.dense, cost.of({g.name: (g.units + 1) // 2 for g in prepared.groups})


def test_operations_of_weights_on_disk_are_those_of_the_same_in_memory():
    loaded = [osscar.load_model(DEMO_DIRECTORY, max_memory=limit) for limit in (None, "1GB")]
    memory, disk = (dense_and_halved(one.model, tokens(2, 24)) for one in loaded)
    assert disk == pytest.approx(memory, rel=1e-12)


def test_operations_of_experts_are_the_same_whichever_kernel_multiplies():
    models = [
        mixture("mixtral", kernel=kernel, num_hidden_layers=1)
        for kernel in ("grouped_mm", "batched_mm", "eager")
    ]
    # A gate has two matrices, the output one; each of 24 rows meets two experts.
    of_experts = 2 * (24 * 2) * 3 * 32 * 40
    layers = (m for m in models[0].modules() if isinstance(m, nn.Linear | MixtralTopKRouter))
    of_layers = sum(2 * 24 * layer.weight.numel() for layer in layers)
    scores = 2 * 24 * 24 * 32 * 2  # and weighted sums
    counted = [dense_and_halved(model, tokens(2, 24)) for model in models]
    assert counted[0][0] == of_experts + of_layers + scores
    assert counted[1:] == [pytest.approx(counted[0], rel=1e-12)] * 2


# ---- bytes -------------------------------------------------------------------------------


def stored(directory):
    """The bytes of the tensors in a directory's file."""
    (file,) = directory.glob("*.safetensors")
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("name", ["convolutions", "opt", "llama", "mixture"])
def test_the_tensors_of_a_file_have_the_bytes_that_are_counted(name, runs, tmp_path):
    """Tied, with buffers that lose units, and of experts that are written one by one."""
    found = runs[name]
    with prepare(found.dense, found.data) as prepared:
        cost = count(Cost.BYTES, prepared, prepared.groups)
    osscar.save(found.dense, tmp_path / "dense")
    osscar.save(found.result.model, tmp_path / "smaller")
    assert stored(tmp_path / "dense") == cost.dense
    kept = {group.name: len(group.kept) for group in found.result.plan.groups}
    assert stored(tmp_path / "smaller") == cost.of(kept)


class Listed(nn.Module):
    """Units meet numbers that the code lists, and a table that no file of the modules has."""

    def __init__(self, table=False):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.register_buffer("table", torch.ones(4000 if table else 1), persistent=False)

    def forward(self, x):
        listed = torch.tensor([0.5 + 0.01 * i for i in range(64)])
        return self.down(torch.relu(self.up(x)) * listed) + self.table.mean()


def test_a_share_of_a_program_is_one_of_the_weights_that_one_has(tmp_path):
    torch.manual_seed(0)
    net, data = Listed().eval(), torch.randn(64, 8)
    asked = {"form": "exported", "allocation": "uniform", "backend": "wanda", "round_to": 1}
    osscar.save(net, tmp_path / "dense")
    dense = stored(tmp_path / "dense")
    result = osscar.prune(net, data, size=0.8, **asked)
    limit = result.budget.tightest
    assert dense == limit.dense
    assert limit.limit == pytest.approx(0.8 * dense, abs=1)
    osscar.save(result.model, tmp_path / "saved")
    assert 0.7 * dense < stored(tmp_path / "saved") == limit.reached <= limit.limit
    with pytest.raises(RequestError, match=r"allows 1,000,000 bytes, and the exported program has"):
        osscar.prune(net, data, size="1MB", **asked)
    with pytest.raises(RequestError, match=r"cannot be.*16,\d+, as an exported program, of 4,384"):
        osscar.prune(Listed(table=True).eval(), data, size=0.8, **asked)


# ---- budgets that the model keeps --------------------------------------------------------


class TiedAutoencoder(nn.Module):
    """What comes in is made again by the transposed weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.rest = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(8, 4)

    def forward(self, x):
        code = torch.relu(self.b(torch.relu(self.a(x))))
        back = torch.relu(F.linear(code, self.b.weight.t()))
        return self.rest(F.linear(back, self.a.weight.t()))


class Steps(nn.Module):
    """A layer that reads what it makes, so that units leave along both dimensions of its weight."""

    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)
        self.wide, self.back = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        h = torch.relu(self.up(x))
        for _ in range(3):
            h = torch.relu(self.mix(h) + self.back(torch.relu(self.wide(h))))
        return self.down(h)


class TiedWords(nn.Module):
    """Words are scored by the vectors that they are looked up by, and by nothing else."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        h = self.words(x)
        return F.linear(h + self.down(torch.relu(self.up(h))), self.words.weight)


class ReadsLSTM(nn.Module):
    """A recurrent layer reads the features that a layer makes of each step."""

    def __init__(self):
        super().__init__()
        self.up, self.lstm = nn.Linear(5, 24), nn.LSTM(24, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(torch.relu(self.up(x)))[0][:, -1])


KEPT = {
    "tied autoencoder": (TiedAutoencoder, lambda: torch.randn(256, 8), {}),
    "both dimensions": (Steps, lambda: torch.randn(256, 6), {"residual": 0.75}),
    "tied words": (TiedWords, lambda: torch.randint(30, (64, 9)), {}),
    "lstm": (ReadsLSTM, lambda: torch.randn(128, 6, 5), {}),
    "program": (Listed, lambda: torch.randn(256, 8), {"form": "exported"}),
    "conv-lstm": (ConvLSTM, lambda: torch.randn(64, 2, 2, 5, 5), {}),
}


@pytest.mark.sampled(6)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", ["params", "size", "flops"])
@pytest.mark.parametrize("case", KEPT)
def test_the_model_keeps_its_budget_to_the_last_unit(case, budget):
    torch.manual_seed(0)
    build, draw, also = KEPT[case]
    model, data = build().eval(), draw()
    asked = {"allocation": "uniform", "backend": "magnitude", "damp": 0.1, "form": "eager"} | also
    result = osscar.prune(model, data, **{budget: 0.7}, **asked)
    limit = result.budget.of(budget)
    has = {
        "params": lambda: count_parameters(result.model),
        "size": lambda: sum(t.nbytes for t in written_tensors(result.model).values()),
        "flops": lambda: count_flops(result.model, {"x": data[:1]}),
    }[budget]()
    assert has == limit.reached <= limit.limit < limit.dense


def test_a_budget_that_the_model_does_not_keep_is_an_error():
    torch.manual_seed(0)
    with (
        mock.patch("osscar.allocation.limits.weights", return_value=CountedCost(900.0, (), {})),
        pytest.raises(EquivalenceError, match=r"has 900 parameters, and \d+ were counted for"),
    ):
        osscar.prune(TiedAutoencoder().eval(), torch.randn(64, 8), params=0.7)


def test_an_lstm_is_counted_whichever_kernel_runs_it():
    model, x = ReadsLSTM().eval(), torch.randn(2, 6, 5)
    # Four gates of eight states read 24 features and eight states, in two directions.
    expected = 2 * 2 * 6 * (5 * 24 + 2 * 4 * 8 * (24 + 8)) + 2 * 2 * 16 * 3
    assert count_flops(model, {"x": x}) == expected
    with torch.backends.mkldnn.flags(enabled=False):
        assert count_flops(model, {"x": x}) == expected == by_torch(model, x)
