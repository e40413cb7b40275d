"""Curves that are measured: one group alone is pruned, and the predictions are compared."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.divergence import Distance, Reference
from osscar.allocation.measured import (
    LEAST,
    Curve,
    dense_reference,
    measured_curves,
    widths_to_measure,
)
from osscar.base.errors import NonFiniteError, RequestError
from osscar.data.batches import ModelInputs
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest, Widths
from tests.osscar.families import tiny, tokens
from tests.osscar.test_budget import Net

# ---- what is measured --------------------------------------------------------------------


class Sum(nn.Module):
    """A classifier whose two layers of neurons know nothing of each other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 7)
        self.one, self.other = nn.Linear(8, 4), nn.Linear(7, 4, bias=False)

    def forward(self, x):
        one = self.one(torch.tanh(self.first(x)))
        return SequenceClassifierOutput(logits=one + self.other(torch.relu(self.second(x))))


def by_hand(model, consumer, X, keep, damp, fresh):
    """Remove units one by one, always the one whose refit is best; return the divergence."""
    W0 = consumer.weight.detach().double().T
    X = X.double()
    if consumer.bias is not None:
        mean = X.mean(0)
        X = X - mean
    H = X.T @ X / len(X)
    pull = damp * H.diagonal()

    def refitted(rows):
        W = torch.zeros_like(W0)
        G = H[rows] @ W0 + pull[rows, None] * W0[rows]
        W[rows] = torch.linalg.solve(H[rows][:, rows] + pull[rows].diag(), G)
        D = W - W0
        return float((D * (H @ D)).sum() + (pull[:, None] * D.square()).sum()), W

    kept = list(range(len(W0)))
    while len(kept) > keep:
        kept.remove(min(kept, key=lambda unit: refitted([k for k in kept if k != unit])[0]))
    _, W = refitted(kept)
    other = copy.deepcopy(model)
    name = next(n for n, module in model.named_modules() if module is consumer)
    changed = other.get_submodule(name)
    changed.weight.data = W.T.float()
    if consumer.bias is not None:
        changed.bias.data += ((W0 - W).T @ mean).float()
    p, q = (each(fresh).logits.log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def measured(prepared, keep, **asked):
    """Measure groups at some widths."""
    groups = [group for group in prepared.groups if group.name in keep]
    request = PruningRequest(sparsity=0.5, **asked)
    return measured_curves(prepared, request, groups, lambda curves: keep, {})


def halves(prepared):
    return {g.name: max(1, g.units // 2) for g in prepared.groups if g.prunable}


def test_what_is_measured_is_what_pruning_one_group_by_hand_comes_to():
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    with prepare(model, data) as prepared, torch.no_grad():
        keep = halves(prepared)
        curves, measure = measured(prepared, keep, damp=0.1)
        assert measure == "nats"
        fitted, fresh = data[:45], data[60:]  # of 60, a quarter is held out for other ends
        read = {
            8: (model.one, torch.tanh(model.first(fitted))),
            7: (model.other, torch.relu(model.second(fitted))),
        }
        for name, kept in keep.items():
            units = len(curves[name].shape) - 1
            due = by_hand(model, *read[units], kept, 0.1, fresh)
            assert due > 1e-4
            assert curves[name].measured == {kept: pytest.approx(due, rel=1e-3)}


class Both(nn.Module):
    """Puts out two tensors of other sizes, of which none is known to be scores."""

    def __init__(self):
        super().__init__()
        self.sum = Sum()

    def forward(self, x):
        y = self.sum(x).logits
        return {"one": 1e3 * y, "other": y[:, :2].sum(1) + 1}


def test_outputs_that_are_no_scores_are_compared_by_their_relative_error():
    torch.manual_seed(0)
    data = torch.randn(80, 6)
    with prepare(Both().eval(), data) as prepared, torch.no_grad():
        curves, measure = measured(prepared, halves(prepared))
        assert measure == "relative"
        assert all(0 < distance < 1 for c in curves.values() for distance in c.measured.values())
        reference = dense_reference(prepared, 20)
        dense = prepared.model(data[60:])
        prepared.model.sum.one.weight.mul_(0.5)
        found = prepared.model(data[60:])
        errors = [
            ((found[k] - y).square().sum() / y.square().sum()).item() for k, y in dense.items()
        ]
        assert reference.divergence(prepared.model) == pytest.approx(np.mean(errors))


def test_an_output_of_another_shape_is_wholly_in_error():
    batch = {"x": torch.ones(1)}
    distance = Distance(ModelInputs(batch), "relative", powers=(3.0, 2.0))
    dense = [torch.ones(3), torch.ones(2)]
    reference = Reference(distance, [batch], [dense])

    class Fewer(nn.Linear):
        def forward(self, x):
            return torch.ones(3), torch.ones(1)

    assert reference.divergence(Fewer(1, 1)) == pytest.approx(0.5)


def test_a_group_that_overflows_without_some_units_is_named():
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    model.second.weight.data = model.second.weight.data[[0, 0, 1, 1, 2, 2, 3]]
    model.second.bias.data = model.second.bias.data[[0, 0, 1, 1, 2, 2, 3]]
    for parameter in model.second.parameters():
        parameter.data *= 1e-3
    model.other.weight.data = 6e4 * model.other.weight.data.sign()  # of twins, one does for both
    with prepare(model.half(), data.half()) as prepared:
        before = copy.deepcopy(prepared.model.state_dict())
        with pytest.raises(
            NonFiniteError, match=r"'second\.neurons' pruned alone cannot be measured"
        ):
            measured(prepared, halves(prepared), damp=0.01)
        after = prepared.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


BUILT = {
    "opt": (lambda: tiny("opt"), lambda: tokens(8, 24)),
    "gpt2": (lambda: tiny("gpt2"), lambda: tokens(8, 24)),
    "cnn": (Net, lambda: torch.randn(40, 3, 14, 14)),
}


@pytest.mark.parametrize("name", BUILT)
def test_models_are_left_as_they_were(name):
    build, data = BUILT[name]
    torch.manual_seed(0)
    with prepare(build().eval(), data()) as prepared:
        before = copy.deepcopy(prepared.model.state_dict())
        curves, _ = measured(prepared, halves(prepared))
        assert all(next(iter(curve.measured.values())) > 0 for curve in curves.values())
        after = prepared.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_language_model_makes_one_prediction_in_two(monkeypatch):
    with prepare(tiny("opt"), tokens(2, 22)) as prepared, torch.no_grad():
        model, inputs, seen = prepared.model, prepared.inputs, []
        batches = inputs.batches(model, 1)
        distance = Distance.of(model, inputs, batches[0])
        monkeypatch.setattr("osscar.allocation.divergence.MOST_BYTES", distance.bytes)
        reference = Reference.of(distance, model, batches)
        model.lm_head.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
        reference.divergence(model)
        every = model(batches[0]["input_ids"]).logits
    assert seen == [11, 11, 22]
    assert torch.allclose(reference.expected[0], every[0, 1::2].log_softmax(-1), atol=1e-5)


# ---- curves ------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_curve_goes_through_what_was_measured_and_stays_one(data):
    rises = data.draw(st.lists(st.floats(1e-3, 1.0), min_size=4, max_size=12))
    losses = np.concatenate([np.cumsum(rises)[::-1], [0.0]])
    points = data.draw(
        st.dictionaries(
            st.integers(1, len(rises) - 1), st.floats(1e-3, 5.0), min_size=1, max_size=3
        )
    )
    curve = Curve("group", losses)
    for kept, nats in points.items():
        curve = curve.through(kept, nats)
    assert (np.diff(curve.losses) <= 0).all()
    assert curve.losses[-1] == 0
    assert curve.shape is losses
    for kept in points:  # fewer units never do better, whatever was measured
        assert curve.losses[kept] == pytest.approx(max(points[k] for k in points if k >= kept))
    ratio = points[max(points)] / losses[max(points)]
    assert curve.losses[-2] == pytest.approx(ratio * losses[-2])


def test_what_is_measured_of_next_to_nothing_is_not_believed():
    shape = Curve("group", np.array([1.0, 1e-3, 0.0, 0.0]))
    assert shape.through(1, 0.0).losses == pytest.approx(shape.shape * LEAST / 1e-3)
    assert shape.through(2, 0.5).losses == pytest.approx(shape.shape)  # of units that do nothing


def test_groups_are_measured_where_they_matter_and_were_not_before():
    with prepare(tiny("opt"), tokens(4, 16)) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        names = [group.name for group in groups]
        heads = next(group for group in groups if group.units == 6)
        keep = {group.name: group.units // 2 for group in groups}
        shares = {group.name: np.linspace(1, 0, group.units + 1) for group in groups}
        curves = {name: Curve(name, share) for name, share in shares.items()}
        assert widths_to_measure(groups, keep, {}, Widths()) == keep
        assert widths_to_measure(groups, keep, curves, Widths()) == keep
        nothing = curves | {heads.name: Curve(heads.name, 1e-4 * shares[heads.name])}
        assert widths_to_measure(groups, keep, nothing, Widths()).keys() == {*names} - {heads.name}
        known = curves | {heads.name: curves[heads.name].through(3, 0.5)}
        assert widths_to_measure(groups, keep, known, Widths()).keys() == {*names} - {heads.name}
        moved = widths_to_measure(groups, keep | {heads.name: 5}, known, Widths())
        assert moved[heads.name] == 5
        assert heads.name not in widths_to_measure(groups, keep | {heads.name: 6}, known, Widths())
        assert widths_to_measure(groups, keep | {heads.name: 6}, {}, Widths())[heads.name] == 3


# ---- budgets -----------------------------------------------------------------------------


def test_a_group_that_predictions_hardly_need_gives_up_more():
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    model.other.weight.data *= 0.05
    with prepare(model, data) as prepared:
        budget = allocate(prepared, PruningRequest(sparsity=0.4)).budget
    by_units = {width.units: width for width in budget.widths.values()}
    assert by_units[7].kept < 4 < by_units[8].kept
    for name, points in budget.measured.items():
        assert all(0 < p.kept < budget.widths[name].units for p in points)


def test_a_budget_is_met_without_gradients():
    class NoGradients(Sum):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    result = osscar.prune(NoGradients().eval(), torch.randn(60, 6), sparsity=0.4)
    assert result.budget.tightest.reached <= result.budget.tightest.limit
    assert result.budget.measure == "nats"
    assert result.budget.measured.keys() == result.budget.widths.keys()
    document = result.budget.to_json()
    (point, *_) = next(iter(document["measured"].values()))
    assert point.keys() == {"kept", "distance"}


def test_a_group_that_has_to_keep_all_its_units_shares_a_budget():
    torch.manual_seed(0)
    model = Sum().eval()
    model.first, model.one = nn.Linear(6, 16), nn.Linear(16, 4)
    asked = PruningRequest(sparsity=0.1, round_to=4, at_least=0.6)
    with prepare(model, torch.randn(80, 6)) as prepared:
        budget = allocate(prepared, asked).budget
    assert {width.units: width.kept for width in budget.widths.values()} == {16: 12, 7: 7}
    (name,) = (name for name, width in budget.widths.items() if width.units == 16)
    assert budget.curves.keys() == budget.measured.keys() == {name}


def test_too_few_samples_to_keep_some_apart_are_refused():
    with (
        prepare(Sum().eval(), torch.randn(3, 6)) as prepared,
        pytest.raises(RequestError, match="there are 3 in all; give at least 4"),
    ):
        allocate(prepared, PruningRequest(sparsity=0.4))
