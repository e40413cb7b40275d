"""What the proof compares, and what it says when a model cannot be shrunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import AdapterError, EquivalenceError
from osscar.proof import equivalence
from osscar.proof.equivalence import masked, proof_outputs, prove_equal
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking import shrink as shrinking
from osscar.shrinking.integers import IntegerSearch
from osscar.shrinking.shrink import shrink
from tests.coverage.measure import half_of, shrink_by_half
from tests.graph.topologies import randomized
from tests.zoo import transformers_case


class Two(nn.Module):
    """Two linear layers; what happens to the neurons and the outputs is up to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.leave = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> object:
        return self.answer(self.leave(self.hidden(self.enter(x).relu())))

    def hidden(self, h: Tensor) -> Tensor:
        return h

    def answer(self, y: Tensor) -> object:
        return y


def _refusal(model: nn.Module, plan: PruningPlan, inputs: list) -> EquivalenceError:
    """Return why shrinking is refused; nothing has changed."""
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(EquivalenceError) as caught:
        shrink(model, plan, inputs)
    assert before == {n: id(tensor) for n, tensor in model.state_dict(keep_vars=True).items()}
    return caught.value


def _half(model: nn.Module, example: object) -> PruningPlan:
    return half_of(graph.trace(model, example).prunable)


# ---- outputs of every sort ---------------------------------------------------------------


class Labels(Two):
    """Puts out nothing but whole numbers."""

    def answer(self, y: Tensor) -> object:
        return y.argmax(-1)


class WrongLabels(Labels):
    """Reads the bias in a way that no plan below knows of."""

    def forward(self, x: Tensor) -> object:
        h = torch.relu(F.linear(x, self.enter.weight)) + self.enter.bias.mean()
        return self.answer(self.leave(h))


def _plan_for(model: Two) -> PruningPlan:
    slots = (
        graph.Slot("enter.weight", 0, graph.Role.PRODUCER, "enter", 8),
        graph.Slot("leave.weight", 1, graph.Role.CONSUMER, "leave", 8),
        graph.Slot("enter.bias", 0, graph.Role.PASS_THROUGH, "enter", 8),
    )
    return PruningPlan((GroupPlan("n", graph.UnitKind.NEURONS, 8, (0, 1, 2, 3), slots),))


