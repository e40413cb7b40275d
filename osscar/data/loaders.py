"""Batches from a loader, a data set, a list or a file, read once and kept as a set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from osscar.base.errors import DataError, FileError, first_line, of_part, warn
from osscar.base.inputs import safe_repr, whole_number
from osscar.base.memory import attempt
from osscar.base.printable import listed, pluralize
from osscar.data.batches import (
    FORMS,
    accepted_arguments,
    check_arguments,
    named_inputs,
    needed_arguments,
)
from osscar.data.samples import (
    GROUPS,
    IGNORED,
    IMAGES,
    LABEL_NAMES,
    LABELS,
    SampleList,
    SampleSet,
    TensorSet,
    has_columns,
    kind_of_numbers,
)
from osscar.data.sequences import TOKENS, decoder_inputs, divided, hides, makes_decoder_inputs
from osscar.data.text import CalibrationSet, TextSet
from osscar.network.modules import check_usable

DEFAULT_WINDOWS, DEFAULT_SAMPLES = 32, 256
"""That calibrate a model unless the caller says otherwise."""

_AT_HAND = (list, Mapping, Tensor, np.ndarray, TensorSet)
"""What is in memory, of which all is read unless the caller says otherwise."""


def load_batches(
    data: Any, model: nn.Module, *, samples: int | None = None, sample_groups: Any = None
) -> CalibrationSet | SampleSet:
    """Read batches once, and keep them.

    Labels reach the model only if it needs them.  Whole numbers are kept to score by; other labels,
    and entries that the model does not take, are left out.  An encoder with a decoder, of
    transformers, makes of labels what its decoder reads, unless that is given.  Padding of
    sequences, where ``attention_mask`` is 0, is cut off, and so is that of labels, which is -100 at
    their ends; those of equal lengths run together.  The set's `source` says what was done.

    Parameters
    ----------
    data
        A tensor; a mapping of tensors by the names of the model's arguments, with perhaps
        `labels`; a pair (inputs, labels); or an iterable of these, such as a
        ``torch.utils.data.DataLoader``.
    model
        What will read them.
    samples
        How many to read at most, the first ones.  By default all of a list and of tensors, and
        otherwise 256, or 32 of a language model.
    sample_groups
        As of a `TensorSet`.  Windows of text have none: they are compared with one another.

    Returns
    -------
    CalibrationSet or SampleSet
        Windows of a causal language model that have one length; else a `TensorSet`, or a
        `SampleList` of samples that differ in length.

    Raises
    ------
    DataError
        If there is no batch, batches differ in form, do not fit the model, or are padded in
        another way than at the ends of sequences.
    """
    check_usable(model)
    data = _batches_of(data)
    if samples is not None:
        whole_number(samples, "the number of samples (samples=)", 1)
    elif not isinstance(data, _AT_HAND):
        samples = DEFAULT_WINDOWS if _is_causal(model) else DEFAULT_SAMPLES
    return _read(data, model, samples, sample_groups)[0]


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
        read_labels = data.labels is not None and makes_decoder_inputs(model, data.tensors)
        ready = not (hides(model, data.tensors) or read_labels)
    else:
        kinds = (Tensor, str, bytes, SampleSet, CalibrationSet, TextSet)
        ready = isinstance(data, kinds) or not isinstance(data, Iterable | Dataset)
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
    found, notes = _read(data, model, None if every else count)
    if notes:
        warn(f"the data are {found.source}")
    return found


def _called(data: Any) -> str:
    name = type(data).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _batches_of(data: Any) -> Any:
    """Return what a tuple holds as a list: one pair (inputs, labels), or several batches."""
    if not isinstance(data, tuple):
        return data
    kinds = (Tensor, np.ndarray)
    pair = len(data) == 2 and isinstance(data[1], kinds)
    return [data] if pair and isinstance(data[0], (*kinds, Mapping)) else list(data)


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
        and model.main_input_name == TOKENS
    )


# ---- reading -----------------------------------------------------------------------------


def _read(
    data: Any, model: nn.Module, samples: int | None, groups: Any = None
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Return data as a set, and what was left out of them or cut off, which its source says too."""
    source, what, notes = data, _called(data), list[str]()
    length = _length(data)
    if isinstance(data, TensorSet):
        labels = {} if data.labels is None else {LABEL_NAMES[0]: data.labels}
        groups = data.sample_groups if groups is None else groups
        source, what, length = [{**data.tensors, **labels}], data.source, 1
    elif isinstance(data, Mapping | Tensor | np.ndarray):
        source, length = [data], 1
    elif isinstance(data, Dataset) or has_columns(data):
        raise DataError(
            f"{what} yields samples, not batches; pass "
            "torch.utils.data.DataLoader(data, batch_size=32, shuffle=True), or images to "
            "osscar.load_images"
        )
    elif isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(f"cannot read batches of {what}; give {FORMS}")
    batches, count = list[TensorSet | SampleList](), 0
    left_out, hidden = dict[str, None](), dict[str, None]()  # in order, each name once
    for number, given in enumerate(source):
        with of_part(f"batch {number} of the data"):
            batch, without, masks = _named(model, given)
        batches.append(batch)
        left_out |= dict.fromkeys(without)
        hidden |= dict.fromkeys(masks)
        count += len(batch)
        if samples is not None and count >= samples:
            break  # the next batch may be long in coming
    if not batches:
        raise DataError(f"{what} is empty or exhausted; give a list or a new DataLoader")
    cut = samples is not None and count > samples
    if samples is not None and cut:
        batches[-1] = batches[-1].rows(torch.arange(len(batches[-1]) - count + samples))
        count = samples
    if cut or (count == samples and length != len(batches)):
        notes = [f"its first {pluralize(count, 'sample')}"]
    title = f"{what}, {notes[0] if notes else pluralize(count, 'sample')}"
    found, notes = _joined(model, batches, list(left_out), list(hidden), title, notes)
    if groups is None:
        return found, notes
    if isinstance(found, CalibrationSet):
        raise DataError(
            "windows of text take no sample_groups, since copies are found by comparison; omit them"
        )
    return replace(found, sample_groups=groups[:count]), notes  # type: ignore[type-var]


