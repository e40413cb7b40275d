"""What recurrent layers read: pruned, refitted on the gates, shrunk, saved."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graph
import osscar
from osscar.consumers.layers import input_gates
from osscar.consumers.linear_maps import linear_maps
from tests.graph.topologies import network

KINDS = {
    "lstm": lambda: nn.LSTM(12, 7, batch_first=True),
    "lstm, steps first, no bias": lambda: nn.LSTM(12, 7, bias=False),
    "two layers, both directions": lambda: nn.LSTM(
        12, 7, num_layers=2, bidirectional=True, batch_first=True
    ),
    "projected": lambda: nn.LSTM(12, 7, proj_size=4, batch_first=True),
    "gru": lambda: nn.GRU(12, 7, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(12, 7, nonlinearity="relu", batch_first=True),
}


class Sequence(nn.Module):
    """A layer whose neurons a recurrent layer reads, its states named before the inputs."""

    def __init__(self, recurrent):
        super().__init__()
        self.enter, self.recurrent = nn.Linear(5, 12), recurrent
        wide = recurrent.proj_size or 7
        self.head = nn.Linear(wide * (1 + recurrent.bidirectional), 3)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        if not self.recurrent.batch_first:
            x = x.transpose(0, 1)
        x = self.recurrent(hx=None, input=x)[0]
        if not self.recurrent.batch_first:
            x = x.transpose(0, 1)
        return self.head(x)


class Steps(nn.Module):
    """A cell that is called once a step."""

    def __init__(self, kind):
        super().__init__()
        self.enter, self.recurrent, self.head = nn.Linear(5, 12), kind(12, 7), nn.Linear(7, 3)

    def forward(self, x):
        state = None
        for step in torch.tanh(self.enter(x)).unbind(1):
            state = self.recurrent(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


NETS = {name: lambda kind=kind: Sequence(kind()) for name, kind in KINDS.items()} | {
    kind.__name__: lambda kind=kind: Steps(kind) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}


def made(name):
    torch.manual_seed(0)
    return NETS[name]().eval()


@pytest.mark.parametrize("name", NETS)
def test_the_group_is_read_by_the_weights_of_inputs_alone(name):
    net = made(name)
    (group,) = graph.trace(net, (torch.randn(2, 6, 5),)).prunable
    names = {n for n, _ in net.recurrent.named_parameters() if n.startswith("weight_ih")}
    own = names - {"weight_ih_l1", "weight_ih_l1_reverse"}
    assert {slot.tensor.rpartition(".")[2] for slot in group.consumers} == own
    maps = linear_maps(net, group)
    assert {one.parameters[0] for one in maps} == own
    x = torch.randn(4, 6, 12)
    for one in maps:
        (X,) = one.read_inputs(x)
        found = X.double() @ one.read_weight()
        if one.bias is not None:
            found = found + one.read_bias()
        gates = one.read_corrections(input_gates(net.recurrent, x), x)
        assert_close(gates, found.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_the_refit_is_least_squares_on_the_gates(name, tmp_path):
    """Against `torch.linalg.lstsq`, with inputs and a constant."""
    net, data = made(name), torch.randn(200, 6, 5)
    result = osscar.prune(net, data, neurons=0.5)
    smaller, kept = result.model, list(result.plan.groups[0].kept)
    assert smaller.enter.out_features == smaller.recurrent.input_size == 6 == len(kept)
    assert result.certificate.error < 1e-6
    hidden = torch.tanh(net.enter(data)).flatten(0, 1)
    gates = input_gates(net.recurrent, hidden).double()
    inputs = hidden[:, kept].double()
    if net.recurrent.bias:
        inputs = torch.cat((inputs, torch.ones(len(inputs), 1)), 1)
    best = torch.linalg.lstsq(inputs, gates).solution
    least = float((inputs @ best - gates).square().sum())
    found = float((input_gates(smaller.recurrent, hidden[:, kept]) - gates).square().sum())
    assert found <= 1.05 * least
    again = osscar.load(result.save(tmp_path / "smaller").path, dense=made(name))
    assert_close(again(data), smaller(data))


@network(
    embed=lambda: nn.Embedding(20, 12),
    recurrent=lambda: nn.LSTM(12, 7, batch_first=True),
    head=(7, 3),
)
def Text(net, ids):
    """Embeddings, which an LSTM reads."""
    return net.head(net.recurrent(net.embed(ids))[1][0][-1])


def test_embeddings_lose_what_a_layer_reads():
    torch.manual_seed(0)
    ids = {"ids": torch.randint(0, 20, (64, 6))}
    result = osscar.prune(Text().eval(), ids, residual=0.5)
    assert result.model.get_parameter("recurrent.weight_ih_l0").shape[1] == 6
    assert result.certificate.error < 1e-6
