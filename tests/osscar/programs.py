"""Networks whose code keeps sizes that it cannot change, and what they compute without units.

Nothing here is shared with the proof: units are removed by zeroing what reads them, written anew.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import graph
from osscar.proof.plan import GroupPlan, PruningPlan
from tests.graph.topologies import conv, network

WIDTH = 16


class Attention(nn.Module):
    """Takes the width of a head from the width of the stream."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)
        )

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


@network(blocks=lambda: nn.Sequential(Block(), Block()), head=(WIDTH, 5))
def Transformer(net, x):
    """A model whose heads cannot follow, and whose neurons can."""
    return net.head(net.blocks(x).mean(1))


@network(
    enter=(8, 64 * 4 * 4),
    up=lambda: nn.ConvTranspose2d(64, 12, 2, stride=2),
    leave=conv(12, 3, 3, padding=1),
)
def Generator(net, z):
    """A generator, which reads channels from features by a size that is written down."""
    x = torch.relu(net.enter(z)).view(-1, 64, 4, 4)
    return net.leave(torch.relu(net.up(x)))


def gated(gate):
    """Make a network with a gate of a written size before a plain layer."""

    @network(enter=(8, 64), leave=(32, 20), head=(20, 3))
    def Gated(net, x):
        a, b = net.enter(x).split(32, -1)
        return net.head(torch.tanh(net.leave(gate(a, b))))

    return Gated


Gated, MaxOut = gated(lambda a, b: a * F.gelu(b)), gated(torch.maximum)


@network(
    stem=conv(3, 8, 3, padding=1),
    one=conv(8, 10, 3, padding=1),
    two=conv(10, 8, 3, padding=1),
    wide=conv(8, 16, 3, stride=2, padding=1),
    head=(16, 5),
)
def OptionA(net, x):
    """A residual network whose shortcut adds zeros for the channels that it lacks."""
    x = torch.relu(net.stem(x))
    x = torch.relu(x + net.two(torch.relu(net.one(x))))
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    return net.head(torch.relu(net.wide(x) + shortcut).mean((2, 3)))


@network(
    stem=conv(3, 24, 3, padding=1),
    depthwise=conv(24, 24, 3, padding=1, groups=24),
    grouped=conv(24, 32, 3, padding=1, groups=4),
    norm=lambda: nn.GroupNorm(4, 32),
    head=(32, 5),
)
def Grouped(net, x):
    """A net of grouped and depthwise convolutions, group normalization, sizes by number."""
    x = torch.relu(net.depthwise(torch.relu(net.stem(x))))
    x = torch.relu(net.norm(net.grouped(x)))
    return net.head(x.mean((2, 3)).view(x.shape[0], 32))


@network(q=(16, 24), k=(16, 24), v=(16, 24), out=(24, 16))
def Folding(net, x):
    """Attention with heads folded into the batch, its tables of zeros made by size."""
    b, n, _ = x.shape
    q, k, v = (
        part.view(b, n, 6, 4).transpose(1, 2).reshape(b * 6, n, 4)
        for part in (net.q(x), net.k(x), net.v(x))
    )
    mixed = torch.bmm((q @ k.transpose(1, 2) * 0.5).softmax(-1), v)
    mixed = mixed.view(b, 6, n, 4).transpose(1, 2).reshape(b, n, 24)
    return net.out(mixed + x.new_zeros(b, n, 24))


@network(wide=(8, 40), one=(10, 6), two=(18, 6), three=(12, 6))
def Sliced(net, x):
    """One wide layer whose parts are cut out by number, from the front and from the back."""
    y = torch.tanh(net.wide(x))
    a, b, c = y[:, :10], y.narrow(1, 10, 18), y[:, -12:]
    return net.one(a) + net.two(b) * net.three(c)


@network(q=(16, 24), kv=(16, 4), out=(24, 16))
def Repeating(net, x):
    """Attention whose heads share keys, repeated by number."""
    b, n, _ = x.shape
    q = net.q(x).view(b, n, 6, 4).transpose(1, 2)
    kv = net.kv(x).view(b, n, 1, 4).transpose(1, 2)
    kv = kv.expand(b, 6, n, 4)
    mask = torch.zeros(n, n, dtype=x.dtype).repeat(6, 1, 1)
    mixed = ((q @ kv.transpose(-2, -1)) + mask).softmax(-1) @ kv
    return net.out(mixed.transpose(1, 2).reshape(b, n, 24))


@network(
    one=lambda: nn.Conv1d(3, 16, 1),
    two=lambda: nn.Conv1d(16, 24, 1),
    three=lambda: nn.Conv1d(40, 12, 1),
    head=lambda: nn.Conv1d(12, 4, 1),
)
def Points(net, x):
    """A small PointNet: features of points, maxima over them, put beside each point again."""
    near = torch.relu(net.one(x))
    far = torch.relu(net.two(near)).max(2, keepdim=True)[0].view(-1, 24, 1)
    both = torch.cat((far.expand(-1, 24, x.shape[2]), near), 1)
    return net.head(torch.relu(net.three(both)))


