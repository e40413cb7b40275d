"""What a model is calibrated with, and what it is traced and proved with."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from osscar.base.errors import CalibrationError, ModelError
from osscar.data.images import ImageSet
from osscar.data.samples import SampleSet
from osscar.data.tensors import TensorSet, check_arguments, check_tensors, in_order, named_inputs
from osscar.data.tokens import CalibrationSet
from osscar.network.modules import context_length, device_of

Batch: TypeAlias = dict[str, Tensor]
"""Keyword arguments of a model's forward pass."""

CalibrationData: TypeAlias = CalibrationSet | SampleSet
"""What `osscar.load_calibration`, `osscar.load_images` and `osscar.load_tensors` return."""

_EXAMPLE_TOKENS = 16

_PROOF_TOKENS = 64
"""Units do not depend on the length, so that a short window proves as much as a long one."""


class ModelInputs(ABC):
    """Calibration data in the form that one kind of model reads."""

    batch_size: ClassVar[int]
    """How many samples run at once unless the caller says otherwise."""

    @property
    @abstractmethod
    def classes(self) -> bool:
        """Whether the model is known to tell classes apart, such as the tokens of a vocabulary."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What reports say about the data."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse data that the model cannot read.

        Raises
        ------
        CalibrationError
            If they have a wrong form.
        """

    @abstractmethod
    def example(self, model: nn.Module) -> Batch:
        """Return inputs to trace the model with."""

    @abstractmethod
    def batches(self, model: nn.Module, batch_size: int) -> list[Batch]:
        """Return the calibration data, at most so many samples at a time, on the model's device."""

    @abstractmethod
    def only(self, batch: Batch) -> ModelInputs:
        """Return data of the same kind that are one batch."""

    @abstractmethod
    def proofs(self, model: nn.Module, seed: int) -> list[Batch]:
        """Return random inputs of two different sizes, on the model's device."""

    def count(self, batch: Batch) -> int:
        """Return how many samples there are in a batch."""
        return len(next(iter(batch.values())))

    def rows(self, batch: Batch, start: int, stop: int | None) -> Batch:
        """Return some of the samples in a batch."""
        return {name: tensor[start:stop] for name, tensor in batch.items()}


