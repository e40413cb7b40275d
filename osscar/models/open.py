"""Whatever model a name stands for, opened or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from osscar.base.errors import CheckpointError, OptionError
from osscar.base.inputs import file_name
from osscar.checkpoint.manifest import is_checkpoint, read_manifest
from osscar.data.preprocessing import OPTIONS
from osscar.models.language import LoadedModel, load_model
from osscar.models.names import Sort, check_no_program, sort_of
from osscar.models.vision import VisionModel, load_vision_model


def is_vision(name: str | Path) -> bool:
    """Tell whether a name stands for a model that is not of transformers."""
    return sort_of(name) is not Sort.LANGUAGE


def check_directory(name: str) -> None:
    """Refuse a directory that holds no model, or one whose plan nobody can read.

    Raises
    ------
    CheckpointError
        Saying what is missing or damaged; names that are no directories pass.
    ModelError
        If it holds a program of transformers, which no command opens.
    """
    try:
        path = Path(name).expanduser()
        if not name or not path.is_dir():
            return
    except (OSError, RuntimeError, ValueError):
        return  # no name of a directory: whoever looks for the model will say so
    check_no_program(name)
    if read_manifest(path) is None and not is_checkpoint(path):
        raise CheckpointError(
            f"{name!r} has neither osscar.json nor config.json: it is not a checkpoint; give the "
            "directory that `osscar prune` wrote"
        )


def open_model(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    dense: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    max_memory: str | int | None = None,
    preprocessing: Any = None,
) -> LoadedModel | VisionModel:
    """Load whatever model a name stands for.

    Parameters
    ----------
    name
        What `osscar.load_model` or `osscar.load_vision_model` takes.
    weights
        A file that fills a model of torchvision or of one's own code.
    pretrained
        Whether a torchvision model without such a file gets torchvision's weights.
    dense
        Code that builds the dense model of a directory whose model is of one's own code.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    trust_remote_code
        Run the code that a checkpoint of transformers brings along.
    max_memory
        Most memory for a language model that is larger, as of `osscar.load_model`.
    preprocessing
        What is done to an image, as of `osscar.load_vision_model`.

    Raises
    ------
    OptionError
        If weights are given for a model that brings its own, a dense model for one that needs
        none, or preprocessing of images for one that reads text.
    OsscarError
        What `osscar.load_model` and `osscar.load_vision_model` raise.
    """
    name = file_name(name, "the model", "its name or directory")
    check_directory(name)
    sort = sort_of(name)
    if dense is not None and sort is not Sort.CODE_DIRECTORY:
        raise OptionError(
            f"{name!r} is no pruned model of your own code, so nothing else builds it; leave "
            "--against away"
        )
    if weights is not None and not sort.takes_weights:
        raise OptionError(f"{name!r} has weights of its own; leave --weights away")
    if sort is Sort.LANGUAGE:
        if preprocessing is not None:
            raise OptionError(f"{name!r} reads text, not images; leave {OPTIONS} away")
        return load_model(
            name,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            max_memory=max_memory,
        )
    if max_memory is not None:
        raise OptionError(
            f"{name!r} is no language model of transformers, and no other is read from disk; leave "
            "--max-memory away"
        )
    return load_vision_model(
        name,
        weights=weights,
        pretrained=pretrained,
        dense=dense,
        dtype=dtype,
        device=device,
        preprocessing=preprocessing,
    )
