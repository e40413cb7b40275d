"""Small networks that read images."""

from __future__ import annotations

import torch
from torch import nn

from osscar.data.preprocessing import Preprocessing

IMAGENET = Preprocessing(
    resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
"""What belongs to most weights of torchvision."""


def plain(side: int) -> Preprocessing:
    """Return what leads to color images of one size, pixels / 255."""
    return Preprocessing(crop=side, mean=0.0, std=1.0, channels=3)


class Block(nn.Module):
    """A residual block with an expansion, a depthwise convolution and a gate."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, 4, 1)
        self.excite = nn.Conv2d(4, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.norm1(self.expand(x)))
        y = torch.relu(self.norm2(self.depthwise(y)))
        gate = torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * torch.sigmoid(self.excite(gate))
        return torch.relu(x + self.norm3(self.project(y)))


class SmallNet(nn.Module):
    """Stem, two residual blocks, a strided convolution and a head behind `flatten`."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.blocks = nn.Sequential(Block(8, 16), Block(8, 16))
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(12 * 4, classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.pool(torch.relu(self.norm(self.down(x)))).flatten(1))


def small_net(classes: int = 5, seed: int = 0) -> nn.Module:
    """Return a network whose batch-norm statistics and scales are those of a used one."""
    torch.manual_seed(seed)
    model = SmallNet(classes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.momentum = None
        model.train()
        model(images(64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return model.eval()


def images(count: int = 64, side: int = 12, seed: int = 1) -> torch.Tensor:
    """Return smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


class Concat(nn.Module):
    """Four branches that one layer reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
        self.branches = nn.ModuleList(nn.Linear(6, 8) for _ in range(4))
        self.join, self.head = nn.Linear(32, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        y = torch.cat([torch.relu(branch(x)) for branch in self.branches], -1)
        return self.head(torch.tanh(self.join(y)))


class Twice(nn.Module):
    """One feed-forward layer that is called twice, so that the batches start again after it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.wide, self.head = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(torch.relu(self.wide(x)))
