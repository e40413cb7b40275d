"""What a model that reads images is worth: quality, speed and size, alone or beside another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from osscar.base.errors import ImageError, ModelError, NonFiniteError
from osscar.base.inputs import whole_number
from osscar.base.printable import counted
from osscar.data.batches import Batch, cast_like
from osscar.data.images import ImageSet
from osscar.data.tensors import named_inputs
from osscar.evaluation.result import Comparison, Evaluation
from osscar.evaluation.samples import FEW, Tally, failures_named, measured
from osscar.network.modules import check_usable
from osscar.network.predictions import scored_output
from osscar.preparation.repeatable import check_repeatable
from osscar.shrinking.equivalence import call


@dataclass(frozen=True)
class ImageQuality:
    """How well a model classifies images.

    Attributes
    ----------
    images
        Number of images scored.
    top1, top5
        Share of the images whose label is the first, or among the first five, of the model's
        classes; None without labels, and top5 also where there are no more than five classes.
    agreement
        Share of the images of which the dense model's first class is the same; None without one.
    kl
        Mean Kullback-Leibler divergence of the model's classes from the dense model's, in nats;
        None without one.
    """

    images: int
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None


@dataclass(frozen=True)
class ImageSpeed:
    """Images per second of one model.

    Attributes
    ----------
    images_per_second
        Forward passes over one batch.
    batch_size
        Images in that batch.
    repetitions
        Times that it was asked to pass, at the least.
    """

    images_per_second: float
    batch_size: int
    repetitions: int


def evaluate_images(
    model: nn.Module,
    images: ImageSet,
    *,
    classes: Sequence[str] = (),
    batch_size: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
) -> Evaluation[ImageQuality, ImageSpeed]:
    """Measure quality, speed and size of a model.

    Parameters
    ----------
    model
        It takes one batch of images and returns logits, (batch, classes): as its only
        floating-point output, as the one called `logits`, first in a tuple, or as the only such
        matrix of a mapping.
    images
        Images that neither trained nor calibrated it, with or without labels.
    classes
        The names of the model's classes, by which folders are recognized.
    batch_size
        Images at once.
    repetitions
        Times that a batch is timed, at the least.
    path
        The model's directory, whose size is reported.

    Raises
    ------
    ImageError
        If an image cannot be decoded, or the labels are not the model's classes.
    ModelError
        If the model is no classifier, it is not known which of its outputs is to be scored, or two
        passes over the same images differ.
    NonFiniteError
        If logits are NaN or infinite.
    OptionError
        If a number is not positive.
    """
    return _measure([(model, path)], images, classes, batch_size, repetitions)[0]


def compare_images(
    model: nn.Module,
    dense: nn.Module,
    images: ImageSet,
    *,
    classes: Sequence[str] = (),
    batch_size: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
    dense_path: str | Path | None = None,
) -> Comparison[ImageQuality, ImageSpeed]:
    """Measure a model and its dense original on the same images, and time them in turns.

    Parameters
    ----------
    model, dense
        Two models with the same classes.
    images
        Images that neither trained nor calibrated either of them, with or without labels.
    classes
        The names of their classes, by which folders are recognized.
    batch_size
        Images at once.
    repetitions
        Times that a batch is timed, at the least.
    path, dense_path
        Their directories, whose sizes are reported.

    Raises
    ------
    ImageError
        If an image cannot be decoded, or the labels are not the models' classes.
    ModelError
        If a model is no classifier, it is not known which of its outputs is to be scored, two
        passes over the same images differ, or the two have different numbers of classes.
    NonFiniteError
        If logits are NaN or infinite.
    OptionError
        If a number is not positive.
    """
    pair = [(model, path), (dense, dense_path)]
    mine, theirs = _measure(pair, images, classes, batch_size, repetitions)
    return Comparison.of(mine, theirs)


def score_images(
    models: Sequence[nn.Module],
    images: ImageSet,
    *,
    dense: nn.Module | None = None,
    classes: Sequence[str] = (),
    batch_size: int = 32,
) -> list[ImageQuality]:
    """Measure how well several models classify the same images.

    Parameters
    ----------
    models
        Classifiers in evaluation mode.
    images
        Images with or without labels.
    classes
        The names of the models' classes, by which folders are recognized.
    batch_size
        Images at once.
    dense
        What agreement and divergence are measured against; one of the models, or another.

    Returns
    -------
    list of ImageQuality
        In the order of the models.

    Raises
    ------
    ImageError
        If an image cannot be decoded, or the labels are not the models' classes.
    ModelError
        If a model is no classifier, it is not known which of its outputs is to be scored, two
        passes over the same images differ, or they have different numbers of classes.
    NonFiniteError
        If logits are NaN or infinite.
    OptionError
        If the batch size is not positive.
    """
    whole_number(batch_size, "the batch size (--batch-size)", 1)
    if not isinstance(images, ImageSet):
        raise ImageError(
            f"the images are a {type(images).__name__}; give what osscar.load_images returns"
        )
    everyone = [*models, *(() if dense is None or dense in models else (dense,))]
    for model in everyone:
        check_usable(model)
    tallies = [Tally() for _ in models]
    labels: Tensor | None = None
    with torch.inference_mode():
        for number, batch in enumerate(images.batches(batch_size)):
            if number == 0:
                for model in everyone:
                    with failures_named(model, _in_words(batch[:FEW])):
                        check_repeatable(model, _arguments(model, batch[:FEW]))
            logits = [_logits(model, batch) for model in models]
            theirs = None if dense is None else _dense_logits(dense, models, logits, batch)
            if number == 0:
                labels = label_indices(images, classes, logits[0].shape[1])
                _check_same_classes([*logits, *(() if theirs is None else (theirs,))])
            part = None if labels is None else labels[number * batch_size :][: len(batch)]
            for tally, mine in zip(tallies, logits, strict=True):
                tally.add(mine, part, None if mine is theirs else theirs)
    return [ImageQuality(tally.count, **tally.scores()) for tally in tallies]


def _dense_logits(
    dense: nn.Module, models: Sequence[nn.Module], logits: Sequence[Tensor], batch: Tensor
) -> Tensor:
    """Return the dense model's logits, which may be at hand."""
    known = (mine for model, mine in zip(models, logits, strict=True) if model is dense)
    found = next(known, None)
    return _logits(dense, batch) if found is None else found


