"""Small hand-written networks, one for each way in which axes hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d


class Residual(nn.Module):
    """A stream that two convolutions write and three read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.two(torch.relu(self.one(x)))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, read together after a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat((self.left(x), self.right(x)), 1))
        return self.head(x.flatten(1))


class Depthwise(nn.Module):
    """An expansion that passes through a depthwise filter."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depth(F.hardswish(self.expand(x)))))


class Grouped(nn.Module):
    """Whole groups of channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=4)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.grouped(torch.relu(self.expand(x)))))


class Tied(nn.Module):
    """One weight under two names, with biases of its own under each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.enter = nn.Linear(4, 6)
        self.leave = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.second(torch.tanh(self.first(self.enter(x))))))


class CalledTwice(nn.Module):
    """The same block on two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x) + 1)


class UnusedBranch(nn.Module):
    """A branch whose result goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 7)
        self.unused = nn.Linear(7, 3)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        self.unused(x).sum()
        return self.head(x)


class BareParameters(nn.Module):
    """Weights that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 9))
        self.scale = nn.Parameter(torch.randn(9))
        self.down = nn.Parameter(torch.randn(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up * self.scale) @ self.down.T


class Shuffle(nn.Module):
    """Channels dealt out to two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.leave = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.leave(x)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.leave = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        gate = F.adaptive_avg_pool2d(x, 1)
        return self.leave(x * torch.sigmoid(self.excite(torch.relu(self.squeeze(gate)))))


class PaddedShortcut(nn.Module):
    """A shortcut with zeros in place of the channels that it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 1)
        self.wide = nn.Conv2d(4, 8, 1)
        self.leave = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.wide(x) + F.pad(x, (0, 0, 0, 0, 2, 2))))


class EinsumAttention(nn.Module):
    """Attention written out, its batch as large as its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 3 * 2 * 5)
        self.out = nn.Linear(2 * 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, 5).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        mixed = torch.einsum("b h i j, b h j d -> b i h d", weights, v)
        return self.out(mixed.flatten(2))


class EinsumLayers(nn.Module):
    """Attention and neurons of bare weights, which have a dimension for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(6, 3, 5)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(3, 5, 6))
        self.up = nn.Parameter(torch.randn(9, 6))
        self.down = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,dhk->bshk", x, w) for w in (self.query, self.key, self.value))
        weights = torch.einsum("bqhk,bshk->bhqs", q, k).softmax(-1)
        mixed = torch.einsum("bhqs,bshk->bqhk", weights, v)
        x = x + torch.einsum("bshk,hkd->bsd", mixed, self.out)
        return torch.einsum("...n,no->...o", torch.relu(x @ self.up.T), self.down)


class TiedAutoencoder(nn.Module):
    """A decoder that reads the weights of the encoder the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(4, 9), nn.Linear(9, 6)
        self.back, self.shift = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(torch.tanh(self.outer(x))))
        x = torch.tanh(F.linear(x, self.inner.weight.t(), self.back))
        return F.linear(x, self.outer.weight.t(), self.shift)


class Deformable(nn.Module):
    """A modulated deformable convolution, whose filters read two fields of offsets."""

    def __init__(self, fields: int = 2, groups: int = 1, masked: bool = True) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.offset = nn.Conv2d(8, fields * 18, 3, padding=1)
        self.mask = nn.Conv2d(8, fields * 9, 3, padding=1) if masked else None
        self.deform = DeformConv2d(8, 6, 3, padding=1, groups=groups, bias=masked)
        self.leave = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        mask = None if self.mask is None else torch.sigmoid(self.mask(x))
        return self.leave(torch.relu(self.deform(x, self.offset(x), mask)))


class GroupNormed(nn.Module):
    """Whole groups of a normalization can go."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 1)
        self.norm = nn.GroupNorm(3, 12)
        self.leave = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.norm(self.enter(x))))


class UpAndDown(nn.Module):
    """A transposed convolution after pooling, with in-place arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.act = nn.PReLU(4)
        self.leave = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.down(x), 2)
        x = F.interpolate(self.act(self.up(x)), scale_factor=2.0)
        return self.leave(x.mul_(2).add_(1))


class GatedHalves(nn.Module):
    """One projection cut in two halves that gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 14)
        self.leave = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).chunk(2, -1)
        return self.leave(a * F.silu(b))


