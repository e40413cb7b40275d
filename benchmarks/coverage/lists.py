"""The lists of architectures that docs/coverage.csv has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.coverage import images, shrunken
from benchmarks.coverage.case import Inputs, Made, first_that_runs
from tests import zoo
from tests.graph import blocks, topologies
from tests.osscar import programs
from tests.osscar.networks import small_net


@dataclass(frozen=True)
class Listed:
    """A list of architectures.

    title: On the page.
    names: Return the names of its models; a directory keeps what takes long to find out.
    make: Builds one of them, or raises `NotBuilt`.
    """

    title: str
    names: Callable[[Path | None], list[str]]
    make: Callable[[str], Made]


# ---- hand-written networks ---------------------------------------------------------------

_NETS: Mapping[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{
        f"topologies.{name}": (kind, inputs)
        for name, (kind, inputs, _) in topologies.PRUNABLE.items()
    },
    **{
        f"topologies.{name}": (kind, (torch.randn(3, 4),))
        for name, (kind, _) in topologies.FROZEN.items()
    },
    **{f"blocks.{name}": (kind, (inputs,)) for name, (kind, inputs, _) in blocks.BLOCKS.items()},
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


def _make_family(name: str) -> Made:
    case = zoo.transformers_case(name)
    return Made(case.build(), case.make_inputs())


LISTS: Mapping[str, Listed] = {
    "torchvision": Listed(
        "torchvision",
        lambda place: images.torchvision_names(place and place / "torchvision.json"),
        images.make_torchvision,
    ),
    "torchvision-all": Listed(
        "torchvision: every model",
        lambda place: images.torchvision_names(None, all_of_them=True),
        images.make_torchvision,
    ),
    "timm": Listed(
        "timm", lambda place: images.timm_names(place and place / "timm.json"), images.make_timm
    ),
    "transformers": Listed("transformers", lambda place: list(shrunken.families()), shrunken.make),
    "families": Listed(
        "transformers, sizes chosen by hand", lambda place: list(zoo.FAMILIES), _make_family
    ),
    "nets": Listed("hand-written networks", lambda place: list(_NETS), _make_net),
}
"""By the names that the command line knows them by."""

DEFAULT = ("torchvision", "timm", "transformers", "families", "nets")
"""What is measured unless others are named."""
