"""Curves that are measured: one group alone is pruned, and what models return is compared."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from osscar.allocation import measured as measured_module
from osscar.allocation.allocate import allocate
from osscar.allocation.measured import (
    LEAST,
    Curve,
    measured_curves,
    summed_losses,
    widths_to_measure,
)
from osscar.allocation.task import PruningTask
from osscar.distance.distance import Distance, Reference
from osscar.preparation import prepare as prepare_module
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest, Widths
from solvers import SubsetProblem
from solvers.closed_forms.elimination import eliminate
from solvers.closed_forms.refit import refit
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import mixture

# ---- what is compared --------------------------------------------------------------------


def test_a_language_model_makes_one_prediction_in_two(monkeypatch):
    with prepare(tiny("opt", layers=1), tokens(2, 22)) as prepared, torch.no_grad():
        model, inputs, seen = prepared.model, prepared.inputs, []
        batches = inputs.batches(1)
        distance = Distance.from_outputs(model, inputs, batches[0])
        monkeypatch.setattr("osscar.distance.distance.MOST_BYTES", distance.bytes)
        reference = Reference.from_run(distance, model, batches)
        model.lm_head.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
        reference.divergence(model)
        every = model(batches[0]["input_ids"]).logits
    assert seen == [11, 11, 22]
    assert torch.allclose(reference.expected[0], every[0, 1::2].log_softmax(-1), atol=1e-5)


# ---- one group alone ---------------------------------------------------------------------


class Sum(nn.Module):
    """A classifier whose two layers of neurons know nothing of each other, without gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 7)
        self.one, self.other = nn.Linear(8, 4), nn.Linear(7, 4, bias=False)

    @torch.no_grad()
    def forward(self, x):
        one = self.one(torch.tanh(self.first(x)))
        return SequenceClassifierOutput(logits=one + self.other(torch.relu(self.second(x))))


class Both(Sum):
    """Puts out two tensors of other sizes, of which none is known to be scores."""

    def forward(self, x):
        y = super().forward(x).logits
        return {"one": 1e3 * y, "other": y[:, :2].sum(1) + 1}


