"""Whether a checkpoint asks for what it holds, and whether what was read computes what it should.

The model is built on the device 'meta' first, where tensors have no memory, and compared with the
tensors that the headers of the weights name.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from osscar.base.errors import CheckpointError, ModelError, first_line
from osscar.base.json_files import read_json
from osscar.base.memory import available_memory
from osscar.checkpoint.files import CONFIG_FILE, Manifest
from osscar.checkpoint.hf_config import DESCRIPTION_ERRORS
from osscar.network.modules import context_length, device_of, example_length
from osscar.network.predictions import named_logits
from osscar.offload.on_disk import is_on_disk
from osscar.offload.places import StoredTensor
from osscar.proof.equivalence import call
from osscar.proof.lineage import LINEAGE, Drawn, strays_from


@contextmanager
def offline() -> Iterator[None]:
    """Let libraries ask the hub for nothing that a file names."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def readable(path: object) -> Iterator[None]:
    """Raise what libraries make of a damaged description as a CheckpointError; `offline`."""
    try:
        with offline():
            yield
    except DESCRIPTION_ERRORS as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: {first_line(error):.500}"
        ) from error


# ---- the config --------------------------------------------------------------------------

_REFUSED = {
    "quantization_config": "its weights are quantized, which cannot be pruned: dequantize it first",
    "transformers_weights": "it names another file of weights; rename that to model.safetensors",
    "configuration_files": "it names other files that are read in its place; rename one of these",
}

_ELSEWHERE = tuple(
    (re.compile(field), re.compile(value), what)
    for field, value, what in (
        (r"_implementation(\.|$)", "/", "code that would be fetched and run"),
        (r"(^|\.)(architecture|backbone)$", "[/:]", "a model that is no name of its library's"),
        (r"(model_args|_kwargs)\.(pretrained|checkpoint|cache)", "", "weights that lie elsewhere"),
        (r"(^|\.)fast_tokenizer_files$", r"[/\\]", "a file that lies elsewhere"),
    )
)
"""Fields, their values, and what these would have libraries fetch, or read outside of a directory.
"""

_MOST_COUNTED = 2**24
"""The most that a whole number in a config counts, of layers, classes or channels: libraries make
lists as long."""

_NO_COUNT = re.compile(r"theta|base|scal|factor|freq|position|length|window|context|ctx|seq|seed")
"""Fields of whole numbers that are none, or how many positions a model takes."""


def check_config(path: Path) -> dict[str, Any]:
    """Return ``config.json``, unless of an adapter, quantized, or with code to be fetched."""
    file = path / CONFIG_FILE
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path} is an adapter; merge it into its model first")
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; it is not a checkpoint")
    config = check_fields(file)
    for name, why in _REFUSED.items():
        if config.get(name) is not None:
            raise CheckpointError(f"{file} has a {name}: {why}")
    return config


def check_fields(file: Path, most: int = _MOST_COUNTED) -> dict[str, Any]:
    """Return a file that a library reads, unless it names what lies elsewhere, or is too large."""
    content = read_json(file, dict[str, Any])
    for name, value in _fields(content):
        for field, values, what in _ELSEWHERE:
            if value and field.search(name) and values.search(str(value)):
                raise CheckpointError(f"{file} has {name} {value!r:.60}, {what}; remove it")
        if type(value) is int and abs(value) > most and not _NO_COUNT.search(name):
            raise CheckpointError(f"{file} has {name} {value}, more than {most:,}; correct it")
    return content


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no container, with the keys around it."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _fields(inside, f"{name}.{key}")
    elif isinstance(value, list):
        for inside in value:
            yield from _fields(inside, name)
    else:
        yield name.removeprefix("."), value


# ---- the tensors of a model --------------------------------------------------------------


class EmptyOnMeta(TorchFunctionMode):
    """Give tensors that wait for weights no memory, and compute with all others."""

    _WAITING = frozenset({torch.empty, torch.zeros, torch.ones, torch.full})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        return func(*args, **(options | {"device": "meta"} if func in self._WAITING else options))


def structure(
    build: Callable[[], nn.Module], stored: Sized, *, computed: bool = False
) -> nn.Module:
    """Build a model on 'meta'; `computed` gives values to what waits for no weights.

    Raises a CheckpointError if it has more parts than a model of which so many tensors are stored.
    """
    with _counting(_FEW_PARTS + _PARTS * len(stored)):
        if not computed:
            with suppress(NotImplementedError), torch.device("meta"):
                return build()  # but RegNet computes its widths with tensors, which need values
        with EmptyOnMeta():
            return build()