class GatedByGlu(nn.Module):
    """The same by torch's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 14), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.glu(self.enter(x)))


class IndependentHalves(nn.Module):
    """One projection whose two parts go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 11)
        self.left = nn.Linear(5, 3)
        self.right = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.enter(x), [5, 6], -1)
        return self.left(torch.relu(a)) + self.right(torch.tanh(b))


class Stacked(nn.Module):
    """Parameters put together on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6, bias=False)
        self.two = nn.Linear(4, 5, bias=False)
        self.leave = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat((self.one.weight, self.two.weight))
        return self.leave(torch.relu(F.linear(x, weight)))


class UnusedMean(nn.Module):
    """A mean over what is pruned, that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        x.mean(-1).unsqueeze(-1)
        return self.leave(x)


class WeightNormed(nn.Module):
    """Rows of a weight with lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.enter(x)))


class LookedUp(nn.Module):
    """A number for each unit, looked up in a table by an index that the unit owns."""

    table: Tensor
    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.leave = nn.Linear(6, 3)
        self.register_buffer("table", torch.randn(9))
        self.register_buffer("index", torch.tensor([8, 2, 2, 5, 0, 7]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) * self.table[self.index] + self.table.index_select(0, self.index)
        return self.leave(torch.relu(x))


class IndexedApart(nn.Module):
    """Two dimensions are looked up together, with the units between them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x)).transpose(1, 2).unsqueeze(1)
        return self.leave(x[:, torch.tensor([0, 0, 0]), :, torch.tensor([3, 0, 2])])


