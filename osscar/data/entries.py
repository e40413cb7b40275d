"""One batch, in whatever form it is at hand, by the names of a model's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.base.errors import DataError
from osscar.base.printable import pluralize
from osscar.data.batches import (
    accepted_arguments,
    check_arguments,
    check_tensors,
    named_inputs,
    needed_arguments,
)
from osscar.data.images import is_image
from osscar.data.padding import TOKENS
from osscar.data.samples import LABELS
from osscar.network.modules import number_kind

_RIGHT_ANSWERS = ("label", "target")
"""What is in the name of an entry that says what a model should have put out."""

_DECODED = "decoder_input_ids"

_LABELS = (LABELS, "label")
_SPANS = frozenset({"start_positions", "end_positions"})
"""The same of answers to questions."""


@dataclass(frozen=True)
class NamedBatch:
    """What one batch comes to: tensors by argument, labels, and what was left out of it."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    left_out: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(next(iter(self.inputs.values())))

    def first(self, count: int) -> NamedBatch:
        """Return some of its samples."""
        labels = None if self.labels is None else self.labels[:count]
        inputs = {name: tensor[:count] for name, tensor in self.inputs.items()}
        return NamedBatch(inputs, labels, self.left_out)


def named_batch(model: nn.Module, given: Any, row: bool, place: str) -> NamedBatch:
    """Return a batch by the names of the model's arguments, or a row as a batch of one."""
    try:
        if isinstance(given, Mapping):
            found = _of_mapping(model, given, row)
        else:
            found = _of_sequence(model, given, row)
        check_tensors(found.inputs)
        check_arguments(model, found.inputs)
        _check_text(model, found, given)
    except DataError as error:
        raise DataError(f"{place} of the data: {error}") from error
    labels = found.labels
    if labels is not None and len(labels) != found.samples:
        raise DataError(
            f"{place} of the data has {pluralize(found.samples, 'sample')} and "
            f"{pluralize(len(labels), 'label')}; give one for each"
        )
    return found


def _check_text(model: nn.Module, found: NamedBatch, given: Any) -> None:
    """Refuse tokens with fractions, and labels of which a decoder would make what it reads."""
    if not isinstance(model, PreTrainedModel):
        return
    ids = found.inputs.get(TOKENS)
    if ids is not None and number_kind(ids) != "whole":
        raise DataError(f"{TOKENS!r} is {ids.dtype}; give the whole numbers that a tokenizer makes")
    makes = model.config.is_encoder_decoder and _DECODED in accepted_arguments(model)
    lacking = not any(name.startswith("decoder_in") for name in found.inputs)
    if makes and lacking and isinstance(given, Mapping) and LABELS in given:
        raise DataError(
            f"{type(model).__name__} makes {_DECODED!r} of labels, which are set aside; give them, "
            f"as model.prepare_{_DECODED}_from_labels(labels) makes them"
        )


def is_row(model: nn.Module, given: Any) -> bool:
    """Whether a mapping for a model of transformers is one sample without a batch dimension."""
    if not isinstance(model, PreTrainedModel) or not isinstance(given, Mapping):
        return False
    main = given.get(main_argument(model))
    dimensions = {TOKENS: 1, "pixel_values": 3}.get(main_argument(model))
    return dimensions is not None and _dimensions(main) == dimensions


