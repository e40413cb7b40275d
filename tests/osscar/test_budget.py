"""One budget for all layers: what a request comes to, and what is told of it."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from osscar.allocation.allocate import allocate, whole_distance
from osscar.allocation.costs import Cost, count
from osscar.allocation.limits import Budget, allowances, goal
from osscar.allocation.task import PruningTask
from osscar.base.errors import RequestError
from osscar.base.printable import engineering, share
from osscar.network.modules import count_parameters
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest as Asked
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net
from tests.osscar.test_costs import allocated_by_random_curves

# ---- gaps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "bound", "gap"),
    [(2.0, 1.5, 0.25), (2.0, 2.0 * (1 - 1e-16), 0.0), (0.0, 0.0, 0.0), (math.nan, 1.0, math.nan)],
)
def test_only_what_rounding_parts_from_its_bound_is_the_least(predicted, bound, gap):
    budget = Budget((), predicted=predicted, lower_bound=bound)
    assert budget.gap == pytest.approx(gap, nan_ok=True)


# ---- requests ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opt():
    with prepare(tiny("opt"), tokens(8, 24)) as prepared:
        yield prepared


@pytest.fixture(scope="module")
def cnn():
    with prepare(small_net(), images(12)) as prepared:
        yield prepared


@pytest.fixture
def either(request):
    return request.getfixturevalue(request.param)


def allocated(prepared, **asked):
    """Allocate by random curves, or in equal shares."""
    return allocated_by_random_curves(PruningTask(prepared, Asked(**asked)))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("either", ["opt", "cnn"], indirect=True)
@pytest.mark.parametrize("allocation", ["measured", "uniform"])
@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.5, "round_to": 2},
        {"params": 0.8, "at_least": "1/3"},
        {"params": 0.8, "flops": 0.7},
        {"sparsity": 0.2, "params": 0.9, "size": 0.8, "flops": 0.8},
    ],
    ids=str,
)
def test_budgets_are_kept_and_reports_are_right(either, asked, allocation):
    found = allocated(either, **asked, allocation=allocation)
    budget = found.budget
    assert {one.budget for one in budget.limits} == asked.keys() - {"round_to", "at_least"}
    assert budget.limits[0].reached >= 0.7 * budget.limits[0].limit
    for one in budget.limits:
        cost = count(one.cost, either, either.groups)
        assert one.dense == cost.dense
        assert one.reached == pytest.approx(cost.of(found.keep), rel=1e-12)
        assert one.reached <= one.limit * (1 + 1e-9)
        if one.cost is Cost.PARAMETERS:
            assert one.dense == count_parameters(either.model)
    assert {n: w.kept for n, w in budget.widths.items() if w.kept < w.units} == found.keep
    if "at_least" in asked:
        assert all(3 * width.kept >= width.units for width in budget.widths.values())
    if "round_to" in asked:
        assert not any(w.kept % 2 for w in budget.widths.values() if w.kind == "neurons")
    if allocation == "measured":
        # Streams alone may do: they have no curves, but are on trial.
        shared = [width for width in budget.widths.values() if width.predicted is not None]
        assert (budget.predicted > 0) == any(width.kept < width.units for width in shared)
        assert budget.predicted > 0 or budget.on_trial > 0
        assert budget.gap <= 5e-3


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_slack_budget_changes_nothing(opt, allocation):
    alone, both = (
        allocated(opt, flops=0.7, allocation=allocation, **more) for more in ({}, {"params": "all"})
    )
    assert both.keep == alone.keep
    assert both.budget.limits[0].budget == "flops"


class Shortcut(nn.Sequential):
    """Two convolutions whose outputs are added to what they read."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.fixture
def shortcut():
    torch.manual_seed(0)
    block = Shortcut(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 7), block, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    with prepare(model, torch.randn(32, 3, 8, 8)) as prepared:
        yield prepared


def test_equal_shares_leave_residual_channels_whole(shortcut):
    message = r"remove less, or prune residual channels \(`--residual`\), too$"
    with pytest.raises(RequestError, match=message):
        allocated(shortcut, flops=0.5, allocation="uniform")
    found = allocated(shortcut, flops=0.5, residual=0.25, allocation="uniform")
    assert 2 in found.keep.values()


