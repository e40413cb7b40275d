"""Classification models of torchvision: half of every prunable group removed, and proved."""

from __future__ import annotations

import pytest

from .measure import LEAST_EFFECT, measure
from .zoo import REPRESENTATIVES, torchvision_case, torchvision_names

pytest.importorskip("torchvision")

_GIANTS = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
"""The code of smaller ones, and as slow as all of those together."""

_LONG = ("densenet121", "inception_v3", "maxvit_t", "swin_v2_t", "vgg11_bn", "vit_b_32")
"""Representatives, but as slow as all of those others together."""

_QUICK = [name for name in REPRESENTATIVES if name not in _LONG]
_OTHERS = [name for name in torchvision_names() if name not in (*_QUICK, *_GIANTS)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS)]
)
def test_half_of_every_group_can_go(name: str) -> None:
    case = torchvision_case(name, small=True)
    found = measure(case.build(), case.make_inputs())
    assert found.effect > LEAST_EFFECT
    assert found.prunable > 0
    assert found.parameters_after < (1 - found.share / 4) * found.parameters
