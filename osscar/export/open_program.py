"""A model as a program of `torch.export`, with every size of its inputs open that can be.

A size that is left open while a model is traced may all the same be a number in the program: code
that makes a number of it writes that down in silence.  So what was written is tried at other sizes,
too, and where it differs there, the model is traced again with fewer sizes open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sympy import sympify
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.tracing.export import varies
from graph.tracing.standalone import LARGEST
from osscar.base.errors import DataError, EquivalenceError, ModelError, OutputError, first_line
from osscar.base.files import file_target
from osscar.base.inputs import safe_repr
from osscar.base.memory import attempt
from osscar.checkpoint.files import checkpoint_directory
from osscar.checkpoint.reading import load
from osscar.data.loaders import load_tensors
from osscar.data.reader import Batch, Reader, to_model
from osscar.data.samples import LABEL_NAMES
from osscar.network.modules import check_usable, context_length, evaluating
from osscar.network.onnx_runtime import program_of
from osscar.network.predictions import ALONE, named_outputs, reads_sequences
from osscar.offload.on_disk import is_on_disk
from osscar.proof.equivalence import call, comparable, prove_equal
from osscar.proof.lineage import Drawn, lineage_of
from osscar.proof.program import ProgramModule, example_of, open_sizes


@dataclass(frozen=True)
class Exported:
    """What was written.

    Parameters
    ----------
    path
        The file.
    bytes
        Its size, with that of the weights beside it.
    inputs, outputs
        Of ONNX and pt2: what it takes, and of ONNX what it returns, by name: number format and
        shape, such as ``float32 (batch, 3, 32, 32)``, where a word is a size that may vary.
    weights
        The file beside an ONNX file that holds its weights, where these are too large for one.
    architecture, dtype
        Of GGUF: what llama.cpp calls the model, and the number format of the matrices.
    padding
        Of GGUF: neurons of zeros, which make up whole blocks of 32, so that it can be quantized.
    """

    path: Path
    bytes: int
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    weights: Path | None = None
    architecture: str | None = None
    dtype: str | None = None
    padding: int = 0


def traced_target(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    suffix: str,
    *,
    overwrite: bool,
) -> Path:
    """Return the file to write, by default that beside a checkpoint's directory called like it."""
    if out is None:
        if isinstance(model, nn.Module):
            raise OutputError("a model in memory needs the name of the file to write; give out=")
        source = checkpoint_directory(model)
        out = source.with_name(f"{source.name}{suffix}")
    return checked_target(out, suffix, overwrite=overwrite)


def checked_target(out: str | os.PathLike[str], suffix: str, *, overwrite: bool) -> Path:
    """Return the file to write, before any work; only files of the format are replaced."""
    target = file_target(out)
    if os.path.exists(target) and not (overwrite and target.suffix == suffix):
        raise OutputError(
            f"{target} is there already; give another, or replace it, which is for {suffix} files "
            "alone (`--overwrite`, or overwrite=True in Python)"
        )
    return target


# ---- open sizes --------------------------------------------------------------------------


LeftOpen: TypeAlias = Mapping[str, Sequence[int]]
"""The dimensions of each input whose sizes are left open."""

Run: TypeAlias = Callable[[Batch], Sequence[Tensor]]
"""Lets an engine compute what was written on some inputs: all outputs, in the program's order."""

_IDS = "input_ids"
_LABELS = frozenset({*LABEL_NAMES, "target", "targets", "start_positions", "end_positions"})
"""Arguments by which code measures a loss."""

_TOKENS = 12
"""Tokens in each of the two windows that a language model is traced with."""


