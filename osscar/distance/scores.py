"""Which output of a model holds scores of classes, of which a divergence is measured."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from osscar.data.batches import ModelInputs
from osscar.data.reader import Batch
from osscar.network.hooks import hooks
from osscar.network.predictions import (
    LOGITS,
    holds_probabilities,
    outputs_by_name,
    place_of_classes,
    reads_sequences,
)

_CLASSIFIERS = frozenset({"classifier", "classification_head"})
"""Layers that say by their name, whoever wrote them, that they tell classes apart."""

_HEADS = frozenset({"fc", "head", "heads", *_CLASSIFIERS})
"""The last layers of classifiers in `_PACKAGES`."""

_PACKAGES = "torchvision.models.", "timm.models."


@dataclass(frozen=True)
class Scores:
    """An output that holds scores of classes."""

    output: str
    """Its name among all."""
    place: int
    """The dimension of its classes: the last (-1), or the second (1)."""
    why: str

    def table(self, result: Any, batch: Batch) -> Tensor:
        """Return the scores, (..., classes); of padded positions, there are none."""
        found = outputs_by_name(result)[self.output].movedim(self.place, -1)
        real = real_positions(self.output, found, batch)
        return found if real is None else found[real]


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass of the dense model shows."""

    model: nn.Module
    inputs: ModelInputs
    batch: Batch
    outputs: Mapping[str, Tensor]
    """The real numbers that it returns, or `logits` alone where one is called so."""
    embeddings: Mapping[int, nn.Module] = field(default_factory=dict)
    """Those that read whole numbers of the batch, by the identity of their weight."""
    last: str = ""
    """The last layer that ran."""

    @property
    def only(self) -> tuple[str, Tensor] | None:
        """The only output, if it has rows of two numbers or more; a single number counts not."""
        if len(self.outputs) != 1:
            return None
        ((name, found),) = self.outputs.items()
        return (name, found) if found.ndim > 1 and found.shape[-1] > 1 else None

    @property
    def rows(self) -> tuple[str, Tensor] | None:
        """The same, if it has a row a sample, or of sequences one a position."""
        found = self.only
        return found if found and (found[1].ndim == 2 or self.sequences) else None

    @property
    def sequences(self) -> bool:
        """Whether the model reads tokens."""
        return self.inputs.tokens or reads_sequences(self.batch.values())

    @cached_property
    def vocabulary(self) -> int | None:
        """The rows of the only embedding that reads inputs; None if there are several, or none."""
        if self.inputs.tokens:
            return len(self.model.get_input_embeddings().weight)  # type: ignore[operator]
        weights = [one.weight for one in self.embeddings.values()]
        return len(weights[0]) if len(weights) == 1 else None  # type: ignore[arg-type]


