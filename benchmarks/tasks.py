"""Models with their data, and what is removed of them: what `quality` and `peers` are run on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count
from osscar.allocation.task import PruningTask
from osscar.data.images import ImageSet
from osscar.data.text import CalibrationSet, load_calibration
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.models.names import DEMO_CALIBRATION, DEMO_HELD_OUT
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest


@dataclass(frozen=True)
class Setting:
    """What is removed: a name for it, and fields of the request that every method has.

    Fields in their place, `units`, are for methods where every group keeps the same share of its
    units; without, equal shares meet the budget as all others do.
    """

    name: str
    asked: Mapping[str, Any]
    units: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A model with its data, and what is to be removed of it."""

    load: Callable[[argparse.Namespace], Subject]
    settings: tuple[Setting, ...]


class Subject(Protocol):
    """A dense model that can be calibrated and scored."""

    model: Any

    @functools.cached_property
    def dense(self) -> dict[str, float]:
        """Quality of the dense model, by name of its measure."""
        return self.score(self.model)

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        """Return calibration data."""

    def score(self, model: Any) -> dict[str, float]:
        """Return quality by name of its measure."""


class Text(Subject):
    """A language model on WikiText-2, or one that was trained here on the text that is shipped."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.loaded = osscar.load_model(name, device=arguments.device)
        self.model, self.data = self.loaded.model, arguments.data
        self.own, scored = DEMO_CALIBRATION, DEMO_HELD_OUT
        if name == "smollm2-135m":
            whole = (self.data / "wikitext2-raw-test.txt").read_text(encoding="utf-8")
            half = whole.rfind("\n", 0, len(whole) // 2)
            self.own = arguments.directory / "first-half.txt"
            self.own.write_text(whole[:half], encoding="utf-8")
            scored = [whole[half:]]
        self.scored = osscar.load_text(scored, self.loaded.tokenizer, windows=arguments.windows)

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        samples = samples or 32
        length = min(512, self.model.config.max_position_embeddings)
        asked = {"samples": samples, "seqlen": length, "seed": seed}
        if source == "mixed":
            parts = [self.calibration(one, samples, seed).tokens for one in ("same form", "code")]
            tokens = torch.cat([part[at::2] for at, part in enumerate(parts)])
            return CalibrationSet(tokens, source, seed)
        text = {
            "same form": lambda: self.own,
            "shifted": lambda: self.data / "wikitext2-valid.txt",
            "built-in": lambda: DEMO_CALIBRATION,
            "code": lambda: [python_code()],
        }[source]()
        found = load_calibration(text, self.loaded.tokenizer, **asked)
        return dataclasses.replace(found, source=source)

    def score(self, model: Any) -> dict[str, float]:
        return {"perplexity": score([model], self.scored)[0].perplexity}


SOURCES = ("same form", "shifted", "built-in", "code", "mixed")


def python_code() -> str:
    """Return the source of some modules of this Python."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return "\n".join(module.read_text(encoding="utf-8", errors="ignore") for module in modules)


def cifar10(loaded: Any, data: Path, part: str) -> ImageSet:
    """Return the images of a part of CIFAR-10, ``train`` or ``test``, as a model reads them."""
    with np.load(data / "cifar10-subset.npz") as arrays:
        pixels, labels = (arrays[f"{part}_{name}"] for name in ("images", "labels"))
    return ImageSet(f"CIFAR-10, {part}", pixels, loaded.preprocessing, torch.from_numpy(labels))


class Images(Subject):
    """A classifier on images of CIFAR-10, whose labels it may not know."""

    def __init__(
        self, name: str, weights: Path, arguments: argparse.Namespace, labels: bool = True
    ) -> None:
        self.loaded = load_model(name, weights=weights, device=arguments.device)
        self.model, self.data = self.loaded.model, arguments.data
        images = cifar10(self.loaded, self.data, "test").sample(arguments.images, 0)
        self.images = images if labels else dataclasses.replace(images, labels=None)

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        if source != "same form":
            raise SystemExit(f"--source {source!r} is of text; omit it for images")
        return cifar10(self.loaded, self.data, "train").sample(samples or 256, seed)

    def score(self, model: Any) -> dict[str, float]:
        (found,) = score([model], self.images, dense=self.model)
        top1 = {} if found.top1 is None else {"top1": found.top1}
        return {**top1, "agreement": found.agreement, "kl": found.kl}


def resnet20(arguments: argparse.Namespace) -> Subject:
    """Load the CIFAR-10 ResNet-20 of He et al."""
    weights = arguments.data / "resnet20-cifar10.safetensors"
    return Images(f"{Path(__file__).parent / 'resnet20.py'}:build", weights, arguments)


def mobilenet(arguments: argparse.Namespace) -> Subject:
    """Load MobileNetV2 with ImageNet weights, for CIFAR images: agreement with the dense model."""
    return Images("torchvision:mobilenet_v2", arguments.mobilenet, arguments, labels=False)


def neurons(*shares: float) -> tuple[Setting, ...]:
    """Remove shares of the parameters of neurons."""
    return tuple(
        Setting(
            f"{s:.0%} of neurons",
            {"sparsity": s, "heads": "all"},
            {"neurons": round(1 - s, 3), "heads": "all"},
        )
        for s in shares
    )


def both(*shares: float) -> tuple[Setting, ...]:
    """Remove shares of the parameters of heads and neurons."""
    return tuple(
        Setting(
            f"{s:.0%} of heads and neurons",
            {"sparsity": s},
            dict.fromkeys(("heads", "neurons"), round(1 - s, 3)),
        )
        for s in shares
    )


def flops(*shares: float) -> tuple[Setting, ...]:
    """Keep shares of the operations."""
    return tuple(Setting(f"{s} of FLOPs", {"flops": s}) for s in shares)


def speeds(*times: float) -> tuple[Setting, ...]:
    """Make a forward pass so many times as fast."""
    return tuple(Setting(f"{t:g}x as fast", {"speedup": t}) for t in times)


def experts(*shares: float) -> tuple[Setting, ...]:
    """Keep shares of the experts; by default neurons of all experts leave in their place."""
    return tuple(Setting(f"{s:.0%} of experts", {"heads": "all"}, {"experts": s}) for s in shares)


SHARES = (0.2, 0.3, 0.4, 0.5)
TASKS = {
    "smollm2": Task(lambda a: Text("smollm2-135m", a), (*neurons(*SHARES), *both(*SHARES))),
    "demo": Task(lambda a: Text("demo", a), (*neurons(*SHARES), *both(*SHARES))),
    "resnet20": Task(resnet20, flops(0.7, 0.5, 0.3)),
    "mobilenet": Task(mobilenet, flops(0.66)),
    "mixture": Task(lambda a: Text(str(a.mixture), a), experts(0.75, 0.5)),
}


def same_size(model: Any, data: Any, setting: Setting) -> dict[str, Any]:
    """Return the budget that equal shares, whose counts are rounded, really come to.

    A speed is a budget as it is.
    """
    if "speedup" in setting.asked:
        return dict(setting.asked)
    request = PruningRequest(**(setting.units or {**setting.asked, "allocation": "uniform"}))
    with prepare(model, data) as prepared:
        task = PruningTask(prepared, request)
        allocated = allocate(task)
        if setting.units:
            cost = count(Cost.PARAMETERS, prepared, task.groups)
            return {"params": int(cost.of(allocated.keep))}
    budget = allocated.budget
    assert budget is not None
    return {"flops": budget.limits[0].reached / budget.limits[0].dense}