class OpenProgram:
    """A model to be written for another engine, its inputs, and `kernels` that can be written."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        kernels: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        self.model, self.example, self.kernels = model, example, kernels

    def written(self, write: Callable[[Traced], Run], engine: str) -> Traced:
        """Let a program be written until the engine computes what the model does, or refuse."""
        names = ("the model", f"what {engine} computes from the file")
        with evaluating(self.model):
            expected = self._expected()
            for left_open in self._choices():
                traced = Traced(self._program(left_open), self.example)
                run = write(traced)
                prove_equal(expected, run(self.example), names=names)
                if all(self._holds(traced, axis, run, names) for axis in traced.axes):
                    break  # as at last, where no size is left open
        return traced

    @cached_property
    def output_names(self) -> list[str]:
        """Return what the outputs are called, each unlike all else (ModelError if no tensors)."""
        with evaluating(self.model):
            result = call(self.model, self.example)
        names = [name for name, _ in named_outputs(result)]
        leaves = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        other = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if other:
            raise ModelError(
                f"the model returns {safe_repr(other[0])} ({type(other[0]).__name__}), which no "
                "such file can hold; let its forward return tensors alone"
            )
        if len(names) != len(leaves):  # what torch knows as a container, and we do not
            names = list(map(str, range(len(leaves))))
        found = list[str]()
        for name in names:
            given = f"{ALONE}_{name}" if name[0].isdigit() else name
            while given in found or given in self.example:
                given = f"{ALONE}_{given}"
            found.append(given)
        return found

    def _expected(self) -> list[Tensor]:
        with attempt() as tried:  # the model may be anyone's code
            found = outputs(self.model, self.example)
        if tried.failed:
            given = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.example.items())
            raise ModelError(
                f"the model fails on what it is traced with ({given}): {first_line(tried.error)}; "
                "give inputs that it takes, such as `--inputs FILE`, or example_inputs= in Python"
            ) from tried.error
        comparable(found)
        return found

    def _choices(self) -> Iterator[LeftOpen]:
        """Yield which sizes to leave open: all, those of the samples, none."""
        tokens, every = reads_tokens(self.model), dict[str, list[int]]()
        for name, x in self.example.items():
            dims = range(min(2 if tokens or reads_sequences([x]) else 1, x.ndim))
            every[name] = [dim for dim in dims if x.shape[dim] > 1]
        if isinstance(self.model, ProgramModule):
            every = {name: list(dims) for name, dims in open_sizes(self.model).items()}
        first = {name: [dim for dim in dims if not dim] for name, dims in every.items()}
        none: dict[str, list[int]] = {name: [] for name in every}
        yield every
        if first != every:
            yield first
        if none != first:
            yield none

    def _program(self, left_open: LeftOpen) -> torch.export.ExportedProgram:
        auto: Any = torch.export.Dim.AUTO
        sizes = {name: dict.fromkeys(dims, auto) for name, dims in left_open.items()}
        with self.kernels(self.model):
            return program_of(self.model, (), self.example, sizes)

    def _holds(self, traced: Traced, axis: Axis, run: Run, names: tuple[str, str]) -> bool:
        """Tell whether an engine takes the sizes of an axis that the model takes, and is right."""
        known = False
        for inputs in traced.resized(axis):
            with attempt() as tried:  # the model may be anyone's code
                expected = outputs(self.model, inputs)
            if tried.failed:
                continue
            try:
                prove_equal(expected, run(inputs), names=names)
            except AssertionError:  # of a guard, which the file holds: it refuses such inputs
                continue
            except (EquivalenceError, ModelError):
                return False
            known = True
        return known


def outputs(model: nn.Module, inputs: Batch) -> list[Tensor]:
    """Return the tensors that a model returns, on the CPU."""
    with torch.no_grad():
        found = pytree.tree_leaves(call(model, inputs))
    return [leaf.cpu() for leaf in found if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Axis:
    """An open size: its name, how long it was, and the symbols of all inputs that stand for it."""

    name: str
    dim: int
    size: int
    symbols: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Traced:
    """A program, and the inputs that it was traced with, by name in order."""

    program: torch.export.ExportedProgram
    example: Batch

    @cached_property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Return the sizes of each input, whole numbers or expressions in symbols."""
        arguments = self.program.graph.find_nodes(op="placeholder")
        shapes = {node.name: node.meta["val"].shape for node in arguments}
        given = zip(self.example, self.program.graph_signature.user_inputs, strict=True)
        return {
            name: tuple(size.node.expr if varies(size) else int(size) for size in shapes[str(one)])
            for name, one in given
        }

    @cached_property
    def axes(self) -> list[Axis]:
        """Return the open sizes; those of the same dimension that were as long are one."""
        found: dict[tuple[int, int], list[Any]] = {}
        names: dict[tuple[int, int], str] = {}
        for name, shape in self.shapes.items():
            for dim, size in enumerate(shape):
                if getattr(size, "is_Symbol", False):
                    key = dim, self.example[name].shape[dim]
                    found.setdefault(key, []).append(size)
                    names.setdefault(key, _name_of(name, dim, self.example))
        return [
            Axis(names[key], *key, tuple(dict.fromkeys(symbols))) for key, symbols in found.items()
        ]

    def axis_names(self) -> dict[str, dict[int, str]]:
        """Return the name of each open size, by input and dimension, where it first stands."""
        left = {symbol: axis.name for axis in self.axes for symbol in axis.symbols}
        return {
            name: {dim: left.pop(size) for dim, size in enumerate(shape) if size in left}
            for name, shape in self.shapes.items()
        }

    def described(self) -> dict[str, str]:
        """Return number format and shape of each input; a word is a size that may vary."""
        words = {symbol: axis.name for axis in self.axes for symbol in axis.symbols}
        return {
            name: f"{str(self.example[name].dtype).removeprefix('torch.')} "
            f"({', '.join(str(words.get(size, size)) for size in shape)})"
            for name, shape in self.shapes.items()
        }

    def resized(self, axis: Axis) -> Iterator[Batch]:
        """Yield inputs with other sizes of an axis, also beyond guards: the example, repeated."""
        traced = {symbol: one.size for one in self.axes for symbol in one.symbols}
        limits = (self.program.range_constraints.get(symbol) for symbol in axis.symbols)
        most = {int(limit.upper) for limit in limits if limit and limit.upper.is_Integer}
        beyond = {size + 1 for size in most if size < LARGEST}
        for size in sorted({1, max(2, axis.size // 2), axis.size + 1, 4 * axis.size + 1} | beyond):
            changed = {**traced, **dict.fromkeys(axis.symbols, size)}
            yield {
                name: _cut(tensor, [int(sympify(size).subs(changed)) for size in self.shapes[name]])
                for name, tensor in self.example.items()
            }


def _name_of(name: str, dim: int, example: Batch) -> str:
    """Return what an open size is called."""
    if dim == 0 and len({tensor.shape[:1] for tensor in example.values()}) == 1:
        return "batch"
    return "length" if name == _IDS and dim == 1 else f"{name}_{dim}"


def _cut(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    for dim, size in enumerate(shape):
        entries = torch.arange(size, device=tensor.device) % tensor.shape[dim]
        tensor = tensor.index_select(dim, entries)
    return tensor


# ---- the model and its inputs ------------------------------------------------------------


def read(
    model: nn.Module | str | os.PathLike[str],
    dense: nn.Module | None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a model as it is, or the one in a directory, in a number format."""
    found = model if isinstance(model, nn.Module) else load(model, dtype=dtype, dense=dense)
    check_usable(found)
    Reader.of(found)  # which refuses what wraps a model
    if is_on_disk(found):
        raise ModelError("the model's weights stay on disk; save it, and export the directory")
    return found


def example_for(model: nn.Module, given: Any = None) -> Batch:
    """Return inputs to trace a model with, by name: a file's, those given, or of a known form."""
    if isinstance(given, str | os.PathLike):
        samples = load_tensors(os.fspath(given), model).tensors
        known: Batch | None = {name: tensor[:2] for name, tensor in samples.items()}
    else:
        known = _without_labels(model) if given is None else Reader.of(model).example(given)
    if known is None:
        raise DataError(
            f"it is not known what this {type(model).__name__} takes: give two inputs or "
            "more, by `--inputs FILE`, or by example_inputs= in Python"
        )
    Reader.of(model).check(known)
    if all(tensor.ndim and len(tensor) == 1 for tensor in known.values()):
        # The size 1 of a trace stays 1.
        known = {name: torch.cat([tensor, tensor]) for name, tensor in known.items()}
    return to_model(known, model)


def reads_tokens(model: nn.Module) -> bool:
    """Tell whether a model of transformers reads tokens alone."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "main_input_name", None) == _IDS and not decodes


def _without_labels(model: nn.Module) -> Batch | None:
    """Return the known example without labels, of which code makes a loss and no prediction."""
    known = _known_example(model)
    if known is None or isinstance(model, ProgramModule):
        return known
    needed = Reader.of(model).needs
    return {n: x for n, x in known.items() if n not in _LABELS or n in needed} or known


def _known_example(model: nn.Module) -> Batch | None:
    if isinstance(model, ProgramModule):
        built = model.built_by
        return _with_tokens(example_of(model), None if built is None else built[1])
    config, sample = getattr(model, "config", None), lineage_of(model).sample
    if reads_tokens(model):
        length = min(_TOKENS, context_length(model) or _TOKENS)
        return _with_tokens({_IDS: torch.zeros(2, length, dtype=torch.int64)}, config)
    if sample is not None:
        return Reader.of(model).example(sample.drawn())
    return _images_of(model, config)


def _with_tokens(example: Batch, config: Any) -> Batch:
    """Draw tokens of a vocabulary for the ``input_ids`` of an example."""
    size, ids = getattr(config, "vocab_size", None), example.get(_IDS)
    if size is None or ids is None:
        return example
    drawn = torch.randint(size, ids.shape, generator=torch.Generator().manual_seed(0))
    return {**example, _IDS: drawn}


def _images_of(model: nn.Module, config: Any) -> Batch | None:
    """Return images for a model of transformers whose config says of what size they are."""
    name, size = getattr(model, "main_input_name", ""), getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", None)
    if name != "pixel_values" or size is None or channels is None:
        return None
    sides = size if isinstance(size, list | tuple) else (size, size)
    return {name: Drawn((2, channels, *sides), "float32", -1.0, 1.0).tensor()}