DATA = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_hand(model, consumer, X, keep, damp, fresh):
    """Remove units one by one, always the one whose refit is best; return the divergence."""
    W0 = consumer.weight.detach().double().T
    X = X.double()
    mean = X.mean(0) if consumer.bias is not None else torch.zeros(X.shape[1])
    H = (X - mean).T @ (X - mean) / len(X)
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
    """Measure groups at some widths, and see that the model stays as it was."""
    others = [group.name for group in prepared.groups if group.name not in keep]
    before = copy.deepcopy(prepared.model.state_dict())
    try:
        task = PruningTask(prepared, PruningRequest(sparsity=0.5, skip=others, **asked))
        return measured_curves(task, lambda curves: keep)
    finally:
        after = prepared.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def halves(prepared):
    return {g.name: max(1, g.units // 2) for g in prepared.groups if g.prunable}


def test_what_is_measured_is_what_pruning_one_group_by_hand_comes_to():
    model = Sum().eval()
    with prepare(model, DATA) as prepared, torch.no_grad():
        keep = halves(prepared)
        curves = measured(prepared, keep, damp=0.1)
        fitted, fresh = DATA[:45], DATA[60:]  # of 60, a quarter is held out for other ends
        read = {
            8: (model.one, torch.tanh(model.first(fitted))),
            7: (model.other, torch.relu(model.second(fitted))),
        }
        for name, kept in keep.items():
            units = len(curves[name].shape) - 1
            due = by_hand(model, *read[units], kept, 0.1, fresh)
            assert due > 1e-4
            assert curves[name].measured == {kept: pytest.approx(due, rel=1e-3)}


def test_outputs_that_are_no_scores_are_compared_by_their_relative_error():
    with prepare(Both().eval(), DATA) as prepared, torch.no_grad():
        curves = measured(prepared, halves(prepared))
        assert all(0 < distance < 1 for c in curves.values() for distance in c.measured.values())


@pytest.mark.parametrize("refuses", [False, True])
def test_a_large_model_is_compared_in_bfloat16_where_it_is_multiplied(refuses, monkeypatch):
    """Unless the model's own code refuses; distances are nearly the same."""

    def refuse(module, args, out):
        assert out.dtype is torch.float32

    def nats():
        torch.manual_seed(0)
        with prepare(tiny("llama-mha", layers=1), tokens(16, 24)) as prepared:
            if refuses:
                last = [one for one in prepared.model.modules() if isinstance(one, nn.Linear)][-1]
                last.register_forward_hook(refuse)
            curves = measured(prepared, halves(prepared))
            half = prepared.bfloat16
        return half, [d for c in curves.values() for d in c.measured.values()]

    monkeypatch.setattr(prepare_module, "multiplies_bfloat16", lambda device: True)
    full, exact = nats()
    monkeypatch.setattr(prepare_module, "_LARGE_MODEL", 0)
    monkeypatch.setattr(prepare_module, "_LARGE_OUTPUT", 0)
    monkeypatch.setattr(measured_module, "_CLOSE", 1e-9)
    half, rounded = nats()
    assert (full, half) == (False, not refuses)
    assert rounded == pytest.approx(exact, rel=0.1, abs=1e-4)
    assert (rounded == exact) == refuses


@pytest.mark.parametrize(("mean", "expected"), [(0.0, True), (500.0, False)])
def test_a_model_of_which_bfloat16_would_round_much_away_runs_in_float32(
    mean, expected, monkeypatch
):
    """Such as one with units that vary little about a large mean."""
    monkeypatch.setattr(prepare_module, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(prepare_module, "_LARGE_OUTPUT", 0)
    torch.manual_seed(0)
    first, second = nn.Linear(6, 16), nn.Linear(16, 3)
    with torch.no_grad():
        first.bias += mean
        second.bias -= mean * second.weight.sum(1)
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    with prepare(model, torch.randn(16, 6)) as prepared:
        assert prepared.bfloat16 == expected


# ---- curves ------------------------------------------------------------------------------


def test_a_shape_is_that_of_fresh_refits():
    X, W0 = torch.randn(40, 9).double(), torch.randn(9, 3).double()
    problem = SubsetProblem.from_gram(X.T @ X / 40, W0, keep=9)
    curve = summed_losses(problem, eliminate(problem, 8))
    assert len(curve) == 10
    assert curve[9] == 0
    assert curve[0] == pytest.approx(problem.scale)
    assert (np.diff(curve) <= 0).all()
    best_of_eight = min(
        refit(problem, torch.tensor([u for u in range(9) if u != gone]))[1] for gone in range(9)
    )
    assert curve[8] == pytest.approx(best_of_eight)


@settings(max_examples=200)
@given(st.data())
def test_a_curve_goes_through_what_was_measured_and_stays_one(data):
    """Also where its shape is zero; fewer units never do better, whatever was measured."""
    rises = data.draw(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.3, 1.0]), min_size=1, max_size=8))
    idle = data.draw(st.integers(0, 6))
    shape = np.concatenate([np.cumsum([1e-3, *rises])[::-1], np.zeros(idle + 1)])
    widths = st.integers(0, len(shape) - 2)
    points = data.draw(st.dictionaries(widths, st.floats(0.0, 5.0), max_size=4))
    curve = Curve("group", shape)
    for kept, distance in points.items():
        curve = curve.through(kept, distance)
    assert (np.diff(curve.losses) <= 0).all()
    assert curve.losses[-1] == 0
    assert curve.shape is shape
    for kept in points:
        due = max(points[k] for k in points if k >= kept)
        assert curve.losses[kept] == pytest.approx(due, rel=1e-6, abs=2 * LEAST)
    if not points:
        assert (curve.losses == shape).all()
    elif idle == 0:
        ratio = max(points[max(points)], LEAST) / shape[max(points)]
        assert curve.losses[-2] == pytest.approx(ratio * shape[-2], abs=1e-12)


def test_more_units_than_were_measured_follow_the_widest_of_two_of_equal_shape():
    curve = Curve("group", np.array([0.1, 0.1, 0.01, 0.0])).through(1, 0.5).through(0, 2.0)
    assert curve.losses == pytest.approx([2.0, 0.5, 0.05, 0.0])


def test_a_curve_is_linear_in_units_that_do_nothing_on_what_was_fitted():
    shape = Curve("group", np.array([1.0, 0.2, 0.1, 0.0, 0.0, 0.0]))
    assert shape.through(4, 0.5).losses == pytest.approx([2.0, 1.2, 1.1, 1.0, 0.5, 0.0])
    both = shape.through(4, 0.5).through(1, 0.9)
    assert both.losses[1:] == pytest.approx([0.9, 0.9, 0.9, 0.5, 0.0])
    assert both.through(2, 0.6).losses[2:] == pytest.approx([0.6, 0.6, 0.5, 0.0])


