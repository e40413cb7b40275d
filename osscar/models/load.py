"""Whatever model a name stands for, opened or refused, code of a user's own included."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osscar.base.devices import default_torch, resolve_device, resolve_dtype
from osscar.base.errors import FileError, ModelError, OptionError, of_part, warn
from osscar.base.inputs import safe_repr
from osscar.base.memory import FOR_MODELS, memory_for, memory_of
from osscar.base.printable import published
from osscar.checkpoint import reading as checkpoint
from osscar.checkpoint.builders import LibraryOrigin, builder_of, cast
from osscar.data.preprocessing import (
    AnyPreprocessing,
    as_preprocessing,
    image_of,
    of_directory,
    resolved,
)
from osscar.data.reader import TOKENS, Batch, Reader, to_model
from osscar.models.libraries import fill, load_of_library, preprocessing_of, read_state
from osscar.models.loaded import LoadedModel
from osscar.models.names import DEMO, LIBRARIES, ModelKind, at_revision, directory_of, kind_of
from osscar.models.pretrained import class_names, image_processor, load_language_model, transform_of
from osscar.network.modules import check_finite_weights, check_usable, in_evaluation, uncompiled
from osscar.network.tensor_files import read_headers
from osscar.offload.on_disk import suspended_bytes
from osscar.proof.lineage import lineage_of, note, stored_dtype
from solvers.own_code import blamed, importable, imported


@default_torch()
def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
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
        ``"demo"``, the bundled language model; a packaged one such as ``"smollm2-135m"``; a
        directory or Hugging Face id with a language model, an image classifier or an encoder and
        decoder of transformers; a
        directory that `osscar.save` wrote; ``torchvision:NAME`` or ``timm:NAME``; or code of your
        own, ``module:function`` or ``file.py:function``, that returns a model, (model, example
        inputs), or (model, example inputs, transform).  The first that fits is taken: ``./demo`` is
        a directory.
    revision
        The branch, tag or commit of a Hugging Face id, which may also be in the name, as
        ``ID@REVISION``.  Reports have the commit that was loaded.
    weights
        A ``.safetensors`` file, or a state dict that ``torch.load`` reads with ``weights_only``,
        alone or as the only one among the entries of a dictionary, for a model of torchvision, timm
        or your own code.  By default those of the library are fetched.
    pretrained
        Whether a library's model gets weights at all.
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
        Memory that the process may take, such as ``"8GB"``.  The weights of a language model then
        stay on disk, and each is read when it is needed.  `osscar.prune` and `PruningResult.save`
        keep to the limit, too.  On a GPU it is what torch has reserved there for this process.
    preprocessing
        What is done to an image: a function from a PIL image to a tensor, or an
        `osscar.Preprocessing`.  By default what the library of the weights does, what the code
        returns, or what a directory records.

    Raises
    ------
    ModelError
        If nothing answers to the name, it cannot be fetched, or it is no model that is pruned here;
        if weights are missing or do not fit, or code fails.
    CheckpointError, FileError, NonFiniteError
        If a directory holds no model, a file in it is damaged or does not fit the others, or a
        parameter is not finite.
    OptionError, DataError
        If an option is not available here, or does not go with the model or with the others.

    Warns
    -----
    UserWarning
        If weights are left out, or are one entry of their file, or the tokenizer has far fewer
        tokens than the model.
    """
    text = os.fspath(name) if revision is None else at_revision(os.fspath(name), revision)
    stated = None if preprocessing is None else as_preprocessing(preprocessing, "the caller")
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    kind = kind_of(text)
    if kind is ModelKind.PROGRAM_DIRECTORY:
        raise ModelError(
            f"{text!r} is {kind.value}, and no command scores or prunes one; run it in Python "
            "(osscar.load), export it (`osscar export`), or prune the dense model again with form "
            "'eager' (`osscar prune ... --set form=eager`)"
        )
    of_text = kind is ModelKind.LANGUAGE
    own_code = kind is ModelKind.CODE_DIRECTORY
    for given, fits, why in (
        (dense, own_code, "is no pruned model of your own code, so nothing else builds it; omit "
         "dense (`--dense`)"),
        (weights, kind.takes_weights, "has weights of its own; omit weights (`--weights`)"),
        (stated, not of_text, "reads text, not images; omit what is stated of these"),
        (max_memory, of_text, "is no language model of transformers, and no other is read from "
         "disk; omit max_memory (`--max-memory`)"),
    ):  # fmt: skip
        if given is not None and not fits:
            raise OptionError(f"{text!r} {why}")
    with memory_for(f"the weights of {text}", FOR_MODELS):
        if of_text:
            return load_language_model(
                text,
                dtype=number_format,
                device=target,
                trust_remote_code=trust_remote_code,
                max_memory=max_memory,
            )
        if kind in LIBRARIES.values():
            loaded = load_of_library(text, weights, pretrained)
        elif kind is ModelKind.CODE:
            loaded = _from_code(text, weights)
        else:
            loaded = _from_directory(text, kind, dense, number_format)
        return _prepared(loaded, number_format, target, stated)


