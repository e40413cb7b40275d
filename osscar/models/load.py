"""Whatever model a name stands for, opened or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from osscar.base.devices import resolve_device, resolve_dtype
from osscar.base.errors import CheckpointError, FileError, OptionError
from osscar.base.inputs import file_name
from osscar.base.memory import FOR_MODELS, memory_for
from osscar.checkpoint.manifest import is_checkpoint, read_manifest
from osscar.data.preprocessing import as_preprocessing
from osscar.models.language import load_language_model
from osscar.models.loaded import LoadedModel
from osscar.models.modules import load_module
from osscar.models.names import REGISTERED, ModelKind, check_no_program, kind_of
from osscar.network.tensor_files import read_headers
from osscar.offload.device_memory import memory_of


def load_model(
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
) -> LoadedModel:
    """Load whatever model a name stands for.

    Parameters
    ----------
    name
        Of a language model: ``"demo"``, the embedded one; a packaged one such as
        ``"smollm2-135m"``; a directory with a checkpoint, pruned by OSSCAR or not; or a Hugging
        Face id.  The first that fits is taken: ``./demo`` is a directory.  Of any other:
        ``torchvision:NAME``, ``timm:NAME``; the directory or id of an image classifier of
        transformers; ``module:function`` or ``file.py:function``, code of your own that returns
        a model, (model, example inputs), or (model, example inputs, transform); or a directory that
        `osscar.save` wrote.
    weights
        A ``.safetensors`` file, or a state dict that ``torch.load`` reads with ``weights_only``,
        alone or as the only one among the entries of a dictionary, for a model of torchvision, timm
        or your own code.  Those of libraries are fetched without.
    pretrained
        Whether a library's model without a file gets its weights at all, and code of your own is
        called twice to warn of weights that it draws.
    dense
        What builds the dense model of a directory whose model is of your own code.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, one of these dtypes, or ``"auto"`` (also
        None): as stored on a GPU, float32 on a CPU.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"`` (or ``"cuda:1"``).
    trust_remote_code
        Run the code that a checkpoint of transformers brings along. Off by default.
    max_memory
        Most memory that the process may have, such as ``"8GB"``, for a language model that is
        larger: only its structure is built then, and each parameter is read from the files of the
        directory whenever it is needed.  `osscar.prune` and `PruningResult.save` keep to the limit,
        too.  On a GPU it is the GPU's memory that counts, as far as torch has reserved it for this
        process.
    preprocessing
        What is done to an image: a function from a PIL image to a tensor, or an
        `osscar.Preprocessing`.  By default what the library of the weights does, what the code
        returns, or what a directory records.

    Raises
    ------
    ModelError
        If nothing answers to the name, or a packaged model cannot be fetched; if the checkpoint is
        unsafe, or not a causal language model; if weights are missing or do not fit, or code fails.
    CheckpointError
        If the directory holds no model, or its config, plan or weights cannot be read or do not fit
        one another, or the model cannot run.
    DataError
        If what is stated about images makes no sense, or contradicts the example inputs.
    NonFiniteError
        If a parameter holds NaN or infinity, or what a language model makes of two tokens is NaN.
    OptionError
        If the device or number format is not available; or if something is given that does not go
        with the model: weights for one that brings its own, a dense model for one that needs none,
        a limit of memory for one that is not read from disk, preprocessing for one that reads text;
        or the limit is no size.
    FileError
        If a file of a directory is damaged or cut off.
    MissingDependency
        If torchvision, or what reads a packaged model, is needed and not installed.

    Warns
    -----
    UserWarning
        If weights are left out or were drawn, or are one entry of their file, or the tokenizer has
        far fewer tokens than the model.
    """
    text = file_name(name, "the model", "its name or directory")
    stated = None if preprocessing is None else as_preprocessing(preprocessing, "the caller")
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    _check_directory(text)
    kind = kind_of(text)
    of_text = kind is ModelKind.LANGUAGE
    own_code = kind is ModelKind.CODE_DIRECTORY
    for given, fits, why in (
        (dense, own_code, "is no pruned model of your own code, so nothing else builds it; omit "
         "--dense"),
        (weights, kind.takes_weights, "has weights of its own; omit --weights"),
        (stated, not of_text, "reads text, not images; omit what is stated of these"),
        (max_memory, of_text, "is no language model of transformers, and no other is read from "
         "disk; omit --max-memory"),
    ):  # fmt: skip
        if given is not None and not fits:
            raise OptionError(f"{text!r} {why}")
    with _quiet_unless_terminal(), memory_for(f"the weights of {text}", FOR_MODELS):
        if of_text:
            return load_language_model(
                text,
                dtype=number_format,
                device=target,
                trust_remote_code=trust_remote_code,
                max_memory=max_memory,
            )
        return load_module(
            text,
            kind,
            weights=weights,
            pretrained=pretrained,
            dense=dense,
            dtype=number_format,
            device=target,
            preprocessing=stated,
        )


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' bars out of logs."""
    logging = transformers.utils.logging
    silence = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def _check_directory(name: str) -> None:
    """Refuse a directory that holds no model, or one whose plan nobody can read.

    Names that are no directories pass; a directory with a program of transformers is a ModelError.
    """
    try:
        path = Path(name).expanduser()
        if not name or name in REGISTERED or not path.is_dir():
            return
    except (OSError, RuntimeError, ValueError):
        return  # no name of a directory: whoever looks for the model will say so
    check_no_program(name)
    if read_manifest(path) is None and not is_checkpoint(path):
        raise CheckpointError(
            f"{name!r} has neither osscar.json nor config.json: it is not a checkpoint; give the "
            "directory that `osscar prune` wrote"
        )


_COPIES = 4
"""Of the weights that pruning a model in memory holds: as it came, as it is pruned, and the proof
in double precision."""


def fitting_memory(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
) -> int | None:
    """Return the memory to prune a model within, if it is larger than that; None if it fits.

    That is nine tenths of what is free where the model would run: on this machine for the CPU, on
    the card for CUDA. None also where nothing is known, or the model is no directory.
    """
    target = resolve_device(device)
    available = memory_of(target).available()
    if available is None:
        return None
    try:
        path = Path(name).expanduser()
        stored = (read_headers(path) if path.is_dir() else None) or {}
    except (OSError, RuntimeError, ValueError, FileError):
        return None  # whoever loads the model will say so
    kept_as = resolve_dtype(dtype, target)  # None: as stored
    needed = _COPIES * sum(
        tensor.nbytes if kept_as is None else tensor.elements * kept_as.itemsize
        for tensor in stored.values()
    )
    return None if needed <= available else available * 9 // 10
