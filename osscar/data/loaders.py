"""Batches as people have them, from a loader, a data set or a list, as sets that are read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler
from transformers import PreTrainedModel

from osscar.base.errors import DataError
from osscar.base.inputs import whole_number
from osscar.base.messages import warn
from osscar.base.printable import listed, pluralize
from osscar.data.batches import accepted_arguments, needed_arguments, samples_apart
from osscar.data.entries import (
    NamedBatch,
    is_answer,
    is_pair,
    is_row,
    main_argument,
    named_batch,
    split_labels,
)
from osscar.data.padding import MASKS, TOKENS, hides, without_padding
from osscar.data.samples import LABELS, SampleSet, has_columns, named_generator
from osscar.data.tensors import SampleList, TensorSet
from osscar.data.text import TextSet
from osscar.data.tokens import CalibrationSet
from osscar.network.modules import check_usable

DEFAULT_WINDOWS, DEFAULT_SAMPLES = 32, 256
"""That calibrate a model unless the caller says otherwise."""


def load_batches(
    data: Any, model: nn.Module, *, samples: int | None = None, seed: int = 0
) -> CalibrationSet | SampleSet:
    """Read batches once, in whatever form they are at hand, and keep them.

    Entries are matched with the arguments of the model's forward pass.  Labels are set aside: those
    with one whole number a sample are kept to score by, others are left out, and so is what the
    model does not take.  Padding of token sequences, where ``attention_mask`` is 0, is cut off;
    sequences of several lengths then run one by one, so that no padded position counts.  What was
    done stands in the set's `source`, which reports and checkpoints keep.

    Parameters
    ----------
    data
        A ``torch.utils.data.DataLoader``, or anything that yields batches; a ``datasets.Dataset``
        or a data set of torch, which have rows; or a list of batches.  A batch is a tensor, a tuple
        or list of the model's arguments in their order and perhaps the labels, (inputs, labels), or
        a mapping by the names of arguments.
    model
        What will read them.
    samples
        How many to read at most: of rows that can be looked up drawn at random, of anything else
        the first ones, in the order in which they come.  By default all of a list, and otherwise
        256, or 32 of a language model.
    seed
        Of the draw.

    Returns
    -------
    CalibrationSet or SampleSet
        Windows of a causal language model that have one length; else a `TensorSet`, or a
        `SampleList` of samples that differ in size.

    Raises
    ------
    DataError
        If there is no batch; batches differ in what they have, or in shape; nothing in them fits
        the model, or something that it needs is missing; or a mask hides what cannot be cut off.
    ModelError
        If `model` is no model.
    OptionError
        If the number of samples is not positive, or the seed is none.
    """
    check_usable(model)
    whole_number(seed, "the seed (seed=)", 0)
    if samples is not None:
        whole_number(samples, "the number of samples (samples=)", 1)
    usual = DEFAULT_WINDOWS if _writes(model) else DEFAULT_SAMPLES
    return _loaded(data, model, samples, seed, usual)[0]


def read_once(
    model: nn.Module,
    data: Any,
    *,
    whole: bool = False,
    windows: int = DEFAULT_WINDOWS,
    samples: int = DEFAULT_SAMPLES,
) -> Any:
    """Return data in a form that can be read again and again, as they are if they have one.

    What `load_batches` reads is read by it, with a warning where it left something out: `windows`
    of a causal language model, or `samples` of any other, but all of a list.  With `whole` it reads
    all that there is, as for a score.

    Raises
    ------
    DataError
        As of `load_batches`; and, with `whole`, if nothing says how many samples there are.
    """
    if not _are_batches(model, data):
        return data
    check_usable(model)
    if whole and _length(data) is None:
        raise DataError(
            f"{_called(data)} does not say how many samples it has; score so many of them: "
            "osscar.load_batches(data, model, samples=...)"
        )
    count = None if whole else windows if _writes(model) else samples
    found, notes = _loaded(data, model, None, 0, count)
    if notes:
        warn(f"the data are {found.source}")
    return found


# ---- what there is -----------------------------------------------------------------------


def _are_batches(model: nn.Module, data: Any) -> bool:
    """Tell whether data have to be read before a model can be given them."""
    if isinstance(data, TensorSet):
        return hides(model, data.tensors)
    if isinstance(data, Mapping):
        aside = isinstance(model, PreTrainedModel) and any(is_answer(model, name) for name in data)
        return aside or hides(model, data) or any(_are_rows(one) for one in data.values())
    if isinstance(data, Tensor | tuple | str | bytes | SampleSet | CalibrationSet | TextSet):
        return False
    return isinstance(data, list) or _are_rows(data) or isinstance(data, Iterable)


def _as_list(data: Any) -> tuple[Any, str]:
    """Return data, or a list of a batch that stands for itself, and what they are called."""
    if isinstance(data, TensorSet):
        labels = {} if data.labels is None else {LABELS: data.labels}
        return [{**data.tensors, **labels}], data.source
    if isinstance(data, Mapping) and any(_are_rows(one) for one in data.values()):
        names = listed([*map(repr, data)])
        raise DataError(f"{_called(data)} has data sets of its own; give one of {names}")
    if isinstance(data, Mapping | Tensor | np.ndarray | tuple):
        return [data], _called(data)
    if not isinstance(data, Iterable) and not _are_rows(data):
        raise DataError(f"{_called(data)} yields no batches; give a loader, a data set or a list")
    return data, _called(data)


def _are_rows(data: Any) -> bool:
    """Tell whether data yield samples one by one: data sets of torch, and of `datasets`."""
    return isinstance(data, Dataset) or has_columns(data)


def _length(data: Any) -> int | None:
    """Return how many batches or rows there are; None where nothing tells."""
    try:
        return len(data)
    except TypeError:  # of data that are streamed
        return None


def _called(data: Any) -> str:
    name = type(data).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _writes(model: nn.Module) -> bool:
    """Whether it is a causal language model, which reads tokens and predicts the next."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    return not model.config.is_encoder_decoder and main_argument(model) == TOKENS


