"""Small networks made of the blocks that public models are made of, one for each operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Attention(nn.Module):
    """Four query heads of width four on six features."""

    heads, key_heads, width = 4, 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, self.heads * self.width)
        self.key = nn.Linear(6, self.key_heads * self.width)
        self.value = nn.Linear(6, self.key_heads * self.width)
        self.out = nn.Linear(self.heads * self.width, 6)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return self.out(self.mixed(query, key, value).transpose(1, 2).flatten(2))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError


class WrittenOut(_Attention):
    """Attention as in a textbook, with a causal mask."""

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) / self.width**0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


class MultiQuery(WrittenOut):
    """One key head, which is broadcast against all heads."""

    key_heads = 1


class BatchedProducts(_Attention):
    """Batch and heads in one dimension, scores added to a bias of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 5, 5))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape
        query, key, value = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        scores = torch.baddbmm(self.bias, query, key.transpose(1, 2), alpha=0.5)
        return torch.bmm(scores.softmax(-1), value).view(shape)


class GroupedQueries(_Attention):
    heads, key_heads = 6, 2

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class RepeatedKeys(_Attention):
    key_heads = 2

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(query, key, value)


class RotaryByComplexNumbers(_Attention):
    """Pairs of features turned as complex numbers, as the published LLaMA does."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        angles = torch.rand(9, self.width // 2)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turns = self.turns[: x.shape[2]].view(1, 1, x.shape[2], -1)
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = self.turned(query), self.turned(key)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Normed(nn.Module):
    """A hidden layer on a stream that is normalized by its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.norm = nn.RMSNorm(6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(F.silu(self.up(self.norm(x))))
        length = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.leave(x * length)


class AddedProducts(nn.Module):
    """Layers written as sums of a bias and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 9))
        self.bias = nn.Parameter(torch.randn(9))
        self.down = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.down.bias, torch.addmm(self.bias, x, self.up).tanh(), self._down())

    def _down(self) -> Tensor:
        return self.down.weight.t()


class _Hidden(nn.Module):
    """A hidden layer of six, read `copies` times."""

    copies = 1

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.randn(1, 6))
        self.leave = nn.Linear(6 * self.copies, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x)))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Expanded(_Hidden):
    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.scale.expand(len(x), -1)


class Repeated(_Hidden):
    copies = 2

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x).repeat(1, 2)


class RepeatedInside(_Hidden):
    copies = 2

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x).repeat_interleave(2, -1)


class StackedCopies(_Hidden):
    copies = 2

    def middle(self, x: Tensor) -> Tensor:
        return torch.stack((x.tanh(), x.sigmoid()), -1).flatten(1)


class Unflattened(_Hidden):
    """Units in rows of three, as many as there are."""

    def middle(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x).unflatten(-1, (-1, 3)).tanh().flatten(1)


class UnderModes(_Hidden):
    """Gradients off and on, and another precision, for parts of the forward pass."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            x = x.float().tanh() * self.scale
            with torch.enable_grad():
                gate = x.detach().sigmoid()
        with torch.enable_grad():
            x, halved = x * gate, x / 2
        return x + halved


class Recurrent(nn.Module):
    """Layers over steps in both directions, the second one on top of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 9)
        self.layers = nn.GRU(9, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.middle = nn.Linear(8, 7)
        self.last = nn.LSTM(7, 5, proj_size=3)
        self.leave = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.layers(self.enter(x).tanh())[0]).relu()
        return self.leave(self.last(x.transpose(0, 1))[1][0][-1])


class RecurrentSteps(nn.Module):
    """Cells that are called step by step; what the second reads is the state of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 9)
        self.one, self.two = nn.LSTMCell(9, 4), nn.RNNCell(4, 5, nonlinearity="relu")
        self.leave = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), 4), x.new_ones(len(x), 4))
        other = None
        for step in self.enter(x).tanh().unbind(1):
            state = self.one(step, state)
            other = self.two(state[0], other)
        return self.leave(other)


