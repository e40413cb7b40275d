"""How much worse than the dense model another is, with the bound of a one-sided 95 % interval.

All differences are paired: both models read the same samples, so that what makes a sample hard for
both drops out.  Copies of a sample count as one.  `python -m benchmarks.target_bounds` shows how
often the bounds hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import with_config
from scipy.optimize import brentq
from scipy.special import bdtr, gammaln, stdtrit, xlogy
from torch import Tensor, nn

from osscar.base.errors import DataError, NonFiniteError, RequestError
from osscar.base.inputs import AnyDistance
from osscar.base.json_files import STRICT
from osscar.data.batches import as_inputs
from osscar.data.parts import copies
from osscar.data.samples import IGNORED, SampleSet
from osscar.distance.distance import Distance, Reference, spread
from osscar.proof.lineage import lineage_of
from osscar.request import TargetKind

CONFIDENCE = 0.95

_FEWEST, _USUAL = 16, 32
"""Samples of a mean at least, and unless the caller says otherwise."""

_SKEWNESS = 2.5
"""By how much a skewness is multiplied: that of few samples mostly lacks the rare large ones, so
that it comes out too low, by half of 128 lognormal ones (sigma 1)."""

_NUISANCES = 24
"""How many shares of gained predictions are looked at for the one with the largest chance."""

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

    Of predictions that all stay right, the bound of `bounded_drop` is 1 - 0.05^(1/n), or little
    more.
    """
    if quality is not TargetKind.TOP1:
        return _FEWEST
    least = max(_FEWEST, math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-min(most, 0.5))))
    return next(n for n in itertools.count(least) if bounded_drop(0, 0, n).bound <= most)


def usual_samples(quality: TargetKind, most: float) -> int:
    """Return on how many samples to measure a model by default.

    That is 32; for a drop as many as let a model be within `most` that loses half of it: six of
    12 / `most` predictions.
    """
    return max(_USUAL, math.ceil(12 / most) if quality is TargetKind.TOP1 else 0)


def rarest_seen(samples: int) -> int:
    """Return the largest m of which a kind that is 1 in m of all is sure to be among samples.

    A kind with the share p is absent from n independent samples with probability (1 - p)^n, which
    is 5 % at p = 1 - 0.05^(1/n), or about 3 / n.
    """
    return math.floor(-1 / math.expm1(math.log1p(-CONFIDENCE) / samples))


def bounded_mean(values: Sequence[float] | NDArray[np.float64]) -> Bounded:
    """Return a mean, with its bound: mean + t s / sqrt(n) + 2.5 g s (1 + 2 t^2) / 6n.

    That is Student's t and, where values are skewed to the right (g > 0), Johnson's correction
    ("Modified t tests and confidence intervals for asymmetrical populations", Journal of the
    American Statistical Association 73, 1978), 2.5 times, as the g of few samples is too low.
    In simulation it is above the truth in 96 and 95 % of 16 and 128 normal values, 95 % of 128
    lognormal ones (sigma 1; 89 and 92 % of 16 and 32), and 95 to 97 % of 512 of which one in a
    hundred is 5 to 100 times as large.
    """
    n, mean, s = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
    t = float(stdtrit(n - 1, CONFIDENCE))
    skewness = float(np.mean(((np.asarray(values) - mean) / s) ** 3)) if s else 0.0
    more = _SKEWNESS * max(0.0, skewness) * (1 + 2 * t * t) / (6 * n)
    return Bounded(mean, mean + s * (t / math.sqrt(n) + more), n)


def bounded_drop(lost: int, gained: int, samples: int) -> Bounded:
    """Return by how much accuracy drops, a share of the samples, with its bound.

    The bound is the drop d at which so low a score, or a lower one, has a chance of 5 %, whatever
    share of predictions is gained (the largest chance counts: an exact unconditional test; Hsueh,
    Liu and Chen, "Unconditional exact tests for equivalence or noninferiority for paired binary
    endpoints", Biometrics 57, 2001).  The score is Tango's ("Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", Statistics in Medicine
    17, 1998):

        (lost - gained - n d) / sqrt(n (2 q + d (1 - d))),

    q the most likely share of predictions gained if the drop is d.  Where none is gained that is
    the bound of Clopper and Pearson.

    Parameters
    ----------
    lost, gained
        How many predictions became wrong, and right.
    samples
        Of how many, n.
    """
    n, value = samples, (lost - gained) / samples
    if lost == n:
        return Bounded(value, 1.0, n)

    def above(drop: float) -> float:
        return _chance(lost, gained, n, drop) - (1 - CONFIDENCE)

    return Bounded(value, float(brentq(above, value + 1e-9, 1 - 1e-9, xtol=1e-7)), n)