def _named(
    model: nn.Module, given: Any
) -> tuple[TensorSet | SampleList, list[str], tuple[str, ...]]:
    """Return a batch by argument, what was left out of it, and which masks hid something."""
    inputs, labels, left_out = given, None, list[str]()
    if isinstance(given, tuple | list):
        if not 1 <= len(given) <= 2:
            raise DataError(f"a {type(given).__name__} of {len(given)} is no pair; give {FORMS}")
        inputs, labels = (*given, None)[:2]
    if isinstance(inputs, Mapping):
        takes, needed = accepted_arguments(model), needed_arguments(model)
        aside = [name for name in inputs if name in LABEL_NAMES and name not in needed]
        labels = next((inputs[name] for name in aside), labels)
        left_out = [str(name) for name in inputs if name not in (*takes, *aside)]
        named = {
            name: _tensor(inputs[name])
            for name in takes
            if inputs.get(name) is not None and name not in aside
        }
        if not named:
            raise DataError(
                f"{type(model).__name__}.forward takes {', '.join(takes)}, and there are "
                f"{', '.join(map(str, inputs)) or 'no entries'}; name the entries after "
                "the arguments that read them, and make tensors of what is not (text by the "
                "tokenizer, images by osscar.load_images)"
            )
    else:
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        named = named_inputs(model, [_tensor(one) for one in args])
    scored = None if labels is None else _scored(labels)
    if labels is not None and scored is None:
        left_out = [*left_out, LABEL_NAMES[0]]
    if scored is not None and scored.ndim == 2 and makes_decoder_inputs(model, named):
        named |= decoder_inputs(model, scored)
    check_arguments(model, named)
    apart = divided(model, named, scored)
    found = TensorSet("", named, scored) if apart is None else SampleList("", apart, scored)
    return found, left_out, hides(model, named)


def _scored(labels: Any) -> Tensor | None:
    """Return labels that are whole numbers; None of others."""
    try:
        found = _tensor(labels)
    except DataError:
        return None  # boxes and their like
    if not found.ndim:
        raise DataError(
            f"the label is one number ({safe_repr(labels)}), so the data are not batched; wrap "
            "them in torch.utils.data.DataLoader(samples, batch_size=32)"
        )
    return found if kind_of_numbers(found) == "whole" else None


def _tensor(value: Any) -> Tensor:
    """Return numbers as a tensor whose first dimension is the sample."""
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"a {type(value).__name__} is no tensor; give {FORMS}, or images of PIL to "
            "osscar.load_images"
        ) from None