class _Image(nn.Module):
    """Channels of an image, with something in the middle."""

    channels, read = 8, 8

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, self.channels, 1)
        self.middle = self.made()
        self.leave = nn.Conv2d(self.read, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.middle(self.enter(x))))

    def made(self) -> nn.Module:
        raise NotImplementedError


class InstanceNormed(_Image):
    def made(self) -> nn.Module:
        return nn.InstanceNorm2d(8, affine=True)


class Shuffled(_Image):
    def made(self) -> nn.Module:
        return nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2))


class ShuffledByHand(_Image):
    """Channels dealt out to four groups, whose number is the larger factor."""

    def made(self) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        n, c, h, w = x.shape
        x = x.view(n, 4, -1, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.leave(torch.relu(x))


class FinePixels(_Image):
    channels, read = 12, 3

    def made(self) -> nn.Module:
        return nn.PixelShuffle(2)


class CoarsePixels(_Image):
    read = 32

    def made(self) -> nn.Module:
        return nn.PixelUnshuffle(2)


class Shifted(_Image):
    """Windows shifted over the image, and back."""

    def made(self) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).roll((1, 1), (2, 3))
        return self.leave(torch.relu(x).roll((-1, -1), (2, 3)))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm3d(6)
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.leave = nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(torch.relu(self.norm(self.enter(x))), 2)
        return self.leave(torch.relu(self.up(x)))


class _Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 5, 3, padding=1)
        self.two = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.two(F.silu(self.one(x))))