@contextmanager
def watched(
    model: nn.Module, inputs: ModelInputs, batch: Batch
) -> Generator[Callable[[Any], Pass]]:
    """Watch a pass over a batch while the block runs; what is yielded describes it."""
    embeddings, last = dict[int, nn.Module](), [""]
    whole = [x for x in batch.values() if not x.is_floating_point()]

    def ran(name: str, module: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        last[0] = name
        if isinstance(module, nn.Embedding):
            read = next(iter((*args, *options.values())), None)
            if any(isinstance(read, Tensor) and torch.equal(read, x) for x in whole):
                embeddings[id(module.weight)] = module

    def seen(result: Any) -> Pass:
        return Pass(model, inputs, batch, outputs_by_name(result), embeddings, last[0])

    leaves = [name for name, one in model.named_modules() if name and not any(one.children())]
    with hooks(model, leaves, before=ran):
        yield seen


# ---- the rules ---------------------------------------------------------------------------


def labelled_scores(
    outputs: Mapping[str, Tensor], labels: Sequence[int], *, sequences: bool
) -> Scores | None:
    """Return the only output with a dimension that labels, of this shape, lack: the classes'."""
    fits = [
        Scores(name, 1 if place == 1 < x.ndim - 1 else -1, "calibration data have its labels")
        for name, x in outputs.items()
        if (place := place_of_classes(x.shape, labels, sequences=sequences)) is not None
    ]
    return fits[0] if len(fits) == 1 else None


def _labelled(one: Pass) -> Scores | None:
    """Take what labels of calibration data tell."""
    if one.inputs.predictions is None:
        return None
    labels = one.inputs.count(one.batch), *one.inputs.predictions
    return labelled_scores(one.outputs, labels, sequences=one.sequences)


def _named(one: Pass) -> Scores | None:
    """Take what is called `logits`, unless the model's configuration says that it regresses."""
    config = getattr(one.model, "config", None)
    if one.rows is None or getattr(config, "problem_type", None) == "regression":
        return None
    return Scores(LOGITS, -1, "the output has this name") if one.rows[0] == LOGITS else None


def _probable(one: Pass) -> Scores | None:
    """Take the only output if its rows are probabilities, or their logarithms."""
    if one.rows is None:
        return None
    name, found = one.rows
    if holds_probabilities(found) or holds_probabilities(found.float().exp()):
        return Scores(name, -1, "its rows are probabilities, or their logarithms")
    return None


def _tokens(one: Pass) -> Scores | None:
    """Take what has a column for each row of the only embedding: scores of tokens."""
    fits = [n for n, x in one.outputs.items() if x.ndim > 1 and x.shape[-1] == one.vocabulary]
    why = f"its {one.vocabulary} columns are the rows of the model's only embedding"
    return Scores(fits[0], -1, why) if len(fits) == 1 else None


def _last_layer(one: Pass) -> Scores | None:
    """Take the only output of a model whose number of classes, or last layer, says so."""
    if one.rows is None or not one.last:
        return None
    name, columns = one.rows[0], one.rows[1].shape[-1]
    parts = one.last.split(".")
    places = ("", *accumulate(parts, lambda a, b: f"{a}.{b}"))
    around = [one.model.get_submodule(place) for place in places]
    for module in around:
        if getattr(module, "num_classes", None) == columns:
            return Scores(name, -1, f"{type(module).__name__}.num_classes is {columns}")
    if isinstance(around[-1], nn.Identity):  # in the place of a head that was taken off
        return None
    packaged = any(type(module).__module__.startswith(_PACKAGES) for module in around)
    if (_HEADS if packaged else _CLASSIFIERS).isdisjoint(parts):
        return None
    whose = " of a known classifier" if packaged else ""
    return Scores(name, -1, f"the last layer{whose} is called {one.last}")


RULES: tuple[Callable[[Pass], Scores | None], ...] = (
    _labelled,
    _named,
    _probable,
    _tokens,
    _last_layer,
)
"""The first that finds scores decides."""


def scores_of(one: Pass) -> Scores | None:
    """Return the output that holds scores of classes; None if no rule finds one."""
    found = (rule(one) for rule in RULES)
    return next((scores for scores in found if scores is not None), None)


def asked_scores(one: Pass) -> Scores | None:
    """Return the scores, those of the only output where no rule says more."""
    found = scores_of(one)
    if found is None and one.only is not None:
        place = -1 if one.rows is not None else 1
        found = Scores(one.only[0], place, "it is the only output, and the distance is given")
    return found


# ---- outputs -----------------------------------------------------------------------------


def real_positions(name: str, output: Tensor, batch: Batch) -> Tensor | None:
    """Return at which positions of an output, (samples, positions) bool, a sample is not padded.

    None where nothing tells: a matrix is taken to have positions where it is called as
    `start_logits` is.  The mask of a decoder's inputs tells of all outputs but those that are
    called after the encoder.
    """
    mask = batch.get("attention_mask")
    if any(one.startswith("decoder_") for one in batch) and not name.startswith("encoder"):
        mask = batch.get("decoder_attention_mask")
    if mask is None or mask.shape != output.shape[:2]:
        return None
    return mask.bool() if output.ndim > 2 or name.endswith(f"_{LOGITS}") else None
