"""Checkpoints larger than memory: models whose parameters are read from files when they are needed.

Only the structure of such a model is built; its parameters lie on disk (`osscar.offload.on_disk`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import CheckpointError, NonFiniteError
from osscar.checkpoint.builders import TransformersOrigin, read_builder
from osscar.checkpoint.first_pass import check_sample
from osscar.checkpoint.manifest import read_manifest
from osscar.checkpoint.regrouped import chained, parts_in_files
from osscar.checkpoint.validation import check_tensors, names_of, readable, structure
from osscar.network.tensor_files import read_headers
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Place, StoredTensor, WeightCache
from osscar.proof.lineage import LINEAGE
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
        model = structure(build, computed=True)
        for plan in plans:
            slice_units(model, plan)
    check_tensors(model, stored, path)
    _fill_from_disk(model, stored, path, cache)
    read = model.to(cache.device).eval()
    if manifest is not None:
        setattr(read, LINEAGE, manifest.lineage)
        check_sample(read, str(path))
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
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, own in names.items():
        if isinstance(tensors[key], nn.Parameter) or own[0] in persistent:
            yield own, tensors[key]
        elif tensors[key].is_meta:
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
