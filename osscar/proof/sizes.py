"""For inputs of which sizes a proof holds, in words; every size is at least one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
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


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else f"{count:,}"


def _words(least: int, conditions: Sequence[str], noun: str = "") -> str:
    """Say for which n from `least` on conditions hold, such as "two tokens or more".

    They hold for those of the example.
    """
    many, most = noun and f" {noun}s", least + _beyond(conditions)
    good = [*_meeting(least, conditions)]
    low, high = good[0], good[-1]
    lowest = f"{_number(low)}{noun and f' {noun}' if low == 1 else many}"
    if high == low:
        return lowest
    said = f"{_number(low)} to {_number(high)}{many}" if high < most else f"{lowest} or more"
    gaps = [f"{n:,}" for n in sorted({*range(low, high)} - {*good})]
    return said + (f" but not {' or '.join(gaps)}" if gaps else "")


def _meeting(least: int, conditions: Sequence[str]) -> Iterator[int]:
    """Yield for which n from `least` on conditions hold, up to where none changes."""
    codes = [compile(one, "<guard>", "eval") for one in conditions]
    for n in range(least, least + _beyond(conditions) + 1):
        if all(eval(code, {"n": n}) for code in codes):
            yield n


def _beyond(conditions: Sequence[str]) -> int:
    """Return a number beyond which none of some polynomials changes its sign."""
    numbers = ([max(2, int(one)) for one in _NUMBER.findall(code)] for code in conditions)
    return max((2 * math.prod(some) + 2 for some in numbers), default=2)


def _conditions(programs: Sequence[Standalone]) -> tuple[dict[str, list[str]], list[str]]:
    """Return under which conditions on one size n alone programs hold, by its place, and others."""
    of_sizes, others = dict[str, list[str]](), list[str]()
    for guard in dict.fromkeys(guard for one in programs for guard in one.sizes.guards):
        places = set(_PLACE.findall(guard))
        place = min(places, default="")
        code = guard.replace(place, "n")
        if len(places) == 1 and _POLYNOMIAL.fullmatch(code) and _beyond([code]) <= _MOST_TRIED:
            of_sizes.setdefault(place, []).append(code)
        elif not _ALIKE.fullmatch(guard):
            others.append(_MULTIPLE.sub(r"\1 is a multiple of \2", guard))
    return of_sizes, others


def only_sizes(*programs: Standalone) -> dict[str, int]:
    """Return which sizes of inputs can be but one number where programs hold, by their places."""
    found = {}
    for place, conditions in _conditions(programs)[0].items():
        first, *others = islice(_meeting(1, conditions), 2)
        if not others:
            found[place] = first
    return found


def sizes_in_words(dense: Standalone, made: Standalone, *, samples: int = 1) -> str:
    """Say for which inputs two programs hold; `samples` are the fewest of a batch."""
    of_sizes, others = _conditions((dense, made))
    said, given = list[str](), list[str]()
    for name, value in zip(dense.input_names, dense.inputs, strict=True):
        if not isinstance(value, Tensor):
            given.append(f"{name} = {value}")
            continue
        pairs = zip(dense.sizes.shapes[name], made.sizes.shapes[name], strict=True)
        sizes = [one or other for one, other in pairs]
        if sizes[:1] == [None] and not said:
            batch = _words(samples, of_sizes.pop(f"{name}.shape[0]", []))
            of = "batches" if " " in batch else "a batch"
            said.append(f"{'any batch' if batch == 'one or more' else of} of {batch}")
        own = [of_sizes.get(f"{name}.shape[{dim}]", []) for dim in range(len(sizes))]
        if name == "input_ids" and sizes == [None, None] and not own[0]:
            given.append(_words(1, own[1], "token"))
            continue
        words = (
            str(size or (_words(1, own[dim]) if own[dim] else "any"))
            for dim, size in enumerate(sizes)
        )
        given.append(f"{name} ({', '.join(words)})")
    listed = ", and ".join((*said, ", ".join(given)))
    return " where ".join((listed, *([" and ".join(others)] if others else [])))


@dataclass(frozen=True)
class OtherSize:
    """Inputs like others, but of another size at a place, such as ``x.shape[1]``."""

    place: str
    size: int
    inputs: Mapping[str, Any]


def untried_in_words(untried: Iterable[OtherSize]) -> tuple[str, ...]:
    """Say of which sizes nothing is known."""
    found: dict[str, set[int]] = {}
    for one in untried:
        found.setdefault(one.place, set()).add(one.size)
    said = []
    for place, sizes in found.items():
        listed = " or ".join(map(str, sorted(sizes)))
        name, dim = place.removesuffix("]").split(".shape[")
        if dim == "0":
            said.append(f"batches of {listed}")
        elif place == _TOKENS:
            said.append(f"{listed} {'token' if sizes == {1} else 'tokens'}")
        else:
            said.append(f"{name} of size {listed} along dimension {dim}")
    return tuple(said)


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
