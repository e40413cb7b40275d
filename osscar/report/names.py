"""What names of groups have in common: modules that all lie in, and numbers of layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all of several names begin with, up to what numbers the layers.

    Examples
    --------
    >>> common_prefix(["model.layers.0.mlp.neurons", "model.layers.1.mlp.neurons"])
    'model.'
    >>> common_prefix(["model.layers.0.mlp.neurons", "head.neurons"])
    ''
    """
    if len(set(names)) < 2:
        return ""
    modules = [name.split(".") for name in names]
    outer = (parts[:-1] for parts in modules)
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*outer, strict=False))
    shared = [parts[0] for parts in alike]
    if shared and any(parts[len(shared)].isdecimal() for parts in modules):
        shared.pop()
    return "".join(f"{part}." for part in shared)


def without_prefix(prefix: str) -> str:
    """Say that names are shown without what they have in common; empty if that is nothing."""
    return f"Names are shown without what all begin with: {prefix[:-1]}." if prefix else ""


def depths(groups: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, int], str]:
    """Return where each group lies on an axis of depth, by name, and what that axis counts.

    That is the number of the layer in its name; where names do not begin alike up to that, or
    several groups of a kind lie in one layer, it is the place of the group in the model.
    """
    found = {name: _NUMBER.search(name) for name in groups}
    starts = {match and name[: match.start(1)] for name, match in found.items()}
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    places = {(groups[name]["kind"], number) for name, number in numbers.items()}
    if len(starts) == 1 and len(places) == len(groups):
        return numbers, "layer"
    return {name: place for place, name in enumerate(groups, 1)}, "group, from the input on"