def _joined(
    model: nn.Module,
    batches: Sequence[TensorSet | SampleList],
    left_out: list[str],
    hidden: list[str],
    title: str,
    notes: list[str],
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Join batches to a set; return what was left out of them as well."""
    divided = all(isinstance(one, SampleList) for one in batches)
    if hidden and not divided:
        raise DataError(
            "the data have a mask, and this model does not support padded samples; give samples "
            "without padding"
        )
    parts = (one.samples if isinstance(one, SampleList) else [one.tensors] for one in batches)
    samples = [sample for part in parts for sample in part]
    forms = [
        {name: f"{name} {str(t.dtype)[6:]} of {list(t.shape[1:])}" for name, t in one.items()}
        for one in samples
    ]
    other = next((i for i, form in enumerate(forms) if form != forms[0]), None)
    if other is not None and not divided:
        raise DataError(
            f"batch {other} of the data has {', '.join(forms[other].values())}, and batch 0 "
            f"{', '.join(forms[0].values())}; give all in the same form, or samples that each run "
            "by themselves: osscar.SampleList('graphs', [{'x': ...}, ...])"
        )
    decodes = any(name.startswith("decoder_") or name in LABEL_NAMES for name in samples[0])
    labels = _labels(batches, longest=decodes)
    if (
        labels is None
        or _is_causal(model)
        or (other is not None and labels.ndim > 1 and not decodes)
    ):
        labelled = any(one.labels is not None for one in batches)
        labels, left_out = None, [*left_out, LABEL_NAMES[0]] if labelled else left_out
    stay = [name for name in hidden if name in samples[0]]
    unread = [n for n in accepted_arguments(model) if n in {"target", "targets"} - {*samples[0]}]
    told = []
    if labels is not None:
        told = ["labels set aside to score by"]
        told += [f"the model gets no {n}: name the inputs to give it" for n in unread]
    told += [f"without {listed(left_out, 8)}"] if left_out else []
    told += ["padding cut off"] if len(stay) < len(hidden) else []
    told += [f"what {listed(stay)} hides counts"] if stay else []
    source = "; ".join([title, *told])
    together = all(len(x) == 1 for one in samples for x in one.values()) or not divided
    if other is not None or not together:
        return SampleList(source, tuple(samples), labels), [*notes, *told]
    tensors = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
    if _is_causal(model) and set(tensors) == {TOKENS}:
        return CalibrationSet(tensors[TOKENS].long(), source, None), [*notes, *told]
    return TensorSet(source, tensors, labels), [*notes, *told]


def _labels(batches: Sequence[TensorSet | SampleList], *, longest: bool) -> Tensor | None:
    """Return the labels of all batches, as long as the `longest`; None if they do not fit."""
    labels = [one.labels for one in batches if one.labels is not None]
    if longest and all(one.ndim == 2 for one in labels):
        most = max((one.shape[1] for one in labels), default=0)
        labels = [F.pad(one, (0, most - one.shape[1]), value=IGNORED) for one in labels]
    alike = len(labels) == len(batches) and len({one.shape[1:] for one in labels}) == 1
    return torch.cat(labels) if alike else None


# ---- files -------------------------------------------------------------------------------


_SUFFIXES = (".npz", ".safetensors")

_INDICES = (torch.int16, torch.uint16, torch.uint32)
"""Whole numbers by which torch does not index, such as tokens in 16 bits: they become int64."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read an ``.npz`` or ``.safetensors`` file, `_INDICES` as int64; nothing is unpickled."""
    found: dict[str, Tensor] = {}
    # Of a damaged file zipfile, numpy and safetensors raise whatever they meet.
    with attempt() as tried:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: _from_numpy(arrays[name]) for name in arrays.files}
    if tried.failed:
        reason = getattr(tried.error, "strerror", None) or first_line(tried.error)
        if "allow_pickle" in reason:
            reason = "an entry holds objects; store arrays, and images of several sizes as files"
        raise FileError(path, f"it cannot be read as {path.suffix}: {reason}") from tried.error
    return {name: one.long() if one.dtype in _INDICES else one for name, one in found.items()}


def _from_numpy(array: np.ndarray) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).reshape(array.shape)


def holds_images(spec: str | Path, model: nn.Module) -> bool:
    """Tell whether a name is a directory, or an archive of `images` that the model lacks."""
    path = os.path.expanduser(spec)
    if not path.endswith(".npz") or IMAGES in accepted_arguments(model):
        return os.path.isdir(path)
    with attempt(), np.load(path, allow_pickle=False) as arrays:
        return IMAGES in arrays.files
    return False  # whoever reads it will say what is wrong


def load_tensors(spec: str | Path, model: nn.Module) -> TensorSet:
    """Read the samples in a file for a model, to be fed to it as they are.

    Parameters
    ----------
    spec
        An ``.npz`` or ``.safetensors`` file whose entries are named after the arguments of the
        model's forward pass, the first dimension of each being the sample; `labels` may hold the
        right classes, and `sample_groups` those of a `TensorSet`.
    model
        What will read them.

    Raises
    ------
    FileError
        If there is no such file, or it is damaged.
    DataError
        If its entries do not fit the model.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix not in _SUFFIXES:
        raise FileError(
            spec,
            f"{type(model).__name__} reads tensors; give a {' or '.join(_SUFFIXES)} file with its "
            "inputs",
        )
    tensors, needed = read_tensors(path), needed_arguments(model)
    labels, groups = (
        None if name in needed else tensors.pop(name, None) for name in (LABELS, GROUPS)
    )
    with of_part(str(spec)):
        check_arguments(model, tensors)
        return TensorSet(str(spec), tensors, labels, groups)
