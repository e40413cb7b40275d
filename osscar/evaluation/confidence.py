"""How much worse than the dense model another is, with the bound of a one-sided 95 % interval.

All differences are paired: both models read the same samples, so that what makes a sample hard for
both drops out.  The bound of a mean covers 95 % where samples are near normal, and less where few
samples have skewed values: in simulation 86 and 92 % of 16 and 128 lognormal ones (sigma 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import with_config
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit
from torch import Tensor, nn

from osscar.allocation.divergence import Distance, Reference, spread
from osscar.base.distances import AnyDistance
from osscar.base.errors import DataError, NonFiniteError, RequestError
from osscar.base.json_files import STRICT
from osscar.data.batches import as_inputs
from osscar.data.samples import IGNORED, SampleSet
from osscar.request import TargetKind

CONFIDENCE = 0.95

_FEWEST = 8
"""Samples of an interval at least: of seven degrees of freedom, t is 1.9 and not 6.3 as of one."""

MOST_EXPONENT = 700.0
"""Of more, the exponential is no number."""


@with_config(STRICT)
@dataclass(frozen=True)
class Bounded:
    """A value on so many samples, and the end of its one-sided 95 % interval."""

    value: float
    bound: float
    samples: int


def fewest_samples(quality: TargetKind, most: float) -> int:
    """Return on how many samples a model has to be measured so that its bound can be within `most`.

    Of predictions that all stay right, the bound of `bounded_drop` is z^2 / (n + z^2).
    """
    if quality is not TargetKind.TOP1:
        return _FEWEST
    z = float(ndtri(CONFIDENCE))
    return max(_FEWEST, math.ceil(z * z * (1 - most) / most))


def bounded_mean(values: Sequence[float]) -> Bounded:
    """Return a mean, with its bound: mean + t s / sqrt(n) + g s (1 + 2 t^2) / 6n.

    That is Student's t and, where values are skewed to the right (g > 0), Johnson's correction, as
    the divergence of images is: the mean of few then mostly lacks the rare large ones ("Modified t
    tests and confidence intervals for asymmetrical populations", Journal of the American
    Statistical Association 73, 1978).
    """
    n, mean, s = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    t = float(stdtrit(n - 1, CONFIDENCE))
    skewness = float(np.mean((np.asarray(values) - mean) ** 3)) / s**3 if s else 0.0
    more = max(0.0, skewness) * (1 + 2 * t * t) / (6 * n)
    return Bounded(mean, mean + s * (t / math.sqrt(n) + more), n)


def bounded_drop(lost: int, gained: int, samples: int) -> Bounded:
    """Return by how much accuracy drops, a share of the samples, with its bound.

    That is Tango's score interval of a paired difference, which is also valid where few or no
    predictions change ("Equivalence test and confidence interval for the difference in proportions
    for the paired-sample design", Statistics in Medicine 17, 1998): the drop d at which

        lost - gained - n d + z sqrt(n (2 q + d (1 - d))) = 0,

    q the most likely share of predictions gained if the drop is d.

    Parameters
    ----------
    lost, gained
        How many predictions became wrong, and right.
    samples
        Of how many, n.
    """
    n, z = samples, float(ndtri(CONFIDENCE))

    def above(drop: float) -> float:
        b = (2 * n - lost + gained) * drop - lost - gained
        c = -gained * drop * (1 - drop)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        return lost - gained - n * drop + z * math.sqrt(max(0.0, n * (2 * q + drop * (1 - drop))))

    value = (lost - gained) / n
    # Where nothing changes, no drop at all is a root as well, and no bound.
    return Bounded(value, float(brentq(above, min(value + 1e-9, 1.0), 1.0)), n)


@dataclass(frozen=True, eq=False)
class Judge:
    """Measures how much worse than the dense model others are, on samples that fitted nothing.

    Parameters
    ----------
    quality
        What is measured.
    reference
        The outputs of the dense model, a batch a sample.
    labels
        The class of each sample, (n,) int64, for the accuracy of predictions; -100 is left out.
    """

    quality: TargetKind
    reference: Reference
    labels: Tensor | None = None

    @classmethod
    def of(
        cls,
        quality: TargetKind,
        dense: nn.Module,
        data: Any,
        classes: Sequence[str] = (),
        distance: AnyDistance = None,
    ) -> Judge:
        """Run the dense model on the samples; a divergence is the `distance` of a request.

        Raises
        ------
        RequestError
            If perplexity is asked for, and the model is no language model.
        DataError
            If accuracy is, and samples have no labels, or several each.
        """
        inputs = as_inputs(dense, data)
        batches = inputs.batches(dense, 1)
        asked = distance if quality is TargetKind.DIVERGENCE else None
        measured = Distance.of(dense, inputs, batches[0], asked)
        if quality is TargetKind.PERPLEXITY and not (inputs.tokens and measured.measure == "nats"):
            raise RequestError(
                f"{quality.option} is for language models, and {type(dense).__name__} is none; "
                f"give {TargetKind.DIVERGENCE.option}, or with labels {TargetKind.TOP1.option}"
            )
        reference = Reference.of(measured, dense, batches)
        if quality is not TargetKind.TOP1:
            return cls(quality, reference)
        given = data.labels if isinstance(data, SampleSet) else None
        if given is None or given.ndim > 1 or measured.measure != "nats":
            what = "have no labels" if given is None else "have no label of a class each"
            raise DataError(
                f"{quality.option} needs the class of each calibration sample, and these {what}; "
                "give images in a folder for each class, a file with `labels`, or "
                f"{TargetKind.DIVERGENCE.option}, which needs none"
            )
        labels = data.class_labels(classes, reference.expected[0].shape[-1])
        return cls(quality, reference, labels)

    @property
    def labelled(self) -> int:
        """How many samples have a label."""
        return 0 if self.labels is None else int((self.labels != IGNORED).sum())

    @property
    def dense_accuracy(self) -> float:
        """The share of the labels that the dense model predicts."""
        assert self.labels is not None
        pairs = zip(self.reference.expected, self.labels, strict=True)
        right = [float(rows.argmax() == label) for rows, label in pairs if label != IGNORED]
        return sum(right) / max(1, len(right))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Bounded:
        """Measure a model.

        Raises
        ------
        NonFiniteError
            If its outputs are NaN or infinite.
        """
        reference, distance = self.reference, self.reference.distance
        values = list[float]()
        for index, batch in enumerate(reference.batches):
            found = distance.normalized(distance.outputs(model, batch, reference.step))
            if self.labels is None or self.labels[index] != IGNORED:
                values.append(self._worse(found, index))
        if not np.isfinite(values).all():
            raise NonFiniteError("the pruned model's outputs are NaN or infinite", "raise --damp")
        if self.quality is TargetKind.TOP1:
            return bounded_drop(values.count(1.0), values.count(-1.0), len(values))
        mean = bounded_mean(values)
        if self.quality is TargetKind.DIVERGENCE:
            return mean
        increase, most = (math.expm1(min(x, MOST_EXPONENT)) for x in (mean.value, mean.bound))
        return Bounded(increase, most, mean.samples)

    def _worse(self, found: Any, index: int) -> float:
        """Return what is averaged of a sample: a distance, a log-loss risen, or a label missed."""
        dense, distance = self.reference.expected[index], self.reference.distance
        if self.quality is TargetKind.DIVERGENCE:
            total, count = distance.summed(found, dense, self.reference.batches[index])
            return float(total) / count
        if self.quality is TargetKind.PERPLEXITY:
            tokens = self.reference.batches[index]["input_ids"][0]
            at = spread(torch.arange(len(tokens), device=tokens.device), self.reference.step)
            rows = at < len(tokens) - 1
            following = tokens[at[rows] + 1, None]
            return float((dense - found)[rows].gather(1, following).double().mean())
        assert self.labels is not None
        if found.isnan().any():  # of which some class would be the likeliest all the same
            return math.nan
        label = int(self.labels[index])
        return float(dense.argmax() == label) - float(found.argmax() == label)
