"""Whole experts as groups: which ones are found, the masked model, and the smaller one."""

import copy
import dataclasses

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

import osscar
from graph import UnitKind
from osscar.base.errors import ModelError
from osscar.checkpoint.directory import save
from osscar.network.hooks import InDouble
from osscar.preparation.prepare import prepare
from osscar.proof.equivalence import masked
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.routing.find import mixtures_in
from osscar.shrinking.shrink import shrink
from solvers import GroupScore, RouterScores, RoutingRule
from tests.osscar.expert_lists import WIDTH
from tests.osscar.families import tokens
from tests.osscar.mixtures import MIXTURES, ROUTERS, mixture

FAMILIES = [name for name in (*MIXTURES, *ROUTERS) if name != "phimoe"]
NORMALIZED = RoutingRule(2, RouterScores.SOFTMAX, normalized=True)
PLAIN = RoutingRule(2, RouterScores.SOFTMAX)
SIGMOID = RoutingRule(2, RouterScores.SIGMOID, normalized=True)
CORRECTION = "e_score_correction_bias"
RULES = {
    "mixtral": (NORMALIZED, None),
    "qwen2-moe": (PLAIN, None),
    "qwen3-moe-normalized": (NORMALIZED, None),
    "jamba": (PLAIN, None),
    "gpt-oss": (NORMALIZED, None),  # the same as a softmax of those that are chosen
    "glm4-moe": (SIGMOID, CORRECTION),
    "ernie-moe": (NORMALIZED, f"moe_statics.{CORRECTION}"),
    "minimax-m2": (SIGMOID, "argument 1"),
    "deepseek-v3": (RoutingRule(2, RouterScores.SIGMOID, True, 2.5), CORRECTION),
    "deepseek-v2-groups": (RoutingRule(2, RouterScores.SOFTMAX, False, 1.7, 4, 2), None),
    "deepseek-v3-groups": (
        RoutingRule(2, RouterScores.SIGMOID, True, 2.5, 2, 1, GroupScore.TOP_TWO),
        CORRECTION,
    ),
}


def example():
    return {"input_ids": tokens()[:2]}


def found(model):
    with torch.no_grad():
        return mixtures_in(model, example())


def keeping(mixture, gone):
    """Return a plan for a mixture without one expert of each of its groups of experts."""
    group, groups = mixture.group, mixture.routing.rule.groups
    size = group.units // groups
    leave = {g * size + gone % size for g in range(groups)}
    return GroupPlan.of(group, tuple(e for e in range(group.units) if e not in leave))


def each_without_one(mixtures):
    return PruningPlan(tuple(keeping(one, i) for i, one in enumerate(mixtures)))


def logits(model):
    with torch.no_grad():
        return model(**example()).logits


# ---- what is found -----------------------------------------------------------------------


@pytest.mark.parametrize("family", RULES)
def test_the_rule_of_a_router_is_found_by_what_it_puts_out(family):
    model = mixture(family)
    (one, *_) = found(model)
    assert (one.routing.rule, one.routing.bias) == RULES[family]
    assert (one.group.kind, one.group.name) == (UnitKind.EXPERTS, one.experts)
    assert one.group.prunable
    assert one.group.step == one.routing.rule.groups
    experts = model.get_submodule(one.experts)
    assert one.group.units == len(experts.down_proj)
    state = model.state_dict()
    own = {f"{one.experts}.{name}" for name, _ in experts.named_parameters()}
    gates = {slot.tensor for slot in one.group.slots} - own
    assert own < {slot.tensor for slot in one.group.slots}
    assert all(experts.down_proj.shape[0] in state[n].shape for n in gates)
    each = sum(p.numel() for p in experts.parameters())
    each += sum(p.numel() for n, p in model.named_parameters() if n in gates)
    assert one.group.removable * one.group.units == each


