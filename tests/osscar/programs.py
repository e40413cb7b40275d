"""Networks whose code keeps sizes that it cannot change, and what they compute without units.

Nothing here is shared with the proof: units are removed by zeroing what reads them, written anew.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import graph
from osscar.proof.plan import GroupPlan, PruningPlan
from tests.osscar.test_feasibility import Gated, Generator, MaxOut, OptionA, Transformer


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, group normalization, channels cut by number."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = torch.relu(self.norm(self.grouped(x)))
        return self.head(x.mean((2, 3)).view(x.shape[0], 32))


class Folding(nn.Module):
    """Attention with heads folded into the batch, its tables of zeros made by size."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 24) for _ in range(3))
        self.out = nn.Linear(24, 16)

    def split(self, x):
        b, n, _ = x.shape
        return x.view(b, n, 6, 4).transpose(1, 2).reshape(b * 6, n, 4)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        mixed = torch.bmm((q @ k.transpose(1, 2) * 0.5).softmax(-1), v)
        mixed = mixed.view(b, 6, n, 4).transpose(1, 2).reshape(b, n, 24)
        return self.out(mixed + x.new_zeros(b, n, 24))


class Sliced(nn.Module):
    """One wide layer whose parts are cut out by number, from the front and from the back."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 40)
        self.one, self.two, self.three = nn.Linear(10, 6), nn.Linear(18, 6), nn.Linear(12, 6)

    def forward(self, x):
        y = torch.tanh(self.wide(x))
        a, b, c = y[:, :10], y.narrow(1, 10, 18), y[:, -12:]
        return self.one(a) + self.two(b) * self.three(c)


class Repeating(nn.Module):
    """Heads that share keys, repeated by number, and features repeated inside."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 24), nn.Linear(16, 4), nn.Linear(24, 16)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        kv = self.kv(x).view(b, n, 1, 4).transpose(1, 2)
        kv = kv.expand(b, 6, n, 4)
        mask = torch.zeros(n, n, dtype=x.dtype).repeat(6, 1, 1)
        mixed = ((q @ kv.transpose(-2, -1)) + mask).softmax(-1) @ kv
        return self.out(mixed.transpose(1, 2).reshape(b, n, 24))


class Points(nn.Module):
    """A small PointNet: features of points, maxima over them, put beside each point again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 24, 1)
        self.three, self.head = nn.Conv1d(40, 12, 1), nn.Conv1d(12, 4, 1)

    def forward(self, x):
        near = torch.relu(self.one(x))
        far = torch.relu(self.two(near)).max(2, keepdim=True)[0].view(-1, 24, 1)
        both = torch.cat((far.expand(-1, 24, x.shape[2]), near), 1)
        return self.head(torch.relu(self.three(both)))


class Counted(nn.Module):
    """Asks how many samples there are as lists are asked."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = torch.relu(self.enter(x)).view(len(x), 12)
        return self.leave(y + y.sum(0).expand(len(y), 12) / len(x))


class Coincidence(nn.Module):
    """Writes 16 for its features, for its points and for a mixture of both."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):  # (samples, 16 points, 16 features)
        y = torch.relu(self.enter(x.reshape(-1, 16))).view(-1, 16, 16)
        y = torch.relu(self.mix(y.transpose(1, 2).reshape(-1, 16))).view(-1, 16, 16)
        return self.head(torch.tanh(self.leave(y.transpose(1, 2))))


class UnevenHeads(nn.Module):
    """Factorized attention like that of CoaT, whose positions are of two sorts of heads."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 3 * 5 * 4), nn.Linear(20, 16)
        self.near = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.far = nn.Conv1d(12, 12, 5, padding=2, groups=12)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 5, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = q @ (k.softmax(2).transpose(-1, -2) @ v)
        near, far = v.transpose(-1, -2).reshape(b, 20, n).split([8, 12], 1)
        beside = torch.cat((self.near(near), self.far(far)), 1).reshape(b, 5, 4, n)
        mixed = mixed + q * beside.transpose(-1, -2)
        return self.out(mixed.transpose(1, 2).reshape(b, n, 20))


class GroupsOfParts(nn.Module):
    """Channels put together group by group, and read together."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 20, 3, padding=1, groups=4)
        self.three, self.head = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        one = torch.relu(self.one(x))
        n, _, h, w = x.shape
        two = torch.relu(self.two(one)).view(n, 4, 5, h, w)
        both = torch.cat((one.view(n, 4, 3, h, w), two), 2).view(n, 32, h, w)
        return self.head(torch.relu(self.three(both)))


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