def _score(lost: Any, gained: Any, n: int, drop: float) -> Any:
    b = (2 * n - lost + gained) * drop - lost - gained
    c = -gained * drop * (1 - drop)
    q = (np.sqrt(np.maximum(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = np.maximum(n * (2 * q + drop * (1 - drop)), 1e-12)
    return (lost - gained - n * drop) / np.sqrt(variance)


def _chance(lost: int, gained: int, n: int, drop: float) -> float:
    """Return the largest chance of a score as low as that of these counts, if accuracy drops so."""
    most = _score(lost, gained, n, drop) + 1e-9
    right = np.arange(n + 1)  # how many predictions are gained
    low, high = np.full(n + 1, -1), n - right  # so many are lost at most: the score grows with them
    for _ in range(n.bit_length() + 1):
        middle = (low + high + 1) // 2
        fits = _score(middle, right, n, drop) <= most
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    least = max(0.0, -drop)
    width = (1 - drop) / 2 - least
    shares = least + np.append(0.0, np.geomspace(min(0.1 / n, width / 2), width, _NUISANCES))
    q = np.minimum(shares, 1 - 1e-12)[:, None]
    ways = gammaln(n + 1) - gammaln(right + 1) - gammaln(n - right + 1)
    gains = np.exp(ways + xlogy(right, q) + xlogy(n - right, 1 - q))
    few = np.where(low < 0, 0.0, bdtr(low, n - right, np.clip((q + drop) / (1 - q), 0.0, 1.0)))
    return float((gains * few).sum(1).max())


def check_labelled(data: Any, *, known: bool = True) -> None:
    """Refuse samples without a label of a class each; `known` is whether there are classes."""
    given = data.labels if isinstance(data, SampleSet) else None
    if given is None or given.ndim > 1 or not known:
        what = "have no labels" if given is None else "have no label of a class each"
        raise DataError(
            f"{TargetKind.TOP1.option} needs the class of each calibration sample, and these "
            f"{what}; give images in a folder for each class, a file with `labels`, or "
            f"{TargetKind.DIVERGENCE.option}, which needs none"
        )


@dataclass(frozen=True, eq=False)
class Judge:
    """Measures how much worse than the dense model others are, on samples that fitted nothing.

    Copies share a number in `numbers`, (n,) int64; `labels`, (n,) int64, are for the accuracy of
    predictions, and -100 is left out.
    """

    quality: TargetKind
    reference: Reference
    numbers: Tensor
    labels: Tensor | None = None

    @classmethod
    def of(
        cls,
        quality: TargetKind,
        dense: nn.Module,
        data: Any,
        distance: AnyDistance = None,
    ) -> Judge:
        """Run the dense model on samples that can be judged (RequestError, DataError)."""
        inputs = as_inputs(dense, data)
        batches = inputs.batches(1)
        asked = distance if quality is TargetKind.DIVERGENCE else None
        measured = Distance.from_outputs(dense, inputs, batches[0], asked)
        if quality is TargetKind.PERPLEXITY and not (inputs.tokens and measured.measure == "nats"):
            raise RequestError(
                f"{quality.option} is for language models, and {type(dense).__name__} is none; "
                f"give {TargetKind.DIVERGENCE.option}, or with labels {TargetKind.TOP1.option}"
            )
        reference = Reference.from_run(measured, dense, batches)
        if quality is not TargetKind.TOP1:
            return cls(quality, reference, copies(inputs))
        check_labelled(data, known=measured.measure == "nats")
        names = lineage_of(dense).classes
        labels = data.class_labels(names, reference.expected[0].shape[-1])
        return cls(quality, reference, copies(inputs), labels)

    @property
    def samples(self) -> int:
        """How many different samples count: of predictions, those that have a label."""
        some = self.numbers if self.labels is None else self.numbers[self.labels != IGNORED]
        return len(np.unique(some.numpy()))

    @property
    def dense_accuracy(self) -> float:
        """The share of the labels that the dense model predicts."""
        assert self.labels is not None
        pairs = zip(self.reference.expected, self.labels, strict=True)
        right = [float(rows.argmax() == label) for rows, label in pairs if label != IGNORED]
        return sum(right) / max(1, len(right))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Bounded:
        """Measure a model (NonFiniteError if its outputs are NaN or infinite)."""
        reference, distance = self.reference, self.reference.distance
        values, numbers = list[float](), list[int]()
        for index, batch in enumerate(reference.batches):
            found = distance.normalized(distance.outputs(model, batch, reference.step))
            if self.labels is None or self.labels[index] != IGNORED:
                values.append(self._worse(found, index))
                numbers.append(int(self.numbers[index]))
        if not np.isfinite(values).all():
            raise NonFiniteError(
                "the pruned model's outputs are NaN or infinite", "raise damp (`--set damp=1`)"
            )
        _, at = np.unique(numbers, return_inverse=True)
        different = np.bincount(at, values) / np.bincount(at)
        if self.quality is TargetKind.TOP1:
            whole = np.ceil(different - 1e-9)  # of near copies that differ, the worse counts
            drop = bounded_drop(int((whole > 0).sum()), int((whole < 0).sum()), len(whole))
            return dataclasses.replace(drop, value=float(different.mean()))
        mean = bounded_mean(different)
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
