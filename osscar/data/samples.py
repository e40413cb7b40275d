"""Sets of samples: drawn from, described, and recognized again."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from osscar.base.errors import DataError
from osscar.base.files import short_hash
from osscar.base.inputs import safe_repr, whole_number
from osscar.base.printable import pluralize
from osscar.proof.seen import Seen

IGNORED = -100
"""The label of what is not scored, as `torch.nn.functional.cross_entropy` has it."""

IMAGES, LABELS, GROUPS = "images", "labels", "sample_groups"
"""Entries of a file: images, and the class and group of each sample, unless a model reads them."""

LABEL_NAMES = (LABELS, "label")
"""The entries of a batch that hold the class of each sample; `datasets` has the second one."""


class SampleSet(ABC):
    """Samples of one kind, with labels or without."""

    sample_name: ClassVar[str] = "sample"
    """What one of them is called."""

    alone: ClassVar[bool] = False
    """Whether each is a batch of its own, as it differs from others in size."""

    source: str
    labels: Tensor | None
    sample_groups: Tensor | None
    """A number for each, (n,): those of one number, such as pictures of one scene, are near copies
    of one another.  They are never divided into two parts, and count as one."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def arguments(self) -> tuple[Tensor, ...] | Mapping[str, Tensor] | list[Mapping[str, Tensor]]:
        """Return all of them as a model reads them, by position or by name, or one by one."""

    def fingerprints(self) -> list[int]:
        """Return a hash of each sample, 64 bits, to recognize it by, whatever its number format.

        A batch of one is the sample in it, also among samples that each run alone.
        """
        return [
            digest_of({name: tensor[0] for name, tensor in one.items()} if batched(one) else one)
            for one in self.batches(1)
        ]

    def describe(self) -> dict[str, Any]:
        """Return what reports say: where they come from, and by what they are recognized."""
        seen = dataclasses.asdict(Seen.of(self.fingerprints()))
        return {"source": self.source, "seen": seen, "samples": len(self)}

    @abstractmethod
    def batches(self, size: int) -> Iterator[Any]:
        """Yield at most `size` samples at a time."""

    @abstractmethod
    def rows(self, rows: Tensor) -> Self:
        """Return the samples at these positions, (n,) int64."""

    def check_numbers(self, *names: str) -> None:
        """Make labels and groups int64, each a number a sample (DataError)."""
        for name in names:
            object.__setattr__(self, name, checked_numbers(name, getattr(self, name), len(self)))

    def known_of(self, rows: Tensor) -> dict[str, Any]:
        """Return the labels and groups of the samples at these positions, by name."""
        known = {LABELS: self.labels, GROUPS: self.sample_groups}
        return {name: None if one is None else one[rows] for name, one in known.items()}

    @property
    def predictions(self) -> tuple[int, ...] | None:
        """How many predictions of a sample have labels, by dimension; () where a sample has one."""
        return None if self.labels is None else tuple(self.labels.shape[1:])

    def sample(self, count: int, seed: int) -> Self:
        """Return `count` samples drawn at random, or all in random order if there are no more."""
        name = f"{self.sample_name}s"
        whole_number(count, f"the number of {name} (samples, `--samples`)", 1)
        return self.rows(torch.randperm(len(self), generator=named_generator(name, seed))[:count])

    def class_labels(self, classes: Sequence[str], outputs: int) -> Tensor | None:
        """Return labels by a model's outputs, also from names of classes (DataError), or None."""
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


@dataclass(frozen=True, eq=False)
class TensorSet(SampleSet):
    """Samples that a model reads as they are: sound, features, tokens, several of these.

    Parameters
    ----------
    source
        Where they come from, in words.
    tensors
        By the names of the arguments that read them; the first dimension of each is the sample.
    labels
        The right class of each sample, (n,) of whole numbers, or of each of its predictions,
        (n, d1, ...), which (n, classes, d1, ...) are scores of, or else (n, d1, ..., classes); -100
        is not scored.  They become int64.  None where they are not known.
    sample_groups
        A number for each sample, (n,): those of one number are near copies of one another, are
        never divided into two parts, and count as one.  None where there are no near copies.

    Raises
    ------
    DataError
        If there is none, one is empty, has NaN or infinite entries, or the numbers of samples
        differ.
    """

    source: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    sample_groups: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_tensors(self.tensors)
        self.check_numbers(LABELS, GROUPS)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def arguments(self) -> Mapping[str, Tensor]:
        """Return the tensors."""
        return self.tensors

    def rows(self, rows: Tensor) -> TensorSet:
        """Return the samples at these positions, (n,) int64."""
        drawn = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, tensors=drawn, **self.known_of(rows))

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield at most `size` samples at a time."""
        whole_number(size, "the batch size (batch_size, `--batch-size`)", 1)
        for start in range(0, len(self), size):
            yield {name: tensor[start : start + size] for name, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class SampleList(SampleSet):
    """Samples of sizes of their own, such as graphs or sequences.

    Each runs alone.  Where all of their tensors have one entry along the first dimension, those of
    equal shapes run together, if the model returns for two of them what it does for each alone.

    Parameters
    ----------
    source
        Where they come from, in words.
    samples
        Each as the model reads it: tensors by the names of the arguments, of any dimensions.
    labels
        The right class of each, (n,) of whole numbers, which become int64, or None.  Of sequences
        it may be that of each position, (n, longest), with -100 after the end.
    sample_groups
        As of a `TensorSet`.
    """

    alone: ClassVar[bool] = True

    source: str
    samples: Sequence[Mapping[str, Tensor]] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    sample_groups: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.check_numbers(LABELS, GROUPS)

    def __len__(self) -> int:
        return len(self.samples)

    def arguments(self) -> list[Mapping[str, Tensor]]:
        """Return the samples."""
        return list(self.samples)

    def rows(self, rows: Tensor) -> SampleList:
        """Return the samples at these positions, (n,) int64."""
        samples = [self.samples[row] for row in rows.tolist()]
        return replace(self, samples=samples, **self.known_of(rows))

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the samples, one at a time whatever the size."""
        yield from map(dict, self.samples)


