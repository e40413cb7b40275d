"""FLAP: variances of what a layer reads, and nothing but biases to make up for what leaves."""

import copy

import pytest
import torch
from torch import nn

import osscar
from osscar.consumers.linear_maps import linear_maps
from osscar.preparation.prepare import prepare
from osscar.walk.gram import GramAccumulator, pose


class Branches(nn.Module):
    """Two layers read the same units, one of them through a convolution's taps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.wide, self.point = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        return self.wide(x) + self.point(x)


def test_variances_follow_the_weight_of_each_layer():
    torch.manual_seed(0)
    with prepare(Branches().eval(), torch.randn(6, 3, 9, 9)) as prepared:
        [group] = [group for group in prepared.groups if group.units == 8]
        grams = [GramAccumulator(one) for one in linear_maps(prepared.model, group)]
        for gram in grams:
            gram.add(torch.rand(400, gram.linear_map.rows) + 3)
        alone = [copy.deepcopy(gram).consumer(0.1) for gram in grams]
        together = pose(grams, 4, "some", damp=0.1)
    for one, part in zip(alone, together.consumers, strict=True):
        torch.testing.assert_close(part.variance / part.H[0, 0], one.variance / one.H[0, 0])


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_refit_biases_alone_make_up_for_what_leaves(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 4, bias=bias)).eval()
    x = torch.randn(300, 6)
    asked = {"neurons": 6, "backend": "flap", "target": "weights", "damp": 1e9}
    result = osscar.prune(model, x, **asked)
    hidden = model[1](model[0](x)).double()
    scores = hidden.var(0) * model[2].weight.double().square().sum(0)
    kept = sorted(scores.topk(6).indices.tolist())
    assert list(result.plan.groups[0].kept) == kept
    removed = [unit for unit in range(10) if unit not in kept]
    torch.testing.assert_close(result.model[2].weight, model[2].weight[:, kept], rtol=1e-7, atol=0)
    if bias:
        made_up = model[2].weight[:, removed].double() @ hidden[:, removed].mean(0)
        expected = (model[2].bias.double() + made_up).float()
        torch.testing.assert_close(result.model[2].bias, expected, rtol=1e-5, atol=1e-6)
