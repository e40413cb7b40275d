"""Networks that join tensors: what refitting all that a layer reads gains over units' inputs alone.

    python -m benchmarks.joined DIRECTORY --data DATA

A small DenseNet, an Inception, a U-Net and a YOLO-like neck are trained for some minutes on the
thousand images of `cifar10-subset.npz` and the scores that `resnet20-cifar10` has of them, and kept
in DIRECTORY.  A DenseNet-121 has random weights, and statistics of these images.  Of each, half of
the channels of every group leave, with fixed rows refitted and dense: `loss` is the median of the
relative losses of the groups whose readers have some, and `all` that of all groups, both of the
plain target; `error` is how far the outputs are from the dense ones on the test images, by the
default target, and the labels of these are scored, too.  Ends with a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import osscar
from benchmarks.resnet20 import MEAN, STD, ResNet20
from osscar.consumers import consumer

_WIDTH = 16
_CALIBRATION = 128


class _Layer(nn.Sequential):
    """A convolution with batch norm and an activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class _Head(nn.Linear):
    """Scores of ten classes, of the mean over all positions."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3)))


class _Branches(nn.Module):
    """A block of Inception: kernels of 1, 3 and 5, and a pooling, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        w = outputs // 4
        self.one, self.pooled = _Layer(inputs, w), _Layer(inputs, w)
        self.three = nn.Sequential(_Layer(inputs, w), _Layer(w, w, 3))
        self.five = nn.Sequential(_Layer(inputs, w), _Layer(w, w, 3), _Layer(w, w, 3))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1)


class Inception(nn.Sequential):
    """Three blocks of four branches each."""

    def __init__(self, w: int = _WIDTH) -> None:
        blocks = [_Branches(w, 2 * w), _Branches(2 * w, 4 * w), _Branches(4 * w, 4 * w)]
        super().__init__(_Layer(3, w, 3, 2), *blocks, _Head(4 * w))


