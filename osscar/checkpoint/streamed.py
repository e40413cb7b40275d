"""Checkpoints larger than memory: models of which only the structure is built, and their files.

What is read gives a model whose parameters lie on disk (see `osscar.offload.on_disk`); what is
written goes to its file tensor by tensor, with the bytes that the library would write.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import (
    CheckpointError,
    EquivalenceError,
    NonFiniteError,
    OsscarError,
    first_line,
)
from osscar.checkpoint.admission import (
    check_tensors,
    check_unchanged,
    names_of,
    stored_in,
    structure,
)
from osscar.checkpoint.builders import TransformersOrigin, builder_of_whole, read_builder
from osscar.checkpoint.hf_config import DESCRIPTION_ERRORS, is_any_shape
from osscar.checkpoint.manifest import Manifest, read_manifest
from osscar.checkpoint.regrouped import Part, chained, parts_in_files
from osscar.checkpoint.stored import Stored, read_stored
from osscar.offload.on_disk import OnDisk, values_of
from osscar.offload.places import Place, Slice
from osscar.offload.sources import Source, as_bytes
from osscar.offload.weight_cache import WeightCache
from osscar.proof.lineage import LINEAGE
from osscar.shrinking.slice import slice_units

_FORMATS = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by the names of safetensors, in the order in which it writes them."""

_ELSEWHERE = "omit --max-memory to read it whole"


# ---- reading -----------------------------------------------------------------------------