# ---- mixtures of one's own ---------------------------------------------------------------


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.randn(6, WIDTH)), 0.7

    def forward(self, x):
        logits = x @ self.weight.T
        weights, experts = logits.softmax(-1).topk(2)
        return logits, self.factor * weights / weights.sum(-1, keepdim=True), experts


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 8, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(6, WIDTH, 8) / 3)

    def forward(self, x, experts, weights):
        inner = torch.relu(torch.einsum("td,ehd->teh", x, self.up))
        each = torch.einsum("teh,edh->ted", inner, self.down)
        here = experts[:, :, None] == torch.arange(len(self.up))
        return (each * (weights[:, :, None] * here).sum(1)[:, :, None]).sum(1)


class Block(nn.Module):
    def __init__(self, router=None):
        super().__init__()
        self.router, self.experts = router or Router(), Experts()

    def forward(self, x):
        _, weights, experts = self.router(x)
        return x + self.experts(x, experts, weights)


class Capacity(Block):
    """Drops what an expert has no room for: only where there are many tokens."""

    def forward(self, x):
        _, weights, experts = self.router(x)
        sent = nn.functional.one_hot(experts.flatten(), 6).cumsum(0)
        place = sent.gather(1, experts.reshape(-1, 1)).view(experts.shape)
        return x + self.experts(x, experts, weights * (place <= 6))


def test_a_mixture_of_ones_own_loses_experts_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(40, WIDTH)
    with torch.no_grad():
        (one,) = mixtures_in(model, {"x": x})
        assert one.routing.rule == dataclasses.replace(NORMALIZED, scale=0.7)
        dense = copy.deepcopy(model)
        plan = PruningPlan((GroupPlan.of(one.group, (0, 2, 3)),))
        assert shrink(model, plan, [(x,)]).certificate.error < 1e-6
        assert (model(x) - dense(x)).abs().max() > 1e-2
        assert len(model.router.weight) == 3
        save(model, tmp_path / "smaller", example_inputs=(x,))
        again = osscar.load(tmp_path / "smaller", dense=dense)
        assert_close(again(x), model(x))


def net(block, factor=1.0):
    with torch.no_grad():
        for router in (one for one in block.modules() if isinstance(one, Router)):
            router.weight *= factor
    return nn.Sequential(block, nn.Linear(WIDTH, WIDTH)).eval()