def test_residual_channels_leave_where_others_cannot_meet_a_budget(shortcut):
    (stream,) = shortcut.residual
    before = [tensor.clone() for tensor in shortcut.model.state_dict().values()]
    budget = allocate(PruningTask(shortcut, Asked(flops=0.5))).budget
    assert budget.widths[stream].kept < 8
    assert budget.limits[0].reached <= budget.limits[0].limit
    assert budget.on_trial > 0
    assert all(map(torch.equal, before, shortcut.model.state_dict().values()))
    with pytest.raises(RequestError, match=r"cannot be met.*; remove less$"):
        allocate(PruningTask(shortcut, Asked(flops=0.5, residual="all")))
    with pytest.raises(RequestError, match="cannot be met"):
        allocate(PruningTask(shortcut, Asked(flops=0.5, at_least=0.95)))


@pytest.mark.parametrize("best", [8, 6, 3])
def test_as_many_residual_channels_leave_as_bring_the_whole_model_closest(shortcut, best):
    """Two shares in a row that are no closer end it."""
    (stream,), tried = shortcut.residual, []

    def distance(task, keep):
        tried.append(keep.get(stream, 8))
        return abs(tried[-1] - best)

    with mock.patch("osscar.allocation.allocate.whole_distance", distance):
        found = allocate(PruningTask(shortcut, Asked(flops=0.97)))
    assert tried == [*range(8, max(best - 3, 1), -1)]
    assert (found.keep.get(stream, 8), found.budget.on_trial) == (best, 0)
    assert found.budget.widths[stream].kept == best


def test_a_whole_model_is_pruned_on_trial_and_put_back(shortcut):
    task = PruningTask(shortcut, Asked(flops=0.9))
    names = [group.name for group in (*task.shared, *task.streams)]
    before = [tensor.clone() for tensor in shortcut.model.state_dict().values()]
    none, some, more = (whole_distance(task, dict.fromkeys(names, k)) for k in (8, 3, 1))
    assert none == pytest.approx(0, abs=1e-6)
    assert 0 < some < more
    assert all(map(torch.equal, before, shortcut.model.state_dict().values()))


def test_a_sparsity_counts_no_residual_channels(shortcut):
    """So that as many parameters leave, whether streams take part or not."""
    limits = [
        allocated(shortcut, sparsity=0.5, **more).budget.limits[0].limit
        for more in ({}, {"residual": "all"}, {"allocation": "uniform"})
    ]
    assert limits == [limits[0]] * 3


def test_what_is_kept_and_removed_is_told_in_numbers_beforehand(opt):
    dense = count_parameters(opt.model)
    layers = ((n, p.numel()) for n, p in opt.model.named_parameters() if "attn." in n or "fc" in n)
    owned = sum(size for n, size in layers if not n.endswith(("out_proj.bias", "fc2.bias")))

    def told(**asked):
        task = PruningTask(opt, Asked(**asked))
        return goal(task, allowances(task) if task.request.has_budget else ())

    def parts(share, whole, kind):
        kept, of, gone = (engineering(part * whole) for part in (share, 1, 1 - share))
        return f"keeps {kept} of {of} {kind}, removes {gone}"

    assert told(params=0.3) == parts(0.3, dense, "parameters")
    whole = f"{share(0.3 * owned / dense)} of all parameters"
    assert told(sparsity=0.3) == (
        f"sparsity 0.3 removes 30% of the parameters of heads and neurons, {whole}; "
        + parts(1 - 0.3 * owned / dense, dense, "parameters")
    )
    assert "30% of the parameters of neurons, " in told(sparsity=0.3, heads="all")
    flops = count(Cost.FLOPS, opt, opt.groups).dense
    assert told(params=0.9, flops=0.5) == "; ".join(
        (parts(0.9, dense, "parameters"), parts(0.5, flops, "flops"))
    )


def test_kinds_that_are_named_take_no_part_in_the_budget(opt):
    units = {group.name: (group.kind, group.units) for group in opt.groups}
    found = allocated(opt, sparsity=0.5, heads="all", round_to=1)
    assert {units[name][0] for name in found.keep} == {"neurons"}
    neurons = sum(width.kept for width in found.budget.widths.values())
    assert 38 <= neurons <= 40  # of 80: it is a share of what they own
    half = allocated(opt, params=0.6, heads="1/2")
    kept = {name: k for name, k in half.keep.items() if units[name][0] == "heads"}
    assert set(kept.values()) == {opt.model.config.num_attention_heads // 2}
    assert half.budget.limits[0].reached <= 0.6 * half.budget.limits[0].dense
