"""Writing a shrunk model, read back and compared before it takes its place; nothing is pickled.

Where the family's config can express the new shapes, the directory is a stock transformers
checkpoint.  Elsewhere it holds what builds the dense model (see `osscar.checkpoint.builders`), the
small weights, and the plans that turn the one into the shape of the other; and for models of
transformers a file of code, by which it reads them without this project (see
`osscar.checkpoint.hf_config`).  Here that code is never run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from osscar.base.devices import default_torch
from osscar.base.errors import CheckpointError, EquivalenceError, OsscarError, first_line, warn
from osscar.base.files import system_errors, write_json, write_text
from osscar.base.memory import let_shortage_pass
from osscar.checkpoint.atomic_directory import atomic_directory, check_output
from osscar.checkpoint.builders import TransformersOrigin, builder_of
from osscar.checkpoint.card import CARD_FILE, PICTURE_FILE, model_card
from osscar.checkpoint.first_pass import vocabulary_of
from osscar.checkpoint.formats import cast, saved_format, written_tensors
from osscar.checkpoint.hf_config import (
    CODE,
    DESCRIPTION_ERRORS,
    MODELLING_FILE,
    any_shape_config,
    built,
    class_of,
    stock_config,
)
from osscar.checkpoint.manifest import (
    MANIFEST_FILE,
    PAGE_FILE,
    REPORT_FILE,
    Manifest,
    read_manifest,
)
from osscar.checkpoint.reading import check_dtype, load
from osscar.checkpoint.regrouped import parts_in_files
from osscar.checkpoint.streamed import read_streamed
from osscar.network.modules import (
    check_usable,
    copied,
    device_of,
    evaluating,
    example_length,
    number_format,
)
from osscar.network.tensor_files import WEIGHTS_FILE, Part, check_written, write_tensors
from osscar.offload.on_disk import is_on_disk, values_of, weight_cache
from osscar.proof.equivalence import Inputs, in_format_of, proof_outputs, prove_equal, runs
from osscar.proof.lineage import (
    Lineage,
    Origin,
    lineage_of,
    stored_dtype,
    structure_of,
    with_zeros,
)
from osscar.shrinking.fold import fold, is_foldable


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was written.

    Parameters
    ----------
    path
        The directory.
    stock
        Whether plain ``from_pretrained`` reads it; `osscar.load` reads all.
    bytes
        Size of the weights on disk.
    with_code
        Whether it brings the code by which ``from_pretrained(..., trust_remote_code=True)`` reads
        it.
    """

    path: Path
    stock: bool
    bytes: int
    with_code: bool = False


@default_torch()
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    page: str | None = None,
    picture: bytes | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    example_inputs: Inputs | None = None,
) -> SavedCheckpoint:
    """Write a shrunk model, which is kept only if what is read back is equal.

    A model card, ``README.md``, says what it is and how it is read.

    Parameters
    ----------
    model
        A model that `osscar.prune` or `osscar.shrink` made smaller, or that `load` read.
    directory
        Where to.
    tokenizer
        Or an image processor, of transformers; saved beside the weights if given.
    report
        Written as ``osscar_report.json``, for people and tools.
    page
        The same as HTML, written as ``report.html``.
    picture
        A PNG file of what each group keeps, which the model card shows.
    dtype
        Number format of the weights on disk; by default that in which the dense model lay there,
        and where that is not known, the model's.
    overwrite
        Replace a checkpoint that is there; it stays whole if anything fails.
    example_inputs
        On which what was read back is compared with the model.  Language models need none; others
        are compared tensor by tensor without them.

    Raises
    ------
    OutputError
        If the directory is in use, or the disk refuses.
    ModelError, OptionError
        If an argument is of a wrong type.
    EquivalenceError
        If what was read back does not compute what the model computes.
    CheckpointError
        If it cannot be read back.
    """
    check_usable(model)
    check_dtype(dtype)
    lineage = lineage_of(model)
    dtype = stored_dtype(model) if dtype is None else dtype
    path = check_output(directory, overwrite=overwrite, needed_bytes=weight_bytes(model, dtype))
    if dtype != number_format(model):
        model = cast(copied(model), dtype)
    model = _as_its_class_builds_it(model)
    lineage = dataclasses.replace(lineage, stored_dtype=str(dtype).removeprefix("torch."))
    with atomic_directory(path, overwrite=overwrite) as new:
        with system_errors():
            _write(
                model, lineage, new, example_inputs,
                tokenizer=tokenizer, report=report, page=page, picture=picture,
            )  # fmt: skip
        try:
            _prove_same(model, _read_again(model, new), example_inputs)
        except EquivalenceError as error:
            raise EquivalenceError(f"the checkpoint was not kept: {error}") from error
    return read_saved(path)