_FEW_PARTS, _PARTS = 2**12, 2**9
"""Modules and parameters of any model, and more for each tensor that is stored: of hundreds of
experts some may be left."""


@contextmanager
def _counting(most: int) -> Iterator[None]:
    """Refuse to build without end, whatever asks for so many layers."""
    left = itertools.count(most, -1)

    def count(*_: object) -> None:
        if not next(left):
            raise CheckpointError(
                f"the model has more than {most:,} modules and parameters, and few tensors are "
                "stored; correct its description, or download the checkpoint again"
            )

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_module_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_room(model: nn.Module, path: Path) -> None:
    """Refuse a model on 'meta' for which there is no memory, before any of it is taken."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    needed, free = sum(t.numel() * t.element_size() for t in tensors), available_memory()
    if free is not None and needed > free:
        raise CheckpointError(
            f"the model that {path} describes takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} "
            "are free; free some, or download the checkpoint again if it should be smaller"
        )


def check_tensors(model: nn.Module, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Refuse weights of other shapes or kinds of numbers than a model's, which may be on 'meta'."""
    prefix = getattr(model, "base_model_prefix", "")
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, tensor in stored.items():
        mine = next((own[n] for n in names_of(name, prefix) if n in own), None)
        if mine is not None and (
            (tuple(mine.shape), _kind(mine.dtype)) != (tensor.shape, _kind(tensor.dtype))
        ):
            raise CheckpointError(
                f"the weights in {path} do not fit its config: {name!r} is {tensor.dtype} "
                f"{tensor.shape}, not {mine.dtype} {tuple(mine.shape)}; download the "
                "checkpoint again, or, if it was written by save_pretrained of a pruned model, "
                "write it with osscar.save"
            )


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def names_of(name: str, prefix: str) -> tuple[str, ...]:
    """Return what a tensor may be called in the model: with the name of its base, or without."""
    return (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


# ---- the first forward pass --------------------------------------------------------------


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a causal language model of transformers knows; None of others."""
    named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not (named and isinstance(model, PreTrainedModel)):
        return None
    size = getattr(model.config, "vocab_size", None)
    return size if isinstance(size, int) else None


def note_manifest(model: nn.Module, manifest: Manifest | None, source: str) -> None:
    """Note what is known of a model; refuse one that does not return what was recorded."""
    if manifest is None:
        return
    setattr(model, LINEAGE, manifest.lineage)
    sample = manifest.lineage.sample
    if sample is not None and vocabulary_of(model) is not None:
        # As `save` draws it; what more tokens would take nobody knows.
        most, drawn = example_length(model), sample.inputs.values()
        if any(math.prod(x.shape) > most for x in drawn if isinstance(x, Drawn)):
            raise CheckpointError(
                f"{source} records an input of more than {most} tokens; download the checkpoint "
                "again"
            )
    strays = None if sample is None else strays_from(sample, model)
    if strays is not None:
        raise CheckpointError(
            f"the outputs of {source} differ from those of the model that was saved: {strays}; "
            "build the dense model with the code that it was pruned with, or download the "
            "checkpoint again"
        )


def check_causal(model: nn.Module, source: str) -> None:
    """Refuse a model that reads ahead, whose next tokens are no predictions."""
    if is_on_disk(model):
        return
    length = min(2, context_length(model) or 2)
    windows = torch.zeros(3, length, dtype=torch.int64, device=device_of(model))
    windows[2, -1] = 1  # after two that are equal
    logits = named_logits(call(model, {"input_ids": windows}))
    if logits is None or logits.shape[1] < 2:
        return
    first, again, second = logits.float()
    same = torch.finfo(next(model.parameters()).dtype).eps ** 0.5 * float(first[0].abs().max())
    changed, noise = (float((first[0] - other[0]).abs().max()) for other in (second, again))
    if changed > same >= noise:
        raise ModelError(
            f"{source} is a bidirectional {type(model).__name__}: its outputs depend on later "
            f"tokens, so that it does not predict the next one; {OTHERS}"
        )


OTHERS = (
    "build it with its own class, in code that returns (model, example inputs), and name that as "
    "file.py:function; or give it to osscar.prune or osscar.recover in Python"
)
"""What to do with what is no causal language model."""
