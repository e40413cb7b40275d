"""Whole experts as groups: which ones are found, the masked model, and the smaller one."""

import copy
import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import osscar
from graph import UnitKind
from osscar.base.errors import EquivalenceError, ModelError, RequestError
from osscar.checkpoint.directory import save
from osscar.experts.find import mixtures_in
from osscar.network.hooks import InDouble
from osscar.preparation.prepare import prepare
from osscar.proof.equivalence import masked
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink
from solvers import GroupScore, RouterScores, RoutingRule
from tests.osscar.families import framing_tokenizer, tokens
from tests.osscar.mixtures import MIXTURES, ROUTERS, mixture

FAMILIES = [name for name in (*MIXTURES, *ROUTERS) if name != "phimoe"]
NORMALIZED = RoutingRule(2, RouterScores.SOFTMAX, normalized=True)
PLAIN = RoutingRule(2, RouterScores.SOFTMAX)
SIGMOID = RoutingRule(2, RouterScores.SIGMOID, normalized=True)
RULES = {
    "mixtral": (NORMALIZED, None),
    "olmoe": (PLAIN, None),
    "qwen2-moe": (PLAIN, None),
    "qwen3-moe-normalized": (NORMALIZED, None),
    "jamba": (PLAIN, None),
    "gpt-oss": (NORMALIZED, None),  # the same as a softmax of those that are chosen
    "granitemoe": (NORMALIZED, None),
    "glm4-moe": (SIGMOID, "e_score_correction_bias"),
    "ernie-moe": (NORMALIZED, "moe_statics.e_score_correction_bias"),
    "minimax-m2": (SIGMOID, "argument 1"),
    "deepseek-v2": (PLAIN, None),
    "deepseek-v3": (
        RoutingRule(2, RouterScores.SIGMOID, True, 2.5),
        "e_score_correction_bias",
    ),
    "deepseek-v2-groups": (RoutingRule(2, RouterScores.SOFTMAX, False, 1.7, 4, 2), None),
    "deepseek-v3-groups": (
        RoutingRule(2, RouterScores.SIGMOID, True, 2.5, 2, 1, GroupScore.TOP_TWO),
        "e_score_correction_bias",
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


# ---- what is found -----------------------------------------------------------------------


@pytest.mark.parametrize("family", RULES)
def test_the_rule_of_a_router_is_found_by_what_it_puts_out(family):
    model = mixture(family)
    (one, *_) = found(model)
    assert (one.routing.rule, one.routing.bias) == RULES[family]
    assert one.group.kind is UnitKind.EXPERTS
    assert one.group.name == one.experts
    assert one.group.step == one.routing.rule.groups
    assert one.group.prunable
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


def test_a_router_that_is_not_trained_is_known_by_its_code():
    model = mixture("qwen2-moe")
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)
    assert {one.routing.rule for one in found(model)} == {PLAIN}


# ---- what cannot leave -------------------------------------------------------------------


def reasons(model):
    """Return why the experts of a model cannot leave, one for each mixture."""
    groups = [one.group for one in found(model)]
    assert groups
    assert not any(group.prunable for group in groups)
    return {group.frozen[0].reason for group in groups}


def test_a_router_without_a_known_rule_is_told():
    said = reasons(mixture("phimoe"))
    assert all("PhimoeTopKRouter) sends tokens with other weights" in reason for reason in said)


def test_experts_that_are_called_in_another_way_are_told():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    config = hf.Llama4TextConfig(
        **small, num_key_value_heads=2, head_dim=8, intermediate_size=40, num_local_experts=4,
        intermediate_size_mlp=40, interleave_moe_layer_step=1, num_experts_per_tok=1,
    )  # fmt: skip
    (reason,) = reasons(hf.Llama4ForCausalLM(config).eval())
    assert "Llama4TextExperts) is not called with tokens, the experts of each" in reason


def test_experts_that_all_tokens_are_sent_to_stay():
    kind, values = MIXTURES["mixtral"]
    config = kind(**{**values, "num_experts_per_tok": 4})
    said = reasons(hf.AutoModelForCausalLM.from_config(config).eval())
    assert all("every token is sent to all 4 experts" in reason for reason in said)


def changed(model, name, forward):
    """Give every module of a class a forward pass of its own, and return the model."""
    for module in model.modules():
        if type(module).__name__ == name:
            module.forward = forward.__get__(module)
    return model


def counting(self, hidden):
    """Route as a router whose code counts all experts."""
    logits = nn.functional.linear(hidden, self.weight)
    weights, chosen = logits.softmax(1).topk(2)
    return logits, weights, chosen.clamp(min=4 - len(self.weight))


def no_sum(self, hidden, experts, weights):
    """Return what is no sum over experts."""
    down, up = self.down_proj[experts], self.gate_up_proj[experts].chunk(2, 2)[0]
    h = torch.einsum("td,tkfd->tkf", hidden, up).relu()
    return torch.einsum("tkf,tkdf,tk->td", h, down, weights).tanh()


@pytest.mark.parametrize(
    ("name", "forward", "kind", "words"),
    [
        (
            "MixtralTopKRouter",
            counting,
            EquivalenceError,
            "none of 2 groups can follow: .* differs",
        ),
        ("MixtralExperts", no_sum, RequestError, "the last matrices of its experts are not seen"),
    ],
)
def test_code_that_cannot_do_with_fewer_experts_is_refused(name, forward, kind, words):
    model = changed(mixture("mixtral"), name, forward)
    with pytest.raises(kind, match=words):
        osscar.prune(model, tokens(), experts=2)


class Own(nn.Module):
    """A mixture of one's own, by the code of a module or by that of the block."""

    def __init__(self, router=None):
        super().__init__()
        self.gate, self.experts = router or nn.Linear(8, 4), Experts()

    def forward(self, x):
        if isinstance(self.gate, nn.Linear):
            weights, experts = self.gate(x).softmax(1).topk(2)
        else:
            _, experts, weights = self.gate(x)
        return x + self.experts(x, experts, weights)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(8, 4)
        self.factor = 0.7

    def forward(self, x):
        logits = self.score(x)
        best, experts = logits.topk(2)
        return logits, experts, best.softmax(1) * self.factor


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 8, 8) * 0.3) for _ in range(2))

    def forward(self, hidden, experts, weights):
        h = torch.einsum("td,tkdf->tkf", hidden, self.up[experts]).relu()
        return torch.einsum("tkf,tkfd,tk->td", h, self.down[experts], weights)


