"""Small networks made of the blocks that public models are made of, one for each operator."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .topologies import linear, network, parameter, registered

_IMAGE, _ROWS, _TOKENS = torch.randn(2, 3, 4, 4), torch.randn(3, 4), torch.randn(2, 5, 6)

BLOCKS = {}
"""Networks, example inputs, and the prunable groups with their units."""

block = partial(registered, BLOCKS)

# ---- attention -------------------------------------------------------------------------------


def attention(name, units, heads=4, key_heads=4, **makers):
    """Put attentions over heads of width four into the table, by how they mix."""

    def made(mixed):
        def forward(net, x):
            query, key, value = (
                project(x).unflatten(-1, (-1, 4)).transpose(1, 2)
                for project in (net.query, net.key, net.value)
            )
            return net.out(mixed(net, query, key, value).transpose(1, 2).flatten(2))

        keys = {"key": (6, 4 * key_heads), "value": (6, 4 * key_heads)}
        layers = {"query": (6, 4 * heads), **keys, "out": (4 * heads, 6), **makers}
        BLOCKS[name] = network(**layers)(forward), (_TOKENS,), {"heads": units}
        return mixed

    return made


@attention("attention", 4)
@attention("multi-query", 4, key_heads=1)  # which is broadcast against all heads
def written_out(net, query, key, value):
    """As in a textbook, with a causal mask."""
    scores = query @ key.transpose(-1, -2) / 2
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


@attention("bmm-baddbmm", 4, bias=parameter(1, 5, 5))
def batched_products(net, query, key, value):
    """Batch and heads in one dimension, scores added to a bias of the positions."""
    shape = query.shape
    query, key, value = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
    scores = torch.baddbmm(net.bias, query, key.transpose(1, 2), alpha=0.5)
    return torch.bmm(scores.softmax(-1), value).view(shape)


@attention("enable-gqa", 2, heads=6, key_heads=2)
def grouped_queries(net, query, key, value):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@attention("repeated-keys", 2, key_heads=2)
def repeated_keys(net, query, key, value):
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(query, key, value)


@attention("complex-rotary", 4, turns=lambda: torch.polar(torch.ones(9, 2), torch.rand(9, 2)))
def rotary_by_complex_numbers(net, query, key, value):
    """Pairs of features turned as complex numbers, as the published LLaMA does."""

    def turned(x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turns = net.turns[: x.shape[2]].view(1, 1, x.shape[2], -1)
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    query, key = turned(query), turned(key)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


# ---- a hidden layer --------------------------------------------------------------------------


@block(_ROWS, {"neurons": 9})
@network(enter=(4, 6), norm=lambda: nn.RMSNorm(6), up=(6, 9), down=(9, 6), leave=(6, 3))
def rms_norm(net, x):
    """A hidden layer on a stream that is normalized by its own length."""
    x = net.enter(x)
    x = x + net.down(F.silu(net.up(net.norm(x))))
    length = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.leave(x * length)


@block(_ROWS, {"neurons": 9})
@network(up=parameter(4, 9), bias=parameter(9), down=(9, 5))
def addmm(net, x):
    """Layers written as sums of a bias and a product."""
    hidden = torch.addmm(net.bias, x, net.up).tanh()
    return torch.addmm(net.down.bias, hidden, net.down.weight.t())


def _under_modes(net, x):
    """Gradients off and on, and another precision, for parts of the forward pass."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        x = x.float().tanh() * net.scale
        with torch.enable_grad():
            gate = x.detach().sigmoid()
    with torch.enable_grad():
        x, halved = x * gate, x / 2
    return x + halved


for _name, _copies, _units, _middle in [
    ("expand", 1, 6, lambda net, x: torch.tanh(x) * net.scale.expand(len(x), -1)),
    ("repeat", 2, 6, lambda net, x: torch.tanh(x).repeat(1, 2)),
    ("repeat-interleave", 2, 6, lambda net, x: torch.tanh(x).repeat_interleave(2, -1)),
    ("stack", 2, 6, lambda net, x: torch.stack((x.tanh(), x.sigmoid()), -1).flatten(1)),
    # Units in rows of three, as many as there are.
    ("unflatten", 1, 2, lambda net, x: x.sigmoid().unflatten(-1, (-1, 3)).tanh().flatten(1)),
    ("modes", 1, 6, _under_modes),
]:

    def _hidden(net, x, middle=_middle):
        return net.leave(middle(net, net.enter(x)))

    _layers = {"enter": linear(4, 6), "scale": parameter(1, 6), "leave": linear(6 * _copies, 5)}
    BLOCKS[_name] = network(**_layers)(_hidden), (_ROWS,), {"neurons": _units}