class TwoPaths(nn.Module):
    """C2f of YOLO: halves of which one goes through blocks, every step of it read."""

    def __init__(self, entering: int, *, by_number: bool) -> None:
        super().__init__()
        self.by_number = by_number
        self.enter = nn.Conv2d(entering, 8, 1)
        self.blocks = nn.ModuleList(_Bottleneck() for _ in range(2))
        self.leave = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.enter(x))
        parts = list(x.chunk(2, 1) if self.by_number else x.split((4, 4), 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return F.silu(self.leave(torch.cat(parts, 1)))


class PooledPaths(nn.Module):
    """SPPF of YOLO: one tensor pooled again and again, every step of it read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(6, 5, 1)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.leave = nn.Conv2d(15, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.pool(x := F.silu(self.enter(x)))
        return F.silu(self.leave(torch.cat((x, once, self.pool(once)), 1)))


class Neck(nn.Module):
    """A YOLO-style neck: down, pooled, up again, and joined with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TwoPaths(3, by_number=True)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.pooled = PooledPaths()
        self.up = nn.Upsample(scale_factor=2)
        self.joined = TwoPaths(7 + 6, by_number=False)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.backbone(x)
        coarse = self.pooled(self.down(fine))
        return self.head(self.joined(torch.cat((self.up(coarse), fine), 1)))


class Experts(nn.Module):
    """All experts on every row, weighted by gates that do not compete."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 7))
        self.down = nn.Parameter(torch.randn(3, 7, 5))

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.router(x))
        hidden = torch.einsum("rd,edf->ref", x, self.up).relu()
        return torch.einsum("ref,efo,re->ro", hidden, self.down, gates)


class Messages(nn.Module):
    """Two rounds of messages along the edges of a graph, added up at their ends."""

    begins: Tensor
    ends: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 7)
        self.message = nn.Linear(14, 9)
        self.second = nn.Linear(16, 8)
        self.leave = nn.Linear(8, 3)
        self.register_buffer("begins", torch.tensor([0, 1, 2, 3, 4, 0, 2]))
        self.register_buffer("ends", torch.tensor([1, 2, 3, 4, 0, 3, 2]))

    def forward(self, x: Tensor) -> Tensor:
        nodes = self.enter(x).relu()
        both = torch.cat((nodes[:, self.begins], nodes.index_select(1, self.ends)), -1)
        sent = self.message(both).tanh()
        added = sent.new_zeros(len(x), 5, sent.shape[-1]).index_add(1, self.ends, sent)
        sent = self.second(torch.cat((nodes, added), -1))[:, self.begins].tanh()
        index = self.ends[:, None].expand(len(x), -1, sent.shape[-1])
        return self.leave(sent.new_zeros(len(x), 5, sent.shape[-1]).scatter_add(1, index, sent))


class Maxima(nn.Module):
    """The largest message at each end, and some positions filled and copied to."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.other = nn.Linear(6, 7), nn.Linear(6, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.enter(x).tanh(), self.other(x).sigmoid()
        index = torch.tensor([0, 3, 3, 1, 1])[:, None].expand(len(x), -1, 7)
        found = one.scatter_reduce(1, index, other, "amax").index_fill(1, torch.tensor([2]), 0.5)
        return self.leave(found.index_copy(1, torch.tensor([4, 0]), other[:, :2]))


class FourierMixed(nn.Module):
    """FNet, GFNet, and a filter of a length of its own, along positions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.filter = nn.Parameter(torch.randn(3, 8, 2))
        self.taps = nn.Parameter(torch.randn(8, 5))
        self.middle = nn.Linear(8, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft(spectrum, n=5, dim=1, norm="ortho") + torch.fft.fft(x, dim=1).real
        long = torch.fft.rfft(x, n=9, dim=1) * torch.fft.rfft(self.taps, n=9).transpose(0, 1)
        x = self.middle(torch.fft.irfft(long, n=9, dim=1)[:, :5]).relu()
        return self.leave(torch.fft.fftshift(x, dim=(1,)).cumsum(1))


class SpectralOperator(nn.Module):
    """A Fourier neural operator: channels are mixed at each frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 1)
        self.weight = nn.Parameter(torch.randn(6, 7, 3, 2, 2))
        self.beside = nn.Conv2d(6, 7, 1)
        self.leave = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        low = torch.fft.rfft2(x)[:, :, :3, :2]
        mixed = torch.einsum("nihw,iohw->nohw", low, torch.view_as_complex(self.weight))
        return self.leave((torch.fft.irfft2(mixed, s=(4, 4)) + self.beside(x)).relu())


class Patches(nn.Module):
    """Windows as channels and back, places in space that are read, windows of positions."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 5, 1)
        self.mixed = nn.Linear(20, 12)
        self.middle = nn.Conv2d(3, 6, 1)
        self.leave = nn.Linear(6, 2)
        self.register_buffer("places", torch.rand(1, 3, 3, 2) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.enter(x).relu(), 2, stride=2).transpose(1, 2)
        x = F.fold(self.mixed(columns).transpose(1, 2).tanh(), (4, 4), 2, stride=2)
        grid = self.places.expand(len(x), -1, -1, -1)
        x = F.grid_sample(self.middle(x).relu(), grid, align_corners=False)
        return self.leave(x.flatten(2).unfold(2, 3, 2).amax(-1).transpose(1, 2))


class Pairs(nn.Module):
    """A product of two layers, feature by feature."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(4, 6)
        self.product = nn.Bilinear(5, 6, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.product(self.one(x).relu(), self.two(x).tanh()).tanh())


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(11, 6, mode="sum")
        self.up, self.leave = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.up(self.table(x)).relu())


class SpatialGate(nn.Module):
    """gMLP as published: a convolution of a single tap whose channels are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.gate = nn.Conv1d(5, 5, 1)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.enter(x).relu().chunk(2, -1)
        return self.leave(left * self.gate(right))


class UnevenParts(nn.Module):
    """Two rows of parts inside parts, so that units of one part lie in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 2 * (3 + 2 * (2 + 3)))
        self.leave = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, others = self.enter(x).unflatten(1, (2, 13)).split((3, 10), 2)
        two, three = others.unflatten(2, (2, 5)).split((2, 3), 3)
        others = torch.cat((two.tanh(), three.relu()), 3).flatten(2)
        return self.leave(torch.cat((one.sigmoid(), others), 2).flatten(1))


_IMAGE = torch.randn(2, 3, 4, 4)
_ROWS = torch.randn(3, 4)
_TOKENS = torch.randn(2, 5, 6)

