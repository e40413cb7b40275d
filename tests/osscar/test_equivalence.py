"""What the proof compares, in outputs of every sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import graph
from osscar.base.errors import AdapterError, EquivalenceError
from osscar.proof.equivalence import masked, proof_outputs, prove_equal
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink
from tests.graph.topologies import randomized, tied_autoencoder
from tests.osscar.test_shrinking import assert_refused, neurons_of_two_layers

PLAN = PruningPlan((neurons_of_two_layers(),))


class Two(nn.Module):
    """Two linear layers; what happens to the neurons and the outputs is up to subclasses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8, dtype=dtype)
        self.leave = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x: Tensor) -> object:
        return self.answer(self.leave(self.hidden(self.enter(x))))

    def hidden(self, h: Tensor) -> Tensor:
        return h.relu()

    def answer(self, y: Tensor) -> object:
        return y


class Labels(Two):
    """Puts out nothing but whole numbers."""

    def answer(self, y: Tensor) -> object:
        return y.argmax(-1)


class WrongLabels(Labels):
    """Reads the bias in a way that the plan does not know of."""

    def hidden(self, h: Tensor) -> Tensor:
        return (h - self.enter.bias).relu() + self.enter.bias.mean()


class Complex(Two):
    def hidden(self, h: Tensor) -> Tensor:
        return h * h.abs()


class Masked(Two):
    """Puts out logits that are masked, beside an empty tensor."""

    def answer(self, y: Tensor) -> object:
        return y.masked_fill(torch.ones_like(y).triu(1).bool(), -torch.inf), y[:, :0]


class Sampled(Two):
    """Adds noise to its outputs, as a variational encoder does."""

    def answer(self, y: Tensor) -> object:
        return y + torch.randn_like(y), torch.rand(len(y)).argsort(), torch.randperm(5) * y


class SampledInside(Two):
    """Adds noise to the neurons, of which the shrunk model has fewer."""

    def hidden(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class Cached(Two):
    """Reads tokens, and fails with fewer neurons where it begins or goes on from what is kept."""

    fails_with: str

    def forward(
        self, input_ids: Tensor, past_key_values: Tensor | None = None, use_cache: bool = False
    ) -> object:
        h = self.enter(nn.functional.one_hot(input_ids, 4).to(self.enter.weight.dtype)).relu()
        given = {"past": past_key_values is not None, "cache": use_cache}
        if given[self.fails_with]:
            h = h.reshape(*h.shape[:-1], 8)
        return CausalLMOutputWithPast(
            logits=self.leave(h), past_key_values=input_ids if use_cache else None
        )


@pytest.mark.parametrize("kind", [Labels, Complex, Masked, Sampled])
def test_outputs_of_every_sort_are_those_of_the_masked_model(kind: type[Two]) -> None:
    dtype = torch.cfloat if kind is Complex else torch.float32
    torch.manual_seed(0)
    model, x = kind(dtype).eval(), torch.randn(50, 4, dtype=dtype)
    with masked(model, PLAN):
        expected = proof_outputs(model, [(x,)])
    state = torch.get_rng_state()
    assert shrink(model, PLAN, [(x,), (x[:1],)]).certificate.error < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    for found, due in zip(proof_outputs(model, [(x,)]), expected, strict=True):
        torch.testing.assert_close(found, due)


def test_what_computes_something_else_is_refused() -> None:
    x = torch.randn(50, 4)
    wrong = WrongLabels().eval()
    with torch.no_grad():
        wrong.enter.bias.copy_(torch.tensor([0.0] * 4 + [9.0] * 4))
    assert_refused(wrong, PLAN, [(x,)], EquivalenceError, "have to be equal")
    noisy = randomized(SampledInside())
    assert_refused(noisy, PLAN, [(x,)], EquivalenceError, "differs")
    for way in ("cache", "past"):
        Cached.fails_with, ids = way, torch.randint(4, (3, 5))
        cached = randomized(Cached())
        assert_refused(cached, PLAN, [{"input_ids": ids}], AdapterError, "Cached")


def test_a_proof_of_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda _, y: [float(y.sum()), None]  # noqa: E731
    for answer in (nothing, lambda _, y: y[:, :0], lambda _, y: y * float("nan")):
        monkeypatch.setattr(Two, "answer", answer)
        with pytest.raises(EquivalenceError, match="nothing can be compared") as caught:
            shrink(randomized(Two()), PLAN, [(torch.randn(2, 4),)])
        assert "prune without" not in str(caught.value)


def test_each_column_and_each_kind_of_number_is_compared_by_itself() -> None:
    one = torch.tensor([[1.0, 1e3], [-1.0, -torch.inf]], dtype=torch.float64)
    assert prove_equal([one], [one]).error == 0
    for due, found, fewer in (([one, one], [one], "shrunk"), ([one], [one, one], "masked")):
        with pytest.raises(EquivalenceError, match=f"^the {fewer} .* returns fewer tensors than"):
            prove_equal(due, found)
    for place, other, said in (
        ((0, 0), 1.01, "differs"),  # a hundredth of its column, and nothing beside the other
        ((1, 1), 1.0, "at other places"),
        ((1, 1), torch.inf, "at other places"),
        ((1, 1), torch.nan, "at other places"),
    ):
        changed = one.clone()
        changed[place] = other
        with pytest.raises(EquivalenceError, match=said):
            prove_equal([one], [changed])
    with pytest.raises(EquivalenceError, match="differs"):
        prove_equal([one.to(torch.cfloat)[:1]], [one.to(torch.cfloat)[:1] * 1j])
    labels = torch.arange(50)
    for beside, ties in (([one], 1), ([], 0)):  # rounded from what is equal up to rounding
        other = labels.clone()
        other[: ties + 1] = -1
        with pytest.raises(EquivalenceError, match="have to be equal"):
            prove_equal([*beside, labels], [*beside, other])
        other[ties:] = labels[ties:]
        assert prove_equal([*beside, labels], [*beside, other]).ties == ties
        assert prove_equal([labels, *beside], [other, *beside]).ties == ties


def test_masking_is_undone_where_two_groups_read_one_weight() -> None:
    model, x = tied_autoencoder(), torch.randn(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = PruningPlan(
        tuple(GroupPlan.of(group, (0,)) for group in graph.trace(model, (x,)).prunable)
    )
    with masked(model, plan):
        assert not torch.equal(model.state_dict()["inner.weight"], before["inner.weight"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
