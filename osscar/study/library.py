"""A library of subset-selection instances, with the best that is known of each.

The index, ``osscar/data/instances/index.json``, names *sources*, which are files of tensors, and
*instances*, which are a source with a number of units to keep and a damping.  Small sources lie in
the package.  Large ones are made by a recipe: of a model that has a name, of tokens that lie in the
package, and of the linear maps that are read.

So that everyone makes the same file bit by bit, nothing in a recipe depends on the order of sums.
The model runs in float64; what its layers read is rounded to whole numbers of 16 bits, a power of
two times a column; sums of their products are whole numbers below 2^53, which float64 adds without
rounding.  Two machines whose float64 activations differ in their last digits so make the same file,
unless a number lies within that difference of where rounding turns: `docs/instances.md` tells how
often.  The digest of a file is that of its header and tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from osscar.base.errors import FileError, OptionError
from osscar.base.files import atomic_write, cache_directory, make_directory
from osscar.base.json_files import STRICT, read_json
from osscar.base.progress import stage
from osscar.models.load import load_model
from osscar.network.double import InDouble
from solvers import Consumer, SubsetProblem
from solvers.storage import read, write

DIRECTORY = Path(str(files("osscar"))) / "data" / "instances"
INDEX = DIRECTORY / "index.json"
CERTIFICATES = "certificates"
"""The part of the directory that holds what proves the bounds of small instances."""

FORMAT = "osscar-gram/1"
_BITS = 15
"""Of the magnitude of what a layer reads: 2^14 products of two stay below 2^44."""
_AT_ONCE = 4
"""Windows of tokens that a model reads in one call."""


@dataclass(frozen=True)
class Recipe:
    """How a source is made: the linear maps of a model, and the tokens that it reads."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: str
    """A name that `osscar.load_model` knows without a hub."""
    modules: tuple[str, ...]
    """Linear maps whose inputs are joined, as where their outputs are added up."""
    tokens: str
    """A file of the package: token ids, (windows, length) uint16."""


@dataclass(frozen=True)
class Source:
    """A file of tensors, of which instances are made."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    words: str
    """What it is, in a phrase."""
    units: int
    rows: int
    """Of all consumers together."""
    outputs: int
    """Of all consumers together."""
    consumers: int
    sha256: str
    """Of its header and its tensors (`source_digest`)."""
    recipe: Recipe | None = None
    """None where the file lies in the package."""


@dataclass(frozen=True)
class Best:
    """The best that is known of an instance."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    support: tuple[int, ...]
    loss: float
    """Of the refit on `support`, divided by the loss of removing everything."""
    found_by: str
    found_in: float
    """Seconds of one thread."""
    bound: float = 0.0
    """No support has a lower loss; divided likewise."""
    bound_by: str = ""
    """Empty where nothing but zero is known."""
    bound_in: float = 0.0
    proved: bool = False
    """Whether the bound leaves no more than 1e-4 of the loss."""
    certificate: str = ""
    """Digest of the file in the package that proves the bound, where one does."""

    @property
    def gap(self) -> float:
        """Share of the loss by which the optimum may lie below it."""
        return max(0.0, 1.0 - self.bound / self.loss) if self.loss > 0 else 0.0


@dataclass(frozen=True)
class LibraryInstance:
    """An instance: a source, how many units stay, and the damping."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: str
    keep: int
    damp: float
    """Added to the diagonal of H, relative to its mean; windows have it in their files already."""
    best: Best


@dataclass(frozen=True)
class Library:
    """All sources and instances by name."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: str
    sources: dict[str, Source]
    instances: dict[str, LibraryInstance]

    def matching(self, patterns: Sequence[str], *, shipped: bool = False) -> list[str]:
        """Return the names that match a pattern, all where there is none, in the index's order.

        shipped: Whether to leave out those whose source has to be made first.

        Raises
        ------
        OptionError
            If a pattern matches nothing.
        """
        names = [
            name
            for name, one in self.instances.items()
            if not shipped or self.sources[one.source].recipe is None
        ]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"no instance has a name like {pattern!r}; `osscar instances list` has them all"
                )
        return [n for n in names if not patterns or any(fnmatchcase(n, p) for p in patterns)]

    def problem(self, name: str) -> SubsetProblem:
        """Return an instance as a problem, its source made where it does not lie here yet.

        Raises
        ------
        OptionError
            If there is none of this name.
        """
        if name not in self.instances:
            raise OptionError(
                f"there is no instance {name!r}; `osscar instances list` has them all"
            )
        one = self.instances[name]
        return posed(self.file(one.source), name, one.keep, one.damp)

    def file(self, source: str) -> Path:
        """Return where the file of a source lies; make it where it does not.

        Raises
        ------
        FileError
            If what is made, or was made before, is not what the index names.
        """
        known = self.sources[source]
        if known.recipe is None:
            return DIRECTORY / f"{source}.safetensors"
        path = cache_directory() / "instances" / f"{source}.safetensors"
        if not path.exists():
            make_directory(path.parent)
            with atomic_write(path) as partial:
                write(partial, {"format": FORMAT}, made(known.recipe, known.units))
        found = source_digest(*read(path))
        if found != known.sha256:
            raise FileError(
                path,
                f"it has the digest {found}, and the index {known.sha256}: this is another "
                "instance, of which no best value is known. If the file was made by this version, "
                "this machine rounds otherwise than in the last digits (docs/instances.md); if "
                "not, delete it",
            )
        return path


