"""What recurrent layers read: pruned, refitted on the gates, shrunk, saved."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graph
import osscar
from osscar.base.errors import RequestError
from osscar.consumers.layers import input_gates
from osscar.consumers.linear_maps import linear_maps
from tests.osscar.programs import far_apart

KINDS = {
    "lstm": lambda width: nn.LSTM(width, 7, batch_first=True),
    "lstm, steps first, no bias": lambda width: nn.LSTM(width, 7, bias=False),
    "two layers, both directions": lambda width: nn.LSTM(
        width, 7, num_layers=2, bidirectional=True, batch_first=True
    ),
    "projected": lambda width: nn.LSTM(width, 7, proj_size=4, batch_first=True),
    "gru": lambda width: nn.GRU(width, 7, bidirectional=True, batch_first=True),
    "rnn": lambda width: nn.RNN(width, 7, nonlinearity="relu", batch_first=True),
}


class Sequence(nn.Module):
    """A layer whose neurons a recurrent layer and another one read."""

    def __init__(self, recurrent):
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.recurrent = recurrent(12)
        wide = 7 if not getattr(self.recurrent, "proj_size", 0) else 4
        self.leave = nn.Linear(wide * (1 + self.recurrent.bidirectional), 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        if not self.recurrent.batch_first:
            x = x.transpose(0, 1)
        x = self.recurrent(x)[0]
        if not self.recurrent.batch_first:
            x = x.transpose(0, 1)
        return self.head(torch.relu(self.leave(x)))


class Steps(nn.Module):
    """A cell that is called once a step, its state begun by a layer of its own."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.cell, self.head = nn.Linear(5, 12), kind(12, 7), nn.Linear(7, 3)

    def forward(self, x):
        state = None
        for step in torch.relu(self.enter(x)).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
NETS = {name: (lambda kind=kind: Sequence(kind)) for name, kind in KINDS.items()} | {
    kind.__name__: (lambda kind=kind: Steps(kind)) for kind in CELLS
}


def made(name):
    torch.manual_seed(0)
    return NETS[name]().eval()


@pytest.mark.parametrize("name", NETS)
def test_the_group_is_read_by_the_weights_of_inputs_alone(name):
    net = made(name)
    group = next(g for g in graph.trace(net, (torch.randn(2, 6, 5),)).prunable if g.units == 12)
    module = net.recurrent if hasattr(net, "recurrent") else net.cell
    own = {n for n, _ in module.named_parameters() if n.startswith("weight_ih")} - {
        "weight_ih_l1",
        "weight_ih_l1_reverse",
    }
    assert {slot.tensor.rpartition(".")[2] for slot in group.consumers} == own
    maps = linear_maps(net, group)
    assert all(one.parameters[0].startswith("weight_ih") for one in maps)
    x = torch.randn(4, 6, 12)
    for one in maps:
        (X,) = one.read_inputs(x)
        found = X.double() @ one.read_weight()
        if one.has_bias:
            found = found + one.read_bias()
        assert far_apart(one.read_outputs(input_gates(module, x), x), found.float()) < 1e-5


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NETS)
def test_pruned_and_refitted(name, tmp_path):
    net = made(name)
    before = copy.deepcopy(net.state_dict())
    data = torch.randn(64, 6, 5)
    result = osscar.prune(net, data, neurons=0.5)
    assert not result.skipped
    smaller = result.model
    module = smaller.recurrent if hasattr(smaller, "recurrent") else smaller.cell
    assert smaller.enter.out_features == module.input_size == 6
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert result.certificate.error < 1e-6
    x = torch.randn(5, 9, 5)
    error = float((smaller(x) - net(x)).square().mean())
    # Cutting the same units out without a refit is worse.
    plan = next(g for g in result.plan.groups if g.name.endswith("neurons") and g.units == 12)
    plain = osscar.prune(net, data, neurons=0.5, damp=1e9, backend="magnitude")
    assert error < 0.8 * float((plain.model(x) - net(x)).square().mean())
    assert len(plan.kept) == 6
    again = osscar.load(result.save(tmp_path / "smaller").path, dense=made(name))
    assert_close(again(x), smaller(x))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NETS)