@dataclass(frozen=True, eq=False)
class TokenInputs(ModelInputs):
    """Windows of tokens for a language model.

    Parameters
    ----------
    windows
        (samples, seqlen) int64.
    """

    batch_size: ClassVar[int] = 8
    classes: ClassVar[bool] = True

    windows: Tensor

    @property
    def samples(self) -> int:  # noqa: D102
        return self.windows.shape[0]

    @property
    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {"samples": self.samples, "seqlen": self.windows.shape[1]}

    def check(self, model: nn.Module) -> None:
        """Refuse windows of a wrong form, too long, or with tokens that the model lacks."""
        windows = self.windows
        if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
            raise CalibrationError(
                f"calibration windows must be int64 (samples, seqlen) and not empty, not "
                f"{windows.dtype} of {tuple(windows.shape)}"
            )
        context = context_length(model)
        if context is not None and windows.shape[1] > context:
            raise CalibrationError(
                f"calibration windows have {windows.shape[1]} tokens and the model takes "
                f"{context}; give a smaller window length (--seqlen)"
            )
        known = _vocabulary(model)
        if int(windows.min()) < 0 or int(windows.max()) >= known:
            raise CalibrationError(
                f"calibration tokens run from {int(windows.min())} to {int(windows.max())} and the "
                f"model knows 0 to {known - 1}; use the tokenizer that belongs to it"
            )

    def example(self, model: nn.Module) -> Batch:
        """Return two short windows."""
        length = min(_EXAMPLE_TOKENS, context_length(model) or _EXAMPLE_TOKENS)
        return {"input_ids": torch.zeros(2, length, dtype=torch.int64, device=device_of(model))}

    def batches(self, model: nn.Module, batch_size: int) -> list[Batch]:  # noqa: D102
        pieces = torch.split(self.windows, min(batch_size, self.samples))
        return [{"input_ids": ids.to(device_of(model))} for ids in pieces]

    def only(self, batch: Batch) -> TokenInputs:  # noqa: D102
        return TokenInputs(batch["input_ids"])

    def proofs(self, model: nn.Module, seed: int) -> list[Batch]:
        """Return random tokens: two short windows, and one of half the length."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary, device = _vocabulary(model), device_of(model)
        seqlen = min(self.windows.shape[1], _PROOF_TOKENS)
        return [
            {"input_ids": torch.randint(vocabulary, shape, generator=generator).to(device)}
            for shape in ((2, seqlen), (1, max(2, seqlen // 2)))
        ]


@dataclass(frozen=True, eq=False)
class TensorInputs(ModelInputs):
    """Tensors for any other model, such as images.

    Parameters
    ----------
    tensors
        By the name of the argument; the first dimension of each is the sample.
    classes
        Whether each sample has a right class, so that the model is a classifier.
    """

    batch_size: ClassVar[int] = 64

    tensors: Mapping[str, Tensor]
    classes: bool = False

    @property
    def samples(self) -> int:  # noqa: D102
        return len(next(iter(self.tensors.values())))

    @property
    def settings(self) -> dict[str, Any]:
        """Samples, their shapes and number formats."""
        shapes = {name: list(tensor.shape[1:]) for name, tensor in self.tensors.items()}
        return {"samples": self.samples, "shapes": shapes, "dtypes": _formats(self.tensors)}

    def check(self, model: nn.Module) -> None:
        """Refuse arguments that the model does not have."""
        check_arguments(model, self.tensors)

    def example(self, model: nn.Module) -> Batch:
        """Return two samples (a single one is repeated)."""
        return self.some(model, 2)

    def some(self, model: nn.Module, count: int) -> Batch:
        """Return so many samples, the first ones, again and again if there are fewer."""
        return self._at(model, torch.arange(count) % self.samples)

    def batches(self, model: nn.Module, batch_size: int) -> list[Batch]:  # noqa: D102
        order = torch.arange(self.samples)
        return [self._at(model, rows) for rows in torch.split(order, batch_size)]

    def only(self, batch: Batch) -> TensorInputs:  # noqa: D102
        return dataclasses.replace(self, tensors=batch)

    def proofs(self, model: nn.Module, seed: int) -> list[Batch]:
        """Return noise with the mean and spread of the data: three samples, and one.

        What is not a floating-point tensor is drawn from the data.
        """
        generator = torch.Generator().manual_seed(seed)
        proofs = []
        for count in (3, 1):
            rows = torch.randint(self.samples, (count,), generator=generator)
            proofs.append(_noise_like(self._at(model, rows), generator))
        return proofs

    def _at(self, model: nn.Module, rows: Tensor) -> Batch:
        return to_model({name: tensor[rows] for name, tensor in self.tensors.items()}, model)


@dataclass(frozen=True, eq=False)
class SeparateInputs(ModelInputs):
    """Samples of sizes of their own, such as graphs, each of which the model is given alone.

    Parameters
    ----------
    each
        For each sample, tensors by the name of the argument, of any dimensions.
    """

    batch_size: ClassVar[int] = 1
    classes: ClassVar[bool] = False

    each: tuple[Mapping[str, Tensor], ...]

    @property
    def samples(self) -> int:  # noqa: D102
        return len(self.each)

    @property
    def settings(self) -> dict[str, Any]:
        """Samples, their number formats and sizes; None stands for one in which they differ."""
        sizes: dict[str, list[int | None]] = {}
        for name in self.each[0]:
            along = zip(*(sample[name].shape for sample in self.each), strict=True)
            sizes[name] = [one[0] if len(set(one)) == 1 else None for one in along]
        return {"samples": self.samples, "sizes": sizes, "dtypes": _formats(self.each[0])}

    def check(self, model: nn.Module) -> None:
        """Refuse arguments that the model does not have, and samples that are not of one form."""
        if not self.each:
            raise CalibrationError("the calibration data are an empty list; give samples")
        forms = [
            {name: f"{name} {t.dtype} with {t.ndim} dimensions" for name, t in sample.items()}
            for sample in self.each
        ]
        for index, sample in enumerate(self.each):
            if forms[index] != forms[0]:
                has, due = (", ".join(forms[i].values()) or "nothing" for i in (index, 0))
                raise CalibrationError(
                    f"sample {index} of the calibration data is {has}, and sample 0 is {due}; give "
                    "all of them in the same form"
                )
            try:
                for one in [{name: t} for name, t in sample.items()] or [{}]:
                    check_tensors(one)  # each alone, since samples are no entries
                check_arguments(model, sample)
            except CalibrationError as error:
                raise CalibrationError(f"sample {index}: {error}") from error

    def example(self, model: nn.Module) -> Batch:
        """Return the first sample."""
        return to_model(self.each[0], model)

    def batches(self, model: nn.Module, batch_size: int) -> list[Batch]:
        """Return the samples, each in a batch of its own."""
        return [to_model(sample, model) for sample in self.each]

    def only(self, batch: Batch) -> SeparateInputs:  # noqa: D102
        return SeparateInputs((batch,))

    def proofs(self, model: nn.Module, seed: int) -> list[Batch]:
        """Return noise with the mean and spread of the first two samples.

        What is not a floating-point tensor, such as the edges of a graph, is as it is.
        """
        generator = torch.Generator().manual_seed(seed)
        return [_noise_like(to_model(one, model), generator) for one in self.each[:2]]

    def count(self, batch: Batch) -> int:
        """Return that there is one."""
        return 1

    def rows(self, batch: Batch, start: int, stop: int | None) -> Batch:
        """Return the sample, which has no parts."""
        return batch


def as_inputs(model: nn.Module, calibration: Any) -> ModelInputs:
    """Return calibration data in the form that the model reads.

    Parameters
    ----------
    model
        The model.
    calibration
        A `CalibrationSet` or token windows (int64) for a language model; an `ImageSet`, a
        `TensorSet`, a floating-point tensor, several tensors as a tuple, or a mapping by argument
        name; or a list of such tuples or mappings, each of one sample whose tensors have any
        dimensions.

    Raises
    ------
    CalibrationError
        If it is none of these, or the model cannot read it.
    """
    _check_signature(model)
    inputs = _wrapped(model, calibration)
    inputs.check(model)
    return inputs


_WRAPPED = ("_orig_mod", "module")
"""Where `torch.compile`, DataParallel and averaging wrappers keep the model that they wrap."""

_ANYTHING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _check_signature(model: nn.Module) -> None:
    """Refuse models whose forward pass does not tell what it takes."""
    kind = type(model).__name__
    try:
        takes = inspect.signature(model.forward).parameters.values()
    except ValueError as error:
        raise ModelError(
            f"{kind}.forward does not tell what it takes, as of a TorchScript model; give the "
            "model that it was made of"
        ) from error
    wrapped = [name for name in _WRAPPED if isinstance(getattr(model, name, None), nn.Module)]
    if wrapped and all(one.kind in _ANYTHING for one in takes):
        raise ModelError(
            f"{kind} wraps a model; give that itself, as model.{wrapped[0]}, and wrap what comes "
            "of it"
        )


def _wrapped(model: nn.Module, calibration: Any) -> ModelInputs:
    if isinstance(calibration, CalibrationSet):
        return TokenInputs(calibration.tokens)
    if isinstance(calibration, ImageSet):
        images = named_inputs(model, (calibration.tensor(),))
        return _checked(images, calibration.labels is not None)
    if isinstance(calibration, TensorSet):
        labels = calibration.labels
        tensors = in_order(model, calibration.tensors)
        return TensorInputs(tensors, labels is not None and labels.ndim == 1)
    if isinstance(calibration, Tensor):
        fractions = calibration.is_floating_point() and calibration.ndim > 2
        if hasattr(model, "get_input_embeddings") and not fractions:
            return TokenInputs(calibration)
        return _checked(named_inputs(model, (calibration,)))
    if isinstance(calibration, Mapping) and all(
        isinstance(t, Tensor) for t in calibration.values()
    ):
        return _checked(in_order(model, calibration))
    if isinstance(calibration, tuple) and all(isinstance(t, Tensor) for t in calibration):
        return _checked(named_inputs(model, calibration))
    if isinstance(calibration, list):
        return SeparateInputs(tuple(_sample(model, one) for one in calibration))
    raise CalibrationError(f"cannot calibrate on a {type(calibration).__name__}; {_FORMS}")


_FORMS = (
    "give token windows, images, or tensors with one sample for each entry of their first "
    "dimension: one, a tuple in the order of the model's arguments, or a mapping by their names; "
    "where samples are no entries, as of graphs, a list with such a tuple or mapping for each"
)


def _sample(model: nn.Module, sample: Any) -> Mapping[str, Tensor]:
    """Return the arguments that are one sample."""
    values = sample.values() if isinstance(sample, Mapping) else sample
    if not isinstance(sample, Mapping | tuple) or not all(isinstance(t, Tensor) for t in values):
        raise CalibrationError(
            f"cannot calibrate on a list with a {type(sample).__name__} in it; {_FORMS}"
        )
    return sample if isinstance(sample, Mapping) else named_inputs(model, sample)


def _checked(tensors: Mapping[str, Tensor], classes: bool = False) -> TensorInputs:
    """Return tensors that any model can read; those of a `TensorSet` are."""
    check_tensors(tensors)
    return TensorInputs(tensors, classes)


def to_model(batch: Mapping[str, Tensor], model: nn.Module) -> Batch:
    """Return tensors on a model's device, and in its number format if they have fractions."""
    reference = next(model.parameters())
    return {
        name: tensor.to(reference)
        if tensor.is_floating_point() and reference.is_floating_point()
        else tensor.to(reference.device)
        for name, tensor in batch.items()
    }


def _formats(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _noise_like(batch: Batch, generator: torch.Generator) -> Batch:
    """Return noise with the mean and spread of tensors, where these are floating-point."""

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        return drawn * tensor.std(correction=0) + tensor.mean()

    return {n: noise(t) if t.is_floating_point() else t for n, t in batch.items()}