def test_routing_that_is_no_module_is_told():
    with torch.no_grad():
        (one,) = mixtures_in(Own().eval(), {"x": torch.randn(40, 8)})
    assert "code of the module around it routes" in one.group.frozen[0].reason


def test_a_router_that_takes_no_drawn_tokens_is_told():
    model = Own(Router()).eval()

    def forward(self, x):
        assert x.abs().max() < 1e-3
        return Router.forward(self, x)

    model.gate.forward = forward.__get__(model.gate)
    with torch.no_grad():
        (one,) = mixtures_in(model, {"x": 1e-5 * torch.randn(40, 8)})
    assert "fails on drawn tokens" in one.group.frozen[0].reason


def test_a_mixture_of_ones_own_loses_experts_and_is_saved(tmp_path):
    torch.manual_seed(0)
    model, x = Own(Router()).eval(), torch.randn(40, 8)
    with torch.no_grad():
        (one,) = mixtures_in(model, {"x": x})
        assert one.routing.rule.scale == 0.7
        dense = copy.deepcopy(model)
        plan = PruningPlan((GroupPlan.of(one.group, (0, 2, 3)),))
        assert shrink(model, plan, [(x,)]).certificate.error < 1e-6
        assert (model(x) - dense(x)).abs().max() > 1e-2
        assert model.gate.score.out_features == 3
        save(model, tmp_path / "smaller", example_inputs=(x,))
        again = osscar.load(tmp_path / "smaller", dense=dense)
        assert_close(again(x), model(x))


