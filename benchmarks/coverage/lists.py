"""The lists of architectures that docs/coverage.csv has."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.graph import blocks, topologies
from tests.osscar import programs
from tests.osscar.networks import small_net
from tests.zoo import images, shrunken
from tests.zoo.case import Inputs, Made, first_that_runs


@dataclass(frozen=True)
class Listed:
    """A list of architectures: its title on the page, names, and what builds one of them.

    `make` raises `NotBuilt`; `kind` tells the class of what could not be measured.
    """

    title: str
    names: Callable[[], Iterable[str]]
    make: Callable[[str], Made]
    kind: Callable[[str], str] = str


SHEET = Path(__file__).resolve().parents[2] / "docs" / "coverage.csv"


def known_rows() -> list[dict[str, str]]:
    """Return the rows of docs/coverage.csv."""
    with SHEET.open(newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


def listed(name: str) -> list[str]:
    """Return the models of a list in the sheet: of a library, the smallest of each module."""
    return [row["model"] for row in known_rows() if row["list"] == name]


_NETS: Mapping[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{
        f"{room}.{name}": (kind, inputs)
        for room, nets in (("topologies", topologies.PRUNABLE), ("blocks", blocks.BLOCKS))
        for name, (kind, inputs, _) in nets.items()
    },
    **{
        f"topologies.{name}": (kind, (torch.randn(3, 4),))
        for name, (kind, _) in topologies.FROZEN.items()
    },
    **{
        f"programs.{name}": (kind, (torch.randn(2, *shape),))
        for name, (kind, shape) in programs.CASES.items()
    },
    "networks.small-net": (small_net, (torch.randn(2, 3, 12, 12),)),
}


def _make_net(name: str) -> Made:
    build, inputs = _NETS[name]
    torch.manual_seed(0)
    model = topologies.randomized(build()).float()
    inputs = tuple(one.float() if one.is_floating_point() else one for one in inputs)
    more: Inputs = tuple(torch.cat((one, one.flip(0)[:1])) for one in inputs)
    return Made(model, first_that_runs(model, [[inputs, more], [inputs, inputs]]))


LISTS: Mapping[str, Listed] = {
    "torchvision": Listed("torchvision", partial(listed, "torchvision"), images.make_torchvision),
    "timm": Listed("timm", partial(listed, "timm"), images.make_timm),
    "transformers": Listed(
        "transformers",
        shrunken.families,
        shrunken.make,
        lambda name: shrunken.families()[name],
    ),
    "nets": Listed("hand-written networks", lambda: _NETS, _make_net),
}
"""By the names that the command line knows them by."""
