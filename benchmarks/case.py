"""What every method is given, and what it returns."""

from __future__ import annotations

import enum
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osscar
from benchmarks.tasks import Setting
from osscar.data.batches import as_inputs
from osscar.data.images import ImageSet
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops

IMAGES_AT_ONCE, WINDOWS_AT_ONCE = 64, 4


@dataclass(frozen=True)
class Case:
    """One model to be made smaller, which stays as it is itself."""

    model: nn.Module
    data: Any
    """Calibrates: an `ImageSet` with labels, or a `CalibrationSet`."""
    setting: Setting
    """What is removed, and how this toolkit is asked for it."""
    size: Mapping[str, Any]
    """What equal shares in whole units come to, as fields of a request: ``flops``, a share, or
    ``params``, a count.  No method may keep more."""
    seed: int
    options: Any
    """Of the command line."""
    counting: list[float] = field(default_factory=list)
    """Processor seconds of each count of what is left, which no method is charged with."""

    @functools.cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The calibration data as arguments of the model."""
        at_once = IMAGES_AT_ONCE if self.labels is not None else WINDOWS_AT_ONCE
        return list(as_inputs(self.model, self.data).batches(at_once))

    @property
    def labels(self) -> Tensor | None:
        """Classes of the images, (samples,) int64; None for text."""
        return self.data.labels if isinstance(self.data, ImageSet) else None

    def used(self, model: nn.Module) -> int:
        """Return what is limited of a model: parameters, or operations on one sample."""
        if "params" in self.size:
            return count_parameters(model)
        sample = {name: tensor[:1] for name, tensor in self.batches[0].items()}
        began = time.process_time()
        found = count_flops(model, sample)
        self.counting.append(time.process_time() - began)
        return found

    @functools.cached_property
    def allowed(self) -> float:
        """What of it may stay."""
        if "params" in self.size:
            return float(self.size["params"])
        return float(self.size["flops"]) * self.used(self.model)

    def observe(self, model: Any, modules: Sequence[Any], see: Callable[..., None]) -> None:
        """Run the data, and show what each module is given and puts out: its index, x and y."""
        hooks = [
            module.register_forward_hook(lambda _, args, y, index=index: see(index, args[0], y))
            for index, module in enumerate(modules)
        ]
        for batch in self.batches:
            model(**batch)
        for hook in hooks:
            hook.remove()


class Form(enum.Enum):
    """How a smaller model is written, and read again, as its own documentation has it.

    That of Torch-Pruning is a pickle, which may run any code: only give this benchmark a directory
    that it has written itself.
    """

    OSSCAR = "weights and plan"
    PRETRAINED = "transformers"
    PICKLE = "pickle"

    def write(self, smaller: Smaller, directory: Path) -> None:
        """Write a model into a directory that is not there yet."""
        model: Any = smaller.model
        if self is Form.OSSCAR:
            smaller.result.save(directory, dtype=torch.float32)
        elif self is Form.PRETRAINED:
            model.save_pretrained(directory)
        else:
            directory.mkdir()
            torch.save(model, directory / "model.pth")

    def read(self, directory: Path, dense: Any) -> nn.Module:
        """Read a model, given the one that it was made of."""
        if self is Form.OSSCAR:
            return osscar.load(directory, dense=dense)
        if self is Form.PRETRAINED:
            return type(dense).from_pretrained(directory).eval()  # type: ignore[no-any-return]
        return torch.load(directory / "model.pth", weights_only=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Smaller:
    """A smaller model, the form in which its own documentation writes it, and a run of OSSCAR's."""

    model: nn.Module
    form: Form = Form.PICKLE
    result: Any = None

    @property
    def proved(self) -> str:
        """What is proved: the program is equal, or outputs are; empty if nothing is."""
        if self.result is None:
            return ""
        return "program" if self.result.certificate.structure is not None else "outputs"
