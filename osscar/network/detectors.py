"""The networks of torchvision's detectors, without what makes boxes of their outputs."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

_AROUND = ("transform", "anchor_generator")
"""Children of a detector that have no weights: they prepare lists of images, and place boxes."""


class DetectorNetwork(nn.Module):
    """What a detector of torchvision computes of a batch of prepared images, in tensors alone.

    A detector takes images of any size, and returns as many boxes as it finds, which no two passes
    have to agree on.  In between is a network like any other: the backbone, and the heads that read
    its feature maps.  It shares the detector's children, under their names.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        around = copy.copy(detector)
        around.__dict__["_modules"] = {}
        for name, child in detector.named_children():
            (around if name in _AROUND else self).add_module(name, child)
        self._around = (around,)  # in a tuple, since it is no part of the network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return what boxes are made of, for normalized images (n, 3, height, width).

        Of detectors in one stage that is what their head returns, such as ``cls_logits``.  Of those
        in two stages it is the feature maps, which the second stage crops from, and what the first
        one says of each place.
        """
        inside: dict[str, Any] = dict(self.named_children())
        features = list(inside["backbone"](images).values())
        if "head" in inside:
            found: dict[str, Tensor] = inside["head"](features)
            return found
        objectness, deltas = inside["rpn"].head(features)
        named = {"features": features, "objectness": objectness, "deltas": deltas}
        return {f"{name}_{i}": x for name, xs in named.items() for i, x in enumerate(xs)}

    def detector(self) -> nn.Module:
        """Return the detector of these weights, from a list of images to boxes."""
        (around,) = self._around
        whole: nn.Module = copy.copy(around)
        whole.__dict__["_modules"] = {**around._modules, **self._modules}
        return whole.train(self.training)
