"""Speed-ups: whole models are timed until one is as fast as is wanted."""

import itertools
import math
from timeit import Timer
from unittest import mock

import pytest

import osscar
from osscar.allocation import speedup, times
from osscar.allocation.speedup import Aim, Proposal
from osscar.base import timing
from osscar.base.errors import RequestError
from osscar.request import BudgetKind, PruningRequest
from osscar.run.jobs import jobs
from osscar.run.points import prune_points
from tests.osscar.families import tiny, tokens
from tests.osscar.pretended_clock import PretendedClock


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """No turns but those that are asked for."""
    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)


def seconds(model):
    """As long as parameters say, those of attention three times as long, and some for all else."""
    prices = ((name, p.numel()) for name, p in model.named_parameters())
    return 1e-9 * (5_000 + sum(3 * size if "attn" in name else size for name, size in prices))


@pytest.fixture
def timed(monkeypatch):
    """Let models take as long as `seconds` says, and operators as their parameters; return what was
    timed whole."""
    models = []

    def of_operator(operator, size):
        shapes = operator.arguments_at(size, lambda shape, dtype: shape)
        price = 2e-9 if "attn" in operator.module else 1e-9  # not quite what models take
        return price * math.prod(shapes.get("weight", (1,)))

    def clock_of(task):
        found = PretendedClock(task.prepared.model, task.prepared.traced, seconds, of_operator)
        found.timed = models
        return found

    monkeypatch.setattr(speedup, "clock_of", clock_of)
    return models


def test_each_point_of_a_sweep_is_as_fast_as_it_is_asked_for(timed, monkeypatch):
    """Operators are timed once for all of them."""
    tables = mock.Mock(side_effect=times.tabled)
    monkeypatch.setattr(times, "tabled", tables)
    model, points = tiny("opt"), jobs(BudgetKind.SPEEDUP, (1.2, 1.5))
    base, swept = PruningRequest(speedup=2.0, backend="wanda", device="cpu"), []
    for job, result in prune_points(model, tokens(8, 24), base, points):
        reached = seconds(model) / seconds(result.model)
        assert reached == pytest.approx(job.value, rel=speedup.CLOSE)
        assert 1 / result.budget.tightest.reached == pytest.approx(reached, rel=1e-6)
        assert result.budget.tightest.limit == pytest.approx(1 / job.value)
        assert len(timed) <= 9
        timed.clear()
        swept.append(job)
    assert swept == [*points]
    tables.assert_called_once()


@pytest.mark.parametrize(("wanted", "binds"), [(1.1, True), (1.5, False)])
def test_other_budgets_hold_at_every_step_of_a_speed_up(timed, wanted, binds):
    """At 1.1 times the speed the model would be larger than it may be."""
    model, asked = tiny("opt"), {"allocation": "uniform", "backend": "wanda"}
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
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=50.0)
    assert len(timed) == 1


def test_a_rough_time_that_told_enough_for_one_speed_up_is_taken_again_for_another(monkeypatch):
    """As the sizes of a sweep share what was timed."""
    errors = iter((0.1, 0.005))
    ratio = mock.Mock(side_effect=lambda *_: speedup.Ratio(2.05, next(errors)))
    monkeypatch.setattr(speedup, "time_against", ratio)
    monkeypatch.setattr(speedup, "_built", mock.Mock())
    monkeypatch.setattr(speedup, "clock_of", mock.Mock())
    known = {}
    for wanted, count in ((1.25, 1), (1.25, 1), (2.0, 2), (1.9, 2)):
        task = mock.Mock(options=["a"], keep={}, request=PruningRequest(speedup=wanted))
        models = speedup.WholeModels(task, known)
        assert models.speedup({"a": 3}) == 2.05
        assert ratio.call_count == count
        assert not models.error


# ---- whole models decide -----------------------------------------------------------------


class Models:
    """Stands for models of one group of a thousand units that take so long as is said."""

    def __init__(self, seconds, error=0.0):
        self.seconds, self.speedups, self.error = seconds, {}, error
        self.least = {"a": 0}

    def key(self, kept):
        return (kept["a"],)

    def speedup(self, kept):
        return self.speedups.setdefault(self.key(kept), 1 / self.seconds(kept["a"]))


def by(*widths):
    """Propose the largest of some widths that a share of all units allows."""
    return lambda share: {"a": max(w for w in widths if w <= max(share, 0) * 1000)}