@network(enter=(8, 12), leave=(12, 3))
def Counted(net, x):
    """Code that asks how many samples there are as lists are asked."""
    y = torch.relu(net.enter(x)).view(len(x), 12)
    return net.leave(y + y.sum(0).expand(len(y), 12) / len(x))


@network(enter=(16, 16), leave=(16, 16), mix=(16, 16), head=(16, 3))
def Coincidence(net, x):  # (samples, 16 points, 16 features)
    """Code that writes 16 for its features, for its points and for a mixture of both."""
    y = torch.relu(net.enter(x.reshape(-1, 16))).view(-1, 16, 16)
    y = torch.relu(net.mix(y.transpose(1, 2).reshape(-1, 16))).view(-1, 16, 16)
    return net.head(torch.tanh(net.leave(y.transpose(1, 2))))


@network(
    qkv=(16, 3 * 5 * 4),
    out=(20, 16),
    near=lambda: nn.Conv1d(8, 8, 3, padding=1, groups=8),
    far=lambda: nn.Conv1d(12, 12, 5, padding=2, groups=12),
)
def UnevenHeads(net, x):
    """Factorized attention like that of CoaT, whose positions are of two sorts of heads."""
    b, n, _ = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 5, 4).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = q @ (k.softmax(2).transpose(-1, -2) @ v)
    near, far = v.transpose(-1, -2).reshape(b, 20, n).split([8, 12], 1)
    beside = torch.cat((net.near(near), net.far(far)), 1).reshape(b, 5, 4, n)
    mixed = mixed + q * beside.transpose(-1, -2)
    return net.out(mixed.transpose(1, 2).reshape(b, n, 20))


@network(one=(3, 12, 1), two=conv(12, 20, 3, padding=1, groups=4), three=(32, 8, 1), head=(8, 2, 1))
def GroupsOfParts(net, x):
    """A net whose channels are put together group by group, and read together."""
    one = torch.relu(net.one(x))
    n, _, h, w = x.shape
    two = torch.relu(net.two(one)).view(n, 4, 5, h, w)
    both = torch.cat((one.view(n, 4, 3, h, w), two), 2).view(n, 32, h, w)
    return net.head(torch.relu(net.three(both)))


CASES = {
    "heads": (Transformer, (7, 16)),
    "generator": (Generator, (8,)),
    "gated": (Gated, (8,)),
    "max-out": (MaxOut, (8,)),
    "option A": (OptionA, (3, 12, 12)),
    "grouped": (Grouped, (3, 8, 8)),
    "folding": (Folding, (9, 16)),
    "sliced": (Sliced, (8,)),
    "repeating": (Repeating, (5, 16)),
    "points": (Points, (3, 11)),
    "counted": (Counted, (8,)),
    "uneven heads": (UnevenHeads, (9, 16)),
    "groups of parts": (GroupsOfParts, (3, 5, 5)),
    "coincidence": (Coincidence, (16, 16)),
}
"""Networks, and the shape of one sample."""


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """Return a network of float64 with weights that are not small anywhere."""
    torch.manual_seed(seed)
    return randomized(kind())


def randomized(net: nn.Module) -> nn.Module:
    """Draw all parameters and running statistics of a network anew, in float64."""
    net = net.double().eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            width = tensor[0].numel() if tensor.dim() > 1 else 4
            noise = torch.randn(tensor.shape, dtype=torch.float64) / width**0.5
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
            if tensor.dim() == 1 and "norm" in name:
                tensor.add_(1.0)
    return net


def kept_at_random(groups, share=0.6, seed=0) -> PruningPlan:
    """Plan to keep units of each group that are drawn."""
    draw = torch.Generator().manual_seed(seed)
    return PruningPlan(
        tuple(
            GroupPlan.of(
                group,
                tuple(
                    sorted(
                        torch.randperm(group.units, generator=draw)[
                            : max(1, int(group.units * share))
                        ].tolist()
                    )
                ),
            )
            for group in groups
        )
    )


def without_units(net: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a copy in which nothing reads the units that leave."""
    net = copy.deepcopy(net)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    for group in plan.groups:
        gone = [unit for unit in range(group.units) if unit not in group.kept]
        for slot in group.slots:
            if slot.role is graph.Role.CONSUMER:
                where = [slice(None)] * tensors[slot.tensor].dim()
                where[slot.dim] = slot.indices(gone)
                tensors[slot.tensor].data[tuple(where)] = 0.0
    return net


def far_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max())
