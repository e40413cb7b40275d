"""Experts that are a list of modules, by a block that is declared, leave whole."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import graph
import osscar
from osscar.allocation.costs import Cost, count
from osscar.base.errors import EquivalenceError, ModelError, OptionError, RequestError
from osscar.experts.find import mixtures_in
from osscar.experts.lists import called_as_mixtures
from osscar.preparation.prepare import prepare
from solvers import RouterScores, RoutingRule
from tests.osscar.expert_lists import (
    COUNT,
    WIDTH,
    Called,
    Expert,
    Gate,
    Masked,
    Net,
    OwnConfig,
    OwnModel,
    SoftmaxThenTopK,
    Sorted,
    TopKThenSoftmax,
    experts,
    net,
)
from tests.osscar.families import tokens

RULES = {
    SoftmaxThenTopK: RoutingRule(2, RouterScores.SOFTMAX, normalized=True),
    TopKThenSoftmax: RoutingRule(2, RouterScores.SOFTMAX, normalized=True),  # the same
    Sorted: RoutingRule(2, RouterScores.SIGMOID, normalized=True, scale=1.5),
    Masked: RoutingRule(2, RouterScores.SIGMOID),
    Called: RoutingRule(2, RouterScores.SIGMOID, normalized=True, scale=1.5),
}
NAMES = {TopKThenSoftmax: "ffns"}
"""What blocks call their experts, where it is another word."""

ALL = {"damp": 0.3, "correction_weight": 1.0}
"""With these, no sample is held out, and every weight is fitted to all of them."""

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*since a refit did worse on held-out samples:UserWarning"),
]


@pytest.fixture
def x() -> Tensor:
    """Return calibration data."""
    return torch.randn(24, 10, WIDTH, generator=torch.Generator().manual_seed(1))


def mixtures(model: nn.Module, x: Tensor):
    with torch.no_grad():
        return mixtures_in(model, {"x": x[:2]})


@pytest.mark.parametrize("kind", [kind for kind in RULES if kind is not Called])
def test_blocks_compute_the_same_when_called_as_mixtures(kind, x):
    model = net(kind, kind)
    lists = [one.listed for one in mixtures(model, x)]
    with torch.no_grad():
        expected = model(x)
        with called_as_mixtures(model, lists):
            assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(model(x), expected)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any("osscar" in name for name, _ in model.named_modules())


def by_hand(block: nn.Module, x: Tensor, kept: tuple[int, ...], rule: RoutingRule) -> Tensor:
    """Return the sum over those experts that stay, token by token and in double precision."""
    flat = x.reshape(-1, WIDTH)
    gate = getattr(block, "gate", None) or block.router
    logits = flat @ gate.weight.T + (
        gate.bias if isinstance(gate, nn.Linear) and gate.bias is not None else 0
    )
    scores = logits.double().sigmoid() if rule.scores is RouterScores.SIGMOID else logits.double()
    choice = getattr(block, "balance", gate.bias if isinstance(gate, Gate) else torch.zeros(COUNT))
    members = getattr(block, NAMES.get(type(block), "experts"))
    y = torch.zeros(flat.shape, dtype=torch.float64)
    for token, own in enumerate(scores):
        best = sorted(kept, key=lambda e: -float(own[e] + choice[e]))[:2]
        weights = own[best]
        if rule.scores is RouterScores.SOFTMAX:
            weights = weights.softmax(0)
        elif rule.normalized:
            weights = rule.scale * weights / weights.sum()
        for weight, expert in zip(weights, best, strict=True):
            y[token] += weight * members[expert](flat[token]).double()
    return y


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", RULES)
def test_the_set_that_is_chosen_loses_least_of_all_by_hand(kind, x):
    """That of the first block, before which nothing changes."""
    model = net(kind)
    block, few = model.blocks[0], x[:6]
    result = osscar.prune(model, few, experts=4, target="weights", backend="enumerate", **ALL)
    report = result.layers[0]
    with torch.no_grad():
        read = model.norms[0](model.first(few))
        Y = by_hand(block, read, tuple(range(COUNT)), RULES[kind])
        losses = {
            kept: float((by_hand(block, read, kept, RULES[kind]) - Y).square().sum())
            for kept in combinations(range(COUNT), 4)
        }
    best = min(losses, key=lambda kept: losses[kept])
    assert report.support == best
    assert report.relative_loss == pytest.approx(losses[best] / float(Y.square().sum()), rel=1e-3)
    assert report.refitted_loss <= report.relative_loss


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", RULES)
def test_experts_of_a_list_leave_and_the_model_is_proved_saved_and_loaded(kind, x, tmp_path):
    model = net(kind, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = osscar.prune(model, x, experts=4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [one.kept for one in result.layers] == [4, 4]
    assert result.certificate.error < 1e-10  # in double precision
    name = NAMES.get(kind, "experts")
    for layer, dense, small in zip(result.layers, model.blocks, result.model.blocks, strict=True):
        own, kept = getattr(small, name), [getattr(dense, name)[e] for e in layer.support]
        assert len(own) == 4
        for a, b in zip(own, kept, strict=True):
            assert torch.equal(a.up.weight, b.up.weight)
        assert not all(
            torch.equal(a.down.weight, b.down.weight) for a, b in zip(own, kept, strict=True)
        )
        assert getattr(small, "num_experts", 4) == getattr(own, "num_experts", 4) == 4
    assert result.parameters_before - result.parameters_after == sum(
        2 * one.group.removable for one in mixtures(model, x)
    )
    result.save(tmp_path / "smaller")
    again = osscar.load(tmp_path / "smaller", dense=model)
    assert torch.equal(again(x), result.model(x))
    cost = count(Cost.BYTES, model, [one.group for one in mixtures(model, x)], {"x": x[:2]})
    tensors = load_file(tmp_path / "smaller" / "model.safetensors").values()
    assert cost.of({one.name: 4 for one in result.layers}) == sum(t.nbytes for t in tensors)


@pytest.mark.slow
def test_code_of_the_kind_of_transformers_is_saved_with_its_own_config(tmp_path):
    hf.AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
    hf.AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    torch.manual_seed(0)
    model, data = OwnModel(OwnConfig()).eval(), tokens(32, 24)
    for parameter in (p for p in model.parameters() if p.ndim > 1):
        nn.init.normal_(parameter, std=0.3)
    result = osscar.prune(model, data, experts=4)
    saved = result.save(tmp_path / "smaller")
    assert saved.stock
    again = OwnModel.from_pretrained(saved.path)
    assert [len(block.experts) for block in again.blocks] == [4, 4]
    assert again.config.num_experts == 4
    with torch.no_grad():
        assert torch.equal(again(data).logits, result.model(data).logits)


@pytest.mark.slow
def test_experts_leave_in_half_precision(x):
    model = net(SoftmaxThenTopK, Sorted).bfloat16()
    result = osscar.prune(model, x.bfloat16(), experts=4, skip=["blocks.0.*"])
    assert [layer.kept for layer in result.layers] == [4]
    assert next(result.model.parameters()).dtype is torch.bfloat16


def test_experts_whose_last_layer_is_not_seen_stay(x):
    block = SoftmaxThenTopK()
    block.experts = nn.ModuleList(nn.Sequential(Expert(), nn.Tanh()) for _ in range(COUNT))
    with pytest.raises(RequestError, match=r"last matrices .* are not seen.*remove weight norm"):
        osscar.prune(Net(block).eval(), x, experts=3)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "normed", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"]
)
def test_a_last_layer_whose_weight_is_computed_is_not_refitted(normed, x):
    """What is written to it is overwritten when it is called."""
    block = SoftmaxThenTopK()
    for expert in block.experts:
        normed(expert.down)
    (one,) = mixtures(Net(block).eval(), x)
    assert not one.group.frozen
    assert one.last_layer is None


def test_other_layers_lose_neurons_and_say_why_experts_do_not(x):
    """Code that gathers tokens cannot be traced: what lies around is."""
    model = nn.Sequential(Expert(), net(SoftmaxThenTopK)).eval()
    result = osscar.prune(model, x, neurons=0.5, **ALL)
    names = [layer.name for layer in result.layers]
    assert "0.neurons" in names
    assert not any("blocks" in name for name in names)
    with prepare(model, x) as prepared:
        reasons = {g.name: g.frozen[0].reason for g in prepared.groups if g.frozen}
    assert "depend on values there" in reasons["1.blocks.0.experts.neurons"]
    assert any("it enters '1.blocks.0', whose code gives experts" in r for r in reasons.values())


# ---- what is refused ---------------------------------------------------------------------


class Different(SoftmaxThenTopK):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2] = Expert(neurons=12)


@osscar.mixture(gate="router", experts="experts")
class WrongGate(SoftmaxThenTopK):
    pass


@osscar.mixture(gate="experts.0", experts="experts")
class NoGate(SoftmaxThenTopK):
    pass


@osscar.mixture(gate="gate", experts="gate")
class WrongExperts(SoftmaxThenTopK):
    pass


class Unrouted(SoftmaxThenTopK):
    """Asks a router, and calls all experts in their order."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


