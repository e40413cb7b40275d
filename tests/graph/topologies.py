"""Small hand-written networks, one for each way in which axes hang together."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

linear, conv = partial(partial, nn.Linear), partial(partial, nn.Conv2d)


def parameter(*size):
    return lambda: nn.Parameter(torch.randn(size))


class Written(nn.Module):
    """What `network` makes of `makers`, by name: each makes a layer, a parameter or a buffer.

    Two numbers stand for a linear layer of these sizes, three for a convolution.
    """

    makers = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        for name, make in self.makers.items():
            if isinstance(make, tuple):
                make = (linear if len(make) == 2 else conv)(*make)
            held = make()
            is_buffer = isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter)
            self.register_buffer(name, held) if is_buffer else setattr(self, name, held)


def network(**makers):
    """Return a decorator that makes a class of networks of its forward pass, ``(net, x)``."""

    def made(forward):
        name = forward.__name__.title().replace("_", "").strip("<>")
        label = forward.__name__.replace("_", "-")
        return type(name, (Written,), {"makers": makers, "forward": forward, "__label__": label})

    return made


def registered(table, example, groups):
    """Put a network into a table by its name, with an example input and its prunable groups."""

    def made(kind):
        table[kind.__label__] = kind, (example,), groups
        return kind

    return made


def randomized(net):
    """Give every parameter and statistic of a network random values, and set it to eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn_like(tensor))
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return net.eval()


_draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
_IMAGE, _ROWS = _draw(2, 3, 4, 4), _draw(3, 4)

PRUNABLE = {}
"""Networks, example inputs, and the prunable groups with their units."""

prunable = partial(registered, PRUNABLE)


@prunable(_IMAGE, {"stem.channels": 6, "one.channels": 8})
@network(
    stem=conv(3, 6, 3, padding=1),
    one=conv(6, 8, 3, padding=1),
    two=conv(8, 6, 3, padding=1),
    norm=lambda: nn.BatchNorm2d(6),
    head=(6, 5),
)
def residual(net, x):
    """A stream that two convolutions write and three read."""
    x = net.stem(x)
    x = torch.relu(x + net.norm(net.two(torch.relu(net.one(x)))))
    return net.head(x.mean((2, 3)))


@prunable(_IMAGE, {"left.channels": 4, "right.channels": 6})
@network(left=(3, 4, 1), right=(3, 6, 1), norm=lambda: nn.BatchNorm2d(10), head=(10 * 16, 5))
def concat(net, x):
    """Two branches side by side, read together after a flatten."""
    return net.head(net.norm(torch.cat((net.left(x), net.right(x)), 1)).flatten(1))


@prunable(_IMAGE, {"expand.channels": 8})
@network(expand=(3, 8, 1), depth=conv(8, 8, 3, groups=8), project=(8, 4, 1))
def depthwise(net, x):
    return net.project(F.relu6(net.depth(F.hardswish(net.expand(x)))))


@prunable(_IMAGE, {"expand.channels": 4})
@network(expand=(3, 12, 1), grouped=conv(12, 8, 3, groups=4), project=(8, 4, 1))
def grouped(net, x):
    """Whole groups of channels can go."""
    return net.project(torch.relu(net.grouped(torch.relu(net.expand(x)))))


