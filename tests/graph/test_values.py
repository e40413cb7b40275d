"""Code that decides by numbers in its inputs: followed where these are whole, and refused else."""

import pytest
import torch
from torch import nn

import graph


class Grids(nn.Module):
    """Mixes the patches of each image; its code reads off how many there are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, patches, grid):
        ends = torch.repeat_interleave(grid.prod(1), torch.ones_like(grid[:, 0])).cumsum(0)
        parts = torch.split(patches, (ends - grid.prod(1)).diff(append=ends[-1:]).tolist())
        hidden = torch.cat([self.first(one) + one.mean() for one in parts])
        return self.second(hidden.relu())


class Chooses(nn.Module):
    """Has two layers that read the same units, of which a number chooses one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.tasks = nn.ModuleList([nn.Linear(10, 4), nn.Linear(10, 4)])

    def forward(self, x, task):
        return self.tasks[int(task)](self.first(x).relu())


def test_whole_numbers_that_decide_are_followed():
    inputs = {"patches": torch.randn(10, 6), "grid": torch.tensor([[2, 3], [1, 4]])}
    model = Grids().eval()
    before = model(**inputs)
    [group] = [one for one in graph.trace(model, inputs).groups if one.prunable]
    assert {slot.tensor for slot in group.slots} == {"first.weight", "first.bias", "second.weight"}
    assert torch.equal(model(**inputs), before)


def test_what_other_numbers_lead_to_is_not_left_out():
    with pytest.raises(graph.TraceError, match="depends on the values in a tensor"):
        graph.trace(Chooses().eval(), {"x": torch.randn(2, 6), "task": torch.tensor(1)})