class Elsewhere(SoftmaxThenTopK):
    """Loops to a number that no module has; what experts read is that of the gate, or `read`."""

    def read(self, x: Tensor, weights: Tensor) -> Tensor:
        return x

    def route(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x).softmax(-1).topk(2)
        return sum(
            (weights * (chosen == e)).sum(-1, keepdim=True) * self.experts[e](self.read(x, weights))
            for e in range(COUNT)
        )


class OtherRows(Elsewhere):
    def read(self, x: Tensor, weights: Tensor) -> Tensor:
        return x * weights[..., :1]


class Tempered(Elsewhere):
    def route(self, x: Tensor) -> Tensor:
        return self.gate(x) / 0.5


class Threshold(SoftmaxThenTopK):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        scores = scores * (scores > 0.5)
        return sum(scores[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


class Normed(SoftmaxThenTopK):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(x), (WIDTH,))


class SumSecond(TopKThenSoftmax):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), super().forward(x)[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (WrongGate, "it has no module 'router', and has 'gate', 'experts'"),
        (NoGate, "the gate puts out no logits of 6 experts"),
        (WrongExperts, "'gate' is a Linear; experts leave from a torch.nn.ModuleList"),
        (Different, "are not several of the same structure"),
        (Unrouted, "every token is sent to all 6 experts"),
        (OtherRows, "of the rows that 'gate' reads, times weights"),
        (Tempered, "with other weights than a softmax or a sigmoid of its logits"),
        (Threshold, "no rule is known for tokens that go to different numbers"),
        (Normed, "does not hold for 'blocks.0'"),
        (SumSecond, "put out their sum there"),
    ],
)
def test_a_wrong_declaration_says_what_was_found(kind, words, x):
    torch.manual_seed(0)
    model = Net(kind()).eval()
    with pytest.raises(ModelError, match=r"osscar\.mixture") as raised:
        mixtures(model, x)
    assert words in str(raised.value)


