"""Sets of samples, images or tensors alike: drawn from, described, and recognized again."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from osscar.base.errors import DataError
from osscar.base.files import short_hash
from osscar.base.inputs import safe_repr
from osscar.base.printable import pluralize
from osscar.proof.seen import Seen

IGNORED = -100
"""The label of what is not scored, as `torch.nn.functional.cross_entropy` has it."""

IMAGES = "images"
"""The entry of a file that holds images, unless a model reads it as it is."""

LABELS = "labels"
"""The entry of a file that holds the class of each sample, unless a model reads it."""


class SampleSet(ABC):
    """Samples of one kind, with labels or without."""

    sample_name: ClassVar[str] = "sample"
    """What one of them is called."""

    alone: ClassVar[bool] = False
    """Whether each is a batch of its own, as it differs from others in size."""

    source: str
    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def arguments(self) -> tuple[Tensor, ...] | Mapping[str, Tensor] | list[Mapping[str, Tensor]]:
        """Return all of them as a model reads them, by position or by name, or one by one."""

    @abstractmethod
    def fingerprints(self) -> list[int]:
        """Return a hash of each sample, 64 bits, to recognize it by."""

    def describe(self) -> dict[str, Any]:
        """Return what reports say: where they come from, and by what they are recognized."""
        seen = dataclasses.asdict(Seen.of(self.fingerprints()))
        return {"source": self.source, "seen": seen, "samples": len(self)}

    @abstractmethod
    def batches(self, size: int) -> Iterator[Any]:
        """Yield at most `size` samples at a time."""

    @abstractmethod
    def _rows(self, rows: Tensor) -> Self:
        """Return the samples at these positions, (n,) int64."""

    @property
    def predictions(self) -> tuple[int, ...] | None:
        """How many predictions of a sample have labels, by dimension; () where a sample has one."""
        return None if self.labels is None else tuple(self.labels.shape[1:])

    def sample(self, count: int, seed: int) -> Self:
        """Return `count` samples drawn at random, or all in random order where there are no more.

        Raises
        ------
        DataError
            If `count` is not positive.
        """
        name = f"{self.sample_name}s"
        if not isinstance(count, int) or count < 1:
            raise DataError(f"cannot draw {safe_repr(count)} {name}; give at least 1 (--samples)")
        return self._rows(torch.randperm(len(self), generator=named_generator(name, seed))[:count])

    def class_labels(self, classes: Sequence[str], outputs: int) -> Tensor | None:
        """Return the labels as numbers of a model's outputs, or None without labels.

        `classes` are the names of the model's classes, empty where they are not known.

        Raises
        ------
        DataError
            If a label is none of its classes.
        """
        labels = self._named_labels(classes, outputs)
        known = torch.empty(0) if labels is None else labels[labels != IGNORED]
        if len(known) and not (int(known.min()) >= 0 and int(known.max()) < outputs):
            raise DataError(
                f"{self.source} has labels from {int(known.min())} to {int(known.max())} and the "
                f"model {pluralize(outputs, 'class', 'classes')}; give {self.sample_name}s of its "
                "classes"
            )
        return labels

    def _named_labels(self, classes: Sequence[str], outputs: int) -> Tensor | None:
        return self.labels


def has_columns(data: Any) -> bool:
    """Tell whether it is a data set of `datasets`, or one like those."""
    return hasattr(type(data), "column_names")


def columns_of(data: Any) -> tuple[str, ...]:
    """Return the names of its columns, as far as they are known; none of anything else."""
    return tuple(data.column_names or ()) if has_columns(data) else ()


def named_generator(name: str, seed: int) -> torch.Generator:
    """Return a random stream of its own for a purpose, so that streams do not disturb another."""
    drawn = short_hash(f"{name}/{seed}")
    return torch.Generator().manual_seed(drawn >> 1)
