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
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn
from transformers import PreTrainedModel

from osscar import __version__
from osscar.base.devices import default_torch
from osscar.base.errors import OsscarError, first_line, warn
from osscar.base.files import system_errors, write_json, write_text
from osscar.base.printable import pluralize, printable
from osscar.checkpoint.builders import (
    LibraryOrigin,
    TransformersOrigin,
    builder_of,
    cast,
    saved_format,
    written_tensors,
)
from osscar.checkpoint.files import (
    MANIFEST_FILE,
    PAGE_FILE,
    REPORT_FILE,
    Manifest,
    atomic_directory,
    check_output,
)
from osscar.checkpoint.hf_config import (
    CODE,
    any_shape_config,
    built,
    class_of,
    stock_config,
)
from osscar.checkpoint.read_back import Expected, read_back
from osscar.checkpoint.reading import check_dtype
from osscar.checkpoint.streamed import parts_in_files
from osscar.network.modules import check_usable, copied, count_parameters, number_format
from osscar.network.tensor_files import WEIGHTS_FILE, Part, check_written, write_tensors
from osscar.offload.on_disk import is_on_disk
from osscar.proof.equivalence import Inputs
from osscar.proof.lineage import Lineage, Origin, lineage_of, stored_dtype, structure_of
from osscar.proof.plan import combined_groups
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
    fresh
        Whether a new process has read it back as its model card says, and computed the same.  Else
        only this one has, as code of ``__main__`` or of a function can be imported by no other.
    """

    path: Path
    stock: bool
    bytes: int
    with_code: bool = False
    fresh: bool = True


@default_torch()
def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    page: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    example_inputs: Inputs | None = None,
) -> SavedCheckpoint:
    """Write a shrunk model, which is kept only if a new process reads it back as an equal one.

    A model card, ``README.md``, says what it is and how it is read, and so it is read there.

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
    dtype
        Number format of the weights on disk; by default that in which the dense model lay there,
        and where that is not known, the model's.
    overwrite
        Replace a checkpoint that is there; it stays whole if anything fails.
    example_inputs
        On which what was read back is compared with the model, beside inputs of the form that it
        was pruned with, or tokens.  Where neither are known, it is compared tensor by tensor.

    Raises
    ------
    OutputError
        If the directory is in use, or the disk refuses.
    EquivalenceError, CheckpointError
        If what was read back does not compute what the model computes, or cannot be read back.

    Warns
    -----
    UserWarning
        If no other process can import the model's code, so that it was read back in this one alone;
        or if transformers cannot read what its config lists.
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
    forms = _forms(model, lineage)
    with atomic_directory(path, overwrite=overwrite) as new:
        expected = Expected.of(model, example_inputs)
        for form in forms:
            with system_errors():
                manifest = _write(model, lineage, form, new, tokenizer, report, page)
            try:
                fresh = read_back(model, new, form.kind, expected)
                break
            except OsscarError as error:
                if form is forms[-1]:
                    raise
                why = first_line(error)
                warn(f"only osscar.load will read the checkpoint: transformers fails ({why})")
                shutil.rmtree(new)
                new.mkdir()
        # Last, what is known now: reading it would compare with it.
        lineage = dataclasses.replace(manifest.lineage, sample=expected.sample)
        dataclasses.replace(manifest, lineage=lineage, fresh=fresh).write(new)
        written = sum(file.stat().st_size for file in new.glob("*.safetensors"))
    with_code = form.config is not None and not form.stock
    return SavedCheckpoint(path, form.stock, written, with_code, fresh)


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


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return how much a model's weights take on disk in a number format, as `save` takes it."""
    format_of = saved_format(model, dtype)
    written = written_tensors(model).items()
    return sum(t.numel() * format_of(name, t).itemsize for name, t in written)


