"""Files of weights: read without unpickling anything but tensors, and put into a model."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line
from osscar.base.inputs import check_regular, file_name, safe_repr
from osscar.base.messages import warn
from osscar.base.printable import listed, pluralize
from osscar.network.modules import number_kind

_OLD_DENSENET_NAME = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_.*))$"
)

_WRAPPERS = re.compile(r"^(?:_orig_mod\.)?module\.|\b_orig_mod\.")
"""What names have of a model that was trained in parallel, or compiled."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights without unpickling anything but tensors.

    It is ``.safetensors``, or a state dict that ``torch.save`` wrote: alone, or as an entry of a
    dictionary, with a warning that names the entry.

    Raises
    ------
    ModelError
        If the file is missing, or holds no state dict or several.
    """
    name = file_name(path, "the file of weights", "its path")
    try:
        file = Path(name).expanduser()
        check_regular(file)
        if file.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"there is no file of weights at {str(path)!r}; check the path") from None
    except Exception as error:  # torch.load on a file of any other sort raises whatever it meets
        raise ModelError(
            f"the weights in {str(path)!r} cannot be read: {_unreadable(error)}; give a "
            ".safetensors file, or a state dict that torch.load reads with weights_only=True"
        ) from error
    state = _only_state(state, name)
    return renamed({_WRAPPERS.sub("", key): tensor for key, tensor in state.items()})


def _only_state(content: Any, name: str) -> Mapping[str, Tensor]:
    """Return the state dict that a file holds, and say so where it is one entry of several."""
    if _is_state(content):
        return content
    entries = content if isinstance(content, dict) else {}
    states = {key: entry for key, entry in entries.items() if _is_state(entry)}
    if not states:
        raise ModelError(
            f"{name!r} is not a state dict, which has tensors by name; save model.state_dict() to "
            "it"
        )
    names = [safe_repr(key) for key in states]
    if len(states) > 1:
        raise ModelError(
            f"{name!r} holds several state dicts, {listed(names)}; save the one that is meant to a "
            f"file of its own: torch.save(torch.load({name!r})[{names[0]}], 'weights.pt')"
        )
    others = [safe_repr(key) for key in entries if key not in states]
    rest = f", and not {listed(others)}" if others else ""
    warn(f"of {name!r} the entry {names[0]} is read{rest}")
    ((_, state),) = states.items()
    return state


def _is_state(content: Any) -> TypeGuard[dict[str, Tensor]]:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
        )
    )


def _unreadable(error: Exception) -> str:
    """Say why a file of weights cannot be read, in our own words where torch has too many."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something other than tensors, such as a whole model, or is damaged"
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    if not isinstance(error, OSError | RuntimeError | SafetensorError):
        return "it is no file that torch.save wrote"
    return first_line(error)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the names that torchvision's DenseNet weights still have."""
    return {_OLD_DENSENET_NAME.sub(r"\1\2", key): tensor for key, tensor in state.items()}


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Give a model its weights, by the names of its parameters and buffers.

    Raises
    ------
    ModelError
        If a tensor is missing, is left over, or has another shape or another kind of number.
    """
    own = model.state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counters]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    kinds = [
        key for key in own if key in state and number_kind(own[key]) != number_kind(state[key])
    ]
    for what, keys in (
        ("lacks", missing),
        ("has", unknown),
        ("has another shape of", wrong),
        ("has another kind of number in", kinds),
    ):
        if keys:
            raise ModelError(
                f"the weights in {source} do not fit {type(model).__name__}: the file {what} "
                f"{pluralize(len(keys), 'tensor')}, such as {keys[0]!r}"
                f"{_unlike(own, state, keys[0])}; give weights of this very model"
            )
    model.load_state_dict(dict(state), strict=False)


def _unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor], key: str) -> str:
    """Say how a tensor differs from the model's, if both have it."""
    if key not in own or key not in state:
        return ""
    mine, given = (f"{t.dtype} {tuple(t.shape)}" for t in (own[key], state[key]))
    return f" ({given} instead of {mine})"