BLOCKS: dict[str, tuple[type[nn.Module], Tensor, dict[str, int]]] = {
    "attention": (WrittenOut, _TOKENS, {"heads": 4}),
    "multi-query": (MultiQuery, _TOKENS, {"heads": 4}),
    "bmm-baddbmm": (BatchedProducts, _TOKENS, {"heads": 4}),
    "enable-gqa": (GroupedQueries, _TOKENS, {"heads": 2}),
    "repeated-keys": (RepeatedKeys, _TOKENS, {"heads": 2}),
    "complex-rotary": (RotaryByComplexNumbers, _TOKENS, {"heads": 4}),
    "rms-norm": (Normed, _ROWS, {"neurons": 9}),
    "addmm": (AddedProducts, _ROWS, {"neurons": 9}),
    "expand": (Expanded, _ROWS, {"neurons": 6}),
    "repeat": (Repeated, _ROWS, {"neurons": 6}),
    "repeat-interleave": (RepeatedInside, _ROWS, {"neurons": 6}),
    "stack": (StackedCopies, _ROWS, {"neurons": 6}),
    "unflatten": (Unflattened, _ROWS, {"neurons": 2}),
    "modes": (UnderModes, _ROWS, {"neurons": 6}),
    "recurrent": (Recurrent, _TOKENS, {"enter.neurons": 9, "middle.neurons": 7}),
    "recurrent-steps": (RecurrentSteps, _TOKENS, {"neurons": 9}),
    "instance-norm": (InstanceNormed, _IMAGE, {"enter.channels": 8}),
    "channel-shuffle": (
        Shuffled,
        _IMAGE,
        {"enter.channels.2": 2, "middle.1.channels": 4},
    ),
    "shuffle-by-hand": (ShuffledByHand, _IMAGE, {"enter.channels": 2}),
    "pixel-shuffle": (FinePixels, _IMAGE, {"enter.channels": 3}),
    "pixel-unshuffle": (CoarsePixels, _IMAGE, {"enter.channels": 8}),
    "roll": (Shifted, _IMAGE, {"enter.channels": 8}),
    "conv3d": (Volume, torch.randn(2, 1, 4, 4, 4), {"enter.channels": 6, "up.channels": 4}),
    "yolo-neck": (
        Neck,
        _IMAGE,
        {
            "backbone.enter.channels": 4,
            "backbone.blocks.0.one.channels": 5,
            "backbone.blocks.1.one.channels": 5,
            "backbone.leave.channels": 6,
            "down.channels": 6,
            "pooled.enter.channels": 5,
            "pooled.leave.channels": 7,
            "joined.enter.channels": 4,
            "joined.enter.channels.2": 4,
            "joined.blocks.0.one.channels": 5,
            "joined.blocks.1.one.channels": 5,
            "joined.leave.channels": 6,
        },
    ),
    "messages": (
        Messages,
        _TOKENS,
        {"enter.neurons": 7, "message.neurons": 9, "second.neurons": 8},
    ),
    "maxima": (Maxima, _TOKENS, {"neurons": 7}),
    "fourier": (FourierMixed, _TOKENS, {"enter.neurons": 8, "middle.neurons": 7}),
    "fourier-operator": (SpectralOperator, _IMAGE, {"enter.channels": 6, "channels": 7}),
    "patches": (
        Patches,
        _IMAGE,
        {"enter.channels": 5, "mixed.channels": 3, "middle.channels": 6},
    ),
    "bilinear": (Pairs, _ROWS, {"one.neurons": 5, "two.neurons": 6, "product.neurons": 7}),
    "bags": (Bags, torch.arange(12).view(3, 4) % 11, {"hidden": 6, "neurons": 5}),
    "spatial-gate": (SpatialGate, _TOKENS, {"neurons": 8}),
    "uneven-parts": (
        UnevenParts,
        _ROWS,
        {"enter.neurons": 3, "enter.neurons.2": 2, "enter.neurons.3": 3},
    ),
    "experts": (Experts, _ROWS, {"neurons": 7, "router.neurons": 3}),
}
"""Networks, an example input, and the prunable groups with their units."""