# ---- the masked model --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tensor"), [("gpt-oss", "bias"), ("deepseek-v3", "e_score_correction_bias")]
)
def test_the_masked_model_is_that_with_logits_at_minus_infinity(family, tensor):
    """Which biases say, of all logits or of the choice: what is not chosen has no weight."""
    model = mixture(family, kernel="eager").double()
    mixtures = found(model)
    plan = PruningPlan(tuple(keeping(one, i) for i, one in enumerate(mixtures)))
    by_hand = copy.deepcopy(model)
    for one, group in zip(mixtures, plan.groups, strict=True):
        getattr(by_hand.get_submodule(one.router), tensor).data[list(group.gone)] = -1e9
    with torch.no_grad(), InDouble():
        dense = model(**example()).logits
        with masked(model, plan):
            logits = model(**example()).logits
        expected = by_hand(**example()).logits
        assert torch.equal(model(**example()).logits, dense)
    assert (logits - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (logits - dense).abs().max() > 1e-3 * dense.abs().max()


# ---- the smaller model -------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loses_experts_and_is_proved(family):
    model = mixture(family, kernel="eager").double()
    mixtures = found(model)
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        dense = model(**example()).logits
    plan = PruningPlan(tuple(keeping(one, i) for i, one in enumerate(mixtures)))
    with InDouble():
        proof = shrink(model, plan, [example(), {"input_ids": tokens()[2:5]}])
    # LFM2 adds a millionth to the sum that it divides weights by.
    assert proof.certificate.error < (1e-5 if family == "lfm2-moe" else 1e-10)
    assert not proof.plan.integers
    with torch.no_grad():
        smaller = model(**example()).logits
    assert (smaller - dense).abs().max() > 1e-3 * dense.abs().max()
    gone = [
        len(group.gone) * one.group.removable
        for group, one in zip(plan.groups, mixtures, strict=True)
    ]
    assert sum(p.numel() for p in model.parameters()) == before - sum(gone)


def test_layers_may_keep_different_experts_and_neurons_leave_with_them():
    model = mixture("mixtral", kernel="eager").double()
    with prepare(model, tokens()) as prepared:
        first, second = prepared.routed
        # No budget of today takes them.
        assert all(group.kind is not UnitKind.EXPERTS for group in prepared.groups)
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


@pytest.mark.parametrize(("family", "kept"), [("mixtral", (2,)), ("deepseek-v2-groups", (0, 1, 2))])
def test_too_few_experts_are_refused_and_the_model_stays(family, kept):
    model = mixture(family, kernel="eager")
    before = copy.deepcopy(model.state_dict())
    plan = PruningPlan((GroupPlan.of(found(model)[0].group, kept),))
    with pytest.raises(ModelError, match="experts stay"):
        shrink(model, plan, [example()])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_wrong_slice_is_found_out():
    model = mixture("mixtral", kernel="eager")
    whole = GroupPlan.of(found(model)[0].group, (1, 2, 3))
    router, *experts = whole.slots
    wrong = [
        GroupPlan("router", UnitKind.NEURONS, 4, (1, 2, 3), (router,)),
        GroupPlan("experts", UnitKind.NEURONS, 4, (0, 2, 3), tuple(experts)),
    ]
    with pytest.raises(EquivalenceError):
        shrink(model, PruningPlan(tuple(wrong)), [example()])


def test_the_loss_of_balance_counts_the_experts_that_stay():
    model = mixture("mixtral", kernel="eager").double()
    plan = PruningPlan(tuple(GroupPlan.of(one.group, (0, 2, 3)) for one in found(model)))
    model.config.output_router_logits = True  # which is no output that a proof compares
    shrink(model, plan, [example()])
    with torch.no_grad():
        out = model(**example(), labels=example()["input_ids"])
    assert [logits.shape[-1] for logits in out.router_logits] == [3, 3]
    probabilities = torch.cat(out.router_logits).softmax(1)
    sent = torch.nn.functional.one_hot(probabilities.topk(2).indices, 3).double().sum(1).mean(0)
    expected = 3 * float(sent @ probabilities.double().mean(0))
    assert float(out.aux_loss) == pytest.approx(expected, rel=1e-5)


# ---- saved and read back -----------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_experts_are_saved_and_read_by_transformers(family, tmp_path):
    model = mixture(family)
    mixtures = found(model)
    plan = PruningPlan(tuple(keeping(one, i) for i, one in enumerate(mixtures)))
    shrink(model, plan, [example()])
    saved = save(model, tmp_path / "smaller")
    assert saved.stock
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path)
    with torch.no_grad():
        expected = model(**example()).logits
        assert_close(plain(**example()).logits, expected)
        assert_close(osscar.load(saved.path)(**example()).logits, expected)


def test_layers_that_become_alike_again_are_said_by_the_config(tmp_path):
    model = mixture("mixtral")
    for keep in ((3, 2), (2, 2)):
        plan = [
            GroupPlan.of(one.group, tuple(range(kept)))
            for one, kept in zip(found(model), keep, strict=True)
            if kept < one.group.units
        ]
        shrink(model, PruningPlan(tuple(plan)), [example()])
    assert model.num_experts == 2
    saved = save(model, tmp_path / "smaller")
    assert saved.stock
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path)
    assert plain.config.num_local_experts == 2
    with torch.no_grad():
        assert torch.equal(plain(**example()).logits, model(**example()).logits)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["deepseek-v3-groups", "gpt-oss", "mixtral"])
def test_layers_with_different_experts_are_saved_with_the_code_that_reads_them(family, tmp_path):
    model = mixture(family)
    shrink(model, PruningPlan((keeping(found(model)[0], 1),)), [example()])
    saved = save(model, tmp_path / "smaller")
    assert saved.with_code
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path, trust_remote_code=True)
    with torch.no_grad():
        expected = model(**example()).logits
        assert_close(plain(**example()).logits, expected)
        assert_close(osscar.load(saved.path)(**example()).logits, expected)


def test_a_stock_file_holds_a_tensor_for_each_expert_that_stays(tmp_path):
    model = mixture("mixtral")
    plan = PruningPlan(tuple(GroupPlan.of(one.group, (1, 3)) for one in found(model)))
    shrink(model, plan, [example()])
    save(model, tmp_path / "smaller")
    names = load_file(tmp_path / "smaller" / "model.safetensors").keys()
    experts = {
        int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name
    }
    assert experts == {0, 1}


def test_inspect_lists_experts(run, tmp_path):
    model = tmp_path / "model"
    mixture("mixtral").save_pretrained(model)
    framing_tokenizer().save_pretrained(model)
    status, out, err = run("inspect", model, "--json", tmp_path / "groups.json")
    assert status == 0, err
    groups = json.loads((tmp_path / "groups.json").read_text())["groups"]
    experts = [group for group in groups if group["kind"] == "experts"]
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert [group["name"] for group in experts] == names
    assert all(group["units"] == 4 and not group["frozen"] for group in experts)
    assert all(f"{name} " in out for name in names)