def test_labels_are_compared_exactly() -> None:
    x = torch.randn(200, 4)
    model = randomized(Labels())
    plan = _plan_for(model)
    with masked(model, plan):
        expected = model(x)
    assert shrink(model, plan, [(x,)]).certificate.error == 0
    assert torch.equal(model(x), expected)

    wrong = WrongLabels().eval()
    with torch.no_grad():
        wrong.enter.bias.copy_(torch.tensor([0.0] * 4 + [9.0] * 4))
    assert "have to be equal" in str(_refusal(wrong, plan, [(x,)]))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8, dtype=torch.cfloat)
        self.leave = nn.Linear(8, 3, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(h * h.abs())


def test_complex_outputs_are_compared() -> None:
    model, x = Complex().eval(), torch.randn(3, 4, dtype=torch.cfloat)
    plan = _plan_for(model)
    with masked(model, plan):
        (expected,) = proof_outputs(model, [(x,)])
    assert shrink(model, plan, [(x,)]).certificate.error < 1e-5
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(EquivalenceError, match="differs"):
        prove_equal([expected], [expected * 1j])


def test_a_proof_of_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda _, y: [float(y.sum()), None]  # noqa: E731
    for answer in (nothing, lambda _, y: y[:, :0], lambda _, y: y * float("nan")):
        monkeypatch.setattr(Two, "answer", answer)
        model = randomized(Two())
        error = _refusal(model, _plan_for(model), [(torch.randn(2, 4),)])
        assert "nothing can be compared" in str(error)
        assert "leave it out" not in str(error)


class Masked(Two):
    """Puts out logits that are masked, beside an empty tensor."""

    def answer(self, y: Tensor) -> object:
        return y.masked_fill(torch.ones_like(y).triu(1).bool(), -torch.inf), y[:, :0]


def test_masked_logits_and_empty_tensors_are_proved() -> None:
    model, x = randomized(Masked()), torch.randn(3, 4)
    plan = _half(model, (x,))
    with masked(model, plan):
        expected = model(x)[0]
    assert shrink(model, plan, [(x,)]).certificate.error < 1e-5
    torch.testing.assert_close(model(x)[0], expected)


@pytest.mark.parametrize("other", [1.0, torch.inf, torch.nan])
def test_infinity_has_to_stay(other: float) -> None:
    one = torch.tensor([1.0, -torch.inf])
    assert prove_equal([one], [one]).error == 0
    with pytest.raises(EquivalenceError, match="at other places"):
        prove_equal([one], [torch.tensor([1.0, other])])


class Sampled(Two):
    """Adds noise to its outputs, as a variational encoder does."""

    def answer(self, y: Tensor) -> object:
        return y + torch.randn_like(y), torch.rand(len(y)).argsort(), torch.randperm(5) * y


class SampledInside(Two):
    """Adds noise to the neurons, of which the shrunk model has fewer."""

    def hidden(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


def test_models_that_draw_random_numbers_are_compared_on_the_same_ones() -> None:
    model, x = randomized(Sampled()), torch.randn(7, 4)
    state = torch.get_rng_state()
    shrink(model, _half(model, (x,)), [(x,), (x[:1],)])
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_as_wide_as_what_is_pruned_cannot_be_compared() -> None:
    model = randomized(SampledInside())
    assert "differs" in str(_refusal(model, _plan_for(model), [(torch.randn(7, 4),)]))


def test_a_model_that_fails_with_its_cache_is_refused() -> None:
    torch.manual_seed(0)
    config = hf.RwkvConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, context_length=16)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    inputs = {"input_ids": torch.randint(64, (2, 7))}
    groups = graph.trace(model, inputs).prunable
    error = _refusal(model, half_of(groups), [inputs])
    assert "RwkvSelfAttention" in str(error)
    assert "blocks.0.attention.neurons', 'rwkv.blocks.1.attention.neurons': leave" in str(error)
    left = [group for group in groups if "attention" not in group.name]
    shrink(model, half_of(left), [inputs])
    with torch.no_grad():
        model(**inputs)


# ---- modules that follow -----------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.leave(self.encoder(x, src_key_padding_mask=padding))
        return y


@pytest.mark.parametrize("proved_with_padding", [False, True])
def test_padding_is_not_packed_for_attention_that_lost_heads(proved_with_padding: bool) -> None:
    model, x = randomized(Encoder()), torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = (x, padding) if proved_with_padding else (x,)
    plan = _half(model, inputs)
    assert {group.kind for group in plan.groups} == {"heads", "neurons"}
    with masked(model, plan), torch.no_grad():
        expected = model(x, padding)
    shrink(model, plan, [inputs])
    with torch.no_grad():
        found = model(x, padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_encoders_that_keep_their_heads_still_pack() -> None:
    model, x = randomized(Encoder()), torch.randn(2, 5, 16)
    plan = _half(model, (x,))
    kept = tuple(group for group in plan.groups if group.kind != "heads")
    shrink(model, PruningPlan(kept), [(x,)])
    assert model.encoder.use_nested_tensor


class _OwnName(nn.MultiheadAttention):
    """A subclass that changes nothing."""


class _OwnForward(nn.MultiheadAttention):
    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


class Attending(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.attention = kind(16, 4, batch_first=True)
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.attention(x, x, x, need_weights=False)[0])
        return y


def test_subclasses_of_multihead_attention_lose_heads() -> None:
    model, inputs = randomized(Attending(_OwnName)), [(torch.randn(2, 5, 16),)]
    dependencies, _, _ = shrink_by_half(model, inputs)
    assert "heads" in {group.kind for group in dependencies.prunable}
    assert isinstance(model.attention, _OwnName)

    other = randomized(Attending(_OwnForward))
    assert "_OwnForward" in str(_refusal(other, _half(other, inputs[0]), inputs))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Gain(nn.Conv2d):
    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight * self.gain
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kind", [Standardized, Gain])
def test_the_rows_of_a_weight_that_is_scaled_are_no_groups(kind: type[nn.Conv2d]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Conv2d(3, 8, 1)
            self.beside = kind(3, 8, 3, padding=1)
            self.by_channel = Gain(8, 8, 3, padding=1, groups=8)
            self.leave = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.leave(self.by_channel(self.enter(x) + self.beside(x)))
            return y

    model = randomized(Residual())
    shrink_by_half(model, [(torch.randn(2, 3, 6, 6),)])
    assert (model.beside.groups, model.beside.out_channels) == (1, 4)
    assert (model.by_channel.groups, model.by_channel.in_channels) == (4, 4)


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
@pytest.mark.filterwarnings("ignore")
def test_layers_with_normalized_weights_show_their_sizes(norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9)
    osscar.slice_units(model, _half(model, (x,)))
    assert model[0].out_channels == model[2].in_channels == 4
    model(x)


# ---- what a refusal says -----------------------------------------------------------------


class Literal(nn.Module):
    """Code that counts on 8 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.leave = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.enter(x).reshape(-1, 8).relu())
        return y


class Fine(Literal):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.enter(x).relu())
        return y


@pytest.mark.parametrize("count", [1, 6])
def test_a_refusal_names_the_groups_to_leave_out(count: int) -> None:
    blocks = [Fine() for _ in range(count - 1)]
    model, x = randomized(nn.Sequential(*blocks, Literal())), torch.randn(8, 6)
    groups = [group for group in graph.trace(model, (x,)).prunable if group.units == 8]
    plan = half_of(groups)
    assert len(plan.groups) == count
    error = str(_refusal(model, plan, [(x,)]))
    guilty = groups[-1].name
    assert f"the pruning of '{guilty}': leave it out" in error
    assert f"skip='{guilty}'" in error
    assert not any(repr(group.name) in error for group in plan.groups if group.name != guilty)
    # The layer that has the wrong width is not to blame, but who calls it.
    assert "Literal) cannot follow" in error
    assert "torch.nn" not in error


def test_of_groups_that_fail_only_together_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomized(nn.Sequential(Fine(), Fine())), torch.randn(8, 6)
    plan = half_of(group for group in graph.trace(model, (x,)).prunable if group.units == 8)
    outputs = equivalence.proof_outputs

    def wrong_if_all_left(network: nn.Module, inputs: list, keeping: bool = False) -> list[Tensor]:
        factor = 2 if network[0].enter.out_features == network[1].enter.out_features == 4 else 1
        return [factor * output for output in outputs(network, inputs)]

    monkeypatch.setattr(equivalence, "proof_outputs", wrong_if_all_left)
    assert "the pruning of '1.neurons': leave it out" in str(_refusal(model, plan, [(x,)]))
    monkeypatch.setattr(shrinking, "_MOST_TRIALS", 0)
    assert "is among the pruning of '0.neurons', '1.neurons'" in str(_refusal(model, plan, [(x,)]))


def test_layers_of_torch_get_no_adapter() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Linear(8, 3)))
    slot = graph.Slot("0.weight", 0, graph.Role.PRODUCER, "0", 8)
    bias = graph.Slot("0.bias", 0, graph.Role.PASS_THROUGH, "0", 8)
    plan = PruningPlan((GroupPlan("n", graph.UnitKind.NEURONS, 8, (0, 1), (slot, bias)),))
    error = _refusal(model, plan, [(torch.randn(2, 4),)])
    assert isinstance(error, AdapterError)
    assert "osscar.adapter" not in str(error)
    assert "mat1 and mat2" in str(error)


def test_a_stride_never_follows() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Conv2d(3, 2, 3, stride=2, padding=2, dilation=2)
            self.leave = nn.Conv2d(2, 3, 1)
            self.stride, self.layer_idx, self.mine = 2, 2, 2

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.leave(self.enter(x))
            return y

    model, x = Strided().eval(), torch.randn(1, 3, 9, 9)
    search = IntegerSearch(model, _half(model, (x,)), lambda: 0.0)
    names = {name for name, _ in search._following("enter")}
    assert not {"stride", "padding", "dilation", "kernel_size"} & names
    assert search._following("") == {("mine", None): 1}


@pytest.mark.parametrize("kept", [18, 20])
def test_widths_that_experts_cannot_have_are_explained(kept: int) -> None:
    case = transformers_case("mixtral")
    model, inputs = case.build(), case.make_inputs()
    groups = [g for g in graph.trace(model, inputs[0]).prunable if g.kind == "neurons"]
    plan = PruningPlan(tuple(GroupPlan.of(group, tuple(range(kept))) for group in groups))
    if kept % 4 == 0:
        assert shrink(model, plan, inputs).certificate.error < 1e-4
    else:
        error = str(_refusal(model, plan, inputs))
        assert "multiple of 4 units" in error
        assert "round_to=4" in error
