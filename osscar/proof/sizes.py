"""For inputs of which sizes a proof holds, in words; every size is at least one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graph.tracing.export import varies
from graph.tracing.standalone import Standalone, expression

_MOST_NUMBERS = 2**24
"""In an input of another size than the example."""

_NUMBER = re.compile(r"(?<![\w.\[])\d+\b")
"""A number in a guard, and no index."""

_PLACE = re.compile(r"[\w.]+\.shape\[\d+\]")
_ALIKE = re.compile(r"[\w.]+\.shape\[0\] == [\w.]+\.shape\[0\]")
_MULTIPLE = re.compile(r"([\w.]+\.shape\[\d+\]) % (\d+) == 0")
_POLYNOMIAL = re.compile(r"(?:n|\d+|[ ()+*<>=!-])+")
_MOST_TRIED = 2**19
"""Sizes that a condition is tried with, to say it in words."""

_NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_TOKENS = "input_ids.shape[1]"


@dataclass
class _Range:
    """The values of a size: all from `low` to `high`, but for those `without`."""

    low: int = 1
    high: int | None = None
    without: set[int] = field(default_factory=set)

    def limit(self, how: str, number: int) -> None:
        """Leave what a condition lets pass."""
        if how == "!=" and number >= self.low:
            self.without.add(number)
        if how in ("==", ">", ">="):
            self.low = max(self.low, number + (how == ">"))
        if how in ("==", "<", "<="):
            high = number - (how == "<")
            self.high = high if self.high is None else min(self.high, high)
        while self.low in self.without:
            self.low += 1

    def words(self, noun: str = "") -> str:
        """Say it of what the noun counts, such as "two tokens or more"."""
        many = noun and f" {noun}s"
        lowest = f"{_number(self.low)}{noun and f' {noun}' if self.low == 1 else many}"
        if self.high == self.low:
            return lowest
        said = f"{lowest} or more"
        if self.high is not None:
            said = f"{_number(self.low)} to {_number(self.high)}{many}"
        gaps = [f"{x:,}" for x in sorted(self.without) if self.low < x <= (self.high or x)]
        return said + (f" but not {' or '.join(gaps)}" if gaps else "")


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else f"{count:,}"


def sizes_in_words(dense: Standalone, made: Standalone, *, samples: int = 1) -> str:
    """Say for which inputs two programs hold; `samples` are the fewest of a batch."""
    ranges, conditions = dict[str, _Range](), list[str]()
    ranges["batch"] = _Range(samples)
    for guard in dict.fromkeys((*dense.sizes.guards, *made.sizes.guards)):
        places = set(_PLACE.findall(guard))
        limits = _limits(guard, *places) if len(places) == 1 else None
        if limits is not None:
            place = places.pop()
            place = "batch" if place.endswith(".shape[0]") else place
            for how, number in limits:
                ranges.setdefault(place, _Range()).limit(how, number)
        elif not _ALIKE.fullmatch(guard):
            conditions.append(_MULTIPLE.sub(r"\1 is a multiple of \2", guard))
    batch = ranges["batch"]
    said, given = list[str](), list[str]()
    for name, value in zip(dense.input_names, dense.inputs, strict=True):
        if not isinstance(value, Tensor):
            given.append(f"{name} = {value}")
            continue
        pairs = zip(dense.sizes.shapes[name], made.sizes.shapes[name], strict=True)
        sizes = [one or other for one, other in pairs]
        if sizes[:1] == [None] and not said:
            of = "a batch" if batch.low == batch.high else "batches"
            said.append(f"{'any batch' if batch == _Range() else of} of {batch.words()}")
        own = [ranges.get(f"{name}.shape[{dim}]", _Range()) for dim in range(len(sizes))]
        if name == "input_ids" and sizes == [None, None]:
            given.append(own[1].words("token"))
        else:
            words = [
                "any" if size is None and range == _Range() else str(size or range.words())
                for size, range in zip(sizes, own, strict=True)
            ]
            given.append(f"{name} ({', '.join(words)})")
    listed = ", and ".join((*said, ", ".join(given)))
    return " where ".join((listed, *([" and ".join(conditions)] if conditions else [])))


def _limits(guard: str, place: str) -> list[tuple[str, int]] | None:
    """Return what a condition on one size lets pass, as comparisons; None if it is no range."""
    code = guard.replace(place, "n")
    if not _POLYNOMIAL.fullmatch(code):
        return None
    # Beyond the product of its numbers no polynomial changes its sign.
    most = 2 * math.prod(max(2, int(number)) for number in _NUMBER.findall(code)) + 2
    if most > _MOST_TRIED:  # a limit of an index, such as 2**31
        return None
    holds = compile(code, "<guard>", "eval")
    good = [n for n in range(1, most + 1) if eval(holds, {"n": n})]
    if not good:
        return None
    low, high = good[0], good[-1]
    gaps = sorted(set(range(low, high)) - {*good})
    ends = [(">=", low), *([("<=", high)] if high < most else [])]
    return [*ends, *(("!=", gap) for gap in gaps)]


def untried_in_words(untried: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Say of which sizes nothing is known; each is a place, as guards have it, with a number."""
    found: dict[str, list[int]] = {}
    for place, size in untried:
        found.setdefault(place, []).append(size)
    return tuple(_words_of(place, sorted(set(sizes))) for place, sizes in found.items())


def _words_of(place: str, sizes: Sequence[int]) -> str:
    listed = " or ".join(map(str, sizes))
    if place.endswith(".shape[0]"):
        return f"batches of {listed}"
    if place == _TOKENS:
        return f"{listed} {'token' if [*sizes] == [1] else 'tokens'}"
    name, dim = place.removesuffix("]").split(".shape[")
    return f"{name} of size {listed} along dimension {dim}"


@dataclass(frozen=True)
class OtherSize:
    """Inputs like others, but of another size at a place, such as ``x.shape[1]``."""

    place: str
    size: int
    inputs: Mapping[str, Any]


def other_sizes(standalone: Standalone, example: Mapping[str, Any]) -> Iterator[OtherSize]:
    """Yield inputs that differ in one size: an open one, or a side of images, open or not."""
    leaves, form = pytree.tree_flatten({name: example[name] for name in standalone.names})
    places: dict[Any, list[tuple[int, int]]] = {}
    for index, value in enumerate(standalone.inputs):
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if varies(size) or (dim > 1 and value.dim() > 3):
                places.setdefault(expression(size), []).append((index, dim))
    numbers = [int(n) for guard in standalone.sizes.guards for n in _NUMBER.findall(guard)]
    told = sorted({number + more for number in numbers for more in (0, 1)} - {0})
    for size, those in places.items():
        index, dim = those[0]
        count = leaves[index].shape[dim]
        largest = _MOST_NUMBERS * count // max(1, *(leaves[i].numel() for i, _ in those))
        others = (*told, 1, 2 * count, 16 * count + 1) if size.is_Symbol else (2 * count,)
        for other in (other for other in others if other <= largest):
            changed = list(leaves)
            for index, dim in those:
                entries = torch.arange(other, device=leaves[index].device) % count
                changed[index] = changed[index].index_select(dim, entries)
            place = f"{standalone.input_names[those[0][0]]}.shape[{those[0][1]}]"
            yield OtherSize(place, other, pytree.tree_unflatten(changed, form))
