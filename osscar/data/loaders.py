"""Batches from a loader, a data set, a list or a file, read once and kept as a set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from osscar.base.errors import DataError, FileError, first_line, of_part, warn
from osscar.base.inputs import safe_repr, whole_number
from osscar.base.memory import attempt
from osscar.base.printable import listed, pluralize
from osscar.data.batches import FORMS
from osscar.data.reader import TOKENS, Reader
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
from osscar.data.sequences import divided, hides
from osscar.data.text import CalibrationSet, TextSet

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
    reader = Reader.of(model)
    data = _batches_of(data)
    if samples is not None:
        whole_number(samples, "the number of samples (samples=)", 1)
    elif not isinstance(data, _AT_HAND):
        samples = DEFAULT_WINDOWS if reader.causal else DEFAULT_SAMPLES
    return _read(data, reader, samples, sample_groups)[0]


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
    reader = Reader.of(model)
    data = _batches_of(data)
    if isinstance(data, Mapping):
        ready = not any(name in LABEL_NAMES or str(name).endswith("_mask") for name in data)
    elif isinstance(data, TensorSet):
        read_labels = data.labels is not None and reader.decoder_beside(data.tensors) is not None
        ready = not (hides(reader, data.tensors) or read_labels)
    else:
        kinds = (Tensor, str, bytes, SampleSet, CalibrationSet, TextSet)
        ready = isinstance(data, kinds) or not isinstance(data, Iterable | Dataset)
    if ready:
        return data
    if whole and _length(data) is None:
        raise DataError(
            f"{_called(data)} has no length; say how many samples to score: "
            "osscar.load_batches(data, model, samples=...)"
        )
    every = whole or isinstance(data, _AT_HAND)
    count = windows if reader.causal else samples
    found, notes = _read(data, reader, None if every else count)
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


# ---- reading -----------------------------------------------------------------------------


def _read(
    data: Any, reader: Reader, samples: int | None, groups: Any = None
) -> tuple[CalibrationSet | SampleSet, list[str]]:
    """Return data as a set, and what was left out of them or cut off, which its source says too."""
    source, what, length = data, _called(data), _length(data)
    if isinstance(data, TensorSet):
        labels = {} if data.labels is None else {LABELS: data.labels}
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
    found, count = _Batches(reader), 0
    for number, given in enumerate(source):
        with of_part(f"batch {number} of the data"):
            count += found.add(given)
        if samples is not None and count >= samples:
            break  # the next batch may be long in coming
    if not count:
        raise DataError(f"{what} is empty or exhausted; give a list or a new DataLoader")
    notes = list[str]()
    if samples is not None and (count > samples or (count == samples and length != number + 1)):
        notes = [f"its first {pluralize(samples, 'sample')}"]
        found.read[-1] = found.read[-1].rows(torch.arange(len(found.read[-1]) - count + samples))
        count = samples
    joined, told = found.joined(f"{what}, {notes[0] if notes else pluralize(count, 'sample')}")
    if groups is not None:
        if isinstance(joined, CalibrationSet):
            raise DataError(
                "windows of text take no sample_groups, since they are compared with one another; "
                "omit them"
            )
        joined = replace(joined, sample_groups=groups[:count])  # type: ignore[type-var]
    return joined, notes + told


@dataclass
class _Batches:
    """Batches as one model reads them, what was left out of them, and which masks hid something."""

    reader: Reader
    read: list[TensorSet | SampleList] = field(default_factory=list)
    left_out: dict[str, None] = field(default_factory=dict)  # in order, each name once
    hidden: dict[str, None] = field(default_factory=dict)

    def add(self, given: Any) -> int:
        """Take a batch; return how many samples it has."""
        inputs, labels, reader = given, None, self.reader
        if isinstance(given, tuple | list):
            if not 1 <= len(given) <= 2:
                kind = type(given).__name__
                raise DataError(f"a {kind} of {len(given)} is no pair; give {FORMS}")
            inputs, labels = (*given, None)[:2]
        if isinstance(inputs, Mapping):
            aside = [name for name in inputs if name in LABEL_NAMES and name not in reader.needs]
            labels = next((inputs[name] for name in aside), labels)
            others = (str(name) for name in inputs if name not in (*reader.takes, *aside))
            self.left_out |= dict.fromkeys(others)
            mine = [name for name in reader.takes if name not in aside]
            named = {n: _tensor(inputs[n]) for n in mine if inputs.get(n) is not None}
            if not named:
                raise DataError(
                    f"{reader.name}.forward takes {', '.join(reader.takes)}, and there are "
                    f"{', '.join(map(str, inputs)) or 'no entries'}; name the entries after "
                    "the arguments that read them, and make tensors of what is not (text by the "
                    "tokenizer, images by osscar.load_images)"
                )
        else:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            named = reader.named([_tensor(one) for one in args])
        scored = None if labels is None else _scored(labels)
        if labels is not None and scored is None:
            self.left_out |= {LABELS: None}
        decoder = reader.decoder_beside(named)
        if scored is not None and scored.ndim == 2 and decoder is not None:
            named |= decoder(scored)
        reader.check(named)
        apart = divided(reader, named, scored)
        self.hidden |= dict.fromkeys(hides(reader, named))
        whole = TensorSet("", named, scored) if apart is None else SampleList("", apart, scored)
        self.read.append(whole)
        return len(whole)

    def joined(self, title: str) -> tuple[CalibrationSet | SampleSet, list[str]]:
        """Join them to a set; return what its source says beside the title as well."""
        causal, takes, batches = self.reader.causal, self.reader.takes, self.read
        divided = all(isinstance(one, SampleList) for one in batches)
        if self.hidden and not divided:
            raise DataError(
                "the data have a mask, and this model does not support padded samples; give "
                "samples without padding"
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
                f"{', '.join(forms[0].values())}; give all in the same form, or samples that each "
                "run by themselves: osscar.SampleList('graphs', [{'x': ...}, ...])"
            )
        decodes = any(name.startswith("decoder_") or name in LABEL_NAMES for name in samples[0])
        labels = _labels(batches, longest=decodes)
        if labels is not None and (
            causal or (other is not None and labels.ndim > 1 and not decodes)
        ):
            labels = None
        if labels is None and any(one.labels is not None for one in batches):
            self.left_out |= {LABELS: None}
        masks = [name for name in self.hidden if name in samples[0]]
        told = []
        if labels is not None:
            told = ["labels set aside to score by"]
            unread = [n for n in takes if n in {"target", "targets"} - {*samples[0]}]
            told += [f"the model gets no {n}: name the inputs to give it" for n in unread]
        told += [f"without {listed([*self.left_out], 8)}"] if self.left_out else []
        told += ["padding cut off"] if len(masks) < len(self.hidden) else []
        told += [f"what {listed(masks)} hides counts"] if masks else []
        source = "; ".join([title, *told])
        together = not divided or all(len(x) == 1 for one in samples for x in one.values())
        if other is not None or not together:
            return SampleList(source, tuple(samples), labels), told
        tensors = {name: torch.cat([one[name] for one in samples]) for name in samples[0]}
        if causal and set(tensors) == {TOKENS}:
            return CalibrationSet(tensors[TOKENS].long(), source, None), told
        return TensorSet(source, tensors, labels), told


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
    if not path.endswith(".npz") or IMAGES in Reader.of(model).takes:
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
    tensors = read_tensors(path)
    reader = Reader.of(model)
    labels, groups = (
        None if name in reader.needs else tensors.pop(name, None) for name in (LABELS, GROUPS)
    )
    with of_part(str(spec)):
        reader.check(tensors)
        return TensorSet(str(spec), tensors, labels, groups)
