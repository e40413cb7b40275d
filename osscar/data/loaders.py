"""Batches from a loader, a data set or a list, read once and kept as a set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel

from osscar.base.errors import DataError, warn
from osscar.base.inputs import safe_repr, whole_number
from osscar.base.printable import listed, pluralize
from osscar.data.batches import accepted_arguments, check_arguments, named_inputs, needed_arguments
from osscar.data.samples import (
    LABEL_NAMES,
    SampleList,
    SampleSet,
    TensorSet,
    has_columns,
    kind_of_numbers,
    named_generator,
)
from osscar.data.text import CalibrationSet, TextSet
from osscar.network.modules import check_usable

DEFAULT_WINDOWS, DEFAULT_SAMPLES = 32, 256
"""That calibrate a model unless the caller says otherwise."""

_TOKENS, _MASK = "input_ids", "attention_mask"

_PER_TOKEN = frozenset({_TOKENS, _MASK, "token_type_ids", "position_ids"})
"""Inputs that have an entry for each token, and are cut where a sequence is."""

_FORMS = (
    "give a tensor, a mapping of tensors by the names of the model's arguments, or an iterable of "
    "these or of (inputs, labels)"
)


_AT_HAND = (list, Mapping, Tensor, np.ndarray, TensorSet)
"""What is in memory, of which all is read unless the caller says otherwise."""


def load_batches(
    data: Any,
    model: nn.Module,
    *,
    samples: int | None = None,
    seed: int = 0,
    sample_groups: Any = None,
) -> CalibrationSet | SampleSet:
    """Read batches once, and keep them.

    Labels reach the model only if it needs them.  Whole numbers are kept to score by; other labels,
    and entries that the model does not take, are left out.  Padding of token sequences, where
    ``attention_mask`` is 0, is cut off, and sequences of several lengths then run one by one.  The
    set's `source` says what was done.

    Parameters
    ----------
    data
        A tensor; a mapping of tensors by the names of the model's arguments, with perhaps
        `labels`; a pair (inputs, labels); or an iterable of these, such as a
        ``torch.utils.data.DataLoader``, or a data set, each row of which is one sample.
    model
        What will read them.
    samples
        How many to read at most: of rows that can be looked up drawn at random, of anything else
        the first ones.  By default all of a list and of tensors, and otherwise 256, or 32 of a
        language model.
    seed
        Of the draw.
    sample_groups
        A number for each sample of the data, in order: those of one number are near copies of one
        another, are never divided into two parts, and count as one.  Windows of text have none:
        they are compared with one another.

    Returns
    -------
    CalibrationSet or SampleSet
        Windows of a causal language model that have one length; else a `TensorSet`, or a
        `SampleList` of token sequences that differ in length.

    Raises
    ------
    DataError
        If there is no batch, batches differ in form, do not fit the model, or are padded in
        another way than at the ends of token sequences.
    ModelError
        If `model` is no model.
    OptionError
        If the number of samples is not positive, or the seed is none.
    """
    check_usable(model)
    data = _batches_of(data)
    whole_number(seed, "the seed (seed=)", 0)
    if samples is not None:
        whole_number(samples, "the number of samples (samples=)", 1)
    elif not isinstance(data, _AT_HAND):
        samples = DEFAULT_WINDOWS if _is_causal(model) else DEFAULT_SAMPLES
    return _read(data, model, samples, seed, sample_groups)[0]


def read_once(
    model: nn.Module,
    data: Any,
    *,
    whole: bool = False,
    windows: int = DEFAULT_WINDOWS,
    samples: int = DEFAULT_SAMPLES,
) -> Any:
    """Return data in a form that can be read again and again, as they are if they have one.

    Batches are read as by `load_batches`, with a warning where something was left out: `windows`
    of a causal language model, or `samples` of any other, but all of a list and of tensors.  With
    `whole` all of them are read, as for a score.
    """
    data = _batches_of(data)
    if isinstance(data, Mapping):
        ready = not any(name in LABEL_NAMES or str(name).endswith("_mask") for name in data)
    elif isinstance(data, TensorSet):
        ready = not _hides(model, data.tensors)
    else:
        kinds = (Tensor, str, bytes, SampleSet, CalibrationSet, TextSet)
        ready = isinstance(data, kinds) or not (isinstance(data, Iterable) or _has_rows(data))
    if ready:
        return data
    check_usable(model)
    if whole and _length(data) is None:
        raise DataError(
            f"{_called(data)} has no length; say how many samples to score: "
            "osscar.load_batches(data, model, samples=...)"
        )
    every = whole or isinstance(data, _AT_HAND)
    count = windows if _is_causal(model) else samples
    found, notes = _read(data, model, None if every else count, 0)
    if notes:
        warn(f"the data are {found.source}")
    return found


def _called(data: Any) -> str:
    name = type(data).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _batches_of(data: Any) -> Any:
    """Return what a tuple holds as a list: one pair (inputs, labels), or several batches."""
    match data:
        case (Tensor() | np.ndarray() | Mapping(), Tensor() | np.ndarray()) if isinstance(
            data, tuple
        ):
            return [data]
        case tuple():
            return list(data)
    return data


def _has_rows(data: Any) -> bool:
    """Whether data yield samples rather than batches: data sets of torch, and of `datasets`."""
    return isinstance(data, Dataset) or has_columns(data)


def _length(data: Any) -> int | None:
    """Return how many batches or rows there are; None where nothing tells."""
    try:
        return len(data)
    except TypeError:  # of data that are streamed
        return None


def _is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model, which reads tokens and predicts the next."""
    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.main_input_name == _TOKENS
    )


