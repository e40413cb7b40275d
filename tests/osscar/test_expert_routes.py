"""Mixtures whose tokens are not sent as the router says, or that share what they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import osscar
from osscar.base.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration positions:UserWarning")


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        weights, experts = logits.softmax(-1).topk(2)
        return logits, weights / weights.sum(-1, keepdim=True), experts


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 8, 16) / 4)
        self.down = nn.Parameter(torch.randn(6, 16, 8) / 3)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("td,ehd->teh", x, self.up))
        each = torch.einsum("teh,edh->ted", inner, self.down)
        here = experts[:, :, None] == torch.arange(len(self.up))
        return (each * (weights[:, :, None] * here).sum(1)[:, :, None]).sum(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        _, weights, experts = self.router(x)
        y: Tensor = x + self.experts(x, experts, weights)
        return y


class Capacity(Block):
    """Drops what an expert has no room for: only where there are many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        _, weights, experts = self.router(x)
        sent = nn.functional.one_hot(experts.flatten(), 6).cumsum(0)
        place = sent.gather(1, experts.reshape(-1, 1)).view(experts.shape)
        y: Tensor = x + self.experts(x, experts, weights * (place <= 6))
        return y


class Twice(Block):
    """Asks its router for something else, too."""

    def forward(self, x: Tensor) -> Tensor:
        _, weights, experts = self.router(x)
        self.router(x * 0.3 + 1)
        y: Tensor = x + self.experts(x, experts, weights)
        return y


def net(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks, nn.Linear(16, 16)).eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_blocks_that_do_as_the_router_says_lose_experts():
    result = osscar.prune(net(Block(), Block()), torch.randn(64, 16), experts=4)
    assert [layer.kept for layer in result.layers] == [4, 4]


@pytest.mark.parametrize("block", [Capacity, Twice])
def test_a_block_that_sends_tokens_otherwise_is_refused(block):
    model = net(block(), Block())
    with pytest.raises(
        ModelError, match=r"'0\.experts' gets \d+ of 56 tokens of calibration batch 0 with other"
    ):
        osscar.prune(model, torch.randn(64, 16), experts=4)
    assert model[0].experts.down.shape == (6, 16, 8)


def test_scores_that_are_equal_where_logits_are_not_are_refused():
    model = net(Block(), Block())
    with torch.no_grad():
        model[0].router.weight *= 100
    with pytest.raises(ModelError, match=r"of 56 tokens .* than the logits of its router"):
        osscar.prune(model, torch.randn(64, 16), experts=4)


def test_logits_too_far_apart_are_an_error_that_names_the_mixture():
    model = net(Block(), Block()).double()
    with torch.no_grad():
        model[0].router.weight *= 25
    with pytest.raises(ModelError, match=r"'0\.experts' cannot be chosen.*skip="):
        osscar.prune(model, torch.randn(64, 16).double(), experts=4)


def test_a_router_or_a_block_that_is_shared_is_left_alone():
    first, second = Block(), Block()
    second.router = first.router
    once, twice = Block(), Block()
    model = net(first, second, once, twice, twice)
    with pytest.warns(
        UserWarning, match="skipped, with all their units: '0.experts'; '1.experts'; '3.exp"
    ):
        result = osscar.prune(model, torch.randn(64, 16), experts=4)
    assert [layer.name for layer in result.layers] == ["2.experts"]
    reasons = {one.name: one.reason for one in result.skipped}
    assert "output differs from the masked one's" in reasons["0.experts"]
    assert "is called 2 times in a pass" in reasons["3.experts"]