def label_indices(images: ImageSet, classes: Sequence[str], outputs: int) -> Tensor | None:
    """Return the output that stands for each image's class, (n,) int64, or None without labels.

    Folders are matched with the model's classes by name; or, if their names are numbers, by these;
    or in alphabetical order, if there are as many as outputs.

    Parameters
    ----------
    images
        The images.
    classes
        The names of the model's classes; empty where they are not known.
    outputs
        How many outputs the model has.

    Raises
    ------
    ImageError
        If none of this fits.
    """
    if images.labels is None:
        return None
    labels, names = images.labels, images.classes
    if names and set(names) <= set(classes):
        labels = torch.tensor([classes.index(name) for name in names])[labels]
    elif names and all(name.isdecimal() and len(name) < 10 for name in names):
        labels = torch.tensor([int(name) for name in names])[labels]
    elif names and len(names) != outputs:
        raise ImageError(
            f"{images.source} has {counted(len(names), 'class folder')} and the model "
            f"{counted(outputs, 'class', 'classes')}; name "
            "the folders by class or by number, or give as many as there are classes"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= outputs:
        raise ImageError(
            f"{images.source} has labels from {int(labels.min())} to {int(labels.max())} and the "
            f"model {counted(outputs, 'class', 'classes')}; give images of its classes"
        )
    return labels


# ---- measuring ---------------------------------------------------------------------------


def _measure(
    candidates: Sequence[tuple[nn.Module, str | Path | None]],
    images: ImageSet,
    classes: Sequence[str],
    batch_size: int,
    repetitions: int,
) -> list[Evaluation[ImageQuality, ImageSpeed]]:
    models = [model for model, _ in candidates]
    return measured(
        candidates,
        "image",
        lambda: score_images(
            models,
            images,
            dense=models[-1] if len(models) > 1 else None,
            classes=classes,
            batch_size=batch_size,
        ),
        lambda model: _arguments(model, next(images.batches(batch_size))),
        ImageSpeed,
        repetitions,
    )


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    """Return logits in float64, on the CPU."""
    with failures_named(model, _in_words(batch)):
        result = call(model, _arguments(model, batch))
    _, logits = scored_output(result, len(batch), type(model).__name__)
    if logits.ndim != 2 or len(logits) != len(batch):
        raise ModelError(
            f"a classifier returns logits (images, classes); {type(model).__name__} returned "
            f"{tuple(logits.shape)} for {counted(len(batch), 'image')}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("the model's logits are NaN or infinite; its weights are damaged")
    return logits.double().cpu()


def _check_same_classes(logits: Sequence[Tensor]) -> None:
    if len({one.shape[1] for one in logits}) > 1:
        counts = " and ".join(str(one.shape[1]) for one in logits)
        raise ModelError(f"the two models have {counts} classes and cannot be compared")


def _in_words(batch: Tensor) -> str:
    return f"images {tuple(batch.shape)}"


def _arguments(model: nn.Module, batch: Tensor) -> Batch:
    return named_inputs(model, (cast_like(batch, next(model.parameters())),))