# ---- reading -----------------------------------------------------------------------------


def _read(
    data: Any, model: nn.Module, samples: int | None, seed: int, groups: Any = None
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Return data as a set, and what was left out of them or cut off, which its source says too."""
    source, what, notes, drawn = data, _called(data), list[str](), None
    length, order = _length(data), None
    if isinstance(data, TensorSet):
        labels = {} if data.labels is None else {LABEL_NAMES[0]: data.labels}
        groups = data.sample_groups if groups is None else groups
        source, what, length = [{**data.tensors, **labels}], data.source, 1
    elif isinstance(data, Mapping | Tensor | np.ndarray):
        source, length = [data], 1
    elif _has_rows(data) and not isinstance(data, IterableDataset) and length is not None:
        order = torch.arange(length)
        if samples is not None and samples < length:
            order = torch.randperm(length, generator=named_generator("rows", seed))[:samples]
            notes, drawn = [f"{samples:,} of its {length:,} rows, drawn with seed {seed}"], seed
        source = (data[index] for index in order.tolist())
    elif isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(f"cannot read batches of {what}; {_FORMS}")
    read = list(_first(iter(source), model, _has_rows(data), samples))
    if not read:
        raise DataError(f"{what} yields nothing; give one that was not read to its end before")
    batches = [batch for batch, _ in read]
    left_out = list(dict.fromkeys(name for _, names in read for name in names))
    count = sum(map(len, batches))
    cut = samples is not None and count > samples
    if samples is not None and cut:
        batches[-1] = batches[-1].rows(torch.arange(len(batches[-1]) - count + samples))
        count = samples
    if not notes and (cut or (count == samples and length != len(batches))):
        notes = [f"its first {pluralize(count, 'sample')}"]
    title = f"{what}, {notes[0] if notes else pluralize(count, 'sample')}"
    found, notes = _joined(model, batches, left_out, title, notes, drawn)
    if groups is None:
        return found, notes
    if isinstance(found, CalibrationSet):
        raise DataError("windows of text have no sample_groups, as they are compared; omit them")
    numbers = torch.as_tensor(groups)
    some = numbers[:count] if order is None else numbers[order]
    return replace(found, sample_groups=some), notes  # type: ignore[type-var]


def _first(
    source: Iterator[Any], model: nn.Module, rows: bool, samples: int | None
) -> Iterator[tuple[TensorSet, list[str]]]:
    """Yield batches by argument, with what was left out of each, until there are enough samples."""
    read = 0
    for number, given in enumerate(source):
        try:
            batch, left_out = _named(model, given, rows)
            check_arguments(model, batch.tensors)
        except DataError as error:
            place = "row" if rows else "batch"
            raise DataError(f"{place} {number} of the data: {error}") from error
        yield batch, left_out
        read += len(batch)
        if samples is not None and read >= samples:
            return  # the next batch may be long in coming


def _named(model: nn.Module, given: Any, row: bool) -> tuple[TensorSet, list[str]]:
    """Read a batch, or a row as a batch of one, by argument; return what was left out as well."""
    inputs, labels, left_out = given, None, list[str]()
    if isinstance(given, tuple | list):
        if not 1 <= len(given) <= 2:
            raise DataError(f"a {type(given).__name__} of {len(given)} is no pair; {_FORMS}")
        inputs, labels = (*given, None)[:2]
    if isinstance(inputs, Mapping):
        takes, needed = accepted_arguments(model), needed_arguments(model)
        aside = [name for name in inputs if name in LABEL_NAMES and name not in needed]
        labels = next((inputs[name] for name in aside), labels)
        left_out = [str(name) for name in inputs if name not in (*takes, *aside)]
        named = {
            name: _tensor(inputs[name], row)
            for name in takes
            if inputs.get(name) is not None and name not in aside
        }
        if not named:
            raise DataError(
                f"{type(model).__name__}.forward takes {', '.join(takes)}, and there are "
                f"{', '.join(map(str, inputs)) or 'no entries'}; name the entries (columns) after "
                "the arguments that read them, and make tensors of what is not (text by the "
                "tokenizer, images by osscar.load_images)"
            )
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        named = named_inputs(model, [_tensor(one, row) for one in args])
    if labels is None:
        return TensorSet("", named), left_out
    try:
        scored = _tensor(labels, row)
    except DataError:
        scored = torch.empty(1)  # boxes and their like
    if not scored.ndim:
        raise DataError(
            f"its label is one number ({safe_repr(labels)}), as of a sample and not of a batch; "
            "give torch.utils.data.DataLoader(samples, batch_size=32) of these"
        )
    if kind_of_numbers(scored) != "whole":
        return TensorSet("", named), [*left_out, LABEL_NAMES[0]]
    return TensorSet("", named, scored), left_out


def _tensor(value: Any, row: bool) -> Tensor:
    """Return numbers as a tensor whose first dimension is the sample."""
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"a {type(value).__name__} is no tensor; {_FORMS}, or images of PIL to "
            "osscar.load_images"
        ) from None
    return found[None] if row else found


def _joined(
    model: nn.Module,
    batches: list[TensorSet],
    left_out: list[str],
    title: str,
    notes: list[str],
    seed: int | None,
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Join batches to a set; return what was left out of them as well."""
    of_tokens = isinstance(model, PreTrainedModel) and _TOKENS in batches[0].tensors
    samples = [one.tensors for one in batches]
    padded = any(_hides(model, one) for one in samples)
    if of_tokens:
        samples = [
            one
            for number, batch in enumerate(samples)
            for one in _without_padding(model, batch, f"batch {number} of the data")
        ]
    elif padded:
        raise DataError(
            "the data have a mask, and masked positions cannot be left out of the refit for this "
            "model; give samples without padding"
        )
    forms = [
        {name: f"{name} {str(t.dtype)[6:]} of {list(t.shape[1:])}" for name, t in one.items()}
        for one in samples
    ]
    other = next((i for i, form in enumerate(forms) if form != forms[0]), None)
    if other is not None and not of_tokens:
        raise DataError(
            f"batch {other} of the data has {', '.join(forms[other].values())}, and batch 0 "
            f"{', '.join(forms[0].values())}; give all in the same form, or samples that each run "
            "by themselves: osscar.SampleList('graphs', [{'x': ...}, ...])"
        )
    labels = _labels(batches)
    if labels is None or _is_causal(model) or (other is not None and labels.ndim > 1):
        labelled = any(one.labels is not None for one in batches)
        labels, left_out = None, [*left_out, LABEL_NAMES[0]] if labelled else left_out
    told = [
        *(["labels set aside to score by"] if labels is not None else []),
        *([f"without {listed(left_out, 8)}"] if left_out else []),
        *(["padding cut off"] if padded else []),
    ]
    source = "; ".join([title, *told])
    if other is not None:
        return SampleList(source, tuple(samples), labels), [*notes, *told]
    tensors = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
    if _is_causal(model) and set(tensors) == {_TOKENS}:
        windows = CalibrationSet(tensors[_TOKENS].long(), source, seed)
        return windows, [*notes, *told]
    return TensorSet(source, tensors, labels), [*notes, *told]


def _labels(batches: list[TensorSet]) -> Tensor | None:
    """Return the labels of all batches; None where some have none, or they differ in shape."""
    labels = [one.labels for one in batches if one.labels is not None]
    alike = len(labels) == len(batches) and len({one.shape[1:] for one in labels}) == 1
    return torch.cat(labels) if alike else None


# ---- padding -----------------------------------------------------------------------------


def _hides(model: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Whether a mask hides something from a model of transformers, where masks have one meaning."""
    takes = accepted_arguments(model) if isinstance(model, PreTrainedModel) else ()
    masks = [t for name, t in tensors.items() if str(name).endswith("_mask") and name in takes]
    return any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in masks)


def _without_padding(
    model: nn.Module, inputs: Mapping[str, Tensor], place: str
) -> list[Mapping[str, Tensor]]:
    """Return the sequences of a batch, each without its padding, (1, its length).

    A padded position would count wherever activations are summed, or outputs compared.
    """
    ids, mask = inputs[_TOKENS], inputs.get(_MASK)
    if kind_of_numbers(ids) != "whole":
        raise DataError(f"{_TOKENS!r} of {place} is {ids.dtype}; give the ids of tokens")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if kept.shape != ids.shape or ids.ndim != 2:
        raise DataError(
            f"{_MASK!r} of {place} has shape {tuple(kept.shape)} for {_TOKENS!r} of "
            f"{tuple(ids.shape)}; give (samples, tokens) of both"
        )
    runs = kept[:, :1].sum(1) + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    if not bool((runs == 1).all()):
        row = int((runs != 1).nonzero()[0])
        raise DataError(
            f"{_MASK!r} of sequence {row} in {place} hides all of it, or leaves gaps in it; give "
            "sequences with tokens, padded at their ends alone"
        )
    needed = needed_arguments(model)
    passed = {name: t for name, t in inputs.items() if name != _MASK or name in needed}
    cut = {name for name, t in passed.items() if name in _PER_TOKEN and t.shape[:2] == ids.shape}
    return [
        {n: t[row : row + 1, keep] if n in cut else t[row : row + 1] for n, t in passed.items()}
        for row, keep in enumerate(kept)
    ]