def renew_report(checkpoint: SavedCheckpoint, report: Mapping[str, Any], page: str) -> None:
    """Write the page of a checkpoint anew, and last its report."""
    write_text(checkpoint.path / PAGE_FILE, page)
    write_json(checkpoint.path / REPORT_FILE, report)


def _as_its_class_builds_it(model: nn.Module) -> nn.Module:
    """Fold, in a copy, normalized weights that a class of transformers builds as plain ones."""
    if not isinstance(model, PreTrainedModel) or not any(map(is_foldable, model.modules())):
        return model
    dense = built(class_of(type(model), model.config), model.config)
    folded: nn.Module = copied(model)
    return folded if dense is not None and fold(folded, dense.state_dict()) else model


def read_saved(path: Path) -> SavedCheckpoint:
    """Say what is in a directory that `save` wrote, as `save` did."""
    manifest = read_manifest(path)
    assert manifest is not None
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    with_code = (path / MODELLING_FILE.name).is_file() and not manifest.lineage.replayed
    return SavedCheckpoint(path, manifest.stock, written, with_code)


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return how much a model's weights take on disk in a number format, as `save` takes it."""
    format_of = saved_format(model, dtype)
    written = written_tensors(model).items()
    return sum(t.numel() * format_of(name, t).itemsize for name, t in written)


def _write(
    model: nn.Module,
    lineage: Lineage,
    path: Path,
    example_inputs: Inputs | None,
    *,
    tokenizer: Any,
    report: Mapping[str, Any] | None,
    page: str | None,
    picture: bytes | None,
) -> None:
    """Write all files of a checkpoint."""
    config, auto, known, builder = None, None, lineage, builder_of(model)
    if isinstance(model, PreTrainedModel):
        config = stock_config(model, lineage.plans)
    if config is not None:
        assert isinstance(model, PreTrainedModel)
        _save_stock(model, config, path)
        lineage = dataclasses.replace(lineage, plans=(), listed=0)
    else:
        if builder is not None:
            builder.write(model, path)
        _save_one_by_one(model, path)
        auto = _list_shapes(model, lineage, path, example_inputs)
        if auto is not None:
            lineage = dataclasses.replace(lineage, listed=len(lineage.plans))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    if report is not None:
        write_json(path / REPORT_FILE, report)
    if page is not None:
        write_text(path / PAGE_FILE, page)
    if picture is not None:
        (path / PICTURE_FILE).write_bytes(picture)
    card = model_card(
        model, known, report or {},
        stock=config is not None, auto=auto, own_code=builder is None, picture=picture is not None,
    )  # fmt: skip
    write_text(path / CARD_FILE, card)
    lineage = dataclasses.replace(lineage, origin=None if builder is None else builder.origin)
    files = tuple(sorted(file.name for file in path.iterdir()))
    Manifest.of(config is not None, lineage, files).write(path)
    # As the umask says: the writer of safetensors keeps what it writes to its user.
    mode = (path / MANIFEST_FILE).stat().st_mode
    for other in path.rglob("*"):
        if other.is_file():
            other.chmod(mode)


def _save_stock(model: PreTrainedModel, config: Any, path: Path) -> None:
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    if is_on_disk(model):
        TransformersOrigin(type(model), config).write(model, path)
        _save_one_by_one(model, path, parts_in_files(model))
        return
    original = model.config
    model.config = config
    try:
        model.save_pretrained(path)
    finally:
        model.config = original


def _save_one_by_one(
    model: nn.Module, path: Path, parts: Mapping[str, Sequence[Part]] | None = None
) -> None:
    file = path / WEIGHTS_FILE
    tensors = written_tensors(model)
    check_written(write_tensors(file, tensors, {"format": "pt"}, parts), file)


