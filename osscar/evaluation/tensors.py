"""What a model that reads neither text nor images is worth: quality, speed and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from osscar.base.errors import CalibrationError, ModelError, NonFiniteError
from osscar.base.printable import counted
from osscar.data.batches import Batch, as_inputs, cast_like
from osscar.data.tensors import IGNORED, TensorSet
from osscar.evaluation.result import Comparison, Evaluation
from osscar.evaluation.samples import FEW, Tally, failures_named, measured
from osscar.network.modules import check_usable
from osscar.network.predictions import LOGITS, known_output, named_tensors, scored_output
from osscar.preparation.repeatable import check_repeatable


@dataclass(frozen=True)
class TensorQuality:
    """How well a model does on samples of any kind.

    Attributes
    ----------
    samples
        Number of samples scored.
    classes_in
        The output that is taken as scores of classes, which the next four are of: `logits`, or the
        only one. With labels it is chosen among others as `osscar.evaluate_images` does it, and the
        classes are the dimension that the labels lack, the second where it may be more than one;
        without, it has to be a matrix. None if there is no such output.
    top1, top5
        Share of the predictions whose label is the first, or among the first five, of the classes;
        None without labels, and top5 also where there are no more than five classes.
    agreement
        Share of the predictions whose first class is the dense model's; None without one.
    kl
        Mean Kullback-Leibler divergence of the classes from the dense model's, in nats a
        prediction; None without one.
    errors
        How far each output is from the dense model's, by name: the sum of squared differences over
        the sum of squares, 0 if they are equal and 1 if it were all zeros. Empty without a dense
        model; None where that one's are all zero.
    """

    samples: int
    classes_in: str | None
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    errors: Mapping[str, float | None]


@dataclass(frozen=True)
class TensorSpeed:
    """Samples per second of one model.

    Attributes
    ----------
    samples_per_second
        Forward passes over one batch.
    batch_size
        Samples in that batch.
    repetitions
        Times that it was asked to pass, at the least.
    """

    samples_per_second: float
    batch_size: int
    repetitions: int


def evaluate_tensors(
    model: nn.Module,
    data: TensorSet,
    *,
    batch_size: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
) -> Evaluation[TensorQuality, TensorSpeed]:
    """Measure quality, speed and size of a model.

    Parameters
    ----------
    model
        It puts out a tensor, or a dictionary or tuple of them.
    data
        Samples that neither trained nor calibrated it, with or without labels.
    batch_size
        Samples at once.
    repetitions
        Times that a batch is timed, at the least.
    path
        The model's directory, whose size is reported.

    Raises
    ------
    CalibrationError
        If the model does not take the data, or the labels are not its classes.
    ModelError
        If the model fails on them, puts out nothing that the labels are of, or two passes over the
        same samples differ.
    NonFiniteError
        If an output is NaN or infinite.
    OptionError
        If a number is not positive.
    """
    return _measure([(model, path)], data, batch_size, repetitions)[0]


def compare_tensors(
    model: nn.Module,
    dense: nn.Module,
    data: TensorSet,
    *,
    batch_size: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
    dense_path: str | Path | None = None,
) -> Comparison[TensorQuality, TensorSpeed]:
    """Measure a model and its dense original on the same samples, and time them in turns.

    Parameters
    ----------
    model, dense
        Two models with the same outputs.
    data
        Samples that neither trained nor calibrated either of them, with or without labels.
    batch_size
        Samples at once.
    repetitions
        Times that a batch is timed, at the least.
    path, dense_path
        Their directories, whose sizes are reported.

    Raises
    ------
    CalibrationError
        If a model does not take the data, or the labels are not its classes.
    ModelError
        If a model fails on them, puts out nothing that the labels are of, two passes over the same
        samples differ, or the two put out different tensors.
    NonFiniteError
        If an output is NaN or infinite.
    OptionError
        If a number is not positive.
    """
    pair = [(model, path), (dense, dense_path)]
    mine, theirs = _measure(pair, data, batch_size, repetitions)
    return Comparison.of(mine, theirs)


def score_tensors(
    models: Sequence[nn.Module],
    data: TensorSet,
    *,
    dense: nn.Module | None = None,
    batch_size: int = 32,
) -> list[TensorQuality]:
    """Measure how well several models do on the same samples.

    Parameters
    ----------
    models
        In evaluation mode.
    data
        Samples with or without labels.
    dense
        What the others are compared with; one of the models, or another.
    batch_size
        Samples at once.

    Returns
    -------
    list of TensorQuality
        In the order of the models.

    Raises
    ------
    CalibrationError
        If a model does not take the data, or the labels are not its classes.
    ModelError
        If a model fails on them, puts out nothing that the labels are of, or other tensors than
        the dense one, or two passes over the same samples differ.
    NonFiniteError
        If an output is NaN or infinite.
    OptionError
        If the batch size is not positive.
    """
    if not isinstance(data, TensorSet):
        raise CalibrationError(
            f"the data are a {type(data).__name__}; give a TensorSet, such as osscar.load_tensors "
            "returns"
        )
    everyone = [*models, *(() if dense is None or dense in models else (dense,))]
    for model in everyone:
        check_usable(model)
        as_inputs(model, data)
    sums = [_Sums(data) for _ in models]
    with torch.inference_mode():
        start = 0
        for batch in data.batches(batch_size):
            if not start:
                few = {name: tensor[:FEW] for name, tensor in batch.items()}
                for model in everyone:
                    with failures_named(model, _in_words(few)):
                        check_repeatable(model, _arguments(model, few))
            rows = slice(start, start := start + len(next(iter(batch.values()))))
            labels = None if data.labels is None else data.labels[rows]
            found = {id(model): _outputs(model, batch, labels) for model in everyone}
            for own, model in zip(sums, models, strict=True):
                theirs = None if dense is None or dense is model else found[id(dense)]
                own.add(type(model).__name__, found[id(model)], theirs, labels)
    return [own.quality() for own in sums]


# ---- measuring ---------------------------------------------------------------------------


def _measure(
    candidates: Sequence[tuple[nn.Module, str | Path | None]],
    data: TensorSet,
    batch_size: int,
    repetitions: int,
) -> list[Evaluation[TensorQuality, TensorSpeed]]:
    models = [model for model, _ in candidates]
    dense = models[-1] if len(models) > 1 else None
    return measured(
        candidates,
        "sample",
        lambda: score_tensors(models, data, dense=dense, batch_size=batch_size),
        lambda model: _arguments(model, next(data.batches(batch_size))),
        TensorSpeed,
        repetitions,
    )


@dataclass(frozen=True)
class _Outputs:
    """What a model puts out of fractions, by name, in double precision on the CPU.

    Parameters
    ----------
    named
        All of them.
    classes_in, classes_at
        The one that is taken as scores of classes, and their dimension; None if there is none.
    """

    named: Mapping[str, Tensor]
    classes_in: str | None
    classes_at: int = -1


class _Sums:
    """What one model comes to, summed over batches."""

    def __init__(self, data: TensorSet) -> None:
        self.data, self.tally = data, Tally()
        self.classes_in: str | None = None
        self.apart: dict[str, float] = {}
        self.size: dict[str, float] = {}

    def add(
        self, model: str, outputs: _Outputs, dense: _Outputs | None, labels: Tensor | None
    ) -> None:
        """Count a batch."""
        _check_alike(model, outputs, dense)
        for name, known in ({} if dense is None else dense.named).items():
            difference = float((outputs.named[name] - known).abs().square().sum())
            self.apart[name] = self.apart.get(name, 0.0) + difference
            self.size[name] = self.size.get(name, 0.0) + float(known.abs().square().sum())
        self.classes_in, place = outputs.classes_in, outputs.classes_at
        if self.classes_in is None:
            return
        mine, theirs = (
            None if one is None else one.named[self.classes_in].movedim(place, -1).flatten(0, -2)
            for one in (outputs, dense)
        )
        assert mine is not None
        if labels is not None:
            self._check_labels(mine.shape[1])
            labels = labels.flatten()
        self.tally.add(mine, labels, theirs)

    def _check_labels(self, classes: int) -> None:
        assert self.data.labels is not None
        labels = self.data.labels[self.data.labels != IGNORED]
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise CalibrationError(
                f"{self.data.source} has labels from {int(labels.min())} to {int(labels.max())} "
                f"and the model {counted(classes, 'class', 'classes')}; give samples of its classes"
            )

    def quality(self) -> TensorQuality:
        errors = {
            name: apart / self.size[name] if self.size[name] else None if apart else 0.0
            for name, apart in self.apart.items()
        }
        scores = self.tally.scores()
        return TensorQuality(len(self.data), self.classes_in, **scores, errors=errors)


def _place_of_classes(shape: Sequence[int], labels: Tensor) -> int | None:
    """Return the dimension of an output that its labels lack: torch's, or else the last."""
    for place in (1, len(shape) - 1):
        rest = (*shape[:place], *shape[place + 1 :])
        if len(shape) > place and shape[place] > 1 and rest == tuple(labels.shape):
            return place
    return None