class _Split(nn.Module):
    """YOLO's C2f: half of the channels pass a bottleneck, and all that there is is joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = _Layer(inputs, outputs), _Layer(3 * half, outputs)
        self.bottleneck = nn.Sequential(_Layer(half, half, 3), _Layer(half, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, self.bottleneck(b)], 1))


class Neck(nn.Module):
    """A backbone, what is pooled again and again, and both scales joined, as in YOLO."""

    def __init__(self, w: int = _WIDTH) -> None:
        super().__init__()
        self.near = nn.Sequential(_Layer(3, w, 3, 2), _Split(w, 2 * w))
        self.far = nn.Sequential(_Layer(2 * w, 4 * w, 3, 2), _Split(4 * w, 4 * w))
        self.before, self.after = _Layer(4 * w, 2 * w), _Layer(8 * w, 4 * w)
        self.joined, self.head = _Split(6 * w, 2 * w), _Head(2 * w)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(x)
        pooled = [self.before(self.far(near))]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        far = F.interpolate(self.after(torch.cat(pooled, 1)), scale_factor=2)
        return self.head(self.joined(torch.cat([far, near], 1)))


class UNet(nn.Module):
    """Takes noise from images: down twice, up twice, each time joined with what came before."""

    def __init__(self, w: int = _WIDTH) -> None:
        super().__init__()
        self.enter = nn.Sequential(_Layer(3, w, 3), _Layer(w, w, 3))
        self.down = nn.Sequential(_Layer(w, 2 * w, 3, 2), _Layer(2 * w, 2 * w, 3))
        self.bottom = nn.Sequential(_Layer(2 * w, 4 * w, 3, 2), _Layer(4 * w, 4 * w, 3))
        self.up = nn.Sequential(_Layer(6 * w, 2 * w, 3), _Layer(2 * w, 2 * w, 3))
        self.leave = nn.Sequential(_Layer(3 * w, w, 3), nn.Conv2d(w, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        large = self.enter(x)
        small = self.down(large)
        up = F.interpolate(self.bottom(small), scale_factor=2)
        up = F.interpolate(self.up(torch.cat([up, small], 1)), scale_factor=2)
        return self.leave(torch.cat([up, large], 1))


def densenet(growth: int, first: int, *blocks: int) -> nn.Module:
    """Return torchvision's for images of 32 x 32, of which half the resolution is left."""
    model = torchvision.models.DenseNet(growth, blocks, first, num_classes=10)
    model.features.conv0 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DenseNet": lambda: densenet(12, 24, 4, 6, 6),
    "Inception": Inception,
    "U-Net": UNet,
    "YOLO neck": Neck,
    "DenseNet-121": lambda: densenet(32, 64, 6, 12, 24, 16),
}
UNTRAINED = ("DenseNet-121",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    rows = []
    for name in arguments.networks:
        model = trained(name, arguments)
        for most_rows in (0, consumer.MOST_ROWS):
            consumer.MOST_ROWS = most_rows
            rows.append(pruned(name, model, arguments.data))
            print(rows[-1], flush=True)
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(row.values() for row in rows)]
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def pictures(data: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images, as networks take them, and labels."""
    stored = np.load(data / "cifar10-subset.npz")
    images = torch.from_numpy(stored[f"{part}_images"]).movedim(3, 1) / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return (images - mean) / std, torch.from_numpy(stored[f"{part}_labels"]).long()


def noisy(images: Tensor, seed: int = 0) -> Tensor:
    return images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def trained(name: str, arguments: argparse.Namespace) -> nn.Module:
    """Return a network with weights that are kept in the directory, or are found now."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    file = arguments.directory / f"{name}.safetensors"
    if file.exists():
        model.load_state_dict(safetensors.torch.load_file(file))
        return model.eval()
    images, labels = pictures(arguments.data, "train")
    if name in UNTRAINED:
        with torch.no_grad():
            for some in images[:200].split(50):
                model.train()(some)
        return model.eval()
    teacher = ResNet20()
    weights = arguments.data / "resnet20-cifar10.safetensors"
    teacher.load_state_dict(safetensors.torch.load_file(weights))
    teacher.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = arguments.epochs * (len(images) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        some = torch.randint(len(images), (50,))
        loss = distance(name, model.train(), augmented(images[some]), labels[some], teacher, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(name, step, f"{loss.item():.3f}", flush=True)
    safetensors.torch.save_file(model.state_dict(), file)
    return model.eval()


def augmented(images: Tensor) -> Tensor:
    """Return images at another place, half of them seen in a mirror."""
    moved = F.pad(images, [4] * 4)
    top, left = torch.randint(9, (2,)).tolist()
    moved = moved[:, :, top : top + 32, left : left + 32]
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def distance(
    name: str, model: nn.Module, x: Tensor, labels: Tensor, teacher: nn.Module, step: int
) -> Tensor:
    if name == "U-Net":
        return F.mse_loss(model(noisy(x, step)), x)
    with torch.no_grad():
        expected = (teacher(x) / 2).softmax(1)
    found = model(x)
    return F.cross_entropy(found / 2, expected) + 0.2 * F.cross_entropy(found, labels)


def pruned(name: str, model: nn.Module, data: Path) -> dict[str, str]:
    """Prune a network, and return a row of the table."""
    images, _ = pictures(data, "train")
    test, labels = pictures(data, "test")
    denoises = name == "U-Net"
    images, inputs = (noisy(images), noisy(test)) if denoises else (images, test)
    plain = osscar.prune(model, images[:_CALIBRATION], channels=0.5, target="weights")
    losses = [layer.relative_loss for layer in plain.layers]
    reading = [layer.relative_loss for layer in plain.layers if layer.fixed + layer.fixed_dense]
    began = time.process_time()
    result = osscar.prune(model, images[:_CALIBRATION], channels=0.5)
    seconds = time.process_time() - began
    with torch.no_grad():
        before, after = (
            torch.cat([net(some) for some in inputs.split(100)]) for net in (model, result.model)
        )
    measured: dict[str, Any] = {
        "network": name,
        "fixed rows": "refitted" if consumer.MOST_ROWS else "dense",
        "loss": f"{statistics.median(reading):.4f}",
        "all": f"{statistics.median(losses):.4f}",
        "error": f"{float((after - before).square().sum() / before.square().sum()):.4f}",
    }
    for key, found in (("dense", before), ("pruned", after)):
        if denoises:
            measured[key] = f"{10 * float(((found - test).square().mean()).log10()):.2f} dB"
        else:
            measured[key] = f"{float((found.argmax(1) == labels).double().mean()):.1%}"
    return {**measured, "CPU seconds": f"{seconds:.0f}"}


if __name__ == "__main__":
    main()
