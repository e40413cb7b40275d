"""Numbers that code keeps under any name: which of them follow when units leave."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import AdapterError
from osscar.base.json_files import validated
from osscar.proof.equivalence import proof_outputs
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink
from osscar.shrinking.slice import adapter
from tests.coverage.measure import half_of, shrink_by_half
from tests.graph.topologies import randomized
from tests.osscar.test_shrinking import assert_refused, shrunk


class Attention(nn.Module):
    """As many heads as each is wide, under names that no one else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.nheads, self.each, self.span = 4, 4, 16
        self.qkv = nn.Linear(10, 3 * self.span)
        self.out = nn.Linear(self.span, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.nheads, self.span)

    def attend(self, x: Tensor, heads: int, span: int) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            part.view(n, length, heads, self.each).transpose(1, 2)
            for part in self.qkv(x).split(span, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, span))


class Decoder(nn.Module):
    """Attention, and features that become an image by a module without a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention())
        self.layers = nn.Sequential(
            nn.Linear(10, 6 * 4),
            nn.ReLU(),
            nn.Unflatten(1, (6, 2, 2)),
            nn.ConvTranspose2d(6, 3, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.blocks(x).mean(1))


def test_numbers_under_unknown_names_are_found_by_trial() -> None:
    model, inputs = randomized(Decoder()), [(torch.randn(2, 5, 10),), (torch.randn(3, 6, 10),)]
    dense = copy.deepcopy(model)
    _, proof, _ = shrink_by_half(model, inputs)
    assert {(n.module, n.attribute, n.value) for n in proof.plan.integers} == {
        ("layers.2", "unflattened_size", (3, 2, 2)),
        *(
            (f"blocks.{block}", name, n)
            for block in "01"
            for name, n in (("nheads", 2), ("span", 8))
        ),
    }
    # What was found is part of the plan, which works without inputs from then on.
    written = json.loads(json.dumps(dataclasses.asdict(proof.plan)))
    osscar.slice_units(dense, validated(written, PruningPlan, "the plan"))
    dense.load_state_dict(model.state_dict())
    assert all(map(torch.equal, proof_outputs(dense, inputs), proof_outputs(model, inputs)))


class OfConfig(nn.Module):
    """Reads the number of its neurons from a config that others read, too."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.both = nn.Linear(6, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split([self.config.intermediate_size] * 2, dim=-1)
        return x + self.down(gate.sigmoid() * up)


def test_a_number_that_code_reads_from_a_shared_config_follows_in_one_of_its_own() -> None:
    config = SimpleNamespace(intermediate_size=10, name="shared")
    net, x = nn.Sequential(OfConfig(config), OfConfig(config)).eval(), torch.randn(8, 6)
    shrunk(net, x, **{"0_both": 4, "1_both": 7})
    assert [part.config.intermediate_size for part in net] == [4, 7]
    assert (config.intermediate_size, net[0].config.name) == (10, "shared")


class Remembering(nn.Module):
    """Keeps what it makes of a parameter until it is converted, as position biases often are.

    It also notes its width when it is called first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.kept: dict[str, Tensor] = {}

    def _apply(self, *args: object, **kwargs: object) -> nn.Module:
        self.kept = {}
        return super()._apply(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "width"):
            self.width = x.shape[-1]
        kept = self.kept.setdefault(str(x.device), torch.tanh(self.gain.detach()))
        return x.view(-1, self.width) * kept


@pytest.mark.parametrize("has_run", [False, True])
def test_what_modules_remember_of_their_parameters_is_made_anew(has_run: bool) -> None:
    net = nn.Sequential(nn.Linear(5, 12), Remembering(12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(8, 5)
    if has_run:
        net(x)  # so that it remembers
    proof = shrink(net, half_of(graph.trace(net, (x,)).prunable), [(x,)])
    assert proof.certificate.error < 1e-12  # in float64, although it remembered float32
    assert len(proof.plan.integers) == has_run
    found = net(x)
    assert found.dtype == torch.float32
    net[1].kept = {}
    assert torch.equal(net(x), found)


class Stubborn(Attention):
    """Keeps its number of heads where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"heads": self.nheads, "span": self.span}
        del self.nheads, self.span

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.sizes["heads"], self.sizes["span"])


def test_a_module_that_cannot_follow_is_named_until_it_has_an_adapter() -> None:
    model, inputs = randomized(Stubborn()), [(torch.randn(2, 5, 10),)]
    plan = half_of(graph.trace(model, inputs[0]).prunable)
    assert_refused(
        model, plan, inputs, AdapterError, r"Stubborn fails with fewer units.*osscar\.adapter"
    )

    @adapter(Stubborn)
    def follow(module: Stubborn, group: GroupPlan) -> None:
        module.sizes = {name: group.scaled(size) for name, size in module.sizes.items()}

    assert shrink(model, plan, inputs).certificate.error < 1e-6
