"""What evaluations of images and of tensors share: class scores counted, models timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osscar.allocation.curvature import as_logits
from osscar.base.devices import clock_of
from osscar.base.errors import ModelError, OsscarError
from osscar.base.inputs import whole_number
from osscar.base.memory import let_shortage_pass
from osscar.base.timing import interleaved, seconds_of
from osscar.data.batches import Batch
from osscar.data.tensors import IGNORED
from osscar.evaluation.result import Evaluation
from osscar.evaluation.size import measure_footprint, read_peak_memory, reset_peak_memory
from osscar.network.modules import check_usable, device_of, evaluating

FEW = 2
"""Samples that tell whether two passes are alike."""

Q = TypeVar("Q")
S = TypeVar("S")

_TOP = 5


class Tally:
    """Sums over predictions."""

    def __init__(self) -> None:
        self.count = self.first = self.among = self.outputs = 0
        self.labelled = self.compared = self.agreeing = 0
        self.kl = 0.0

    def add(self, logits: Tensor, labels: Tensor | None, dense: Tensor | None) -> None:
        """Count a batch.

        Parameters
        ----------
        logits
            Scores of classes, (predictions, classes) float64, or their probabilities; `dense`
            alike, or None.
        labels
            The right classes, (predictions,), or None; -100 is not counted.
        """
        self.count += len(logits)
        self.outputs = logits.shape[1]
        if labels is not None:
            known = labels != IGNORED
            labels = labels[known]
            best = logits[known].topk(min(_TOP, self.outputs)).indices
            self.labelled += len(labels)
            self.first += int((best[:, 0] == labels).sum())
            self.among += int((best == labels[:, None]).any(1).sum())
        if dense is not None:
            self.compared += len(logits)
            self.agreeing += int((logits.argmax(1) == dense.argmax(1)).sum())
            mine, theirs = (as_logits(one).log_softmax(1) for one in (logits, dense))
            self.kl += float(F.kl_div(mine, theirs, reduction="sum", log_target=True))

    def scores(self) -> dict[str, float | None]:
        """Return `top1`, `top5`, `agreement` and `kl`, each None where it is not known."""
        labelled, compared = self.labelled, self.compared
        return {
            "top1": self.first / labelled if labelled else None,
            "top5": self.among / labelled if labelled and self.outputs > _TOP else None,
            "agreement": self.agreeing / compared if compared else None,
            "kl": self.kl / compared if compared else None,
        }


@contextmanager
def failures_named(model: nn.Module, what: str) -> Iterator[None]:
    """Say so where a model fails in the block, on what is to be scored.

    Raises
    ------
    ModelError
        If it does.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        raise ModelError(
            f"{type(model).__name__} fails on {what}: {type(error).__name__}: {error}; give data "
            "that it reads"
        ) from error


def measured(
    candidates: Sequence[tuple[nn.Module, str | Path | None]],
    sample: str,
    score: Callable[[], Sequence[Q]],
    batch: Callable[[nn.Module], Batch],
    speed: Callable[[float, int, int], S],
    repetitions: int,
) -> list[Evaluation[Q, S]]:
    """Score models, time them in turns, and count what they are made of.

    Parameters
    ----------
    candidates
        Models with their directories, of which one or two.
    sample
        What they read.
    score
        Returns the quality of each.
    batch
        Returns what a model is timed with, as its arguments.
    speed
        Makes something of samples a second, samples in a batch, and repetitions.
    repetitions
        Times that a batch is timed, at the least.
    """
    whole_number(repetitions, "the number of repetitions", 1)
    models = [model for model, _ in candidates]
    for model in models:
        check_usable(model)
    with evaluating(models[0]), evaluating(models[-1]), torch.no_grad():
        reset_peak_memory(device_of(models[0]))
        quality = score()
        peak = read_peak_memory(device_of(models[0]))
        batches = [batch(model) for model in models]
        rows = len(next(iter(batches[0].values())))
        speeds = _speeds(models, batches, rows, repetitions)
        return [
            Evaluation(
                sample=sample,
                quality=quality[index],
                speed=speed(speeds[index], rows, repetitions),
                footprint=measure_footprint(
                    model, {name: t[:1] for name, t in batches[index].items()}, 1, peak, path
                ),
                device=device_of(model).type,
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            )
            for index, (model, path) in enumerate(candidates)
        ]


def _speeds(
    models: Sequence[nn.Module], batches: Sequence[Batch], rows: int, repetitions: int
) -> list[float]:
    timings = [
        seconds_of(partial(model, **batch), clock_of(device_of(model)))
        for model, batch in zip(models, batches, strict=True)
    ]
    return [rows / statistics.median(one) for one in interleaved(timings, repetitions, "Timing")]
