"""What a model is calibrated, traced and proved with: tensors by the names of its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from osscar.base.errors import DataError, of_part
from osscar.data.reader import TOKENS, Batch, Reader
from osscar.data.samples import SampleSet, alike, check_tensors, joined, shapes_of
from osscar.data.text import CalibrationSet

CalibrationData: TypeAlias = CalibrationSet | SampleSet
"""What `osscar.load_calibration`, `osscar.load_images` and their like return."""

WINDOWS_AT_ONCE, SAMPLES_AT_ONCE = 8, 64
"""Windows of tokens in a batch, or samples of anything else, unless the caller says otherwise."""

INDICES = (torch.int32, torch.int64)
"""Number formats of indices, such as tokens."""

_PROOF_TOKENS = 64
"""Units do not depend on the length, so that a short window proves as much as a long one."""


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Calibration data as one model, the `reader`, reads them, on its device.

    They are `tensors` by argument, the first dimension being the sample, windows of a language
    model (`tokens`), or samples `apart` of sizes of their own, which run alone or, of equal shapes,
    `together`.  `predictions` says how many of a sample have known classes, by dimension.  `order`
    are positions, (n,) int64; samples of one number in `sample_groups` belong together.  `source`
    says in words where they come from.
    """

    reader: Reader
    tensors: Mapping[str, Tensor]
    tokens: bool = False
    predictions: tuple[int, ...] | None = None
    apart: tuple[Mapping[str, Tensor], ...] = ()
    together: bool = False
    order: Tensor | None = None
    sample_groups: Tensor | None = None
    source: str = "the data"

    @property
    def batch_size(self) -> int:
        """How many samples a batch has unless the caller says otherwise."""
        if self.alone:
            return 1
        return WINDOWS_AT_ONCE if self.tokens else SAMPLES_AT_ONCE

    @property
    def alone(self) -> bool:
        """Whether each sample is a batch of its own."""
        return bool(self.apart) and not self.together

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.positions)

    @property
    def positions(self) -> Tensor:
        """Where the samples are in `tensors` or `apart`, (n,) int64."""
        if self.order is not None:
            return self.order
        return torch.arange(len(self.apart) or len(next(iter(self.tensors.values()))))

    @property
    def settings(self) -> dict[str, Any]:
        """What reports say: samples, shapes (None: sizes differ) and number formats."""
        if self.tokens:
            return {"samples": self.samples, "seqlen": self.tensors["input_ids"].shape[1]}
        apart = [self.apart[index] for index in self.positions.tolist()] if self.apart else []
        first = apart[0] if apart else self.tensors
        dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in first.items()}
        if not apart:
            shapes = {name: list(tensor.shape[1:]) for name, tensor in self.tensors.items()}
            return {"samples": self.samples, "shapes": shapes, "dtypes": dtypes}
        sizes: dict[str, list[int | None]] = {}
        for name in first:
            along = zip(*(sample[name].shape for sample in apart), strict=True)
            sizes[name] = [one[0] if len(set(one)) == 1 else None for one in along]
        return {"samples": self.samples, "sizes": sizes, "dtypes": dtypes}

    def on(self, model: nn.Module) -> ModelInputs:
        """Return these for a copy of the model, on a device and in a number format of its own."""
        return dataclasses.replace(self, reader=self.reader.on(model))

    def example(self) -> Batch:
        """Return inputs to trace the model with: two samples, or one of those that run alone."""
        if self.tokens:
            ids = torch.zeros(2, self.reader.example_length, dtype=torch.int64)
            return self.reader.placed({TOKENS: ids})
        return self.first() if self.alone else self.two()

    def sample(self) -> Batch:
        """Return inputs of the form of the example, with the numbers of the data."""
        if not self.tokens:
            return self.example()
        return {TOKENS: self.two()[TOKENS][:, : self.reader.example_length]}

    def first(self) -> Batch:
        """Return the first sample; the others stay where they are."""
        return self.part(0, 1).batches(1)[0]

    def batches(self, batch_size: int) -> list[Batch]:
        """Return batches of equal shapes, of at most so many samples."""
        some = self._alike(1 if self.alone else batch_size)
        return [self._at(torch.tensor(rows)) for rows in some]

    def extremes(self) -> ModelInputs:
        """Return the samples with the least and the largest of the numbers that may be indices."""
        found = set[int]()
        for name, tensor in (self.apart[0] if self.apart else self.tensors).items():
            if tensor.dtype in INDICES and not self.tokens:
                every = [one[name] for one in self.apart] or self.tensors[name]
                for pick in (torch.Tensor.min, torch.Tensor.max):
                    of_each = torch.tensor([int(pick(one)) for one in every])
                    found.add(int(pick(of_each, 0).indices))
        return dataclasses.replace(self, order=torch.tensor(sorted(found), dtype=torch.int64))

    def part(self, start: int, stop: int | None = None) -> ModelInputs:
        """Return some of the samples alone, as a slice does."""
        return dataclasses.replace(self, order=self.positions[start:stop])

    def last(self, count: int) -> int:
        """Return how many of the last samples to take for so many, to divide no adjacent group."""
        if self.sample_groups is None or not count:
            return count
        numbers = self.sample_groups[self.positions]
        counts = self.samples - 1 - (numbers[1:] != numbers[:-1]).nonzero()[:, 0]
        near = counts[counts <= 2 * count]
        return int(near[(near - count).abs().argmin()]) if len(near) else count

    def proofs(self, seed: int) -> list[Batch]:
        """Return inputs of several sizes on which outputs are compared.

        The first are drawn: tokens from the vocabulary; other tensors become noise with the mean
        and spread of the data where they are floating-point, then such noise with heavy tails, and
        stay samples of the data where they are not.  The last are samples of the data.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            known, windows = self.reader.vocabulary, self.tensors[TOKENS]
            seqlen = min(windows.shape[1], _PROOF_TOKENS)
            shapes = (2, seqlen), (1, max(2, seqlen // 2)), (5, max(2, seqlen // 4))
            drawn = [torch.randint(known, shape, generator=generator) for shape in shapes]
            own = windows[self.positions[:2], :seqlen]
            return [self.reader.placed({TOKENS: ids}) for ids in (*drawn, own)]
        if self.apart:
            some = self.part(0, 2).batches(1)
            some += [self.two()] * self.together
            return [*(_noise_like(one, generator) for one in some), *some]
        proofs = []
        for count, tails in ((3, False), (1, False), (7, True), (1, True)):
            rows = torch.randint(self.samples, (count,), generator=generator)
            proofs.append(_noise_like(self._at(rows), generator, tails=tails))
        return [*proofs, self.two()]

    def count(self, batch: Batch) -> int:
        """Return how many samples there are in a batch."""
        return 1 if self.alone else len(next(iter(batch.values())))

    def two(self) -> Batch:
        """Return the first two samples of equal shapes, or the first one twice."""
        some = self._alike(2)
        rows = next((rows for rows in some if len(rows) == 2), some[0] * 2)
        return self._at(torch.tensor(rows))

    def _alike(self, batch_size: int) -> list[list[int]]:
        shapes = [shapes_of(one) for one in self.apart]
        return alike([shapes[at] if shapes else () for at in self.positions.tolist()], batch_size)

    def _at(self, rows: Tensor) -> Batch:
        """Return samples of equal shapes, on the model's device."""
        at = self.positions[rows]
        if self.apart:
            return self.reader.placed(joined([self.apart[index] for index in at.tolist()]))
        found = {name: tensor[at.to(tensor.device)] for name, tensor in self.tensors.items()}
        return self.reader.placed(found)