def _list_shapes(
    model: nn.Module, lineage: Lineage, path: Path, example_inputs: Inputs | None
) -> str | None:
    """Let transformers read a planned checkpoint, if it can, and return by which class it does.

    The config says all then that the plans do.  The weights are written already.
    """
    config = any_shape_config(model) if isinstance(model, PreTrainedModel) else None
    if config is None:
        return None
    TransformersOrigin(type(model), config).write(model, path)  # and the code with it
    Manifest.of(False, Lineage(origin=Origin(TransformersOrigin.library))).write(path)
    try:
        _prove_same(model, _read_again(model, path), example_inputs)
    except (*DESCRIPTION_ERRORS, OsscarError) as error:
        warn(f"only osscar.load will read the checkpoint: transformers fails ({first_line(error)})")
        (path / MODELLING_FILE.name).unlink()
        TransformersOrigin(type(model), model.config).write(model, path)
        return None
    named = [name for name in getattr(config, CODE) if name not in ("AutoConfig", "AutoModel")]
    return str(named[0]) if named else "AutoModel"


def _read_again(model: nn.Module, path: Path) -> nn.Module:
    """Read a written checkpoint back, in float32."""
    cache, dense = weight_cache(model), None if builder_of(model) else _dense_of(model)
    try:
        if cache is not None:
            return read_streamed(path, cache, torch.float32)
        return load(path, dtype=torch.float32, dense=dense)
    except (RuntimeError, OsscarError) as error:
        raise CheckpointError(
            f"the checkpoint that was written cannot be read, and was not kept: {error}"
        ) from error


def _dense_of(model: nn.Module) -> nn.Module:
    """Build the dense model of code of somebody's own, with any weights."""
    known = structure_of(model)
    if known is not None:
        return with_zeros(known.model, known.device)
    if lineage_of(model).plans:
        raise CheckpointError(
            f"the dense model of this {type(model).__name__} is not known any more, and without it "
            "the checkpoint cannot be checked; prune the model anew, or load it with "
            "osscar.load(directory, dense=model)"
        )
    return with_zeros(model, device_of(model))


def _prove_same(model: nn.Module, again: nn.Module, example_inputs: Inputs | None) -> None:
    """Compare what a model computes with what was read back."""
    # In float32: whether the weights are the same is the question, not how they are rounded.
    if number_format(model) != torch.float32:
        model = cast(copied(model), torch.float32)
        again = cast(again, torch.float32)  # which may hold other formats beside the first
    device = next(model.parameters()).device
    inputs = _token_inputs(model, device) if example_inputs is None else example_inputs
    with evaluating(model):
        if inputs is None:
            _prove_same_tensors(model, again)
            inputs = _drawn_inputs(model, device)
        if inputs is not None:
            expected = proof_outputs(model, [inputs])
            found = _outputs_again(again.to(device), inputs)
            prove_equal(expected, found, names=("the model", "the model that was read back"))


def _outputs_again(again: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return what a model that was read back puts out, on inputs that the written one takes."""
    try:
        return proof_outputs(again, [inputs])
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        raise EquivalenceError(
            f"the model that was read back fails where the saved one runs: {first_line(error)}"
        ) from error


def _drawn_inputs(model: nn.Module, device: torch.device) -> Inputs | None:
    """Return inputs of the form that the dense model took, if the model takes them."""
    known = structure_of(model)
    drawn = None if known is None else known.drawn()
    if drawn is None:
        return None
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), in_format_of(drawn, model))
    return inputs if runs(model, inputs) else None


def _token_inputs(model: nn.Module, device: torch.device) -> Inputs | None:
    """Return tokens for a causal language model; None for others."""
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        return None
    ids = torch.arange(example_length(model), device=device)
    return {"input_ids": ids[None] % vocabulary}


def _prove_same_tensors(model: nn.Module, again: nn.Module) -> None:
    read = again.state_dict()
    for name, tensor in model.state_dict().items():
        found = None if name not in read else values_of(read[name].to(tensor.dtype)).cpu()
        if found is None or not torch.equal(values_of(tensor).cpu(), found):
            raise EquivalenceError(f"{name!r} was not read back as it was written")