class Gathered(nn.Module):
    """A row of numbers for each unit, of which an index that the unit owns picks some."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(6, 5))
        self.shift = nn.Parameter(torch.randn(6, 4))
        self.leave = nn.Linear(6, 3)
        self.register_buffer("index", torch.tensor([[4, 0, 1], [2, 2, 3]] * 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))[..., None] * self.table
        x = x.gather(-1, self.index.expand(len(x), *self.index.shape))
        x = x + self.shift.gather(1, self.index % 4)
        return self.leave(x.sum(-1))


_DRAWN = torch.Generator().manual_seed(0)
_IMAGE = (torch.randn(2, 3, 4, 4, generator=_DRAWN),)
_LARGE = (torch.randn(2, 3, 16, 16, generator=_DRAWN),)
_ROWS = (torch.randn(3, 4, generator=_DRAWN),)

PRUNABLE: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], dict[str, int]]] = {
    "residual": (Residual, _IMAGE, {"stem.channels": 6, "one.channels": 8}),
    "concat": (Concat, _IMAGE, {"left.channels": 4, "right.channels": 6}),
    "depthwise": (Depthwise, _IMAGE, {"expand.channels": 8}),
    "grouped": (Grouped, _IMAGE, {"expand.channels": 4}),
    "tied": (Tied, _ROWS, {"hidden": 6}),
    "called-twice": (CalledTwice, _ROWS, {"block.neurons": 9}),
    "unused-branch": (UnusedBranch, _ROWS, {"neurons": 7}),
    "unused-mean": (UnusedMean, _ROWS, {"neurons": 6}),
    "weight-normed": (WeightNormed, _ROWS, {"neurons": 6}),
    "looked-up": (LookedUp, _ROWS, {"neurons": 6}),
    "indexed-apart": (
        IndexedApart,
        (torch.randn(2, 5, 6, generator=_DRAWN),),
        {"neurons": 9},
    ),
    "gathered": (Gathered, _ROWS, {"neurons": 6}),
    "bare-parameters": (BareParameters, _ROWS, {"neurons": 9}),
    "shuffle": (Shuffle, _IMAGE, {"enter.channels": 4}),
    "gate": (Gate, _IMAGE, {"enter.channels": 8, "squeeze.channels": 4}),
    "padded": (
        PaddedShortcut,
        _IMAGE,
        {"enter.channels": 4, "wide.channels": 2, "wide.channels.2": 2},
    ),
    "einsum": (EinsumAttention, (torch.randn(2, 4, 6, generator=_DRAWN),), {"heads": 2}),
    "einsum-layers": (
        EinsumLayers,
        (torch.randn(2, 4, 6, generator=_DRAWN),),
        {"heads": 3, "outputs.2": 5, "neurons": 9},
    ),
    "tied-autoencoder": (TiedAutoencoder, _ROWS, {"outer.hidden": 9, "neurons": 6}),
    "deformable": (Deformable, _IMAGE, {"enter.channels": 4, "deform.channels": 6}),
    "group-norm": (GroupNormed, _IMAGE, {"enter.channels": 3}),
    "up-and-down": (UpAndDown, _LARGE, {"down.channels": 6, "up.channels": 4}),
    "gated-halves": (GatedHalves, _ROWS, {"neurons": 7}),
    "glu": (GatedByGlu, _ROWS, {"neurons": 7}),
    "independent-halves": (IndependentHalves, _ROWS, {"enter.neurons": 5, "enter.neurons.2": 6}),
    "stacked": (Stacked, _ROWS, {"one.neurons": 6, "two.neurons": 5}),
}
"""Networks, example inputs, and the prunable groups with their units."""


class _TwoLayers(nn.Module):
    """A hidden layer of twelve, with something unusual in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 12)
        self.leave = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x)))

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class MisalignedViews(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x.view(-1, 3, 4).relu().view(-1, 4, 3).tanh().view(-1, 12)


class Spectrum(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class Softmax(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class Averaged(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class Listed(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return F.pad(x[:, [3, 2, 1]], (0, 9))


class Steps(_TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.states = nn.RNN(1, 1, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        return self.states(x.unsqueeze(-1))[0].squeeze(-1)


class Gram(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x @ x.T @ x


class Numbered(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.arange(12)


class Reversed(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Picked(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x * x[:, :1].relu() + x[:, 3].unsqueeze(1)


class UnevenSplit(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([part.tanh() for part in x.split(5, -1)], -1)


class UnevenSections(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cat([part.tanh() for part in x.tensor_split(5, -1)], -1)


class GatheredAcross(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return x.gather(1, x.argsort(1))


class GatheredInPart(_TwoLayers):
    def middle(self, x: Tensor) -> Tensor:
        return F.pad(x.gather(0, torch.zeros(3, 11, dtype=torch.int64)), (0, 1))


class CopiesOfOneWeight(nn.Module):
    """A weight repeated along what it is contracted over: no zero of it masks one copy."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 12)
        self.weight = nn.Parameter(torch.randn(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.enter(x), self.weight.expand(5, 12))


class CurvedWeight(_TwoLayers):
    """A weight whose zeros are not zeros when it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.enter(x), self.leave.weight.exp())


class OverwrittenWeight(_TwoLayers):
    """A copy of a weight some of which is replaced before use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.leave.weight.clone()
        weight[:2].fill_(1.0)
        return F.linear(self.enter(x), weight)


class Observed(_TwoLayers):
    """A hidden layer that is an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.enter(x)
        return self.leave(x), x


FROZEN: dict[str, tuple[type[nn.Module], str]] = {
    "misaligned-views": (MisalignedViews, "aten.reshape.default"),
    "unknown-operator": (Spectrum, "aten.fft_fft.default"),
    "softmax": (Softmax, "aten.softmax.int"),
    "averaged": (Averaged, "aten.mean.dim"),
    "listed": (Listed, "aten.index.Tensor"),
    "steps": (Steps, "aten.rnn_tanh.input"),
    "gram": (Gram, "aten.matmul.default"),
    "numbered": (Numbered, "aten.arange.default"),
    "reversed": (Reversed, "aten.flip.default"),
    "picked": (Picked, "aten.select.int"),
    "uneven-split": (UnevenSplit, "aten.split.Tensor"),
    "uneven-sections": (UnevenSections, "aten.tensor_split.sections"),
    "gathered-across": (GatheredAcross, "aten.gather.default"),
    "gathered-in-part": (GatheredInPart, "aten.gather.default"),
    "copies-of-one-weight": (CopiesOfOneWeight, "aten.linear.default"),
    "curved-weight": (CurvedWeight, "aten.linear.default"),
    "overwritten-weight": (OverwrittenWeight, "aten.fill_.Scalar"),
    "observed": (Observed, "output"),
}
"""Networks without a prunable group, and the operator that freezes their hidden layer."""


def randomized(network: nn.Module) -> nn.Module:
    """Give every parameter and statistic of a network random values, and set it to eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network.eval()