@block(_TOKENS, {"enter.neurons": 9, "middle.neurons": 7})
@network(
    enter=(6, 9),
    layers=lambda: nn.GRU(9, 4, num_layers=2, bidirectional=True, batch_first=True),
    middle=(8, 7),
    last=lambda: nn.LSTM(7, 5, proj_size=3),
    leave=(3, 2),
)
def recurrent(net, x):
    """Layers over steps in both directions, the second one on top of the first."""
    x = net.middle(net.layers(net.enter(x).tanh())[0]).relu()
    return net.leave(net.last(x.transpose(0, 1))[1][0][-1])


@block(_TOKENS, {"neurons": 9})
@network(
    enter=(6, 9),
    one=lambda: nn.LSTMCell(9, 4),
    two=lambda: nn.RNNCell(4, 5, nonlinearity="relu"),
    leave=(5, 2),
)
def recurrent_steps(net, x):
    """Cells that are called step by step; what the second reads is the state of the first."""
    state = (x.new_zeros(len(x), 4), x.new_ones(len(x), 4))
    other = None
    for step in net.enter(x).tanh().unbind(1):
        state = net.one(step, state)
        other = net.two(state[0], other)
    return net.leave(other)


# ---- channels of an image --------------------------------------------------------------------


@block(_IMAGE, {"enter.channels": 8})
@network(enter=(3, 8, 1), middle=lambda: nn.InstanceNorm2d(8, affine=True), leave=(8, 4, 1))
def instance_norm(net, x):
    return net.leave(torch.relu(net.middle(net.enter(x))))


@block(_IMAGE, {"enter.channels": 2})
@network(enter=(3, 8, 1), leave=(8, 4, 1))
def shuffle_by_hand(net, x):
    """Channels dealt out to four groups, whose number is the larger factor."""
    x = net.enter(x)
    n, c, h, w = x.shape
    return net.leave(torch.relu(x.view(n, 4, -1, h, w).transpose(1, 2).reshape(n, c, h, w)))


@block(_IMAGE, {"enter.channels": 3})
@network(enter=(3, 12, 1), leave=(3, 4, 1))
def pixel_shuffle(net, x):
    return net.leave(torch.relu(F.pixel_shuffle(net.enter(x), 2)))


@block(_IMAGE, {"enter.channels": 8})
@network(enter=(3, 8, 1), leave=(32, 4, 1))
def pixel_unshuffle(net, x):
    return net.leave(torch.relu(F.pixel_unshuffle(net.enter(x), 2)))


@block(_IMAGE, {"enter.channels": 8})
@network(enter=(3, 8, 1), leave=(8, 4, 1))
def roll(net, x):
    """Windows shifted over the image, and back."""
    x = net.enter(x).roll((1, 1), (2, 3))
    return net.leave(torch.relu(x).roll((-1, -1), (2, 3)))


@block(torch.randn(2, 1, 4, 4, 4), {"enter.channels": 6, "up.channels": 4})
@network(
    enter=lambda: nn.Conv3d(1, 6, 3, padding=1),
    norm=lambda: nn.BatchNorm3d(6),
    up=lambda: nn.ConvTranspose3d(6, 4, 2, stride=2),
    leave=lambda: nn.Conv3d(4, 2, 1),
)
def conv3d(net, x):
    x = F.max_pool3d(torch.relu(net.norm(net.enter(x))), 2)
    return net.leave(torch.relu(net.up(x)))


# ---- messages, spectra, windows, products ----------------------------------------------------


@block(_TOKENS, {"enter.neurons": 7, "message.neurons": 9, "second.neurons": 8})
@network(
    enter=(6, 7),
    message=(14, 9),
    second=(16, 8),
    leave=(8, 3),
    begins=lambda: torch.tensor([0, 1, 2, 3, 4, 0, 2]),
    ends=lambda: torch.tensor([1, 2, 3, 4, 0, 3, 2]),
)
def messages(net, x):
    """Two rounds of messages along the edges of a graph, added up at their ends."""
    nodes = net.enter(x).relu()
    both = torch.cat((nodes[:, net.begins], nodes.index_select(1, net.ends)), -1)
    sent = net.message(both).tanh()
    added = sent.new_zeros(len(x), 5, sent.shape[-1]).index_add(1, net.ends, sent)
    sent = net.second(torch.cat((nodes, added), -1))[:, net.begins].tanh()
    index = net.ends[:, None].expand(len(x), -1, sent.shape[-1])
    return net.leave(sent.new_zeros(len(x), 5, sent.shape[-1]).scatter_add(1, index, sent))


