"""Speed-ups: whole models are timed until one is as fast as is wanted."""

import pytest
import torch
from torch import nn

import osscar
from osscar.allocation import speedup
from osscar.base import timing
from osscar.base.errors import RequestError
from osscar.request import PruningRequest
from osscar.run.points import BudgetKind, jobs, prune_points
from tests.osscar.families import tiny, tokens


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """No turns but those that are asked for."""
    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)


def seconds(model):
    """As long as parameters say, those of attention three times as long, and some for all else."""
    prices = ((name, p.numel()) for name, p in model.named_parameters())
    return 5_000 + sum(3 * size if "attn" in name else size for name, size in prices)


@pytest.fixture
def timed(monkeypatch):
    """Let models take as long as `seconds` says; return what was timed."""
    models = []

    def time_against(dense, other, batch):
        models.append(other)
        return seconds(dense) / seconds(other)

    monkeypatch.setattr(speedup, "time_against", time_against)
    return models


def test_each_point_of_a_sweep_is_as_fast_as_it_is_asked_for(timed):
    model, points = tiny("opt"), jobs(BudgetKind.SPEEDUP, (1.2, 1.5))
    base, swept = PruningRequest(speedup=2.0, backend="wanda", device="cpu"), []
    for job, result in prune_points(model, tokens(8, 24), base, points):
        reached = seconds(model) / seconds(result.model)
        assert reached == pytest.approx(job.value, rel=0.03)
        assert 1 / result.budget.tightest.reached == pytest.approx(reached, rel=1e-6)
        assert result.budget.tightest.limit == pytest.approx(1 / job.value)
        assert len(timed) <= speedup.MOST_MODELS
        timed.clear()
        swept.append(job)
    assert swept == [*points]


@pytest.mark.parametrize(("wanted", "binds"), [(1.1, True), (1.5, False)])
def test_other_budgets_hold_at_every_step_of_a_speed_up(timed, wanted, binds):
    """At 1.1 times the speed the model would be larger than it may be."""
    model, asked = tiny("opt"), {"allocation": "uniform", "backend": "wanda"}
    result = osscar.prune(model, tokens(8, 24), speedup=wanted, params=0.8, **asked)
    assert result.parameters_after <= 0.8 * result.parameters_before
    assert {one.budget for one in result.budget.limits} == {"speedup", "params"}
    reached = seconds(model) / seconds(result.model)
    assert reached == pytest.approx(1 / result.budget.of("speedup").reached)
    assert reached >= 0.9 * wanted
    assert (reached > 1.03 * wanted) == binds
    assert (len(timed) == 1) == binds  # nothing larger is built than may be


def test_a_speed_up_out_of_reach_says_what_is_in_reach(timed):
    with pytest.raises(RequestError, match=r"speedup 50 cannot be met: .* is \d.* times as fast"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=50.0, allocation="uniform")


class Takes(nn.Module):
    """Takes so long by a clock of its own; one turn after the other where there are several."""

    now = 0.0

    def __init__(self, *turns):
        super().__init__()
        self.turns, self.weight = list(turns), nn.Parameter(torch.zeros(()))

    def forward(self):
        self.turns.append(self.turns.pop(0))
        Takes.now += self.turns[-1]


def test_a_speed_up_is_of_median_times_and_refused_where_they_are_too_noisy(monkeypatch):
    monkeypatch.setattr(speedup, "clock", lambda: Takes.now)
    assert speedup.time_against(Takes(3.0), Takes(1.5), {}) == pytest.approx(2.0)
    with pytest.raises(RequestError, match=r"too noisy to time.*only known to \d+%"):
        speedup.time_against(Takes(1.0, 7.0, 3.0), Takes(2.0, 5.0), {})
