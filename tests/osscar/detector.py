"""A small network that detects: backbone, neck and heads as YOLO has them, all behind SiLU."""

from __future__ import annotations

import math

import torch
from torch import nn


class ConvNormAct(nn.Module):
    """A convolution with batch norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm, self.act = nn.BatchNorm2d(outputs), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Split(nn.Module):
    """YOLO's C2f: half of the channels pass a bottleneck, and all that there is is joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first = ConvNormAct(inputs, outputs)
        self.bottleneck = nn.Sequential(ConvNormAct(half, half, 3), ConvNormAct(half, half, 3))
        self.last = ConvNormAct(3 * half, outputs)

    def forward(self, x):
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, self.bottleneck(b)], 1))


class Pyramid(nn.Module):
    """YOLO's SPPF: one pooling after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNormAct(channels, channels // 2)
        self.last = ConvNormAct(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.first(x)
        a = self.pool(x)
        b = self.pool(a)
        return self.last(torch.cat([x, a, b, self.pool(b)], 1))


class Detector(nn.Module):
    """Two scales, and a raw map of outputs for each."""

    def __init__(self) -> None:
        super().__init__()
        w = 8
        self.stem, self.one = ConvNormAct(3, w, 3, 2), Split(w, w)
        self.down, self.two = ConvNormAct(w, 2 * w, 3, 2), Split(2 * w, 2 * w)
        self.pyramid, self.up = Pyramid(2 * w), nn.Upsample(scale_factor=2)
        self.neck = Split(3 * w, w)
        self.heads = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(c, 2 * w, 3), ConvNormAct(2 * w, 2 * w, 3), nn.Conv2d(2 * w, 6, 1)
            )
            for c in (w, 2 * w)
        )

    def forward(self, x):
        near = self.one(self.stem(x))
        far = self.pyramid(self.two(self.down(near)))
        maps = self.neck(torch.cat([self.up(far), near], 1)), far
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]


def detector() -> nn.Module:
    """Return a detector whose signal grows from layer to layer.

    Far below zero SiLU is not zero, but nearly so: exp(-50) for instance.
    """
    torch.manual_seed(0)
    model = Detector()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=2.5 / math.sqrt(module.weight[0].numel()))
    return model.eval()
