"""Files of weights: read without unpickling anything but tensors, and put into a model."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from itertools import compress, product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line, warn
from osscar.base.memory import attempt

_RENAMED = (
    (re.compile(r"\b_orig_mod\."), ""),
    (re.compile(r"^module\."), ""),
    (re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
)
"""What names have of a model that was compiled, or trained in parallel, and torchvision's DenseNet
weights of old."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights, or its one entry that is a state dict, unpickling tensors alone."""
    name = os.fspath(path)
    # torch.load on a file of any other sort raises whatever it meets.
    with attempt() as tried:
        file = Path(name).expanduser()
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    if tried.failed:
        reason = first_line(tried.error).partition(". ")[0] or "it is empty or cut off"
        raise ModelError(
            f"the weights in {name!r} cannot be read: {reason:.200}; give a .safetensors file, or "
            "a state dict that torch.load reads with weights_only=True"
        ) from tried.error
    if not _is_state(content):
        entries = content if isinstance(content, dict) else {}
        states = [key for key, entry in entries.items() if _is_state(entry)]
        if len(states) != 1:
            raise ModelError(
                f"{name!r} holds {len(states) or 'no'} state dicts, which have tensors by name; "
                "save model.state_dict() of the model that is meant to a file of its own"
            )
        warn(f"only {states[0]!r:.60} of the {len(entries)} entries of {name!r} is loaded")
        content = entries[states[0]]
    return dict(content)


def _is_state(content: Any) -> bool:
    return bool(isinstance(content, dict) and content) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
    )


def matched(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict by a model's names, without what wrappers put before them if need be."""
    found, most = dict(state), len(state.keys() & names)
    for chosen in product((False, True), repeat=len(_RENAMED)):
        keys = list(state)
        for pattern, new in compress(_RENAMED, chosen):
            keys = [pattern.sub(new, key) for key in keys]
        known = len(set(keys).intersection(names))
        if known > most and len(set(keys)) == len(keys):
            found, most = dict(zip(keys, state.values(), strict=True)), known
    return found


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a model its weights, by the names of its parameters and buffers."""
    try:
        model.load_state_dict(matched(state, model.state_dict().keys()))
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise ModelError(
            f"the weights in {source} do not fit {type(model).__name__}: {reason:.300}; give "
            "weights of this very model"
        ) from error