def _noise_like(batch: Batch, generator: torch.Generator, *, tails: bool = False) -> Batch:
    """Return noise with the mean and spread of real tensors, with `tails` of a Cauchy one."""

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator)
        if tails:
            drawn = drawn / torch.randn(tensor.shape, generator=generator).abs().clamp_min(0.01)
        return drawn.to(tensor) * tensor.std(correction=0) + tensor.mean()

    return {n: noise(t) if t.is_floating_point() else t for n, t in batch.items()}


# ---- what a model can read ---------------------------------------------------------------

FORMS = (
    "a tensor, a mapping of tensors by the names of the model's arguments, or an iterable of "
    "these or of (inputs, labels)"
)
"""What is read of batches."""


def as_inputs(model: nn.Module, calibration: Any) -> ModelInputs:
    """Return calibration data, of any kind that `osscar.prune` takes, as the model reads them."""
    reader = Reader.of(model)
    given, known = calibration, dict[str, Any]()
    if isinstance(calibration, CalibrationSet):
        given, known = calibration.tokens, {"source": calibration.source}
    elif isinstance(calibration, SampleSet):
        given = calibration.arguments()
        names = "source", "predictions", "sample_groups"
        known = {name: getattr(calibration, name) for name in names}
    if isinstance(given, list):
        return ModelInputs(reader, {}, apart=_samples_apart(reader, given), **known)
    fractions = isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 2
    if isinstance(given, Tensor) and reader.vocabulary and not fractions:
        reader.check_windows(given)
        return ModelInputs(reader, {TOKENS: given}, tokens=True, **known)
    tensors = reader.by_name(given)
    if tensors is None:
        kind = type(given).__name__
        raise DataError(f"cannot calibrate on a {kind}; give token windows, images, {FORMS}")
    check_tensors(tensors)
    reader.check(tensors)
    return ModelInputs(reader, tensors, **known)


def _samples_apart(reader: Reader, samples: Sequence[Any]) -> tuple[Batch, ...]:
    """Return samples apart, in the order of the model's arguments."""
    if not samples:
        raise DataError("the list holds no samples; give one or more")
    named: list[Batch] = []
    for index, one in enumerate(samples):
        with of_part(f"sample {index}"):
            if not isinstance(one, Mapping):
                check_tensors(one)  # which says what to give
            for name, tensor in one.items():
                check_tensors({name: tensor})  # each by itself, since samples are no entries
            reader.check(one)
            if TOKENS in one and reader.vocabulary:
                tokens = one[TOKENS].long()
                reader.check_windows(tokens.reshape(-1, tokens.shape[-1]))
        named.append({name: one[name] for name in reader.takes if name in one})
        forms = [{name: (t.dtype, t.ndim) for name, t in named[i].items()} for i in (0, index)]
        if forms[0] != forms[1]:
            raise DataError(
                f"sample {index} is {forms[1]} by dtype and number of dimensions, and sample 0 is "
                f"{forms[0]}; give all of them in the same form"
            )
    return tuple(named)