def _prepared(
    loaded: LoadedModel,
    dtype: torch.dtype | None,
    device: torch.device,
    stated: AnyPreprocessing | None,
) -> LoadedModel:
    """Bring a model that reads no text to its device, with inputs and preprocessing that fit."""
    check_usable(loaded.model)
    check_finite_weights(loaded.model)
    known, example = resolved(
        loaded.model, loaded.example, loaded.preprocessing, stated, loaded.source
    )
    recorded = lineage_of(loaded.model).preprocessing
    used = None if known is None else known.record()
    if known is not None and recorded is not None and used != dict(recorded):
        before, now = dict(recorded), used or {}
        changed = [
            f"{name} was {safe_repr(before.get(name))} and is {safe_repr(now.get(name))}"
            for name in before | now
            if before.get(name) != now.get(name)
        ]
        warn(f"{loaded.source} was pruned with other preprocessing: {'; '.join(changed)}")
    model = loaded.model if dtype is None else cast(loaded.model, dtype)
    model = in_evaluation(model.to(device))
    note(
        model,
        source=lineage_of(model).source or published(loaded.source),
        classes=loaded.classes,
        preprocessing=used,
        stored_dtype=str(loaded.stored_dtype).removeprefix("torch."),
    )
    return dataclasses.replace(
        loaded,
        model=model,
        example=None if example is None else to_model(example, model),
        preprocessing=known,
        states_images=stated is not None,
    )


def _from_code(name: str, weights: str | Path | None) -> LoadedModel:
    model, example, preprocessing = build_from_code(name)
    check_usable(model)
    if weights is not None:
        fill(model, read_state(weights), str(weights))
    needed = Reader.of(model).needs
    if example is None and len(needed) > 1:
        raise ModelError(
            f"{name} gives no example inputs, and its model reads {', '.join(needed)}; return the "
            "model, and a mapping of these names to tensors"
        )
    return LoadedModel(
        model=model,
        example=example,
        preprocessing=preprocessing,
        source=name,
        path=None,
        stored_dtype=stored_dtype(model),
    )


def _from_directory(
    name: str, kind: ModelKind, dense: str | None, dtype: torch.dtype | None
) -> LoadedModel:
    path, source = directory_of(name)
    built, example, brought, processor = None, None, None, None
    if dense is not None:
        built, example, brought = build_from_code(dense)
    classifier = kind is ModelKind.CLASSIFIER
    stock = classifier or kind is ModelKind.ENCODER_DECODER  # whose own format nothing else records
    model = checkpoint.load(path, dense=built, dtype=None if stock else dtype)
    lineage, builder = lineage_of(model), builder_of(model)
    if classifier and (processor := image_processor(path)) is not None:
        brought = transform_of(processor)
    elif isinstance(builder, LibraryOrigin):
        brought = preprocessing_of(builder, model)
    recorded = {} if lineage.sample is None else lineage.sample.drawn()
    pruned_with = {name: x for name, x in recorded.items() if isinstance(x, torch.Tensor)}
    # Of tokens, whoever needs some draws its own.
    if [*pruned_with] not in ([], [TOKENS]) and (
        example is None or image_of(pruned_with) is not None
    ):
        example = pruned_with
    return LoadedModel(
        model=model,
        example=example,
        preprocessing=of_directory(path, lineage, brought),
        source=source,
        path=path,
        stored_dtype=stored_dtype(model),
        processor=processor,
        classes=lineage.classes or (class_names(model) if classifier else ()),
    )


_COPIES = 4
"""Of the weights that pruning a model in memory holds: as it came, as it is pruned, and the proof
in double precision."""

_WALKED = 2
"""Of these, those that there are while batches are held."""


def fitting_memory(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    *,
    positions: int = 0,
) -> int | None:
    """Return the memory to prune a model within, if it is larger than that; None if it fits.

    That is nine tenths of what is free where the model would run: on this machine for the CPU, on
    the card for CUDA. None also where nothing is known, or the model is built from code.

    positions: Tokens of all calibration samples, once for each stream that they run through.
    """
    target = resolve_device(device)
    available = memory_of(target).available()
    if available is None or str(name) == DEMO:  # of a few megabytes
        return None
    try:
        stored = (read_headers(directory_of(str(name))[0]) or {}).values()
    except (OSError, RuntimeError, ValueError, FileError, ModelError):
        return None  # whoever loads the model will say so
    kept_as = resolve_dtype(dtype, target)  # None: as stored
    weights = sum(one.elements * (kept_as or one.dtype).itemsize for one in stored)
    matrices = [one for one in stored if len(one.shape) > 1]
    needed = _COPIES * weights
    if matrices:
        table = max(matrices, key=lambda one: one.shape)  # of embeddings
        itemsize = (kept_as or table.dtype).itemsize
        inputs = max(one.shape[-1] for one in matrices)
        batches = suspended_bytes(positions, table.shape[-1], inputs, itemsize)
        needed = max(needed, _WALKED * weights + batches)
    return None if needed <= available else available * 9 // 10


# ---- code of a user's own ----------------------------------------------------------------


_RETURNS = (
    "return a torch.nn.Module, or (model, example inputs), or (model, example inputs, transform)"
)


def build_from_code(name: str) -> tuple[nn.Module, Batch | None, AnyPreprocessing | None]:
    """Import and call a function; return its model, with example inputs and transform if any."""
    with importable(name):
        found = imported(name, ModelError)
        with blamed(name, ModelError):
            built = found()
    several = isinstance(built, tuple) and len(built) in (2, 3)
    model, example, transform = (*built, None, None)[:3] if several else (built, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; {_RETURNS}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name} returned a TorchScript model; return the original one")
    for of, one in model.named_parameters():
        if one.is_meta or nn.parameter.is_lazy(one):
            raise ModelError(f"{of!r} of what {name} returned has no values; initialize it")
    with of_part(f"what {name} returned"):
        named = None if example is None else Reader.of(model).example(example)
    image = None if named is None else image_of(named)
    channels = 3 if image is None else image.shape[1]
    known = None if transform is None else as_preprocessing(transform, name, channels)
    return in_evaluation(uncompiled(model)), named, known