def checked_numbers(name: str, given: Any, count: int) -> Tensor | None:
    """Return the labels or groups of so many samples as int64, or refuse what are no such."""
    if given is None:
        return None
    found = given
    if name == GROUPS:
        with suppress(TypeError, ValueError, RuntimeError):  # of texts, or of rows that differ
            found = torch.as_tensor(given)
    shown = safe_repr(found)
    if isinstance(found, Tensor):
        shown = f"{found.dtype} of {tuple(found.shape)}"
        fits = found.shape[:1] == (count,) and (found.ndim == 1 or name != GROUPS)
        if kind_of_numbers(found) == "whole" and fits:
            return found.to("cpu" if name == GROUPS else found.device, torch.int64)
    raise DataError(f"the {name} must be {count} whole numbers, one a sample, not {shown}")


def batched(sample: Mapping[str, Tensor]) -> bool:
    """Tell whether each tensor of a sample has one entry along the first dimension."""
    return all(tensor.shape[:1] == (1,) for tensor in sample.values())


def digest_of(sample: Mapping[str, Tensor]) -> int:
    """Return a hash of a sample, 64 bits, whatever its number format."""
    return short_hash(b"".join(_bytes_of(name, sample[name]) for name in sorted(sample)))


def _bytes_of(name: str, tensor: Tensor) -> bytes:
    """Return what tells a tensor from others, in a number format that others of a kind become."""
    kinds = {"complex": torch.complex64, "real": torch.float32}
    values = tensor.detach().to("cpu", kinds.get(kind_of_numbers(tensor), torch.int64)).contiguous()
    shape = f"{name} {values.dtype} {tuple(values.shape)} "
    return shape.encode() + values.numpy().tobytes()


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse samples that no model can read."""
    entries = tensors.items() if isinstance(tensors, Mapping) else ()
    if not entries or not all(isinstance(tensor, Tensor) for _, tensor in entries):
        raise DataError(
            f"the data are {safe_repr(tensors)}; give a mapping of tensors by the names of the "
            "arguments that read them"
        )
    for name, tensor in entries:
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise DataError(
                f"the data {name!r} have the shape {tuple(tensor.shape)}, which holds no samples; "
                "give one or more, along the first dimension"
            )
        eighth = tensor.is_floating_point() and tensor.element_size() == 1
        finite = torch.isfinite(tensor.float() if eighth else tensor)
        if not bool(finite.all()):
            bad = tensor.numel() - int(finite.sum())
            raise DataError(
                f"the data {name!r} have NaN or infinite entries, {bad:,} of {tensor.numel():,}; "
                "leave those samples out"
            )
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise DataError(
            f"the data disagree on the number of samples: {counts}; where the first dimension is "
            "not the sample, as of the nodes and edges of a graph, calibrate from Python on "
            "osscar.SampleList('graphs', [{'x': ...}, ...]), each of which runs by itself"
        )


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


def kind_of_numbers(tensor: Tensor) -> str:
    """Return what kind of numbers a tensor holds: formats of one kind differ in precision only."""
    if tensor.dtype == torch.bool:
        return "bool"
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


# ---- samples of equal shapes, which run together -----------------------------------------


def shapes_of(sample: Mapping[str, Tensor]) -> tuple[Hashable, ...]:
    """Return by what samples are told from others that cannot be in one batch with them."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sample.items())


def alike(shapes: Sequence[Hashable], size: int) -> list[list[int]]:
    """Return the positions of samples in batches: those of equal shapes, so many at a time."""
    batches, latest = list[list[int]](), dict[Hashable, list[int]]()
    for at, shape in enumerate(shapes):
        if len(latest.get(shape, ())) % size == 0:
            latest[shape] = []
            batches.append(latest[shape])
        latest[shape].append(at)
    return batches


def joined(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch of samples of equal shapes, one or several in each."""
    return {name: torch.cat([one[name] for one in samples]) for name in samples[0]}


def rows_and_batches(data: SampleSet, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches of equal shapes, and which samples they hold, (n,) int64."""
    if isinstance(data, SampleList):
        rows = range(len(data))
        ends = [0 if data.labels is None else end_of(data.labels[row]) for row in rows]
        shapes = [(shapes_of(one), end) for one, end in zip(data.samples, ends, strict=True)]
        for some in alike(shapes, size):
            yield torch.tensor(some), joined([data.samples[row] for row in some])
        return
    done = 0
    for batch in data.batches(size):
        count = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
        yield torch.arange(done, done + count), batch
        done += count


def end_of(labels: Tensor) -> int:
    """Return after how many labels of a sample none counts; of how many, if none does at all."""
    known = (labels.flatten() != IGNORED).nonzero()
    return int(known[-1]) + 1 if len(known) else labels.numel()
