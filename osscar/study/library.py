"""Instances of subset selection that ship with the package, and the best that is known of each.

The index, ``osscar/data/instances/index.json``, names *sources*, which are files of tensors, and
*instances*, which are a source with a number of units to keep and a damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import with_config

from osscar.base.errors import OptionError
from osscar.base.json_files import STRICT, read_json
from solvers import Consumer, SubsetProblem
from solvers.storage import read

DIRECTORY = Path(str(files("osscar"))) / "data" / "instances"
INDEX = DIRECTORY / "index.json"
CERTIFICATES = "certificates"
"""The part of the directory that holds what proves the bounds of small instances."""

FORMAT = "osscar-gram/1"

TOLERANCE = 1e-6
"""Share of the best known loss within which an answer counts as that."""


@with_config(STRICT)
@dataclass(frozen=True)
class Source:
    """A file of tensors, of which instances are made."""

    words: str
    """What it is, in a phrase."""
    units: int
    rows: int
    """Of all consumers together."""
    outputs: int
    """Of all consumers together."""
    consumers: int
    sha256: str
    """Of the file."""


@with_config(STRICT)
@dataclass(frozen=True)
class Best:
    """The best that is known of an instance."""

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

    def compared(self, loss: float) -> str:
        """Say how an answer of a loss compares with the best known."""
        if loss < self.loss * (1 - TOLERANCE):
            return f"improves the best known value by {1 - loss / self.loss:.4%}: please send it"
        if loss <= self.loss * (1 + TOLERANCE):
            return "is as good as the best known" + (
                ", which is proved optimal" if self.proved else ""
            )
        return f"is {loss / self.loss - 1:.4%} above the best known"


@with_config(STRICT)
@dataclass(frozen=True)
class LibraryInstance:
    """An instance: a source, how many units stay, and the damping."""

    source: str
    keep: int
    damp: float
    """Added to the diagonal of H, relative to its mean; windows have it in their files already."""
    best: Best


@with_config(STRICT)
@dataclass(frozen=True)
class Library:
    """All sources and instances by name."""

    format: str
    sources: dict[str, Source]
    instances: dict[str, LibraryInstance]

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a pattern, in the index's order."""
        return [name for name in self.instances if fnmatchcase(name, pattern)]

    def chosen(self, patterns: Sequence[str]) -> list[str]:
        """Return the names that match any of the patterns, in the index's order (OptionError)."""
        for pattern in patterns:
            if not self.matching(pattern):
                raise OptionError(
                    f"no instance has a name like {pattern!r}; `osscar instances list` has them all"
                )
        names = {name for pattern in patterns for name in self.matching(pattern)}
        return [name for name in self.instances if name in names]

    def problem(self, name: str) -> SubsetProblem:
        """Return an instance as a problem (OptionError if there is none of this name)."""
        if name not in self.instances:
            raise OptionError(
                f"there is no instance {name!r}; `osscar instances list` has them all"
            )
        one = self.instances[name]
        return posed(DIRECTORY / f"{one.source}.safetensors", name, one.keep, one.damp)


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