@block(_TOKENS, {"neurons": 7})
@network(enter=(6, 7), other=(6, 7), leave=(7, 3))
def maxima(net, x):
    """The largest message at each end, and some positions filled and copied to."""
    one, other = net.enter(x).tanh(), net.other(x).sigmoid()
    index = torch.tensor([0, 3, 3, 1, 1])[:, None].expand(len(x), -1, 7)
    found = one.scatter_reduce(1, index, other, "amax").index_fill(1, torch.tensor([2]), 0.5)
    return net.leave(found.index_copy(1, torch.tensor([4, 0]), other[:, :2]))


@block(_TOKENS, {"enter.neurons": 8, "middle.neurons": 7})
@network(enter=(6, 8), filter=parameter(3, 8, 2), taps=parameter(8, 5), middle=(8, 7), leave=(7, 3))
def fourier(net, x):
    """FNet, GFNet, and a filter of a length of its own, along positions."""
    x = net.enter(x)
    spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(net.filter)
    x = x + torch.fft.irfft(spectrum, n=5, dim=1, norm="ortho") + torch.fft.fft(x, dim=1).real
    long = torch.fft.rfft(x, n=9, dim=1) * torch.fft.rfft(net.taps, n=9).transpose(0, 1)
    x = net.middle(torch.fft.irfft(long, n=9, dim=1)[:, :5]).relu()
    return net.leave(torch.fft.fftshift(x, dim=(1,)).cumsum(1))


@block(_IMAGE, {"enter.channels": 6, "channels": 7})
@network(enter=(3, 6, 1), weight=parameter(6, 7, 3, 2, 2), beside=(6, 7, 1), leave=(7, 2, 1))
def fourier_operator(net, x):
    """Channels are mixed at each frequency."""
    x = net.enter(x).relu()
    low = torch.fft.rfft2(x)[:, :, :3, :2]
    mixed = torch.einsum("nihw,iohw->nohw", low, torch.view_as_complex(net.weight))
    return net.leave((torch.fft.irfft2(mixed, s=(4, 4)) + net.beside(x)).relu())


@block(_IMAGE, {"enter.channels": 5, "mixed.channels": 3, "middle.channels": 6})
@network(
    enter=(3, 5, 1),
    mixed=(20, 12),
    middle=(3, 6, 1),
    leave=(6, 2),
    places=lambda: torch.rand(1, 3, 3, 2) - 0.5,
)
def patches(net, x):
    """Windows as channels and back, places in space that are read, windows of positions."""
    columns = F.unfold(net.enter(x).relu(), 2, stride=2).transpose(1, 2)
    x = F.fold(net.mixed(columns).transpose(1, 2).tanh(), (4, 4), 2, stride=2)
    grid = net.places.expand(len(x), -1, -1, -1)
    x = F.grid_sample(net.middle(x).relu(), grid, align_corners=False)
    return net.leave(x.flatten(2).unfold(2, 3, 2).amax(-1).transpose(1, 2))


@block(_TOKENS, {"neurons": 8})
@network(enter=(6, 16), gate=lambda: nn.Conv1d(5, 5, 1), leave=(8, 3))
def spatial_gate(net, x):
    """gMLP as published: a convolution of a single tap whose channels are positions."""
    left, right = net.enter(x).relu().chunk(2, -1)
    return net.leave(left * net.gate(right))


@block(_ROWS, {"enter.neurons": 3, "enter.neurons.2": 2, "enter.neurons.3": 3})
@network(enter=(4, 2 * (3 + 2 * (2 + 3))), leave=(26, 5))
def uneven_parts(net, x):
    """Two rows of parts inside parts, so that units of one part lie in several places."""
    one, others = net.enter(x).unflatten(1, (2, 13)).split((3, 10), 2)
    two, three = others.unflatten(2, (2, 5)).split((2, 3), 3)
    others = torch.cat((two.tanh(), three.relu()), 3).flatten(2)
    return net.leave(torch.cat((one.sigmoid(), others), 2).flatten(1))


@block(_ROWS, {"neurons": 7, "router.neurons": 3})
@network(router=(4, 3), up=parameter(3, 4, 7), down=parameter(3, 7, 5))
def experts(net, x):
    """All experts on every row, weighted by gates that do not compete."""
    gates = torch.sigmoid(net.router(x))
    hidden = torch.einsum("rd,edf->ref", x, net.up).relu()
    return torch.einsum("ref,efo,re->ro", hidden, net.down, gates)