def expected(kept):
    return kept["a"] / 1000


def test_the_limit_is_moved_until_the_whole_model_fits():
    models = Models(lambda width: 0.3 + 0.7 * (width / 1000) ** 2)
    kept = Aim(models, 1.6, expected).fitted(Proposal(by(*range(1001)), 4))
    assert models.speedup(kept) == pytest.approx(1.6, rel=speedup.CLOSE)
    assert len(models.speedups) <= 5  # and the least


def test_a_model_is_faster_where_no_widths_lie_between():
    """A width of 600 takes too long, and 400 less than it may: more than once nothing is timed."""
    models = Models(lambda width: max(width, 1) / 1000)
    aim = Aim(models, 2.0, expected)
    assert aim.fitted(Proposal(by(0, 400, 600, 1000), 4)) == {"a": 400}
    kept = aim.fitted(Proposal(by(*range(0, 1001, 7)), 2))
    assert models.speedup(kept) == pytest.approx(2.0, rel=speedup.CLOSE)


def test_where_the_table_allows_no_width_less_nothing_fits():
    """The table says that the least widths take 0.6, and those of that limit are slow."""
    models = Models(lambda width: 0.4 if width == 0 else 1.1)
    aim, proposal = Aim(models, 2.0, lambda kept: 0.6), Proposal(lambda share: {"a": 800}, 4)
    assert aim.fitted(proposal) is None
    assert aim.fitted(proposal) is None


def test_a_proposal_that_does_not_fit_goes_on():
    """Times rise all at once, where straight lines lead only slowly."""
    models = Models(lambda width: 0.2 + 0.75 / (1 + math.exp((800 - width) / 10)))
    aim, proposal = Aim(models, 2.0, expected), Proposal(by(*range(1001)), 4)
    assert aim.fitted(proposal) is None
    assert models.speedup(aim.fitted(proposal)) == pytest.approx(2.0, rel=speedup.CLOSE)
    assert 5 < len(models.speedups) <= 9


@pytest.mark.parametrize(
    ("error", "why"), [(0.0, "no more are tried; ask for 1.25"), (0.017, "known to 1.7%")]
)
def test_what_the_device_makes_of_it_is_no_other_speed_in_silence(error, why):
    """Times are 0.8 or 0.4, whatever the width is near: no width takes 0.5."""
    models = Models(lambda width: 0.8 if width % 2 else 0.4, error)
    aim, proposal = Aim(models, 1.7, expected), Proposal(by(*range(1001)), 4)
    assert aim.fitted(proposal) is None
    with pytest.raises(
        RequestError, match=r"1.7 cannot be met within 2%: of \d models.* 1.25 times"
    ) as refused:
        aim.refuse()
    assert why in str(refused.value)


def takes(*turns, told=None):
    """Return a timer of so many seconds, one turn after the other where there are several."""
    left = list(turns)

    def run():
        left.append(left.pop(0))
        if told is not None:
            told.append(left[-1])

    # It is read before a turn and behind it.
    ends = itertools.cycle([lambda: 0.0, lambda: left[-1]])
    return Timer(run, timer=lambda: next(ends)())


def against(dense, other, wanted=2.0):
    return speedup.time_against(takes(*dense), takes(*other), wanted)


def test_a_speed_up_is_of_median_times_and_refused_where_they_are_too_noisy():
    assert against([3.0], [1.5]).speedup == pytest.approx(2.0)
    with pytest.raises(RequestError, match=r"too noisy to time.*only known to \d+%"):
        against([1.0, 7.0, 3.0], [2.0, 5.0], 1.5)


def test_more_turns_are_timed_while_times_differ():
    assert against([2.0], [0.99, 1.0, 1.03, 0.96]).speedup == pytest.approx(2.0, rel=0.02)
    assert against([2.0], [1.0]).speedup == 2.0


@pytest.mark.parametrize(("wanted", "few"), [(2.0, False), (1.5, True), (3.0, True)])
def test_a_speed_up_far_from_what_is_wanted_need_not_be_known_well(wanted, few):
    turns = []
    dense, unsteady = takes(2.0, told=turns), takes(0.94, 1.0, 1.06, 0.97, 1.03)
    found = speedup.time_against(dense, unsteady, wanted)
    assert (found.error > speedup.CLOSE / 2) == few
    assert found.error <= found.told(wanted)
    assert (len(turns) < 7) == few  # five turns, and a warm-up
