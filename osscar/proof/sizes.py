"""For inputs of which sizes a proof holds, in words; every size is at least one."""

from __future__ import annotations

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

_GUARD = re.compile(r"(?:(\d+) )?(==|!=|<=|>=|<|>)?(?: )?([\w.]+\.shape\[\d+\])(?: (\S+) (\d+))?")
_ALIKE = re.compile(r"[\w.]+\.shape\[0\] == [\w.]+\.shape\[0\]")
_SWAPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "==", "!=": "!="}
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
    batch, tokens, conditions = _Range(samples), _Range(), list[str]()
    for guard in dict.fromkeys((*dense.sizes.guards, *made.sizes.guards)):
        known = _simple(guard)
        if known is not None and known[0].endswith(".shape[0]"):
            batch.limit(*known[1:])
        elif known is not None and known[0] == _TOKENS:
            tokens.limit(*known[1:])
        elif not _ALIKE.fullmatch(guard) and (not known or _limits(*known[1:])):
            conditions.append(guard)
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
        if name == "input_ids" and sizes == [None, None]:
            given.append(tokens.words("token"))
        else:
            given.append(f"{name} ({', '.join('any' if x is None else str(x) for x in sizes)})")
    listed = ", and ".join((*said, ", ".join(given)))
    return " where ".join((listed, *([" and ".join(conditions)] if conditions else [])))


def _simple(guard: str) -> tuple[str, str, int] | None:
    """Return the size, the comparison and the number of a condition on one size; else None."""
    found = _GUARD.fullmatch(guard)
    if found is None:
        return None
    number, how, place, after, last = found.groups()
    if number and how and not after:
        return place, _SWAPPED[how], int(number)
    return (place, after, int(last)) if after in _SWAPPED and not number and not how else None


def _limits(how: str, number: int) -> bool:
    """Whether a condition does not hold for every size from one on."""
    sizes = _Range()
    sizes.limit(how, number)
    return sizes != _Range()


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
    noun = "token" if [*sizes] == [1] else "tokens"
    return f"{listed} {noun}" if place == _TOKENS else f"{place} = {listed}"


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