OTHERWISE = r"'0\.experts' gets \d+ of 56 tokens of calibration batch 0 with other"


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore:.*calibration positions:UserWarning")
@pytest.mark.parametrize(
    ("kind", "factor", "dtype", "message"),
    [
        (Capacity, 1, torch.float32, OTHERWISE),
        (Block, 100, torch.float32, r"of 56 tokens .* than follow from the logits of its router"),
        (Block, 25, torch.float64, r"'0\.experts' cannot be chosen.*--skip"),
    ],
)
def test_a_block_that_sends_tokens_otherwise_is_refused(kind, factor, dtype, message):
    """Scores that saturate are equal where logits are not, or too far apart."""
    torch.manual_seed(0)
    model, x = net(kind(), factor).to(dtype), torch.randn(64, WIDTH).to(dtype)
    with pytest.raises(ModelError, match=message):
        osscar.prune(model, x, experts=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration positions:UserWarning")
def test_a_router_or_a_block_that_is_shared_is_left_alone():
    torch.manual_seed(0)
    first, twice = Block(), Block()
    model = nn.Sequential(
        first, Block(first.router), Block(), twice, twice, nn.Linear(WIDTH, WIDTH)
    )
    with pytest.warns(UserWarning, match="skipped, with all their units: '0.experts'; '1.exp"):
        result = osscar.prune(model.eval(), torch.randn(64, WIDTH), experts=4)
    assert [(layer.name, layer.kept) for layer in result.layers] == [("2.experts", 4)]
    reasons = {one.name: one.reason for one in result.skipped}
    assert reasons["0.experts"].endswith("output differs from the masked one's")
    assert reasons["0.experts"] == reasons["1.experts"]
    assert "is called 2 times in a forward pass" in reasons["3.experts"]


# ---- the masked model and the smaller one ------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("gpt-oss", "router.bias"),
        ("deepseek-v3", f"gate.{CORRECTION}"),
        ("minimax-m2", CORRECTION),  # of the block, which gives it to its router
    ],
)
def test_the_masked_model_is_that_with_logits_at_minus_infinity(family, tensor):
    """Which biases say, of all logits or of the choice: what is not chosen has no weight."""
    model = mixture(family, kernel="eager").double()
    plan = each_without_one(found(model))
    by_hand = copy.deepcopy(model)
    for layer, group in zip(by_hand.model.layers, plan.groups, strict=True):
        module, _, name = tensor.rpartition(".")
        getattr(layer.mlp.get_submodule(module), name).data[list(group.gone)] = -1e9
    with InDouble():
        dense = logits(model)
        with masked(model, plan):
            found_logits = logits(model)
        expected = logits(by_hand)
        assert torch.equal(logits(model), dense)
    assert (found_logits - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (found_logits - dense).abs().max() > 1e-3 * dense.abs().max()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loses_experts_is_proved_and_read_by_transformers(family, tmp_path):
    model = mixture(family, kernel="eager").double()
    mixtures, dense = found(model), logits(model)
    before = sum(p.numel() for p in model.parameters())
    plan = each_without_one(mixtures)
    with InDouble():
        proof = shrink(model, plan, [example(), {"input_ids": tokens()[2:5]}])
    # LFM2 adds a millionth to the sum that it divides weights by.
    assert proof.certificate.error < (1e-5 if family == "lfm2-moe" else 1e-10)
    assert not proof.plan.integers
    smaller = logits(model)
    assert (smaller - dense).abs().max() > 1e-3 * dense.abs().max()
    pairs = zip(plan.groups, mixtures, strict=True)
    gone = sum(len(group.gone) * one.group.removable for group, one in pairs)
    assert sum(p.numel() for p in model.parameters()) == before - gone
    model.float()
    saved = save(model, tmp_path / "smaller")
    assert saved.stock
    for read in (hf.AutoModelForCausalLM.from_pretrained, osscar.load):
        assert_close(logits(read(saved.path)), logits(model))


def test_layers_may_keep_different_experts_and_neurons_leave_with_them(tmp_path):
    model = mixture("mixtral", kernel="eager").double()
    with prepare(model, tokens()) as prepared:
        first, second = prepared.experts
        neurons = next(g for g in prepared.groups if g.name == f"{first.experts}.neurons")
    plan = PruningPlan(
        (
            GroupPlan.of(first.group, (1, 3)),
            GroupPlan.of(neurons, tuple(range(20))),
            GroupPlan.of(second.group, (0, 1, 2)),
        )
    )
    with InDouble():
        assert shrink(model, plan, [example()]).certificate.error < 1e-10
    one, other = (layer.mlp for layer in model.model.layers)
    assert one.experts.down_proj.shape == (2, 32, 20)
    assert (one.experts.num_experts, one.gate.num_experts) == (2, 2)
    assert other.experts.down_proj.shape == (3, 32, 40)
    assert model.num_experts == 4  # there is no one number for the loss of balance
    model.float()
    saved = save(model, tmp_path / "smaller")
    assert saved.with_code
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path, trust_remote_code=True)
    assert_close(logits(plain), logits(model))


def test_the_loss_of_balance_counts_the_experts_that_stay():
    model = mixture("mixtral", kernel="eager").double()
    plan = PruningPlan(tuple(GroupPlan.of(one.group, (0, 2, 3)) for one in found(model)))
    model.config.output_router_logits = True  # which is no output that a proof compares
    shrink(model, plan, [example()])
    with torch.no_grad():
        out = model(**example(), labels=example()["input_ids"])
    assert [logits.shape[-1] for logits in out.router_logits] == [3, 3]
    probabilities = torch.cat(out.router_logits).softmax(1)
    sent = nn.functional.one_hot(probabilities.topk(2).indices, 3).double().sum(1).mean(0)
    expected = 3 * float(sent @ probabilities.double().mean(0))
    assert float(out.aux_loss) == pytest.approx(expected, rel=1e-5)
