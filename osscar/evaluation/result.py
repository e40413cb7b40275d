"""What a model is worth, alone or beside its dense original: one result for models of any sort."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from osscar.evaluation.size import Footprint

Q = TypeVar("Q")
S = TypeVar("S")

COMPARED = (
    *("parameters", "perplexity", "top1", "top5"),
    *("prefill_tokens_per_second", "decode_tokens_per_second"),
    *("images_per_second", "samples_per_second"),
    *("flops", "parameter_bytes", "disk_bytes"),
)
"""The numbers whose ratio says something; what the settings were, and what both share, is not."""


@dataclass(frozen=True)
class Evaluation(Generic[Q, S]):
    """Quality, speed and size of one model; ``dataclasses.asdict`` makes it JSON.

    Attributes
    ----------
    sample
        What its floating-point operations are counted for: ``"token"``, ``"image"`` or
        ``"sample"``.
    quality
        How well it does; which numbers these are depends on what the model reads.
    speed
        How fast it is, and with how much at once.
    footprint
        How large it is.
    device, dtype
        Where and in which number format this was measured.
    """

    sample: str
    quality: Q
    speed: S
    footprint: Footprint
    device: str
    dtype: str

    def numbers(self) -> dict[str, Any]:
        """Return all that was measured by its name."""
        parts: tuple[Any, ...] = (self.quality, self.speed, self.footprint)
        return {
            field.name: getattr(part, field.name)
            for part in parts
            for field in dataclasses.fields(part)
        }


@dataclass(frozen=True)
class Comparison(Generic[Q, S]):
    """A model beside its dense original.

    Attributes
    ----------
    model, dense
        What was measured of each.
    ratios
        The model's numbers divided by those of the dense one, by name; more speed is above 1. None
        where either is not known, or the dense one is zero.
    """

    model: Evaluation[Q, S]
    dense: Evaluation[Q, S]
    ratios: Mapping[str, float | None]

    @classmethod
    def of(cls, model: Evaluation[Q, S], dense: Evaluation[Q, S]) -> Comparison[Q, S]:
        """Divide one evaluation by another."""
        mine, theirs = model.numbers(), dense.numbers()
        ratios = {name: _ratio(mine[name], theirs[name]) for name in COMPARED if name in mine}
        return cls(model, dense, ratios)


def _ratio(mine: float | None, dense: float | None) -> float | None:
    return mine / dense if mine is not None and dense else None
