"""Models of torchvision and timm with random weights: the smallest of each of their modules."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.coverage.case import Inputs, Made, NotBuilt, check_size, first_that_runs

_SIZES = (
    (64, 96),
    (96, 128),
    (128, 192),
    (160, 160),
    (192, 192),
    (224, 224),
    (256, 256),
    (300, 300),
)
_FRAMES = ((4, 32), (8, 64), (16, 64), (16, 112), (16, 224))


def smallest_of_each(
    variants: Mapping[str, Iterable[str]], build: Callable[[str], nn.Module], known: Path | None
) -> list[str]:
    """Return, for each family, the variant with the fewest parameters among the promising ones.

    variants: The names of each family's.
    build: Builds one; on the device ``meta``, where that takes no memory.
    known: A file that keeps the answer, since this takes minutes.
    """
    if known is not None and known.exists():
        names: list[str] = json.loads(known.read_text())
        return names
    found = []
    for family in sorted(variants):
        small = sorted(variants[family], key=_promise)[:_CANDIDATES]
        sizes = {name: size for name in small if (size := _size(build, name))}
        if sizes:
            found.append(min(sizes, key=lambda name: sizes[name]))
    if known is not None:
        known.write_text(json.dumps(found))
    return found


_SMALL = r"atto|femto|pico|nano|xxs|xx_small|xs|x_small|tiny|mini|small|lite|_s\b|_t\b"
_CANDIDATES = 5


def _promise(name: str) -> tuple[float, int, str]:
    """Sort names: those that say that they are small, then those with small numbers."""
    words = re.findall(_SMALL, name)
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return (-len(words), sum(numbers[:2]), name)


def _size(build: Callable[[str], nn.Module], name: str) -> int:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            return sum(p.numel() for p in build(name).parameters())
        except Exception:  # code that computes with values while it is built
            return 0


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


def timm_names(known: Path | None) -> list[str]:
    """Return the smallest variant of each of timm's modules; those made for its tests aside."""
    models = importlib.import_module("timm.models")
    variants = {
        module: [n for n in models.list_models(module=module) if not n.startswith("test_")]
        for module in models.list_modules()
    }
    return smallest_of_each(variants, importlib.import_module("timm").create_model, known)


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


def torchvision_names(known: Path | None, *, all_of_them: bool = False) -> list[str]:
    """Return the smallest model of each of torchvision's modules, or all models.

    Those that are made to be quantized are the same networks again.  Of detectors, which put out as
    many boxes as they find, there is the backbone, too.
    """
    models = importlib.import_module("torchvision.models")
    names = [name for name in models.list_models() if not name.startswith("quantized")]
    if not all_of_them:
        variants: dict[str, list[str]] = {}
        for name in names:
            variants.setdefault(models.get_model_builder(name).__module__, []).append(name)
        names = smallest_of_each(variants, _torchvision, known)
    return [f"{name}{part}" for name in names for part in _parts(name)]


class _OfBatch(nn.Module):
    """A detector that takes its images as one tensor, rather than a list of them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> object:
        return self.detector(list(images.unbind(0)))


def _parts(name: str) -> tuple[str, ...]:
    return ("", ".backbone") if re.match(r".*rcnn|fcos|retinanet|ssd", name) else ("",)


def _torchvision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    module = models.get_model_builder(name).__module__
    # Of segmentation and detection models the backbone would be fetched.
    of_two = "segmentation" in module or "detection" in module
    model: nn.Module = models.get_model(
        name, weights=None, **({"weights_backbone": None} if of_two else {})
    )
    return model


def make_torchvision(name: str) -> Made:
    """Build a model of torchvision, or its backbone, for inputs as small as it takes."""
    torch.manual_seed(0)
    whole, _, part = name.partition(".")
    model = _torchvision(whole).eval()
    model = model.backbone if part else model
    check_size(model, 150_000_000)  # VGG has no small one
    if part != "backbone" and _parts(whole)[1:]:
        inputs: list[Inputs] = [(torch.rand(n, 3, 96, 96),) for n in (2, 3)]
        model = _OfBatch(model)
        return Made(model, first_that_runs(model, [inputs]), name)
    inputs = first_that_runs(model, _torchvision_inputs(whole))
    alive_images(model, inputs[0])
    return Made(model, inputs, name)


def _torchvision_inputs(name: str) -> Iterator[list[Inputs]]:
    models = importlib.import_module("torchvision.models")
    kind = models.get_model_builder(name).__module__
    if "optical_flow" in kind:
        yield [tuple(torch.randn(n, 3, 128, 128) for _ in range(2)) for n in (2, 3)]
    elif "video" in kind:
        for frames, size in _FRAMES:
            yield [(torch.randn(n, 3, frames, size, size),) for n in (2, 3)]
    else:
        yield from map(_pair, _SIZES)
