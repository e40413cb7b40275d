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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import osscar
from graph import Size
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, CountedCost, count
from osscar.allocation.measured import Curve
from osscar.base.errors import EquivalenceError, RequestError
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import copied, count_parameters
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.slice import slice_units
from tests.graph.blocks import BLOCKS
from tests.graph.topologies import PRUNABLE
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


def falling(random, units, power):
    return np.append(np.sort(random.exponential(size=units) ** power)[::-1], 0.0)


def random_curves(task):
    """Return a curve of random losses for each group that shares a budget."""
    random = np.random.default_rng(0)
    return {one.name: Curve(one.name, falling(random, one.units, 2)) for one in task.shared}


def allocated_by_random_curves(task):
    """Allocate as if these had been measured."""
    place = "osscar.allocation.allocate.measured_curves"
    with mock.patch(place, return_value=random_curves(task)):
        return allocate(task)


# ---- parameters and operations of networks -----------------------------------------------


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


OF_TOPOLOGIES = (
    *("residual", "concat", "depthwise", "grouped", "called-twice", "bare-parameters", "shuffle"),
    *("gate", "up-and-down", "stacked"),
)
OF_BLOCKS = ("attention", "enable-gqa", "recurrent", "conv3d")
NETWORKS = {
    "conv-lstm": (ConvLSTM, torch.randn(8, 2, 2, 5, 5)),
    **{
        name: (table[name][0], torch.randn(8, *table[name][1][0].shape[1:]))
        for table, names in ((PRUNABLE, OF_TOPOLOGIES), (BLOCKS, OF_BLOCKS))
        for name in names
    },
}


def by_torch(model, *inputs):
    """Return what torch's own counter says, in which gradients have to be."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", NETWORKS)
def test_costs_are_those_of_the_model_that_is_really_smaller(case):
    torch.manual_seed(0)
    build, data = NETWORKS[case]
    model = build().eval()
    with prepare(model, data) as prepared:
        operations, parameters = (
            count(cost, prepared, prepared.groups) for cost in (Cost.FLOPS, Cost.PARAMETERS)
        )
        groups = [group for group in prepared.groups if group.prunable and group.units > 1]
        assert groups
        assert operations.dense == by_torch(model, data[:1])
        some = [sorted({1, (group.units + 1) // 2, group.units}) for group in groups]
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


def dense_and_halved(model, data):
    """Return the operations of a model, and those with half of all units."""
    with prepare(model, data) as prepared:
        cost = count(Cost.FLOPS, prepared, prepared.groups)
        return cost.dense, cost.of({g.name: (g.units + 1) // 2 for g in prepared.groups})


@pytest.mark.slow
def test_operations_of_weights_on_disk_are_those_of_the_same_in_memory():
    loaded = [osscar.load_model(DEMO_DIRECTORY, max_memory=limit) for limit in (None, "1GB")]
    memory, disk = (dense_and_halved(one.model, tokens(2, 24)) for one in loaded)
    assert disk == pytest.approx(memory, rel=1e-12)


@pytest.mark.slow
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


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["convolutions", "opt", "mixture"])
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
    """Units meet numbers that the code lists."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x):
        listed = torch.tensor([0.5 + 0.01 * i for i in range(64)])
        return self.down(torch.relu(self.up(x)) * listed)


def test_a_share_of_a_program_is_one_of_the_weights_that_one_has(tmp_path):
    torch.manual_seed(0)
    net, data = Listed().eval(), torch.randn(64, 8)
    asked = {"form": "exported", "allocation": "uniform", "backend": "wanda", "round_to": 1}
    osscar.save(net, tmp_path / "dense")
    dense = stored(tmp_path / "dense")
    result = osscar.prune(net, data, size=0.8, **asked)
    limit = result.budget.limits[0]
    assert dense == limit.dense
    assert limit.limit == pytest.approx(0.8 * dense, abs=1)
    osscar.save(result.model, tmp_path / "saved")
    assert 0.7 * dense < stored(tmp_path / "saved") == limit.reached <= limit.limit
    with pytest.raises(RequestError, match=r"allows 1,000,000 bytes, and the exported program has"):
        osscar.prune(net, data, size="1MB", **asked)


def test_a_budget_that_the_model_does_not_keep_is_an_error():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with (
        mock.patch("osscar.allocation.limits.weights", return_value=CountedCost(900.0, (), {})),
        pytest.raises(EquivalenceError, match=r"has 900 parameters, and \d+ were counted for"),
    ):
        osscar.prune(model, torch.randn(64, 8), params=0.7)


def test_an_lstm_is_counted_whichever_kernel_runs_it():
    model, x = nn.LSTM(24, 8, batch_first=True, bidirectional=True), torch.randn(2, 6, 24)
    # Four gates of eight states read 24 features and eight states, in two directions.
    expected = 2 * 2 * 6 * 2 * 4 * 8 * (24 + 8)
    assert count_flops(model.eval(), {"input": x}) == expected
    with torch.backends.mkldnn.flags(enabled=False):
        assert count_flops(model, {"input": x}) == expected == by_torch(model, x)