# ---- reading -----------------------------------------------------------------------------


def _loaded(
    data: Any, model: nn.Module, samples: int | None, seed: int, usual: int | None
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Return data as a set, and what of them was left out, set aside or cut off.

    Of anything but a list the `usual` number of samples is read where no other is asked for.
    """
    batches, what = _as_list(data)
    if isinstance(data, list) and not _holds_batches(model, data):
        named = samples_apart(model, data)[:samples]
        return SampleList(f"{what}, {pluralize(len(named), 'sample')}", named), []
    if samples is None and not isinstance(batches, list):
        samples = usual
    return _set_of(model, _read(batches, model, samples, seed), what)


def _holds_batches(model: nn.Module, batches: list[Any]) -> bool:
    """Tell whether the entries of a list are batches, of which each has several samples.

    Otherwise each is one sample that is given to the model as it is, such as a graph: that is right
    whatever its tensors are, and so it is what a list means unless something says the opposite,
    which are bare tensors, labels, and models of transformers, whose first dimension is the sample.
    """
    if all(isinstance(one, Tensor | np.ndarray) for one in batches):
        return bool(batches)
    if isinstance(model, PreTrainedModel) or any(is_pair(one) for one in batches):
        return True
    if any(is_answer(model, name) for one in batches if isinstance(one, Mapping) for name in one):
        return True
    tuples = [one for one in batches if isinstance(one, tuple | list) and one]
    takes, needed = accepted_arguments(model), len(needed_arguments(model)) or 1
    return any(
        split_labels(model, list(one))[1] is not None
        or any(is_answer(model, name) for name in takes[needed : len(one)])
        for one in tuples
    )


@dataclass(frozen=True)
class _Reading:
    """What was read, which part of what there is if not all, and with which seed if one drew."""

    batches: list[NamedBatch]
    how: str = ""
    seed: int | None = None
    shuffled: bool = False

    @property
    def amount(self) -> str:
        """Which samples they are, in words."""
        return self.how or pluralize(sum(batch.samples for batch in self.batches), "sample")


def _read(data: Any, model: nn.Module, samples: int | None, seed: int) -> _Reading:
    """Read batches, or rows, until there are enough samples."""
    rows, length, how, used = _are_rows(data), _length(data), "", None
    source: Iterable[Any] = data
    if rows and length is not None and not isinstance(data, IterableDataset):
        order = torch.arange(length)
        if samples is not None and samples < length:
            how, used = f"{samples:,} of its {length:,} rows, drawn with seed {seed}", seed
            order = torch.randperm(length, generator=named_generator("rows", seed))[:samples]
        source = (data[index] for index in order.tolist())
    read, left = list[NamedBatch](), samples
    for number, given in enumerate(source):
        of_rows = rows or is_row(model, given)
        batch = named_batch(model, given, of_rows, f"{'row' if rows else 'batch'} {number}")
        read.append(batch if left is None or batch.samples <= left else batch.first(left))
        if left is not None:
            left -= read[-1].samples
            if left == 0:  # the next batch may be long in coming
                break
    if not read:
        raise DataError(
            f"{_called(data)} yields nothing; give one with samples, and one that was not read to "
            "its end before"
        )
    every = length == len(read) and read[-1] is batch
    if samples is not None and left == 0 and used is None and not every:
        how = f"its first {pluralize(samples, 'sample')}"
    shuffled = isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler) and how
    return _Reading(read, how, used, bool(shuffled))


# ---- sets --------------------------------------------------------------------------------


def _set_of(
    model: nn.Module, reading: _Reading, what: str
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Join batches to a set, whose source tells what was left out of them, as the notes do."""
    read = reading.batches
    _check_alike(read)
    notes = [reading.how] if reading.how else []
    left_out = list(dict.fromkeys(name for batch in read for name in batch.left_out))
    labelled = [batch.labels for batch in read if batch.labels is not None]
    labels = _joined(labelled) if len(labelled) == len(read) else None
    samples = _samples_of(model, read)
    together = _alike(samples)
    if labelled and (labels is None or _writes(model) or not (together or labels.ndim == 1)):
        labels, left_out = None, [*left_out, LABELS]
    if reading.shuffled:
        notes.append("shuffled, as it came in this reading")
    if labels is not None:
        notes.append("labels set aside to score by")
    if left_out:
        notes.append(f"without {listed(left_out, 8)}")
    if any(hides(model, batch.inputs) for batch in read):
        notes.append("padding cut off")
    source = "; ".join([f"{what}, {reading.amount}", *notes[bool(reading.how) :]])
    if not together:
        return SampleList(source, tuple(samples), labels), notes
    tensors = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
    if _writes(model) and set(tensors) == {TOKENS}:
        return CalibrationSet(tensors[TOKENS].to(torch.int64), source, reading.seed), notes
    return TensorSet(source, tensors, labels), notes


def _joined(labels: Sequence[Tensor]) -> Tensor | None:
    """Return labels of all batches; None where those of sequences differ in length."""
    alike = len({one.shape[1:] for one in labels}) == 1
    return torch.cat(list(labels)) if alike else None


def _samples_of(model: nn.Module, read: list[NamedBatch]) -> list[dict[str, Tensor]]:
    """Return batches, or of token sequences each one without its padding."""
    if isinstance(model, PreTrainedModel) and TOKENS in read[0].inputs:
        return [
            one
            for number, batch in enumerate(read)
            for one in without_padding(model, batch.inputs, f"batch {number} of the data")
        ]
    for number, batch in enumerate(read):
        for name, tensor in batch.inputs.items():
            first = read[0].inputs[name].shape[1:]
            if tensor.shape[1:] != first:
                raise DataError(
                    f"{name!r} has samples of {tuple(tensor.shape[1:])} in batch {number} of the "
                    f"data, and of {tuple(first)} in batch 0; give samples of one size, or a list "
                    "with one mapping of arguments for each sample, which then run one by one"
                )
        if hides(model, batch.inputs):
            masks = [name for name in batch.inputs if name.endswith(MASKS)]
            raise DataError(
                f"{listed(masks)} of batch {number} of the data hides a part of its samples that "
                "cannot be cut off, and what is hidden would count in what layers are fitted to; "
                "give samples without padding"
            )
    return [batch.inputs for batch in read]


def _check_alike(read: list[NamedBatch]) -> None:
    """Refuse batches of which one has what another lacks, or another kind of number."""
    for number, batch in enumerate(read[1:], 1):
        mine, first = (
            {n: f"{n} {str(t.dtype).removeprefix('torch.')}" for n, t in one.inputs.items()}
            for one in (batch, read[0])
        )
        if mine != first:
            raise DataError(
                f"batch {number} of the data has {', '.join(mine.values())}, and batch 0 "
                f"{', '.join(first.values())}; give all of them in the same form"
            )


def _alike(samples: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether samples have the same sizes, and can run together."""
    return all(
        {n: t.shape[1:] for n, t in one.items()} == {n: t.shape[1:] for n, t in other.items()}
        for one, other in pairwise(samples)
    )