def _dimensions(value: Any) -> int:
    if isinstance(value, list):
        return 1 + (_dimensions(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def main_argument(model: nn.Module) -> str:
    """Return the argument that a model reads before all others, as far as that is known."""
    needed = needed_arguments(model)
    return next(iter(needed), "") or str(getattr(model, "main_input_name", ""))


def _of_mapping(
    model: nn.Module, given: Mapping[str, Any], row: bool, *, scored: bool = False
) -> NamedBatch:
    """Read entries by name; where labels to score by are beside them, targets are inputs."""
    takes = accepted_arguments(model)
    inputs, labels, left_out = dict[str, Tensor](), None, list[str]()
    scored = scored or any(name in given and name not in takes for name in _LABELS)
    for name, value in given.items():
        if is_answer(model, name) and not (scored and name in takes):
            one = _tensor(value, row)
            if name in _LABELS and one is not None and is_labels(one):
                labels = one
            else:
                left_out.append(name)
        elif name not in takes:
            left_out.append(name)
        elif value is not None:
            inputs[name] = _needed_tensor(value, row, f"the entry {name!r}")
    if not inputs:
        raise DataError(
            f"{type(model).__name__}.forward takes {', '.join(takes)}, and there are "
            f"{', '.join(map(str, given)) or 'no entries'}; name the entries (columns) after the "
            "arguments that read them, and make tensors of what is not (text by the tokenizer, "
            "images by osscar.load_images)"
        )
    ordered = {name: inputs[name] for name in takes if name in inputs}
    return NamedBatch(ordered, labels, tuple(left_out))


def _of_sequence(model: nn.Module, given: Any, row: bool) -> NamedBatch:
    """Read a tensor, the arguments of a model and perhaps labels, or (inputs, labels)."""
    if is_pair(given):
        inputs, answers = given
        found = _batch_of_inputs(model, inputs, row)
    else:
        entries = list(given) if isinstance(given, tuple | list) else [given]
        entries, answers = split_labels(model, entries)
        if answers is None:
            _check_meant(model, entries)
        args = [_needed_tensor(e, row, f"the entry {i}") for i, e in enumerate(entries)]
        found = NamedBatch(_named(model, args))
    if answers is None:
        return found
    labels = _tensor(answers, row)
    if labels is not None and is_labels(labels):
        return NamedBatch(found.inputs, labels, found.left_out)
    return NamedBatch(found.inputs, None, (*found.left_out, "its targets"))


def _batch_of_inputs(model: nn.Module, inputs: Any, row: bool) -> NamedBatch:
    if isinstance(inputs, Mapping):
        return _of_mapping(model, inputs, row, scored=True)
    args = [_needed_tensor(e, row, f"the input {i}") for i, e in enumerate(inputs)]
    return NamedBatch(_named(model, args))


def is_pair(given: Any) -> bool:
    """Whether it is (inputs, labels) with the inputs in a tuple, a list or a mapping."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return False
    inputs = given[0]
    several = isinstance(inputs, tuple | list) and len(inputs) > 0
    arrays = several and all(isinstance(one, Tensor | np.ndarray) for one in inputs)
    return arrays or isinstance(inputs, Mapping)


def split_labels(model: nn.Module, entries: list[Any]) -> tuple[list[Any], Any]:
    """Tell the arguments of a model from the labels behind them.

    An argument that the model can do without is none of them if it looks like labels.
    """
    takes, needed = len(accepted_arguments(model)), len(needed_arguments(model)) or 1
    last = entries[-1]
    like_labels = (
        is_labels(last)
        and last.ndim == 1
        and all(_dimensions(one) and len(one) == len(last) for one in entries[:-1])
    )
    if len(entries) == needed + 1 and (takes == needed or like_labels):
        return entries[:-1], last
    return entries, None


def _check_meant(model: nn.Module, entries: list[Any]) -> None:
    """Refuse an entry that may be an argument or a target."""
    needed, takes = len(needed_arguments(model)) or 1, accepted_arguments(model)
    if needed < len(entries) <= len(takes):
        raise DataError(
            f"{type(model).__name__}.forward can do without {takes[needed]!r}, so that nobody "
            f"knows whether entry {needed} of {len(entries)} is that or a target; give mappings by "
            "name, or (inputs, labels) with the inputs in a tuple"
        )


def _named(model: nn.Module, args: Sequence[Tensor]) -> dict[str, Tensor]:
    main = main_argument(model)
    if len(args) == 1 and main in accepted_arguments(model):
        return {main: args[0]}
    if not needed_arguments(model):  # any of its arguments may be meant
        raise DataError(
            f"{type(model).__name__}.forward can do without each of its arguments, so that nobody "
            f"knows which of them {len(args)} tensors are; give mappings by their names"
        )
    return named_inputs(model, args)


def is_answer(model: nn.Module, name: Any) -> bool:
    """Whether an entry is what a model should put out, which it can do without."""
    said = str(name).lower()
    answers = said in _SPANS or any(word in said for word in _RIGHT_ANSWERS)
    return answers and name not in needed_arguments(model)


def _tensor(value: Any, row: bool) -> Tensor | None:
    """Return numbers as a tensor whose first dimension is the sample; None of anything else."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    value = value.detach()
    return value[None] if row else value  # type: ignore[no-any-return]


def _needed_tensor(value: Any, row: bool, what: str) -> Tensor:
    found = _tensor(value, row)
    if found is not None:
        return found
    hint = (
        "osscar.load_images(data, preprocessing) reads images"
        if is_image(value)
        else "give tensors, or what torch.as_tensor makes one of"
    )
    raise DataError(f"{what} is a {type(value).__name__}, and no tensor; {hint}")


def is_labels(value: Any) -> bool:
    """Whether they are whole numbers, one or several a sample."""
    whole = isinstance(value, Tensor) and value.ndim > 0 and value.dtype != torch.bool
    return whole and number_kind(value) == "whole"