@cache
def library() -> Library:
    """Return the library as the package has it."""
    return read_json(INDEX, Library)


def posed(file: Path, name: str, keep: int, damp: float) -> SubsetProblem:
    """Return the problem of a source's file: a finished one, or Gram matrices to be damped."""
    header, tensors = read(file)
    if header.get("format") != FORMAT:
        whole = SubsetProblem.load(file)
        return SubsetProblem(whole.consumers, keep, name)
    count = sum(key.endswith(".H") for key in tensors)
    consumers = tuple(
        Consumer.from_gram(
            tensors[f"{i}.H"], tensors[f"{i}.W0"], units=tensors[f"{i}.rows"], damp=damp
        )
        for i in range(count)
    )
    return SubsetProblem(consumers, keep, name)


def source_digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a source's header and tensors: names, formats, shapes and numbers."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.contiguous().numpy()
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return found.hexdigest()


# ---- recipes -----------------------------------------------------------------------------


def made(recipe: Recipe, units: int) -> dict[str, Tensor]:
    """Return the tensors of a source, by its recipe; minutes where the model is not small."""
    model = load_model(recipe.model, dtype="float32", device="cpu").model
    maps = [model.get_submodule(name) for name in recipe.modules]
    weights = [weight_of(one) for one in maps]
    tokens = torch.from_numpy(np.load(DIRECTORY / recipe.tokens).astype(np.int64))
    return gram_tensors(inputs_of(model.double(), maps, tokens), weights, units)


def gram_tensors(X: Sequence[Tensor], weights: Sequence[Tensor], units: int) -> dict[str, Tensor]:
    """Return the tensors of a source of linear maps whose outputs are added up.

    X: What each reads, (positions, inputs) float64.
    weights: Of each, (inputs, outputs) float32.
    """
    H, W = exact_gram(torch.cat(list(X), 1)), torch.cat(list(weights))
    return {"0.H": H, "0.W0": W, "0.rows": torch.arange(len(W)).view(units, -1)}


def weight_of(linear: Any) -> Tensor:
    """Return a linear map's weights, (inputs, outputs) float32, as a copy."""
    weight: Tensor = linear.weight
    return weight.detach().T.float().clone(memory_format=torch.contiguous_format)


class _Reached(Exception):
    """The last map has been reached: what comes after it need not be computed."""


def inputs_of(model: nn.Module, maps: Sequence[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Return what each map reads of all tokens, (positions, inputs) float64."""
    seen: dict[nn.Module, list[Tensor]] = {one: [] for one in maps}

    def keep(module: nn.Module, args: Any) -> None:
        seen[module].append(args[0].flatten(0, -2))
        if all(len(found) == len(seen[module]) for found in seen.values()):
            raise _Reached

    hooks = [one.register_forward_pre_hook(keep) for one in maps]
    try:
        parts = torch.split(tokens, _AT_ONCE)
        with InDouble(), torch.no_grad(), stage("reading", total=len(parts)) as bar:
            for part in parts:
                try:
                    model(input_ids=part, use_cache=False)
                except _Reached:
                    bar.advance()
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(found) for found in seen.values()]


def exact_gram(X: Tensor) -> Tensor:
    """Return ``X'X/N`` of X rounded to 16 bits, in float32: the same bits in whatever order.

    X: (N, p) float64, of at most 2^22 positions.  Each column is rounded to multiples of the power
    of two that makes its largest magnitude a number of `_BITS` bits.
    """
    largest = X.abs().amax(0)
    # Of zeros nothing is to be rounded.  frexp is exact, where a logarithm is not.
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent, _BITS) - _BITS
    step = torch.ldexp(torch.ones_like(largest), exponent)
    whole = torch.round(X / step)
    sums = whole.T @ whole
    return (sums * step * step[:, None] / len(X)).float()