def _check_alike(model: str, outputs: _Outputs, dense: _Outputs | None) -> None:
    if dense is None:
        return
    mine, theirs = (
        {name: tuple(one.shape) for name, one in each.named.items()} for each in (outputs, dense)
    )
    if mine != theirs:
        raise ModelError(
            f"the models cannot be compared: {model} puts out {mine}, and the dense one {theirs}"
        )


# ---- outputs -----------------------------------------------------------------------------


def _arguments(model: nn.Module, batch: Batch) -> Batch:
    reference = next(model.parameters())
    return {name: cast_like(tensor, reference) for name, tensor in batch.items()}


def _in_words(batch: Batch) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())


def _outputs(model: nn.Module, batch: Batch, labels: Tensor | None) -> _Outputs:
    """Return what a model puts out, and which of it the labels, if there are any, are of.

    Raises
    ------
    ModelError
        If it fails, puts out no fractions, or nothing that the labels are of.
    NonFiniteError
        If something is NaN or infinite.
    """
    kind = type(model).__name__
    with failures_named(model, _in_words(batch)):
        result = model(**_arguments(model, batch))
    found = {
        name: one
        for name, one in named_tensors(result)
        if one.is_floating_point() or one.is_complex()
    }
    if not found:
        raise ModelError(
            f"{kind} returned a {type(result).__name__} without a floating-point tensor; let its "
            "forward return one, or a dictionary or tuple of them"
        )
    for name, one in found.items():
        if not bool(torch.isfinite(one).all()):
            raise NonFiniteError(f"{name!r} of {kind} is NaN or infinite; its weights are damaged")
    exact = {
        name: one.to("cpu", torch.complex128 if one.is_complex() else torch.float64)
        for name, one in found.items()
    }
    if labels is None:
        name, known = known_output(result)
        matrix = known is not None and known.ndim == 2 and known.shape[1] > 1
        return _Outputs(exact, name if matrix else None)
    name, scored = scored_output(result, len(labels), kind)
    place = _place_of_classes(scored.shape, labels)
    if place is None:
        there = ", ".join(f"{key!r} {tuple(one.shape)}" for key, one in found.items())
        raise ModelError(
            f"{kind} puts out {there}, and the labels are {tuple(labels.shape)}: scores of classes "
            f"would be {(len(labels), 'classes', *labels.shape[1:])}, named {LOGITS!r} where there "
            "are other outputs; let the model put out these, or leave the labels out"
        )
    return _Outputs(exact, name, place)
