"""A shrunk program as ``.pt2``, the archive of `torch.export`, for engines that read it.

Nothing here reads such a file but the one that was just written: an archive may hold pickled parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graph.tracing.export import varies
from osscar.base.errors import ModelError, OutputError
from osscar.base.files import atomic_write
from osscar.checkpoint.directory import load
from osscar.export.target import checked_target, checkpoint_directory
from osscar.network.modules import check_module
from osscar.shrinking.equivalence import prove_equal
from osscar.shrinking.program.program import ProgramModule, example_of, exported


@dataclass(frozen=True)
class ExportedArchive:
    """What was written.

    Parameters
    ----------
    path, bytes
        The file.
    inputs
        The shape of each input by its name; -1 stands for a size that may vary.
    """

    path: Path
    bytes: int
    inputs: dict[str, tuple[int, ...]]


def export_pt2(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dense: nn.Module | None = None,
    overwrite: bool = False,
) -> ExportedArchive:
    """Write a shrunk program as an archive of `torch.export`, and compare what was written.

    Parameters
    ----------
    model
        A `ProgramModule`, or a directory that holds one and names what builds its dense model.
    out
        The file; by default beside the directory, such as ``smaller.pt2`` for ``smaller``.
    dense
        The dense model of a directory whose model is of your own code, as `osscar.load` takes it.
    overwrite
        Replace a file that ends in ``.pt2``; nothing else is ever replaced.

    Raises
    ------
    CheckpointError
        If the directory holds none that can be read.
    ModelError
        If its modules were shrunk, not its program.
    OutputError
        If the file is there already or cannot be written.
    EquivalenceError
        If what was read back does not compute the same; the file is not there then.
    """
    if out is None and isinstance(model, nn.Module):
        raise OutputError("a model in memory has no place of its own; give the file (out=)")
    if out is None:
        source = checkpoint_directory(model)
        out = source.with_name(f"{source.name}.pt2")
    target = checked_target(out, ".pt2", lambda file: file.suffix == ".pt2", overwrite=overwrite)
    read = model if isinstance(model, nn.Module) else load(model, dense=dense)
    check_module(read)
    if not isinstance(read, ProgramModule):
        raise ModelError(
            f"it is a {type(read).__name__}, whose modules are its form; call torch.export on it "
            "yourself, with inputs of your own, or prune it with form='exported' (--form exported)"
        )
    program, example = exported(read), example_of(read)
    with torch.no_grad():
        expected = pytree.tree_leaves(read(**example))
    with atomic_write(target) as partial:
        with partial.open("wb") as archive:
            torch.export.save(program, archive)
        with partial.open("rb") as written, torch.no_grad():
            again = torch.export.load(written).module()
            found = pytree.tree_leaves(again(**example))
        prove_equal(expected, found, names=("the program", "the archive that was read back"))
    return ExportedArchive(target, target.stat().st_size, _input_shapes(program, example))


def _input_shapes(
    program: torch.export.ExportedProgram, names: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    arguments = program.graph.find_nodes(op="placeholder")
    shapes = {node.name: node.meta["val"].shape for node in arguments}
    pairs = zip(names, program.graph_signature.user_inputs, strict=True)
    return {
        name: tuple(-1 if varies(size) else int(size) for size in shapes[str(given)])
        for name, given in pairs
    }
