"""Experts that are a list of modules, by a block that is declared, leave whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graph
import osscar
from osscar.allocation.costs import Cost, weights
from osscar.base.errors import EquivalenceError, ModelError, RequestError
from osscar.preparation.prepare import prepare
from osscar.proof.equivalence import masked
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.routing.declared import called_as_mixtures
from osscar.routing.find import mixtures_in
from solvers import RouterScores, RoutingRule
from tests.osscar.expert_lists import (
    COUNT,
    WIDTH,
    Expert,
    Masked,
    Net,
    SoftmaxThenTopK,
    Sorted,
    TopKThenSoftmax,
    net,
)

NORMALIZED = RoutingRule(2, RouterScores.SOFTMAX, normalized=True)
SCALED = RoutingRule(2, RouterScores.SIGMOID, normalized=True, scale=1.5)
RULES = {
    SoftmaxThenTopK: NORMALIZED,
    TopKThenSoftmax: NORMALIZED,  # the same
    Sorted: SCALED,
    Masked: RoutingRule(2, RouterScores.SIGMOID),
}

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*since a refit is worse on held-out samples:UserWarning"),
]


@pytest.fixture
def x() -> Tensor:
    """Return calibration data."""
    torch.manual_seed(0)
    return torch.randn(24, 10, WIDTH, generator=torch.Generator().manual_seed(1))


def mixtures(model: nn.Module, x: Tensor):
    with torch.no_grad():
        return mixtures_in(model, {"x": x[:2]})


@pytest.mark.parametrize("kind", RULES)
def test_the_rule_is_found_and_blocks_compute_the_same_when_called_as_mixtures(kind, x):
    model = net(kind, kind)
    found = mixtures(model, x)
    rules = {dataclasses.replace(one.rule, scale=round(one.rule.scale, 9)) for one in found}
    assert rules == {RULES[kind]}
    lists = [one.listed for one in found]
    with torch.no_grad():
        expected = model(x)
        with called_as_mixtures(model, lists):
            assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(model(x), expected)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any("osscar" in name for name, _ in model.named_modules())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", RULES)
def test_experts_of_a_list_leave_and_the_model_is_proved_saved_and_loaded(kind, x, tmp_path):
    model = net(kind)
    (one,) = mixtures(model, x)
    result = osscar.prune(model, x, experts=4)
    (layer,) = result.layers
    assert result.certificate.error < 1e-10  # in double precision
    assert layer.refitted_loss < layer.relative_loss
    own, dense = (other.get_submodule(one.experts) for other in (result.model, model))
    pairs = list(zip(own, (dense[expert] for expert in layer.support), strict=True))
    assert all(torch.equal(a.up.weight, b.up.weight) for a, b in pairs)
    assert not all(torch.equal(a.down.weight, b.down.weight) for a, b in pairs)
    assert getattr(result.model.blocks[0], "num_experts", 4) == getattr(own, "num_experts", 4) == 4
    assert result.parameters_before - result.parameters_after == 2 * one.group.removable
    result.save(tmp_path / "smaller")
    again = osscar.load(tmp_path / "smaller", dense=model)
    assert torch.equal(again(x), result.model(x))
    cost = weights(Cost.BYTES, model, graph.DependencyGraph((), ()), [one.group])
    tensors = load_file(tmp_path / "smaller" / "model.safetensors").values()
    assert cost.of({layer.name: 4}) == sum(t.nbytes for t in tensors)


def test_experts_whose_last_layer_is_not_seen_stay(x):
    block = SoftmaxThenTopK()
    block.experts = nn.ModuleList(nn.Sequential(Expert(), nn.Tanh()) for _ in range(COUNT))
    with pytest.raises(RequestError, match=r"output matrices .* are not found.*remove weight norm"):
        osscar.prune(Net(block).eval(), x, experts=3)


def test_a_last_layer_whose_weight_is_computed_is_not_refitted(x):
    """What is written to it is overwritten when it is called."""
    block = SoftmaxThenTopK()
    for expert in block.experts:
        nn.utils.parametrizations.weight_norm(expert.down)
    (one,) = mixtures(Net(block).eval(), x)
    assert not one.group.frozen
    assert one.last_layer is None


def test_other_layers_lose_neurons_and_say_why_experts_do_not(x):
    """Code that gathers tokens cannot be traced: what lies around is."""
    with prepare(nn.Sequential(Expert(), net(SoftmaxThenTopK)).eval(), x) as prepared:
        assert "0.neurons" in [group.name for group in prepared.groups if group.prunable]
        reasons = {g.name: g.frozen[0].reason for g in prepared.groups if g.frozen}
    assert "depend on values there" in reasons["1.blocks.0.experts.neurons"]
    assert any("it enters '1.blocks.0', whose code gives experts" in r for r in reasons.values())


# ---- what is refused ---------------------------------------------------------------------


@osscar.mixture(gate="router", experts="experts", top_k=2)
class WrongGate(SoftmaxThenTopK):
    pass


@osscar.mixture(gate="gate", experts="experts", top_k=2)
class NotNormalized(SoftmaxThenTopK):
    pass


@osscar.mixture(gate="gate", experts="experts")
class Silent(SoftmaxThenTopK):
    """Whose gate returns logits alone, and nothing says what becomes of them."""


@osscar.mixture(gate="router", experts="ffns", route=lambda logits: 0)
class NoRoutes(TopKThenSoftmax):
    pass


@osscar.mixture(gate="gate", experts="experts", top_k=2)
class Elsewhere(SoftmaxThenTopK):
    """Loops to a number that no module has."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        return sum(
            (weights * (chosen == e)).sum(-1, keepdim=True) * self.experts[e](x)
            for e in range(COUNT)
        )


OTHERWISE = "outputs of 'blocks.0' differ from its declaration"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (WrongGate, "has no attribute `router`"),
        (NotNormalized, OTHERWISE),
        (Silent, "give top_k="),
        (NoRoutes, "int"),
    ],
)
def test_a_wrong_declaration_says_what_was_found(kind, words, x):
    with pytest.raises(ModelError, match=r"osscar\.mixture.* does not fit 'blocks\.0'") as raised:
        mixtures(Net(kind()).eval(), x)
    assert words in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_declaration_is_held_in_the_models_own_number_format(dtype, x):
    for kind in (SoftmaxThenTopK, TopKThenSoftmax):
        (one,) = mixtures(net(kind).to(dtype), x.to(dtype))
        assert not one.group.frozen
    with pytest.raises(ModelError, match=OTHERWISE):
        mixtures(net(NotNormalized).to(dtype), x.to(dtype))


def test_code_that_counts_all_experts_is_tried_and_refused(x):
    with pytest.raises(EquivalenceError, match="none of 1 group can be pruned"):
        osscar.prune(Net(Elsewhere()).eval(), x, experts=4)


def test_a_block_that_is_called_twice_is_refused(x):
    block = Masked()
    with pytest.raises(ModelError, match=r"does not fit 'blocks\.0': the block is called 2 times"):
        mixtures(Net(block, block).eval(), x)


def test_a_block_whose_experts_were_masked_chooses_as_before(x):
    """Its own bias, which decides with the scores, is put back."""
    model = net(Masked)
    (one,) = mixtures(model, x)
    plan = PruningPlan((GroupPlan.of(one.group, range(4)),))
    dense = model(x)
    with masked(model, plan):
        assert not torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)