# ---- writing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a checkpoint says the shapes of a model.

    config: That of transformers which says them; None where plans do.
    kind: The class of transformers that reads it; None where `osscar.load` alone does.
    stock: Whether it is read without code beside it.
    """

    config: Any = None
    kind: str | None = None
    stock: bool = False


def _forms(model: nn.Module, lineage: Lineage) -> list[_Form]:
    """Return the forms in which a model may be written; the first that can be read again is."""
    if isinstance(model, PreTrainedModel):
        stock = stock_config(model, lineage.plans)
        if stock is not None:
            return [_Form(stock, type(model).__name__, stock=True)]
        listed = any_shape_config(model)
        if listed is not None:
            named = (n for n in getattr(listed, CODE) if n not in ("AutoConfig", "AutoModel"))
            return [_Form(listed, next(named, "AutoModel")), _Form()]
    return [_Form()]


def _write(
    model: nn.Module,
    lineage: Lineage,
    form: _Form,
    path: Path,
    tokenizer: Any,
    report: Mapping[str, Any] | None,
    page: str | None,
) -> Manifest:
    """Write all files of a checkpoint."""
    known, builder = lineage, builder_of(model)
    if form.stock:
        assert isinstance(model, PreTrainedModel)
        _save_stock(model, form.config, path)
        lineage = dataclasses.replace(lineage, plans=(), listed=0)
    else:
        _save_one_by_one(model, path)
        if form.config is not None:
            TransformersOrigin(type(model), form.config).write(model, path)  # and the code with it
            lineage = dataclasses.replace(lineage, listed=len(lineage.plans))
        elif isinstance(builder, TransformersOrigin):
            builder.write(model, path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    if report is not None:
        write_json(path / REPORT_FILE, report)
    if page is not None:
        write_text(path / PAGE_FILE, page)
    auto, own_code = None if form.stock else form.kind, builder is None
    card = model_card(model, known, report or {}, stock=form.stock, auto=auto, own_code=own_code)
    write_text(path / CARD_FILE, card)
    origin = lineage.origin if isinstance(builder, LibraryOrigin) else None
    if isinstance(builder, TransformersOrigin):  # the rest lies in its config
        origin = Origin(builder.library)
    lineage = dataclasses.replace(lineage, origin=origin, sample=None)
    files = tuple(sorted(file.name for file in path.iterdir()))
    manifest = Manifest.of(form.stock, lineage, files)
    manifest.write(path)
    # As the umask says: the writer of safetensors keeps what it writes to its user.
    mode = (path / MANIFEST_FILE).stat().st_mode
    for other in path.rglob("*"):
        if other.is_file():
            other.chmod(mode)
    return manifest


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


# ---- the model card ----------------------------------------------------------------------


CARD_FILE = "README.md"

_TEMPLATE = jinja2.Template(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))

_ASKED = (
    *("sparsity", "params", "size", "flops", "speedup"),
    *("heads", "neurons", "channels", "residual", "experts", "backend", "target"),
)
"""Settings of a pruning that the card repeats, where they are set."""


def model_card(
    model: nn.Module,
    lineage: Lineage,
    report: Mapping[str, Any],
    *,
    stock: bool,
    auto: str | None,
    own_code: bool,
) -> str:
    """Return the model card of a checkpoint.

    Of a `report` that is no pruning or recovery nothing is told; `stock` says whether transformers
    reads it, `auto` by which class it does with code, `own_code` whether a dense model is needed.
    """
    schema = str(report.get("schema"))
    pruning = report if schema.startswith("osscar.prune/") else {}
    recovers = pruning or schema.startswith("osscar.recover/")
    after, removed = count_parameters(model), list(_removed(lineage))
    before, held = pruning.get("parameters_before", after), pruning.get("held_out")
    structure = structure_of(model)
    card: str = _TEMPLATE.render(
        library="transformers" if isinstance(model, PreTrainedModel) else "pytorch",
        source=_short(lineage.source),
        gone=f"{1 - after / before:.1%}" if after < before else "",
        name=type(structure if structure is not None and own_code else model).__name__,
        stock=stock,
        own_code=own_code,
        auto=auto,
        removed=removed,
        kinds=" and ".join(kind for kind, *_ in removed) or "units",
        before=before,
        after=after,
        made=list(_made(model, lineage, pruning)),
        divergence=pruning.get("divergence"),
        judged=pluralize(held, "held-out sample") if held else "calibration data",
        recovery=report.get("recovery") if recovers else None,
    )
    return card


def _short(source: str) -> str:
    """Return a source without the folders that it lies in, and with no signs of Markdown."""
    name = source.removeprefix("directory ")
    if name != source or Path(name).is_absolute():
        name = Path(name).name
    return printable(name).translate({ord(c): f"\\{c}" for c in "\\|[]<>`*_"})


def _removed(lineage: Lineage) -> Iterator[tuple[str, int, int, int]]:
    """Yield each kind, its groups, and how many units these had and have, over all runs."""
    groups = combined_groups(lineage.plans)
    for kind in dict.fromkeys(group.kind for group in groups):
        mine = [group for group in groups if group.kind == kind]
        dense, kept = sum(group.units for group in mine), sum(len(group.kept) for group in mine)
        yield kind, len(mine), dense, kept


def _made(
    model: nn.Module, lineage: Lineage, pruning: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what the model was made of, and how."""
    if lineage.source:
        yield "dense model", _short(lineage.source)
    settings = pruning.get("settings", {})
    said = [f"{name} {settings[name]}" for name in _ASKED if settings.get(name) is not None]
    if said:
        yield "asked for", _short(", ".join(said))
    for seen in lineage.calibration:
        count = "" if seen.samples is None else f"{pluralize(seen.samples, 'sample')} of "
        yield "has seen", f"{count}{_short(seen.source)}"
    for certificate in lineage.certificates:
        yield from certificate.rows()
    yield "number format", str(number_format(model)).removeprefix("torch.")
    yield "made with", f"osscar {__version__}"
