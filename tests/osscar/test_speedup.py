"""Speed-ups: whole models are timed until one is as fast as is wanted."""

import itertools
from timeit import Timer
from types import SimpleNamespace
from unittest import mock

import pytest

import osscar
from osscar.allocation import speedup, times
from osscar.allocation.speedup import Ratio, WholeModels
from osscar.base.errors import RequestError
from osscar.request import BudgetKind, PruningRequest
from osscar.run.jobs import jobs
from osscar.run.sweep import prune_points
from tests.osscar.families import tiny, tokens
from tests.osscar.pretended_clock import PretendedClock, seconds, seconds_alone


@pytest.fixture
def timed(monkeypatch):
    """Let models and operators take pretended times; return which models were timed whole."""
    models = []

    def clock_of(task):
        found = PretendedClock(task.prepared.model, task.prepared.traced, seconds, seconds_alone)
        found.timed = models
        return found

    monkeypatch.setattr(speedup, "clock_of", clock_of)
    return models


@pytest.mark.slow
def test_each_point_of_a_sweep_is_as_fast_as_it_is_asked_for(timed, monkeypatch):
    """Operators are timed once for all of them."""
    tables = mock.Mock(side_effect=times.tabled)
    monkeypatch.setattr(times, "tabled", tables)
    model, points = tiny("opt"), jobs(BudgetKind.SPEEDUP, (1.2, 1.5))
    base, swept = PruningRequest(speedup=2.0, backend="wanda", device="cpu"), []
    for job, result in prune_points(model, tokens(8, 24), base, points):
        reached = seconds(model) / seconds(result.model)
        assert reached == pytest.approx(job.value, rel=speedup.CLOSE)
        assert 1 / result.budget.limits[0].reached == pytest.approx(reached, rel=1e-6)
        assert result.budget.limits[0].limit == pytest.approx(1 / job.value)
        assert len(timed) <= 9
        timed.clear()
        swept.append(job)
    assert swept == [*points]
    tables.assert_called_once()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "binds"), [(1.1, True), pytest.param(1.5, False, marks=pytest.mark.slow)]
)
def test_other_budgets_hold_at_every_step_of_a_speed_up(timed, wanted, binds):
    """At 1.1 times the speed the model would be larger than it may be."""
    model, asked = tiny("opt", layers=1), {"allocation": "uniform", "backend": "wanda"}
    result = osscar.prune(model, tokens(8, 24), speedup=wanted, params=0.8, **asked)
    assert result.parameters_after <= 0.8 * result.parameters_before
    assert {one.budget for one in result.budget.limits} == {"speedup", "params"}
    reached = seconds(model) / seconds(result.model)
    assert reached == pytest.approx(1 / result.budget.of("speedup").reached)
    assert reached >= (1 - speedup.CLOSE) * wanted
    assert (reached > (1 + speedup.CLOSE) * wanted) == binds
    assert len(timed) == 2 or not binds  # nothing larger is built than may be


def test_a_speed_up_out_of_reach_says_what_is_in_reach_before_anything_is_measured(
    timed, monkeypatch
):
    monkeypatch.setattr("osscar.allocation.allocate.measured_curves", None)
    with pytest.raises(RequestError, match=r"speedup 50 cannot be met: .* is \d.* times as fast"):
        osscar.prune(tiny("opt", layers=1), tokens(8, 24), speedup=50.0)
    assert len(timed) == 1


# ---- whole models decide -----------------------------------------------------------------


class Models(WholeModels):
    """Models of one group of a thousand units that take so long as is said."""

    def __init__(self, wanted, seconds, error=0.0):
        request = SimpleNamespace(speedup=wanted)
        super().__init__(SimpleNamespace(request=request, keep={}, least={"a": 0}))
        self.seconds, self.error = seconds, error

    def timed(self, kept):
        return Ratio(1 / self.seconds(kept["a"]), self.error)

    def propose(self, widths, models):
        """Fit the largest of some widths that a share of all units allows."""

        def within(share):
            return {"a": max(w for w in widths if w <= max(share, 0) * 1000)}

        return self.fitted(within, lambda kept: kept["a"] / 1000, models)


def test_the_limit_is_moved_until_the_whole_model_fits():
    models = Models(1.6, lambda width: 0.3 + 0.7 * (width / 1000) ** 2)
    assert models.speedup(models.propose(range(1001), 4)) == pytest.approx(1.6, rel=speedup.CLOSE)
    assert len(models.ratios) <= 5  # and the least


def test_a_model_is_faster_where_no_widths_lie_between():
    """A width of 600 takes too long, and 400 less than it may: more than once nothing is timed."""
    models = Models(2.0, lambda width: max(width, 1) / 1000)
    assert models.propose((0, 400, 600, 1000), 4) == {"a": 400}
    kept = models.propose(range(0, 1001, 7), 2)
    assert models.speedup(kept) == pytest.approx(2.0, rel=speedup.CLOSE)


@pytest.mark.parametrize(
    ("error", "why"), [(0.0, "no more are tried; ask for 1.25"), (0.07, "known to 7.0%")]
)
def test_what_the_device_makes_of_it_is_no_other_speed_in_silence(error, why):
    """Times are 0.8 or 0.4, whatever the width is near: no width takes 0.5."""
    models = Models(1.7, lambda width: 0.8 if width % 2 else 0.4, error)
    assert models.propose(range(1001), 4) is None
    with pytest.raises(
        RequestError, match=r"1.7 cannot be met within 2%: of \d models.* 1.25 times"
    ) as refused:
        models.refuse()
    assert why in str(refused.value)


def takes(*turns):
    """Return a timer of so many seconds, one turn after the other where there are several."""
    left = list(turns)

    def run():
        left.append(left.pop(0))

    # It is read before a turn and behind it.
    ends = itertools.cycle([lambda: 0.0, lambda: left[-1]])
    return Timer(run, timer=lambda: next(ends)())


def against(dense, other, wanted=2.0):
    return speedup.time_against(takes(*dense), takes(*other), wanted)


def test_a_speed_up_is_of_median_times_and_refused_where_they_are_too_noisy():
    assert against([3.0], [1.5]).speedup == pytest.approx(2.0)
    with pytest.raises(RequestError, match=r"too noisy to time.*only known to \d+%"):
        against([1.0, 7.0, 3.0], [2.0, 5.0], 1.5)