class Tied(nn.Module):
    """One weight under two names, with biases of its own under each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.leave(torch.tanh(self.second(torch.tanh(self.first(self.enter(x))))))


PRUNABLE["tied"] = Tied, (_ROWS,), {"hidden": 6}


@prunable(_ROWS, {"block.neurons": 9})
@network(block=lambda: nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)))
def called_twice(net, x):
    return net.block(net.block(x) + 1)


@prunable(_ROWS, {"neurons": 7})
@network(used=(4, 7), unused=(7, 3), head=(7, 5))
def unused_branch(net, x):
    x = net.used(x)
    net.unused(x).sum()
    return net.head(x)


@prunable(_ROWS, {"neurons": 6})
@network(enter=(4, 6), leave=(6, 3))
def unused_mean(net, x):
    """A mean over what is pruned, that nothing depends on."""
    x = torch.relu(net.enter(x))
    x.mean(-1).unsqueeze(-1)
    return net.leave(x)


@prunable(_ROWS, {"neurons": 6})
@network(enter=lambda: weight_norm(nn.Linear(4, 6)), leave=(6, 3))
def weight_normed(net, x):
    return net.leave(torch.relu(net.enter(x)))


@prunable(_ROWS, {"neurons": 6})
@network(
    enter=(4, 6),
    leave=(6, 3),
    table=lambda: torch.randn(9),
    index=lambda: torch.tensor([8, 2, 2, 5, 0, 7]),
)
def looked_up(net, x):
    """A number for each unit, looked up in a table by an index that the unit owns."""
    x = net.enter(x) * net.table[net.index] + net.table.index_select(0, net.index)
    return net.leave(torch.relu(x))


@prunable(_draw(2, 5, 6), {"neurons": 9})
@network(enter=(6, 9), leave=(9, 2))
def indexed_apart(net, x):
    """Two dimensions are looked up together, with the units between them."""
    x = torch.relu(net.enter(x)).transpose(1, 2).unsqueeze(1)
    return net.leave(x[:, torch.tensor([0, 0, 0]), :, torch.tensor([3, 0, 2])])


@prunable(_ROWS, {"neurons": 6})
@network(
    enter=(4, 6),
    table=parameter(6, 5),
    shift=parameter(6, 4),
    leave=(6, 3),
    index=lambda: torch.tensor([[4, 0, 1], [2, 2, 3]] * 3),
)
def gathered(net, x):
    """A row of numbers for each unit, of which an index that the unit owns picks some."""
    x = torch.relu(net.enter(x))[..., None] * net.table
    x = x.gather(-1, net.index.expand(len(x), *net.index.shape))
    return net.leave((x + net.shift.gather(1, net.index % 4)).sum(-1))


@prunable(_ROWS, {"neurons": 9})
@network(up=parameter(4, 9), scale=parameter(9), down=parameter(5, 9))
def bare_parameters(net, x):
    return torch.tanh(x @ net.up * net.scale) @ net.down.T


@prunable(_IMAGE, {"enter.channels": 4})
@network(enter=(3, 8, 1), leave=(8, 4, 1))
def shuffle(net, x):
    """Channels dealt out to two groups."""
    x = torch.relu(net.enter(x))
    n, c, h, w = x.shape
    return net.leave(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@prunable(_IMAGE, {"enter.channels": 8, "squeeze.channels": 4})
@network(enter=(3, 8, 1), squeeze=(8, 4, 1), excite=(4, 8, 1), leave=(8, 5, 1))
def gate(net, x):
    """Squeeze and excitation."""
    x = net.enter(x)
    mean = F.adaptive_avg_pool2d(x, 1)
    return net.leave(x * torch.sigmoid(net.excite(torch.relu(net.squeeze(mean)))))


@prunable(_IMAGE, {"enter.channels": 4, "wide.channels": 2, "wide.channels.2": 2})
@network(enter=(3, 4, 1), wide=(4, 8, 1), leave=(8, 5, 1))
def padded(net, x):
    """A shortcut with zeros in place of the channels that it lacks."""
    x = torch.relu(net.enter(x))
    return net.leave(torch.relu(net.wide(x) + F.pad(x, (0, 0, 0, 0, 2, 2))))


@prunable(_draw(2, 4, 6), {"heads": 2})
@network(qkv=(6, 3 * 2 * 5), out=(2 * 5, 6))
def einsum(net, x):
    """Attention written out, its batch as large as its number of heads."""
    n, length, _ = x.shape
    q, k, v = net.qkv(x).view(n, length, 3, 2, 5).permute(2, 0, 3, 1, 4)
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return net.out(torch.einsum("b h i j, b h j d -> b i h d", weights, v).flatten(2))


@prunable(_draw(2, 4, 6), {"heads": 3, "outputs.2": 5, "neurons": 9})
@network(
    query=parameter(6, 3, 5),
    key=parameter(6, 3, 5),
    value=parameter(6, 3, 5),
    out=parameter(3, 5, 6),
    up=parameter(9, 6),
    down=parameter(9, 4),
)
def einsum_layers(net, x):
    """Attention and neurons of bare weights, which have a dimension for heads."""
    q, k, v = (torch.einsum("bsd,dhk->bshk", x, w) for w in (net.query, net.key, net.value))
    weights = torch.einsum("bqhk,bshk->bhqs", q, k).softmax(-1)
    mixed = torch.einsum("bhqs,bshk->bqhk", weights, v)
    x = x + torch.einsum("bshk,hkd->bsd", mixed, net.out)
    return torch.einsum("...n,no->...o", torch.relu(x @ net.up.T), net.down)


@prunable(_ROWS, {"outer.hidden": 9, "neurons": 6})
@network(outer=(4, 9), inner=(9, 6), back=parameter(9), shift=parameter(4))
def tied_autoencoder(net, x):
    """A decoder that reads the weights of the encoder the other way round."""
    x = torch.tanh(net.inner(torch.tanh(net.outer(x))))
    x = torch.tanh(F.linear(x, net.inner.weight.t(), net.back))
    return F.linear(x, net.outer.weight.t(), net.shift)


@prunable(_IMAGE, {"enter.channels": 3})
@network(enter=(3, 12, 1), norm=lambda: nn.GroupNorm(3, 12), leave=(12, 5, 1))
def group_norm(net, x):
    """Whole groups of a normalization can go."""
    return net.leave(torch.relu(net.norm(net.enter(x))))


@prunable(_draw(2, 3, 16, 16), {"down.channels": 6, "up.channels": 4})
@network(
    down=conv(3, 6, 3, stride=2, padding=1),
    up=lambda: nn.ConvTranspose2d(6, 4, 2, stride=2),
    act=lambda: nn.PReLU(4),
    leave=(4, 5, 1),
)
def up_and_down(net, x):
    """A transposed convolution after pooling, with in-place arithmetic."""
    x = F.max_pool2d(net.down(x), 2)
    x = F.interpolate(net.act(net.up(x)), scale_factor=2.0)
    return net.leave(x.mul_(2).add_(1))


@prunable(_ROWS, {"neurons": 7})
@network(enter=(4, 14), leave=(7, 5))
def gated_halves(net, x):
    """One projection cut in two halves that gate each other."""
    a, b = net.enter(x).chunk(2, -1)
    return net.leave(a * F.silu(b))


@prunable(_ROWS, {"neurons": 7})
@network(enter=(4, 14), leave=(7, 5))
def glu(net, x):
    return net.leave(F.glu(net.enter(x)))


@prunable(_ROWS, {"enter.neurons": 5, "enter.neurons.2": 6})
@network(enter=(4, 11), left=(5, 3), right=(6, 3))
def independent_halves(net, x):
    """One projection whose two parts go different ways."""
    a, b = torch.split(net.enter(x), [5, 6], -1)
    return net.left(torch.relu(a)) + net.right(torch.tanh(b))


@prunable(_ROWS, {"one.neurons": 6, "two.neurons": 5})
@network(one=linear(4, 6, bias=False), two=linear(4, 5, bias=False), leave=(11, 3))
def stacked(net, x):
    """Parameters put together on the fly."""
    weight = torch.cat((net.one.weight, net.two.weight))
    return net.leave(torch.relu(F.linear(x, weight)))


# ---- what freezes a hidden layer -------------------------------------------------------------

_two_layers = network(enter=(4, 12), leave=(12, 5))


def _between(middle):
    """Put something unusual in the middle of a hidden layer of twelve."""
    return _two_layers(lambda net, x: net.leave(middle(net.enter(x))))


@network(enter=(4, 12), leave=(12, 5), states=lambda: nn.RNN(1, 1, batch_first=True))
def _steps(net, x):
    return net.leave(net.states(net.enter(x).unsqueeze(-1))[0].squeeze(-1))


@network(enter=(4, 12), weight=parameter(5, 1))
def _copies_of_one_weight(net, x):
    """A weight repeated along what it is contracted over: no zero of it masks one copy."""
    return F.linear(net.enter(x), net.weight.expand(5, 12))


@_two_layers
def _overwritten_weight(net, x):
    """A copy of a weight some of which is replaced before use."""
    weight = net.leave.weight.clone()
    weight[:2].fill_(1.0)
    return F.linear(net.enter(x), weight)


@_two_layers
def _observed(net, x):
    """A hidden layer that is an output too."""
    x = net.enter(x)
    return net.leave(x), x


FROZEN = {
    "misaligned-views": (
        _between(lambda x: x.view(-1, 3, 4).relu().view(-1, 4, 3).tanh().view(-1, 12)),
        "aten.reshape.default",
    ),
    "unknown-operator": (_between(lambda x: torch.fft.fft(x).real), "aten.fft_fft.default"),
    "softmax": (_between(lambda x: x.softmax(-1)), "aten.softmax.int"),
    "averaged": (_between(lambda x: x - x.mean(-1, keepdim=True)), "aten.mean.dim"),
    "listed": (_between(lambda x: F.pad(x[:, [3, 2, 1]], (0, 9))), "aten.index.Tensor"),
    "steps": (_steps, "aten.rnn_tanh.input"),
    "gram": (_between(lambda x: x @ x.T @ x), "aten.matmul.default"),
    "numbered": (_between(lambda x: x * torch.arange(12)), "aten.arange.default"),
    "reversed": (_between(lambda x: x.flip(-1)), "aten.flip.default"),
    "picked": (_between(lambda x: x * x[:, :1].relu() + x[:, 3].unsqueeze(1)), "aten.select.int"),
    "uneven-split": (
        _between(lambda x: torch.cat([part.tanh() for part in x.split(5, -1)], -1)),
        "aten.split.Tensor",
    ),
    "uneven-sections": (
        _between(lambda x: torch.cat([part.tanh() for part in x.tensor_split(5, -1)], -1)),
        "aten.tensor_split.sections",
    ),
    "gathered-across": (_between(lambda x: x.gather(1, x.argsort(1))), "aten.gather.default"),
    "gathered-in-part": (
        _between(lambda x: F.pad(x.gather(0, torch.zeros(3, 11, dtype=torch.int64)), (0, 1))),
        "aten.gather.default",
    ),
    "copies-of-one-weight": (_copies_of_one_weight, "aten.linear.default"),
    # A weight whose zeros are not zeros when it is used.
    "curved-weight": (
        _two_layers(lambda net, x: F.linear(net.enter(x), net.leave.weight.exp())),
        "aten.linear.default",
    ),
    # Arguments that a rule does not read, and tensors that an operator writes to.
    "summed-into": (
        _between(lambda x: torch.sum(x[:, None], 1, out=torch.empty_like(x))),
        "aten.sum.IntList_out",
    ),
    "squared-into": (
        _between(lambda x: torch.mul(x, x, out=torch.zeros_like(x))),
        "aten.mul.out",
    ),
    "statistics-of-a-batch": (
        _between(lambda x: F.batch_norm(x, None, None, training=True)),
        "aten.batch_norm.default",
    ),
    "dropped": (_between(lambda x: F.dropout(x, 0.5, training=True)), "aten.dropout.default"),
    "randomly-leaky": (_between(lambda x: F.rrelu(x, training=True)), "aten.rrelu.default"),
    "overwritten-weight": (_overwritten_weight, "aten.fill_.Scalar"),
    "observed": (_observed, "output"),
}
"""Networks without a prunable group, and the operator that freezes their hidden layer."""
