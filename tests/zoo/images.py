"""Models of torchvision and timm with random weights, and images as small as they take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.zoo.case import Inputs, Made, NotBuilt, check_size, first_that_runs

_SIZES = (
    *((64, 96), (96, 128), (128, 192)),
    *((size, size) for size in (160, 192, 224, 256, 300)),
)
_FRAMES = ((4, 32), (8, 64), (16, 64), (16, 112), (16, 224))


def alive_images(model: nn.Module, inputs: Inputs) -> None:
    """Let every layer matter: parameters away from zero, statistics that fit the weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or (parameter.numel() and parameter.abs().max() < 1e-3):
                parameter.add_(0.1 * torch.randn_like(parameter))
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        model(*(torch.cat((one, one.flip(0))) for one in inputs))
    model.eval()


# ---- timm --------------------------------------------------------------------------------


def make_timm(name: str) -> Made:
    """Build a model of timm for images as small as it takes."""
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    check_size(model)
    config = model.pretrained_cfg
    due = config.get("input_size", (3, 224, 224))[-1]
    if config.get("fixed_input_size"):
        model, inputs = _fixed(lambda size: timm.create_model(name, img_size=size), model, due)
    else:
        sizes = [*(pair for pair in _SIZES if pair[0] <= due), (due, due)]
        inputs = first_that_runs(model, map(_pair, sizes))
    alive_images(model, inputs[0])
    return Made(model, inputs, name)


def _fixed(
    build: Callable[[int], nn.Module], model: nn.Module, due: int
) -> tuple[nn.Module, list[Inputs]]:
    """Build a model that takes images of one size for the smallest that it runs on."""
    for size, _ in _SIZES:
        if size < due:
            try:
                smaller = build(size).eval()
                return smaller, first_that_runs(smaller, [_pair((size, size))])
            except (TypeError, NotBuilt, AssertionError, RuntimeError, ValueError):
                continue  # it knows no such option, or not that size
    return model, first_that_runs(model, [_pair((due, due))])


def _pair(sizes: tuple[int, int]) -> list[Inputs]:
    one, two = sizes
    return [(torch.randn(2, 3, one, one),), (torch.randn(3, 3, two, two),)]


# ---- torchvision -------------------------------------------------------------------------


class _OfBatch(nn.Module):
    """A detector that takes its images as one tensor, rather than a list of them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> object:
        return self.detector(list(images.unbind(0)))


def make_torchvision(name: str) -> Made:
    """Build a model of torchvision, or its backbone, for inputs as small as it takes."""
    torch.manual_seed(0)
    whole, _, part = name.partition(".")
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(whole).__module__
    detects = "detection" in kind
    fetched = detects or "segmentation" in kind  # the backbone, if it is not refused
    other = {"weights_backbone": None} if fetched else {}
    model = models.get_model(whole, weights=None, **other).eval()
    model = model.backbone if part else model
    check_size(model, 150_000_000)  # VGG has no small one
    if detects and not part:
        inputs: list[Inputs] = [(torch.rand(n, 3, 96, 96),) for n in (2, 3)]
        model = _OfBatch(model)
        return Made(model, first_that_runs(model, [inputs]), name)
    inputs = first_that_runs(model, _torchvision_inputs(kind))
    alive_images(model, inputs[0])
    return Made(model, inputs, name)


def _torchvision_inputs(kind: str) -> Iterator[list[Inputs]]:
    if "optical_flow" in kind:
        yield [tuple(torch.randn(n, 3, 128, 128) for _ in range(2)) for n in (2, 3)]
    elif "video" in kind:
        for frames, size in _FRAMES:
            yield [(torch.randn(n, 3, frames, size, size),) for n in (2, 3)]
    else:
        yield from map(_pair, _SIZES)
