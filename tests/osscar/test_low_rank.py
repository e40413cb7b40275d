"""Adapters beside weights: their ranks are no neurons."""

import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import ModelError
from tests.osscar.recovery.perturbed import needs_peft


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
ASKED = {"neurons": 0.5, "round_to": 1, "device": "cpu"}


@needs_peft
@pytest.mark.parametrize(("layers", "count"), [(["0"], "1 adapter"), (["0", "2"], "2 adapters")])
def test_adapters_of_peft_are_refused_until_they_are_merged(layers, count):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=layers))
    with pytest.raises(ModelError, match=rf"has {count} of peft.*model\.merge_and_unload\(\)`$"):
        osscar.prune(adapted, X, **ASKED)
    result = osscar.prune(adapted.merge_and_unload(), X, **ASKED)
    assert [(layer.units, layer.kept) for layer in result.layers] == [(24, 12)]