def read_streamed(path: Path, cache: WeightCache, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model of transformers whose parameters lie in the files of a directory.

    All files are read once, so that a damaged one is refused here. `dtype` is by default as the
    config says.
    """
    manifest = read_manifest(path)
    if manifest is not None:
        check_unchanged(path, manifest.lineage.origin)
    stored = stored_in(path)
    if stored is None:
        raise CheckpointError(f"{path} holds no weights in safetensors, of which a model is read")
    try:
        model = _structure(path, stored, manifest, dtype)
    except OsscarError:
        raise
    except DESCRIPTION_ERRORS as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: {first_line(error):.500}"
        ) from error
    check_tensors(model, stored, path)
    _fill_from_disk(model, stored, path, cache)
    if manifest is not None:
        setattr(model, LINEAGE, manifest.lineage)
    return model.to(cache.device).eval()


def _structure(
    path: Path, stored: Mapping[str, Stored], manifest: Manifest | None, dtype: torch.dtype | None
) -> nn.Module:
    """Build a model without its weights, in the shapes of those that are stored."""
    whole = builder_of_whole(path, manifest)
    if whole is not None:
        whole.check_stock(path)
        build = partial(whole.build, dtype or number_format_of(whole.config, stored))
        pruned = is_any_shape(whole.config)
        return structure(build, stored, path, pruned=pruned, computed=True)
    assert manifest is not None  # whose plan it is
    builder = read_builder(manifest.lineage.origin, path)
    if not isinstance(builder, TransformersOrigin):
        raise CheckpointError(
            f"{path} holds no model of transformers, and no other is read from disk; {_ELSEWHERE}"
        )
    build = partial(builder.build, dtype or number_format_of(builder.config, stored))
    model = structure(build, stored, path, pruned=True, computed=True)
    for plan in manifest.lineage.replayed:
        slice_units(model, plan)
    return model


def _fill_from_disk(
    model: nn.Module, stored: Mapping[str, Stored], path: Path, cache: WeightCache
) -> None:
    """Let the parameters of a model without values be read from files.

    The parameters are on 'meta', each in the number format in which it is read.
    """
    places, parts = dict(_places(stored)), parts_in_files(model)
    prefix = getattr(model, "base_model_prefix", "")
    known = {n: place.slice for name, place in places.items() for n in names_of(name, prefix)}
    for names, parameter in _tensors(model):
        found = [places[n] for name in names for n in names_of(name, prefix) if n in places]
        if parameter is None:
            continue
        if not found:
            rows = (
                chained(n, tuple(parameter.shape), parts[n], known) for n in names if n in parts
            )
            found = [Place.of(values) for values in rows if values is not None]
        if not found:
            raise CheckpointError(
                f"{path} holds no {names[0]!r}, or holds it in another form than "
                f"{type(model).__name__}; {_ELSEWHERE}"
            )
        if len(found) > 1 and len({place.slice.digest() for place in found}) > 1:
            raise CheckpointError(
                f"{path} holds other values of {names[0]!r} than of {names[1]!r}, which its config "
                f"ties; {_ELSEWHERE}"
            )
        _check_range(found[0].slice, parameter.dtype)
        _put(model, names, parameter, found[0].cast(parameter.dtype), cache)


def _check_range(values: Slice, dtype: torch.dtype) -> None:
    """Read all values once, so that a file with NaN, or one that is cut off, is refused here."""
    largest = values.largest()
    if dtype.is_floating_point and largest > torch.finfo(dtype).max:
        raise NonFiniteError(
            f"values of {values.name!r} are infinite in {str(dtype).removeprefix('torch.')}, which "
            f"ends at {torch.finfo(dtype).max:.5g}: give bfloat16 or float32"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor | None]]:
    """Yield each parameter and persistent buffer with all its names; None if it is computed."""
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
        kept = isinstance(tensors[key], nn.Parameter) or own[0] in persistent
        if not kept and tensors[key].is_meta:
            raise CheckpointError(
                f"{type(model).__name__} computes {own[0]!r} in a way that needs memory for the "
                f"whole model; {_ELSEWHERE}"
            )
        yield own, tensors[key] if kept else None


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


def _places(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Place]]:
    sources: dict[Path, Source] = {}
    for name, tensor in stored.items():
        assert tensor.file is not None
        if tensor.dtype not in _FORMATS:
            raise CheckpointError(
                f"{tensor.file} holds {name!r} as {tensor.dtype}, which cannot be pruned"
            )
        source = sources.get(tensor.file) or sources.setdefault(tensor.file, Source(tensor.file))
        values = Slice(source, tensor.offset, tensor.shape, _FORMATS[tensor.dtype], name)
        yield name, Place.of(values)


def number_format_of(config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """Return what transformers takes for ``auto``: the config's, or that of the first weight."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    formats = [_FORMATS[tensor.dtype] for tensor in stored.values() if tensor.dtype in _FORMATS]
    return next((kind for kind in formats if kind.is_floating_point), torch.float32)


# ---- writing -----------------------------------------------------------------------------


def write_weights(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str],
    parts: Mapping[str, Sequence[Part]] | None = None,
) -> dict[str, bytes]:
    """Write a file of safetensors with the bytes that the library writes, tensor by tensor.

    Tensors that are named in `parts` are written as these.  Return the SHA-256 of the bytes of
    each tensor in the file, by name.
    """
    written = {n: (parts or {}).get(n, (Part(n, tuple(t.shape)),)) for n, t in tensors.items()}
    forms = {
        part.name: torch.empty(part.shape, dtype=tensors[name].dtype, device="meta")
        for name, own in written.items()
        for part in own
    }
    order, text = header_of(forms, metadata)
    ends = itertools.accumulate(forms[name].nbytes for name in order)
    places = {n: 8 + len(text) + end - forms[n].nbytes for n, end in zip(order, ends, strict=True)}
    digests: dict[str, bytes] = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(written, key=lambda name: places[written[name][0].name]):
            values, done = as_bytes(values_of(tensors[name]).contiguous().cpu()), 0
            for part in written[name]:
                own = values[done : done + forms[part.name].nbytes]
                out.seek(places[part.name])
                out.write(own)
                digests[part.name] = hashlib.sha256(own).digest()
                done += len(own)
    return digests


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[list[str], bytes]:
    """Return the names of tensors in the order of a file, and what that says of them first."""
    kinds = {kind: (rank, name) for rank, (name, kind) in enumerate(_FORMATS.items())}
    # What safetensors has no name for, it refuses when it comes to writing.
    told = {name: kinds.get(t.dtype, (len(kinds), str(t.dtype))) for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (told[name][0], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        after = end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {
            "dtype": told[name][1],
            "shape": list(tensors[name].shape),
            "data_offsets": [end, after],
        }
        end = after
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return order, text + b" " * (-len(text) % 8)


def check_written(digests: Mapping[str, bytes], file: Path) -> None:
    """Read a file that was written back, tensor by tensor, and compare."""
    for name, place in _places(read_stored(file.parent)):
        if place.slice.digest() != digests[name]:
            raise EquivalenceError(f"{name!r} was not read back as it was written")
