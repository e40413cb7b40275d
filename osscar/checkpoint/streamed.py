"""Checkpoints larger than memory: models whose parameters are read from files when they are needed.

Only the structure of such a model is built; its parameters lie on disk (`osscar.offload.on_disk`).
Files hold the matrices of experts one by one, and transformers stacks them when it reads them:
where a tensor is its parts one after the other, byte by byte, it is read and written as these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from osscar.base.errors import CheckpointError, NonFiniteError
from osscar.base.memory import attempt
from osscar.checkpoint.builders import TransformersOrigin, names_and_tensors, read_builder
from osscar.checkpoint.files import read_manifest
from osscar.checkpoint.validation import check_tensors, names_of, note_manifest, readable, structure
from osscar.network.tensor_files import Part, read_headers
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Chain, Place, StoredTensor, WeightCache
from osscar.shrinking.slice import slice_units

_ELSEWHERE = "omit max_memory (`--max-memory`) to load it into memory"


def read_streamed(path: Path, cache: WeightCache, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model of transformers whose parameters lie in a directory's files, all read once."""
    manifest, stored = read_manifest(path), read_headers(path)
    with readable(path):
        builder, plans = read_builder(path, manifest)
        if stored is None or not isinstance(builder, TransformersOrigin):
            raise CheckpointError(
                f"{path} holds no model of transformers in safetensors files, which max_memory "
                f"needs; {_ELSEWHERE}"
            )
        build = partial(builder.build, dtype or number_format_of(builder.config, stored))
        model = structure(build, stored, computed=True)
        for plan in plans:
            slice_units(model, plan)
    check_tensors(model, stored, path)
    _fill_from_disk(model, stored, path, cache)
    read = model.to(cache.device).eval()
    note_manifest(read, manifest, str(path))
    return read


def _fill_from_disk(
    model: nn.Module, stored: Mapping[str, StoredTensor], path: Path, cache: WeightCache
) -> None:
    """Let the parameters of a model on 'meta' be read from files."""
    parts, prefix = parts_in_files(model), getattr(model, "base_model_prefix", "")
    known = {n: one for name, one in stored.items() for n in names_of(name, prefix)}
    for names, parameter in _tensors(model):
        found = [known[name] for name in names if name in known]
        if not found:
            shape = tuple(parameter.shape)
            rows = (chained(n, shape, parts[n], known) for n in names if n in parts)
            found = [values for values in rows if values is not None]
        if not found:
            raise CheckpointError(
                f"{path} has no {names[0]!r} in the form that {type(model).__name__} reads; "
                f"{_ELSEWHERE}"
            )
        if len(found) > 1 and len({values.digest() for values in found}) > 1:
            raise CheckpointError(
                f"{names[0]!r} and {names[1]!r} differ in {path}, and its config ties them; "
                f"{_ELSEWHERE}"
            )
        _check_range(found[0], parameter.dtype)
        _put(model, names, parameter, Place(found[0], found[0].shape).cast(parameter.dtype), cache)


def _check_range(values: StoredTensor, dtype: torch.dtype) -> None:
    """Read all values once, so that a file with NaN, or one that is cut off, is refused here."""
    largest = values.largest()
    if dtype.is_floating_point and largest > torch.finfo(dtype).max:
        raise NonFiniteError(
            f"values of {values.name!r} are infinite in {str(dtype).removeprefix('torch.')}, which "
            f"ends at {torch.finfo(dtype).max:.5g}: give bfloat16 or float32"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each parameter and persistent buffer with all its names."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in names_and_tensors(model):
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    persistent = model.state_dict(keep_vars=True).keys()
    for tensor, own in found.values():
        if isinstance(tensor, nn.Parameter) or own[0] in persistent:
            yield own, tensor
        elif tensor.is_meta:
            raise CheckpointError(
                f"{type(model).__name__} computes {own[0]!r} in a way that needs memory for the "
                f"whole model; {_ELSEWHERE}"
            )


def _put(
    model: nn.Module, names: Sequence[str], old: Tensor, place: Place, cache: WeightCache
) -> None:
    """Give modules a parameter on disk, or a buffer with its values."""
    is_parameter = isinstance(old, nn.Parameter)
    new = OnDisk(place, cache) if is_parameter else place.read(cache.device)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        table = module._parameters if is_parameter else module._buffers
        table[attribute] = new  # type: ignore[assignment]


def number_format_of(config: Any, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return what transformers takes for ``auto``: the config's, or that of the first weight."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    formats = (tensor.dtype for tensor in stored.values())
    return next((dtype for dtype in formats if dtype.is_floating_point), torch.float32)


# ---- tensors in parts --------------------------------------------------------------------


def parts_in_files(model: nn.Module) -> dict[str, tuple[Part, ...]]:
    """Return, for tensors that transformers stores as parts in a row, these parts, by name."""
    if not isinstance(model, PreTrainedModel):
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = {name: (*shape[:-1], 1) for name, shape in shapes.items() if math.prod(shape)}
    ends = dict(zip(rows, itertools.accumulate(map(math.prod, rows.values())), strict=True))
    coded = {
        name: torch.arange(ends[name] - math.prod(shape), ends[name]).view(shape)
        for name, shape in rows.items()
    }
    converted: Mapping[str, Tensor] = {}
    with attempt():  # what it makes of a model is its own affair
        converted = revert_weight_conversion(model, dict(coded))
    stretches = sorted(
        ((int(codes.flatten()[0]), name, codes) for name, codes in converted.items()),
        key=lambda one: one[:2],
    )
    found: dict[str, tuple[Part, ...]] = {}
    for name, codes in coded.items():
        first, end = ends[name] - codes.numel(), ends[name]
        mine = [(stored, part) for at, stored, part in stretches if first <= at < end]
        if [stored for stored, _ in mine] == [name] or not _in_a_row(codes, [p for _, p in mine]):
            continue
        width = shapes[name][-1:]
        found[name] = tuple(Part(stored, (*part.shape[:-1], *width)) for stored, part in mine)
    return found


def _in_a_row(codes: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether parts are a tensor one after the other; of each row there is the first entry."""
    if any(part.shape[-1:] != codes.shape[-1:] for part in parts):
        return False
    return bool(parts) and torch.equal(torch.cat([p.flatten() for p in parts]), codes.flatten())


def chained(
    name: str, shape: tuple[int, ...], parts: Sequence[Part], places: Mapping[str, StoredTensor]
) -> StoredTensor | None:
    """Return where a tensor is, given its parts; None where one is missing, or not as it should."""
    found = [places.get(part.name) for part in parts]
    slices = [one for one in found if one is not None]
    alike = len({one.dtype for one in slices}) == 1 and len(slices) == len(parts)
    if not alike or any(s.shape != p.shape for s, p in zip(slices, parts, strict=True)):
        return None
    stretches = [(one.source, one.offset, one.nbytes) for one in slices]
    return StoredTensor(Chain(stretches), 0, shape, slices[0].dtype, name)