def test_groups_are_measured_where_they_matter_and_were_not_before():
    with prepare(tiny("opt"), tokens(4, 16)) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
    names = {group.name for group in groups}
    heads = next(group.name for group in groups if group.units == 6)
    keep = {group.name: group.units // 2 for group in groups}
    shares = {group.name: np.linspace(1, 0, group.units + 1) for group in groups}
    curves = {name: Curve(name, share) for name, share in shares.items()}
    nothing = curves | {heads: Curve(heads, 1e-4 * shares[heads])}
    known = curves | {heads: curves[heads].through(3, 0.5)}

    def wanted(curves, **now):
        return widths_to_measure(groups, keep | {heads: now.get("heads", 3)}, curves, Widths())

    assert wanted({}) == wanted(curves) == keep
    assert wanted(nothing).keys() == wanted(known).keys() == names - {heads}
    assert wanted(known, heads=5)[heads] == 5
    assert heads not in wanted(known, heads=6)
    assert wanted({}, heads=6)[heads] == 3


class Quiet(nn.Module):
    """Two layers of neurons in parallel: of one, the last units fire where the last input is 5."""

    def __init__(self, units, quiet):
        super().__init__()
        self.first, self.second = nn.Linear(7, units), nn.Linear(7, 12)
        self.one, self.other = nn.Linear(units, 5), nn.Linear(12, 5)
        with torch.no_grad():
            self.first.weight[-quiet:, :6] *= 0.1
            self.first.weight[-quiet:, 6], self.first.bias[-quiet:] = 1.0, -4.0

    def forward(self, x):
        y = self.one(self.first(x).relu()) + 1e-2 * self.other(self.second(x).tanh())
        return SequenceClassifierOutput(logits=y)


@pytest.mark.parametrize(("units", "quiet", "share"), [(14, 9, 0.6), (20, 4, 0.8)])
def test_units_that_fire_on_other_samples_alone_are_missed_as_was_measured(units, quiet, share):
    """At widths above and below that from which on the fitted samples miss nothing."""
    model, x = Quiet(units, quiet).eval(), torch.randn(96, 7)
    x[:, 6] = torch.where(torch.arange(96) < 72, 0.0, 5.0)
    with prepare(model, x) as prepared:
        first = next(g for g in prepared.groups if g.units == units)
        task = PruningTask(prepared, PruningRequest(sparsity=share, skip=["second*"]))
        budget = allocate(task).budget
        points = {p.kept: p.distance for p in budget.measured[first.name]}
        kept = budget.widths[first.name].kept
        found = budget.widths[first.name].predicted
        exact = measured(prepared, {first.name: units - quiet})
    lost = exact[first.name].measured[units - quiet]
    assert lost > 0.01
    assert kept in points
    assert found == pytest.approx(max(d for k, d in points.items() if k >= kept), rel=1e-6)
    if kept < units - quiet:
        assert points[units - quiet] == pytest.approx(lost, rel=1e-4)
        assert found >= lost
    curve = Curve(first.name, exact[first.name].shape)
    assert curve.losses[units - quiet] == 0  # which is all that the fitted samples tell


# ---- budgets -----------------------------------------------------------------------------


def test_a_group_that_predictions_hardly_need_gives_up_more():
    model = Sum().eval()
    model.other.weight.data *= 0.05
    with prepare(model, DATA) as prepared:
        budget = allocate(PruningTask(prepared, PruningRequest(sparsity=0.4))).budget
    by_units = {width.units: width for width in budget.widths.values()}
    assert by_units[7].kept < 4 < by_units[8].kept
    assert budget.measured.keys() == budget.widths.keys()
    for name, points in budget.measured.items():
        assert all(0 < p.kept < budget.widths[name].units for p in points)


def test_a_mixture_of_experts_is_not_compared_in_bfloat16(monkeypatch):
    """Tokens near a tie would go to other experts."""
    monkeypatch.setattr(prepare_module, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(prepare_module, "_LARGE_MODEL", 0)
    for model, expected in ((mixture("mixtral"), False), (tiny("llama-mha", layers=1), True)):
        with prepare(model, tokens(4, 8)) as prepared:
            assert prepared.bfloat16 == expected
