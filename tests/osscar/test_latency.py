"""Speed-ups: parts of a pass, their table, and aiming by it."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.allocation import latency
from osscar.allocation import latency_table as parts
from osscar.allocation.latency_table import groups_between, tabulated, timed_pass
from osscar.allocation.widths import asked_groups
from osscar.base import timing
from osscar.base.errors import RequestError
from osscar.pruning.prune import prepare_for
from osscar.pruning.sweep import BudgetKind, jobs, prune_points
from osscar.request import PruningRequest, Widths
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    """No turns but those that are asked for."""
    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)


def own_seconds(name, module):
    price = 3 if "attn" in name else 1
    return price * sum(p.numel() for p in module.parameters(recurse=False))


def seconds(model):
    return 5_000 + sum(own_seconds(name, module) for name, module in model.named_modules())


@pytest.fixture
def clock(monkeypatch):
    """Let modules take as long as their parameters say, those of attention three times as long.

    Yields what was timed whole, and what part by part.
    """
    whole, by_parts = [], []

    def time_against(dense, other, batch):
        whole.append(other)
        return seconds(dense) / seconds(other)

    def timed(model, modules, batch):
        by_parts.append(model)
        events, _ = timed_pass(model, modules, batch)
        found = [
            own_seconds(after[0], model.get_submodule(after[0]))
            if (before, after) == ((after[0], True), (after[0], False))
            else 0.0
            for before, after in itertools.pairwise(events)
        ]
        found[0] += seconds(model) - sum(found)
        return events, tuple(found)

    monkeypatch.setattr(latency, "time_against", time_against)
    monkeypatch.setattr(parts, "timed_pass", timed)
    return whole, by_parts


def asked(model, data, **more):
    """Open a model, and return it with the groups that a speed-up reaches, and what others keep."""
    request = PruningRequest(speedup=1.5, device="cpu", **more)
    prepared = prepare_for(model, data, request)
    opened = prepared.__enter__()
    _, keep, shared = asked_groups(opened, request)
    return prepared, opened, shared, keep


# ---- aiming ------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("allocation", ["curvature", "uniform"])
@pytest.mark.parametrize("wanted", [1.2, 1.5])
def test_a_speed_up_is_aimed_at_by_timing(clock, wanted, allocation):
    whole, _ = clock
    model = tiny("opt")
    result = osscar.prune(
        model, tokens(8, 24), speedup=wanted, allocation=allocation, backend="wanda"
    )
    reached = seconds(model) / seconds(result.model)
    # Uniform shares come to whole heads in all layers at once.
    assert reached == pytest.approx(wanted, rel=0.03 if allocation == "curvature" else 0.1)
    assert 1 / result.budget.reached == pytest.approx(reached, rel=1e-6)
    assert result.budget.limit == pytest.approx(1 / wanted)
    assert len(whole) <= (2 if allocation == "curvature" else 6)  # with the result itself


class Takes(nn.Module):
    """Takes so long by a clock of its own."""

    now = 0.0

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(()))

    def forward(self):
        Takes.now += self.seconds


def test_a_speed_up_is_above_one_where_the_other_model_is_faster(monkeypatch):
    monkeypatch.setattr(latency, "clock_of", lambda device: lambda: Takes.now)
    assert latency.time_against(Takes(3.0), Takes(1.5), {}) == pytest.approx(2.0)


def test_a_device_that_is_too_noisy_is_refused_with_the_spread(monkeypatch):
    times = itertools.count(1)

    def timed(model, modules, batch):
        events, _ = timed_pass(model, modules, batch)
        return events, (float(1 + next(times) % 7),) * (len(events) - 1)

    monkeypatch.setattr(parts, "timed_pass", timed)
    with pytest.raises(RequestError, match=r"too noisy to time.*only known to \d+%"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=1.5)


def test_a_whole_model_that_is_too_noisy_to_time_is_refused(monkeypatch, clock):
    def noisy(dense, other, batch):
        raise RequestError("this device is too noisy to time")

    monkeypatch.setattr(latency, "time_against", noisy)
    with pytest.raises(RequestError, match="too noisy"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=1.5)


def test_a_speed_up_out_of_reach_says_what_is_in_reach(clock):
    with pytest.raises(RequestError, match=r"speedup=50 cannot be met.*at least"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=50.0)


def test_a_sweep_over_speed_ups_has_one_table(clock):
    _, by_parts = clock
    model, points = tiny("opt"), jobs(BudgetKind.SPEEDUP, (1.2, 1.5))
    base = PruningRequest(speedup=2.0, backend="wanda", device="cpu")
    timed = []
    for job, result in prune_points(model, tokens(8, 24), base, points):
        timed.append(len(by_parts))
        reached = seconds(model) / seconds(result.model)
        assert 1 / result.budget.reached == pytest.approx(reached, rel=1e-6)
        assert reached == pytest.approx(job.value, rel=0.03)
    assert timed[0] == timed[1] > 0


# ---- the table ---------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("more", [{}, {"heads": "1/2"}, {"round_to": 8}])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-gqa"])
def test_a_table_is_the_time_of_models_that_were_never_built(clock, family, more):
    model, random = tiny(family), np.random.default_rng(0)
    context, prepared, shared, keep = asked(model, tokens(8, 24), **more)
    table = latency.latency_table(prepared, shared, keep, Widths(more.get("round_to", 1)))
    if not more:
        assert table.of({}) == pytest.approx(1.0)
    assert len(table.classes(group.name for group in shared)) == len(shared)
    for _ in range(2):
        kept = {g.name: int(random.integers(1, g.units + 1)) for g in shared}
        if "round_to" in more:  # the least width of a table is not one unit
            kept = {g.name: g.units for g in shared} | {shared[1].name: shared[1].units // 2}
        result = osscar.prune(model, tokens(8, 24), groups={**keep, **kept}, backend="magnitude")
        assert table.of(kept) == pytest.approx(seconds(result.model) / seconds(model), rel=1e-6)
    name = shared[0].name
    counts = np.array([kept[name], shared[0].units])
    over = table.over(name, counts, kept)
    assert over[1] - over[0] == pytest.approx(
        table.of({**kept, name: shared[0].units}) - table.of(kept)
    )
    context.__exit__(None, None, None)


def test_the_time_of_a_filter_depends_on_both_of_its_widths(clock):
    context, prepared, shared, keep = asked(small_net(), images())
    table = latency.latency_table(prepared, shared, keep, Widths())
    assert len(table.classes(group.name for group in shared)) < len(shared)
    half = {group.name: group.units // 2 for group in shared}
    result = osscar.prune(
        small_net(), images(), groups=half, backend="magnitude", correction_weight=0.0
    )
    expected = seconds(result.model) / seconds(small_net())
    assert table.of(half) == pytest.approx(expected, rel=0.02)
    name = shared[0].name
    over = table.over(name, np.array([1, shared[0].units]), half)
    expected = table.of({**half, name: shared[0].units}) - table.of({**half, name: 1})
    assert over[1] - over[0] == pytest.approx(expected)
    context.__exit__(None, None, None)


def test_what_was_timed_twice_is_averaged_and_what_lies_between_interpolated():
    groups = [frozenset({"a"}), frozenset({"a"}), frozenset(), frozenset({"a", "b"})]
    kept = [{}, {"a": 2, "b": 1}, {"a": 2, "b": 2}]
    times = [np.array(row) for row in ([4, 4, 1, 9], [1, 2, 1, 3], [2, 1, 4, 5])]
    table = tabulated(groups, kept, times, 100.0, {"a": 4, "b": 2})
    assert table.dense_seconds == 8 + 2 + 9
    assert table.of({}) == 1
    assert table.of({"a": 2, "b": 1}) == pytest.approx((3 + 2 + 3) / 19)
    assert table.of({"a": 3}) == pytest.approx(((3 + 8) / 2 + 2 + (5 + 9) / 2) / 19)
    assert table.of({"a": 1}) == pytest.approx((3 + 2 + 3) / 19)  # not below what was timed
    fixed = tabulated(groups, kept[1:], times[1:], 100.0, {"a": 4, "b": 2})
    assert fixed.dense_seconds == 100.0


# ---- parts of a pass ---------------------------------------------------------------------


def test_parts_add_up_to_a_pass_and_leave_no_hooks():
    model = tiny("llama-gqa")
    batch = {"input_ids": tokens(2, 24)}
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    events, found = timed_pass(model, names, batch)
    assert list(events) == [
        ("", True),
        *((name, enters) for name in names for enters in (True, False)),
        ("", False),
    ]
    assert len(found) == len(events) - 1
    assert all(part >= 0 for part in found)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_runs_between_modules_depends_on_what_both_know():
    owners = {
        "q": frozenset({"heads"}),
        "o": frozenset({"heads", "stream"}),
        "up": frozenset({"n"}),
    }
    enters, leaves = (lambda name: (name, True)), (lambda name: (name, False))
    assert groups_between(enters("o"), leaves("o"), owners) == {"heads", "stream"}
    assert groups_between(leaves("q"), enters("o"), owners) == {"heads"}
    assert groups_between(leaves("o"), enters("up"), owners) == set()
    assert groups_between(("", True), enters("q"), owners) == set()


class Fickle(nn.Module):
    """Calls its layers in an order that depends on how often it ran."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        layers = (self.one, self.two) if self.calls % 2 else (self.two, self.one)
        return layers[1](layers[0](x))


def test_a_model_that_takes_another_way_at_every_pass_is_refused():
    batch = {"x": torch.randn(2, 4)}
    with pytest.raises(RequestError, match="does not call its modules alike"):
        parts.parts_in_turn(Fickle(), Fickle(), ["one", "two"], batch, 3)


def test_medians_are_over_turns_and_like_parts_and_forgive_a_slow_moment():
    steady = np.array([[1.0, 1.0, 2.0]] * 5)
    steady[0] = 50.0  # a hiccup
    beside = [3 * steady, steady, steady]  # at first, a moment of other work
    smaller = [3 * steady / 2, steady / 4, steady]
    dense, smaller = parts.medians(beside, smaller, ["same", "same", "other"])
    assert dense == pytest.approx([1, 1, 2])
    assert [list(one) for one in smaller] == [
        pytest.approx([0.5, 0.5, 1]), pytest.approx([0.25, 0.25, 0.5]), pytest.approx([1, 1, 2]),
    ]  # fmt: skip
