"""Mixtures of one's own whose experts are a list of modules, in the styles that code has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import osscar

WIDTH, COUNT = 16, 6


class Expert(nn.Module):
    """A small feed-forward network."""

    def __init__(self, neurons: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, neurons), nn.Linear(neurons, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


def experts() -> nn.ModuleList:
    return nn.ModuleList(Expert() for _ in range(COUNT))


@osscar.mixture(gate="gate", experts="experts", top_k=2, normalize=True)
class SoftmaxThenTopK(nn.Module):
    """The loop of Mixtral's first code: one-hot masks, and weights divided by their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = COUNT
        self.gate = nn.Linear(WIDTH, COUNT, bias=False)
        self.experts = experts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1, dtype=torch.float).topk(2)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        mask = nn.functional.one_hot(chosen, self.num_experts).permute(2, 1, 0)
        y = torch.zeros_like(flat)
        for number in range(self.num_experts):
            place, token = torch.where(mask[number])
            part = self.experts[number](flat[token]) * weights[token, place, None]
            y.index_add_(0, token, part)
        return y.view(x.shape)


def best_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Route as `TopKThenSoftmax` does."""
    best, chosen = logits.topk(2)
    return chosen, best.softmax(-1)


@osscar.mixture(gate="router", experts="ffns", route=best_two)
class TopKThenSoftmax(nn.Module):
    """With a shared expert, the sum inside of the block, logits beside, and a count of odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.how_many = COUNT
        self.router, self.ffns, self.shared = nn.Linear(WIDTH, COUNT), experts(), Expert()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, WIDTH)
        logits = self.router(flat)
        best, chosen = logits.topk(2)
        weights = best.softmax(-1)
        y = flat + self.shared(flat)
        for number in range(self.how_many):
            here = chosen == number
            tokens = here.any(-1)
            if tokens.any():
                weight = (weights * here).sum(-1)[tokens, None]
                y[tokens] = y[tokens] + weight * self.ffns[number](flat[tokens])
        return y.view(x.shape), logits


class Gate(nn.Module):
    """A router that keeps its logits for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(COUNT, WIDTH) / WIDTH**0.5)
        self.register_buffer("bias", 0.1 * torch.randn(COUNT))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.linear(x.reshape(-1, WIDTH), self.weight).sigmoid()
        chosen = (scores + self.bias).topk(2, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return chosen, 1.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


@osscar.mixture(gate="gate", experts="experts")
class Sorted(nn.Module):
    """Tokens sorted by their experts, as in the code that comes with DeepSeek's checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = Gate(), experts(), Expert()

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        flat = x.reshape(-1, WIDTH)
        counts = chosen.new_zeros((len(chosen), len(self.experts)))
        counts.scatter_(1, chosen, 1)
        order = chosen.view(-1).argsort()
        tokens = flat[order // chosen.shape[1]]
        outputs, start = [], 0
        for number, many in enumerate(counts.sum(0).cpu().numpy()):
            if many:
                outputs.append(self.experts[number](tokens[start : start + many]))
                start += many
        parts = torch.empty_like(torch.cat(outputs))
        parts[order] = torch.cat(outputs)
        y = (parts.view(*chosen.shape, -1) * weights[:, :, None].to(x)).sum(1)
        return y.view(x.shape) + self.shared_experts(x)


@osscar.mixture(gate="gate", experts="experts", top_k=2, scores="sigmoid", bias="balance")
class Masked(nn.Module):
    """Every expert sees all tokens, and a bias of the block decides with the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, COUNT, bias=False), experts()
        self.balance = nn.Parameter(0.1 * torch.randn(COUNT))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        chosen = (scores + self.balance).topk(2).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + weights[..., number, None] * expert(x)
        return y


class Net(nn.Module):
    """Blocks on a residual stream."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in blocks)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            y: Any = block(norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        y = self.last(x)
        return y


def net(*kinds: type[nn.Module]) -> Net:
    """Build a net of blocks in which routes and experts matter."""
    torch.manual_seed(0)
    found = Net(*(kind() for kind in kinds)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith(("gate.weight", "router.weight", "down.weight")):
                parameter.mul_(3)
    return found
