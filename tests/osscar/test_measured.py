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
from osscar.allocation.allocate import MEASURED, allocate
from osscar.allocation.curves import LEAST_NATS, MOST, Curve
from osscar.allocation.measured import (
    Compared,
    Measurement,
    compared_samples,
    measured_groups,
    scaled,
    widths_to_measure,
)
from osscar.allocation.replay import Recording
from osscar.base.errors import NonFiniteError, RequestError
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


def consumers_of(prepared, groups):
    """Return the modules that read some groups."""
    return {one.name for group in groups for one in prepared.linear_maps(group)}


def test_what_is_measured_is_what_pruning_one_group_by_hand_comes_to():
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    with prepare(model, data) as prepared, torch.no_grad():
        groups = [group for group in prepared.groups if group.prunable]
        keep = {group.name: group.units // 2 for group in groups}
        compared = Compared.of(prepared, consumers_of(prepared, groups), compared_samples(prepared))
        found = measured_groups(prepared, compared, keep, damp=0.1)
        fitted, fresh = data[:45], data[60:]  # of 60, a quarter is held out for other ends
        read = {
            8: (model.one, torch.tanh(model.first(fitted))),
            7: (model.other, torch.relu(model.second(fitted))),
        }
        for group in groups:
            due = by_hand(model, *read[group.units], keep[group.name], 0.1, fresh)
            assert due > 1e-4
            assert found[group.name].nats == pytest.approx(due, rel=1e-3)


def test_a_group_that_overflows_without_some_units_keeps_its_curve():
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    model.second.weight.data = model.second.weight.data[[0, 0, 1, 1, 2, 2, 3]]
    model.second.bias.data = model.second.bias.data[[0, 0, 1, 1, 2, 2, 3]]
    for parameter in model.second.parameters():
        parameter.data *= 1e-3
    model.other.weight.data = 6e4 * model.other.weight.data.sign()  # of twins, one does for both
    with prepare(model.half(), data.half()) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        keep = {group.name: group.units // 2 for group in groups}
        before = copy.deepcopy(prepared.model.state_dict())
        compared = Compared.of(prepared, consumers_of(prepared, groups), compared_samples(prepared))
        with pytest.warns(UserWarning, match="pruned alone cannot be measured"):
            found = measured_groups(prepared, compared, keep, damp=0.01)
        assert found.keys() == {"first.neurons"}
        with pytest.raises(NonFiniteError, match="pruned alone cannot be measured"):
            measured_groups(prepared, compared, keep, damp=0.01, shapes=True)
        after = prepared.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


BUILT = {
    "opt": (lambda: tiny("opt"), lambda: tokens(8, 24)),
    "gpt2": (lambda: tiny("gpt2"), lambda: tokens(8, 24)),
    "cnn": (Net, lambda: torch.randn(40, 3, 14, 14)),
}


@pytest.mark.parametrize("name", BUILT)
def test_passes_that_start_late_see_what_whole_ones_do_and_leave_the_model_as_it_was(name):
    build, data = BUILT[name]
    torch.manual_seed(0)
    with prepare(build().eval(), data()) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        before = copy.deepcopy(prepared.model.state_dict())
        keep = {group.name: max(1, group.units // 2) for group in groups}
        compared = Compared.of(prepared, consumers_of(prepared, groups), compared_samples(prepared))
        late = measured_groups(prepared, compared, keep, damp=None)
        assert all(recording.ended for recording in compared.recorded)
        recorded = [Recording(0) for _ in compared.recorded]
        whole = Compared(prepared, compared.reference, recorded)
        again = measured_groups(prepared, whole, keep, damp=None)
        assert {n: m.nats for n, m in late.items()} == {n: m.nats for n, m in again.items()}
        assert all(one.nats > 0 for one in late.values())
        after = prepared.model.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        assert not any("forward" in vars(module) for module in prepared.model.modules())


class Writes(nn.Module):
    """Writes to what it is given."""

    def forward(self, x):
        return x.add_(1)


def test_blocks_that_write_to_what_they_are_given_run_again():
    model = nn.Sequential(nn.Linear(2, 3), Writes(), nn.Linear(3, 2))
    recording, x = Recording(1 << 20), torch.randn(4, 2)
    with recording.recording(model, ["2"]):
        due = model(x)
    assert [name for name, _ in recording.ended] == ["0", "2"]
    assert recording.before == {"2": 1}
    with recording.replayed(model, ["2"]):
        assert torch.equal(model(torch.full_like(x, torch.nan)), due)
    assert torch.equal(model(x), due)
    full = Recording(4 * 3 * 4)
    with full.recording(model, ["2"]):
        model(x)
    assert [name for name, _ in full.ended] == ["0"]


class Appends(nn.Module):
    """Puts what it reads into a list that it is given."""

    def forward(self, x, seen):
        seen.append(x)
        return torch.tanh(x)


class Notes(nn.Module):
    """Keeps what it reads."""

    def forward(self, x, seen):
        self.seen = [x]
        return torch.tanh(x)


class Answers(nn.Module):
    """Puts out what nobody can look into."""

    def forward(self, x, seen):
        return Answer(x)


class Answer:
    def __init__(self, x):
        self.x = x

    def __add__(self, other):
        self.x = self.x + other
        return self.x


class Skips(nn.Module):
    """What its block has read goes on beside what it puts out."""

    def __init__(self, block):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(2, 3), block, nn.Linear(3, 2)

    def forward(self, x):
        seen = []
        out = self.block(self.first(x), seen)
        (beside,) = seen or getattr(self.block, "seen", [0.5])
        return self.last(out + beside)


@pytest.mark.parametrize("block", [Appends, Notes, Answers])
def test_blocks_that_do_more_than_put_something_out_run_again(block):
    model, recording, x = Skips(block()), Recording(1 << 20), torch.randn(4, 2)
    with recording.recording(model, ["last"]):
        due = model(x)
    assert [name for name, _ in recording.ended] == ["first", "last"]
    model(torch.randn(4, 2))
    for _ in range(2):
        with recording.replayed(model, ["last"]):
            assert torch.equal(model(torch.full_like(x, torch.nan)), due)


def test_modules_that_blocks_share_are_no_blocks():
    shared = nn.Sequential(nn.Tanh())
    parts = [nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2)) for _ in range(3)]
    model, x = nn.Sequential(*parts, shared[0]), torch.randn(4, 2)
    consumers = [f"{part}.{place}" for part in range(3) for place in (0, 2)]
    recording = Recording(1 << 20)
    with recording.recording(model, consumers):
        due = model(x)
    assert [name for name, _ in recording.ended] == consumers
    with recording.replayed(model, ["2.0"]):
        assert torch.equal(model(torch.full_like(x, torch.nan)), due)
    assert not any("forward" in vars(module) for module in model.modules())


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
    curve = Curve("group", losses, comparable=False)
    for kept, nats in points.items():
        curve = curve.through(kept, nats)
    assert curve.in_nats
    assert (np.diff(curve.losses) <= 0).all()
    assert curve.losses[-1] == 0
    assert curve.predicted is losses
    for kept in points:  # fewer units never do better, whatever was measured
        assert curve.losses[kept] == pytest.approx(max(points[k] for k in points if k >= kept))
    ratio = points[max(points)] / losses[max(points)]
    assert curve.losses[-2] == pytest.approx(ratio * losses[-2])


def test_what_is_measured_of_next_to_nothing_is_not_believed():
    losses = np.array([1.0, 1e-3, 0.0, 0.0])
    predicted = Curve("group", losses)
    assert predicted.through(1, 0.9).losses == pytest.approx(losses * MOST)
    assert predicted.through(1, 0.0).losses == pytest.approx(losses / MOST)
    assert predicted.through(2, 0.5).losses == pytest.approx(losses)  # of units that do nothing
    shape = Curve("group", losses, comparable=False)
    assert shape.through(1, 0.0).losses == pytest.approx(losses * LEAST_NATS / 1e-3)


def test_groups_are_measured_where_they_matter_and_were_not_before():
    with prepare(tiny("opt"), tokens(4, 16)) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        names = [group.name for group in groups]
        heads = next(group for group in groups if group.units == 6)
        keep = {group.name: group.units // 2 for group in groups}
        shares = {group.name: np.linspace(1, 0, group.units + 1) for group in groups}
        curves = {name: Curve(name, share) for name, share in shares.items()}
        assert widths_to_measure(groups, keep, None, Widths()) == keep
        assert widths_to_measure(groups, keep, curves, Widths()) == keep
        nothing = curves | {heads.name: Curve(heads.name, 1e-4 * shares[heads.name])}
        assert widths_to_measure(groups, keep, nothing, Widths()).keys() == {*names} - {heads.name}
        known = scaled(curves, {heads.name: Measurement(3, 0.5)})
        assert widths_to_measure(groups, keep, known, Widths()).keys() == {*names} - {heads.name}
        moved = widths_to_measure(groups, keep | {heads.name: 5}, known, Widths())
        assert moved[heads.name] == 5
        all_of_it = widths_to_measure(groups, keep | {heads.name: 6}, curves, Widths())
        assert all_of_it[heads.name] == 3


# ---- budgets -----------------------------------------------------------------------------


def test_a_group_that_predictions_hardly_need_gives_up_more():
    """What gradients say of it is put right by what is measured."""
    torch.manual_seed(0)
    model, data = Sum().eval(), torch.randn(80, 6)
    model.other.weight.data *= 0.05
    with prepare(model, data) as prepared:
        found = {
            allocation: allocate(prepared, PruningRequest(sparsity=0.4, allocation=allocation))
            for allocation in ("curvature", "measured")
        }
    for allocation, allocated in found.items():
        budget = allocated.budget
        by_units = {width.units: width for width in budget.widths.values()}
        assert by_units[7].kept < 4 < by_units[8].kept
        assert budget.comparable
        for name, points in budget.measured.items():
            assert all((p.predicted is None) == (allocation == "measured") for p in points)
            assert all(0 < p.kept < budget.widths[name].units for p in points)


def test_a_budget_is_met_without_gradients():
    class NoGradients(Sum):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    result = osscar.prune(
        NoGradients().eval(), torch.randn(60, 6), sparsity=0.4, allocation="measured"
    )
    assert result.budget.reached <= result.budget.limit
    assert result.budget.comparable
    assert result.budget.measured.keys() == result.budget.widths.keys()
    document = result.budget.to_json()
    (point, *_) = next(iter(document["measured"].values()))
    assert point.keys() == {"kept", "predicted", "nats"}


@pytest.mark.parametrize("allocation", MEASURED)
def test_a_group_that_has_to_keep_all_its_units_shares_a_budget(allocation):
    torch.manual_seed(0)
    model = Sum().eval()
    model.first, model.one = nn.Linear(6, 16), nn.Linear(16, 4)
    asked = PruningRequest(sparsity=0.1, allocation=allocation, round_to=4, at_least=0.6)
    with prepare(model, torch.randn(80, 6)) as prepared:
        budget = allocate(prepared, asked).budget
    assert {width.units: width.kept for width in budget.widths.values()} == {16: 12, 7: 7}
    assert budget.comparable
    (name,) = (name for name, width in budget.widths.items() if width.units == 16)
    assert budget.curves.keys() == budget.measured.keys() == {name}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Sum, lambda: torch.randn(3, 6), "there are 3 in all; give at least 4"),
        (
            lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
            lambda: torch.randn(40, 6),
            "no output of Sequential is known",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, data, message):
    with (
        prepare(model().eval(), data()) as prepared,
        pytest.raises(RequestError, match=message),
    ):
        allocate(prepared, PruningRequest(sparsity=0.4, allocation="measured"))
