"""What the dense model is worth on its calibration data: whether there is anything to prune."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import bdtrc
from torch import nn
from transformers import PreTrainedModel

from osscar.base.errors import DataError, ModelError, NonFiniteError
from osscar.base.printable import pluralize
from osscar.data.loaders import read_once
from osscar.data.samples import IGNORED, SampleSet
from osscar.data.text import CalibrationSet
from osscar.evaluation.quality import SampleQuality, TextQuality, score
from osscar.network.modules import check_usable, token_embeddings
from osscar.offload.on_disk import is_on_disk

_SAMPLES, _WINDOWS = 512, 4
"""That are scored at most: a pass over them takes next to nothing of a run."""

_SIGNIFICANCE = 0.01

_CHANCE_SHARE = 0.5
"""Of the vocabulary: a perplexity above it is next to guessing."""


@dataclass(frozen=True)
class DenseScore:
    """How well the dense model does on the data that calibrate it.

    Parameters
    ----------
    measure
        ``"top1"`` or ``"perplexity"``.
    value
        Of that measure; None where the labels are not the model's classes.
    samples
        How many windows, images or samples were scored.
    data
        The same in words.
    chance
        What guessing comes to: the share of the most frequent class, or the size of the vocabulary.
    near_chance
        Whether the model is not significantly better than that.
    reason
        Why there is no value; empty if there is one.
    """

    measure: str
    value: float | None
    samples: int
    data: str
    chance: float | None = None
    near_chance: bool = False
    reason: str = ""


def score_dense(
    model: nn.Module, calibration: Any, *, classes: Sequence[str] = ()
) -> DenseScore | None:
    """Score the dense model on its calibration data, in one pass over a few of them.

    Parameters
    ----------
    model
        The dense model, which is not changed.
    calibration
        An `ImageSet` or `TensorSet`, of which at most 512 samples are scored, or a
        `CalibrationSet`, of which at most 4 windows are.
    classes
        The names of the model's classes, by which folders are recognized.

    Returns
    -------
    DenseScore or None
        None where nothing is known to score by: samples without labels, data of another sort, a
        model whose weights stay on disk.

    Raises
    ------
    DataError
        If the model cannot read the windows.
    ModelError
        If it is no model.
    NonFiniteError
        If logits are NaN or infinite.
    """
    check_usable(model)
    if is_on_disk(model):
        return None
    calibration = read_once(model, calibration)
    if isinstance(calibration, SampleSet) and calibration.labels is not None:
        return _score_labelled(model, calibration, classes)
    table = token_embeddings(model) if isinstance(model, PreTrainedModel) else None
    if not isinstance(calibration, CalibrationSet) or calibration.seqlen < 2 or table is None:
        return None
    few = dataclasses.replace(calibration, tokens=calibration.tokens[:_WINDOWS])
    found: TextQuality = score([model], few)[0]
    vocabulary = len(table)
    return DenseScore(
        "perplexity",
        found.perplexity,
        found.windows,
        f"{pluralize(found.windows, 'calibration window')} of {found.seqlen} tokens",
        chance=vocabulary,
        near_chance=found.perplexity > _CHANCE_SHARE * vocabulary,
    )


def _score_labelled(model: nn.Module, data: SampleSet, classes: Sequence[str]) -> DenseScore | None:
    if len(data) > _SAMPLES:
        data = data.sample(_SAMPLES, seed=0)
    assert data.labels is not None
    known, n = data.labels[data.labels != IGNORED], len(data)
    of = pluralize(n, f"labelled calibration {data.sample_name}")
    try:
        found: SampleQuality = score([model], data, classes=classes)[0]
    except (DataError, ModelError, NonFiniteError) as error:
        # Labels may mean something else than its classes, and some classes be shut off by infinity.
        return DenseScore("top1", None, n, of, reason=str(error))
    if found.top1 is None:
        return None
    predictions, most = found.predictions, int(known.bincount().max()) / len(known)
    if predictions != n:
        of = f"{predictions:,} predictions in {of}"
    elif data.labels.ndim > 1 and data.labels.shape[1] > 1:
        of = f"{of}, at the last of {data.labels.shape[1]} labels each"
    by_chance = float(bdtrc(round(found.top1 * predictions) - 1, predictions, most))
    # Of so few that even getting all of them right would be no proof, nothing is said.
    near = by_chance > _SIGNIFICANCE >= most**predictions
    return DenseScore("top1", found.top1, n, of, chance=most, near_chance=near)
