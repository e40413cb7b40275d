"""Files of weights: read without unpickling anything but tensors, and put into a model."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line
from osscar.base.inputs import check_regular, file_name
from osscar.base.printable import pluralize
from osscar.network.modules import number_kind

_OLD_DENSENET_NAME = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_.*))$"
)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights without unpickling anything but tensors.

    It is ``.safetensors``, or a state dict that ``torch.save`` wrote, alone or as ``state_dict`` or
    ``model`` in a dictionary. A ModelError says that it is missing or holds something else.
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
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise ModelError(
            f"{str(path)!r} is not a state dict, which has tensors by name; save "
            "model.state_dict() to it"
        )
    return renamed({key.removeprefix("module."): tensor for key, tensor in state.items()})


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