def test_the_refit_is_least_squares_on_the_gates(name):
    """Against `torch.linalg.lstsq`, with inputs and a constant."""
    net = made(name)
    data = torch.randn(200, 6, 5)
    result = osscar.prune(net, data, neurons=0.5)
    smaller = result.model
    module = smaller.recurrent if hasattr(smaller, "recurrent") else smaller.cell
    dense = net.recurrent if hasattr(net, "recurrent") else net.cell
    act = torch.tanh if hasattr(net, "recurrent") else torch.relu
    with torch.no_grad():
        hidden = act(net.enter(data)).flatten(0, 1).double()
        kept = next(g for g in result.plan.groups if g.units == 12).kept
        gates = input_gates(dense, hidden.float()).double()
        inputs = hidden[:, list(kept)]
        if dense.bias:
            inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), 1)
        best = torch.linalg.lstsq(inputs, gates).solution
        least = float((inputs @ best - gates).square().sum())
        found = float((input_gates(module, hidden[:, list(kept)].float()) - gates).square().sum())
    assert found <= 1.05 * least


def test_a_budget_reaches_the_gates():
    net = made("lstm")
    with torch.no_grad():
        net.recurrent.weight_ih_l0[:, :6] *= 1e-3  # half of the neurons hardly matter
    result = osscar.prune(net, torch.randn(64, 6, 5), sparsity=0.3, target="weights")
    group = next(group for group in result.plan.groups if group.units == 12)
    assert set(range(6, 12)) <= set(group.kept)
    curve = result.budget.curves[group.name]
    # Of the whole model: what hardly matters costs hardly anything, all of it much more.
    assert curve[6] < 1e-3 * curve[0]


class Text(nn.Module):
    """Embeddings, which an LSTM reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(20, 12), nn.LSTM(12, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, ids):
        return self.head(self.recurrent(self.embed(ids))[1][0][-1])


def test_embeddings_lose_what_a_layer_reads():
    torch.manual_seed(0)
    net = Text().eval()
    result = osscar.prune(net, {"ids": torch.randint(0, 20, (64, 6))}, residual=0.5)
    assert result.model.get_parameter("recurrent.weight_ih_l0").shape[1] == 6
    assert result.certificate.error < 1e-6


def test_weights_that_other_code_or_cells_read_are_left_alone():
    class Penalized(Text):
        def forward(self, ids):
            read = self.embed(ids)
            return super().forward(ids) + (read @ self.recurrent.weight_ih_l0.T).mean(1)[:, :3]

    class Shared(Steps):
        def __init__(self):
            super().__init__(nn.GRUCell)
            self.other = nn.GRUCell(12, 7)
            self.other.weight_ih = self.cell.weight_ih

        def forward(self, x):
            return super().forward(x) + self.head(self.other(self.enter(x[:, 0])))

    ids = {"ids": torch.randint(0, 20, (64, 6))}
    with pytest.raises(RequestError, match="which other code"):
        osscar.prune(Penalized().eval(), ids, residual=0.5)
    with pytest.raises(RequestError, match="share"):
        osscar.prune(Shared().eval(), torch.randn(32, 6, 5), neurons=0.5)


def test_states_may_be_named_before_the_inputs():
    class Named(Sequence):
        def __init__(self):
            super().__init__(KINDS["lstm"])

        def forward(self, x):
            states = tuple(torch.zeros(1, len(x), 7) for _ in range(2))
            read = torch.tanh(self.enter(x))
            return self.head(torch.relu(self.leave(self.recurrent(hx=states, input=read)[0])))

    torch.manual_seed(0)
    net = Named().eval()
    for asked in ({"sparsity": 0.3}, {"neurons": 0.5}):
        result = osscar.prune(net, torch.randn(32, 6, 5), **asked)
        assert result.model.recurrent.input_size == result.model.enter.out_features < 12