def test_code_that_counts_all_experts_is_tried_and_refused(x):
    torch.manual_seed(0)
    with pytest.raises(EquivalenceError, match="none of 1 group can follow"):
        osscar.prune(Net(Elsewhere()).eval(), x, experts=4)


def test_a_block_that_is_called_twice_is_refused(x):
    block = Masked()
    with pytest.raises(ModelError, match=r"does not hold for 'blocks\.0': it is called 2 times"):
        mixtures(Net(block, block).eval(), x)


class Capacity(SoftmaxThenTopK):
    """Gives experts no more than some tokens of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            token, place = token[:24], place[:24]
            y.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return y.view(x.shape)


def test_a_block_that_drops_tokens_where_they_are_many_is_refused(x):
    torch.manual_seed(0)
    model = Net(Capacity()).eval()
    assert not mixtures(model, x[:, :8])[0].group.frozen
    with pytest.raises(ModelError, match=r"to other experts of 'blocks.0.experts', or with other"):
        osscar.prune(model, x[:, :8].repeat(4, 1, 1), experts=4, batch_size=96)


class Undeclared(nn.Module):
    """Sends tokens to a list, which nobody has said."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.num_experts = nn.Linear(WIDTH, COUNT), experts(), COUNT

    forward = SoftmaxThenTopK.forward


def test_a_list_that_is_not_declared_stays_and_says_how_to_declare_it(x):
    block, call = Undeclared(), r"osscar\.mixture\('tests.*Undeclared', gate='\.\.\.', experts='exp"
    (one,) = mixtures(Net(block).eval(), x)
    assert one.group.frozen
    with pytest.raises(graph.TraceError, match=call):
        osscar.prune(Net(block).eval(), x, experts=4)
    osscar.mixture(Undeclared, gate="gate", experts="experts")  # by a call, too
    (one,) = mixtures(Net(block).eval(), x)
    assert not one.group.frozen
    assert one.last_layer == "down"


@pytest.mark.parametrize(("classes", "gate"), [((3,), "gate"), ((nn.Linear,), ""), ((dict,), "g")])
def test_what_is_no_declaration_is_refused(classes, gate):
    with pytest.raises(OptionError):
        osscar.mixture(*classes, gate=gate, experts="experts")


def test_lists_that_are_no_experts_are_no_mixtures(x):
    assert mixtures(Net(Expert(), Expert()).eval(), x) == ()
