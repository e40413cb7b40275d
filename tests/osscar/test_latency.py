"""Speed-ups: parts of a pass, their table, what is kept of it on disk, and aiming by it."""

import errno
import itertools
import json
import os
import pathlib
import re

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.allocation import latency, parts
from osscar.allocation.latency import Latency
from osscar.allocation.latency_table import Part, tabulated
from osscar.allocation.parts import Event, groups_between, timed_pass
from osscar.allocation.widths import asked_groups
from osscar.base import timing
from osscar.base.errors import RequestError
from osscar.pruning.prune import prepare_for
from osscar.pruning.sweep import BudgetKind, jobs, sweep
from osscar.request import PruningRequest, Widths
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where tables are kept, and no turns but those that are asked for."""
    monkeypatch.setenv("OSSCAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)
    return tmp_path / "cache" / "latency"


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
            own_seconds(after.module, model.get_submodule(after.module))
            if (before.module, before.enters, after.enters) == (after.module, True, False)
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
    ready = prepare_for(model, data, request)
    opened = ready.__enter__()
    _, keep, shared = asked_groups(opened, request)
    return ready, opened, shared, keep


# ---- aiming ------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("allocation", ["curvature", "uniform", "fluctuation"])
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


def test_a_device_that_is_too_noisy_is_refused_with_the_spread(monkeypatch, cache):
    times = itertools.count(1)

    def timed(model, modules, batch):
        events, _ = timed_pass(model, modules, batch)
        return events, (float(1 + next(times) % 7),) * (len(events) - 1)

    monkeypatch.setattr(parts, "timed_pass", timed)
    with pytest.raises(RequestError, match=r"too noisy to time.*only known to \d+%"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=1.5)
    assert not cache.exists()


def test_a_whole_model_that_is_too_noisy_to_time_is_refused(monkeypatch, clock):
    def noisy(dense, other, batch):
        raise RequestError("this device is too noisy to time")

    monkeypatch.setattr(latency, "time_against", noisy)
    with pytest.raises(RequestError, match="too noisy"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=1.5)


def test_a_speed_up_out_of_reach_says_what_is_in_reach(clock):
    with pytest.raises(RequestError, match=r"--speedup 50 cannot be met.*at least"):
        osscar.prune(tiny("opt"), tokens(8, 24), speedup=50.0)


def test_a_sweep_over_speed_ups_has_one_table(clock):
    _, by_parts = clock
    model, points = tiny("opt"), jobs(BudgetKind.SPEEDUP, (1.2, 1.5))
    base = PruningRequest(speedup=2.0, backend="wanda", device="cpu")
    timed = []
    for job, result in sweep(model, tokens(8, 24), base, points):
        timed.append(len(by_parts))
        reached = seconds(model) / seconds(result.model)
        assert 1 / result.budget.reached == pytest.approx(reached, rel=1e-6)
        assert reached == pytest.approx(job.value, rel=0.03)
    assert timed[0] == timed[1] > 0


# ---- the table ---------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("more", [{}, {"heads": "1/2"}, {"round_to": 8}])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-gqa"])
def test_a_table_is_the_time_of_models_that_were_never_built(clock, family, more):
    model, random = tiny(family), np.random.default_rng(0)
    context, ready, shared, keep = asked(model, tokens(8, 24), **more)
    table = Latency(ready, shared, keep, Widths(more.get("round_to", 1))).table
    if not more:
        assert table.of({}) == pytest.approx(1.0)
    assert table.separable([group.name for group in shared])
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
    context, ready, shared, keep = asked(small_net(), images())
    table = Latency(ready, shared, keep).table
    assert not table.separable([group.name for group in shared])
    half = {group.name: group.units // 2 for group in shared}
    result = osscar.prune(small_net(), images(), groups=half, backend="magnitude", blend=0.0)
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
    assert table.seconds({}) == table.dense_seconds
    assert table.seconds({"a": 2, "b": 1}) == pytest.approx(3 + 2 + 3)
    assert table.seconds({"a": 3}) == pytest.approx((3 + 8) / 2 + 2 + (5 + 9) / 2)
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
    enters, leaves = (lambda name: Event(name, True)), (lambda name: Event(name, False))
    assert groups_between(enters("o"), leaves("o"), owners) == {"heads", "stream"}
    assert groups_between(leaves("q"), enters("o"), owners) == {"heads"}
    assert groups_between(leaves("o"), enters("up"), owners) == set()
    assert groups_between(Event("", True), enters("q"), owners) == set()


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
    events = (Event("", True), Event("", False))
    steady = np.array([[1.0, 1.0, 2.0]] * 5)
    steady[0] = 50.0  # a hiccup
    slow = parts.Turns(events, 3 * steady, 3 * steady / 2)  # a moment of other work
    fast = parts.Turns(events, steady, steady / 4)
    also = parts.Turns(events, steady, steady)
    dense, smaller = parts.medians([slow, fast, also], ["same", "same", "other"])
    assert dense == pytest.approx([1, 1, 2])
    assert [list(one) for one in smaller] == [
        pytest.approx([0.5, 0.5, 1]), pytest.approx([0.25, 0.25, 0.5]), pytest.approx([1, 1, 2]),
    ]  # fmt: skip


# ---- kept on disk ------------------------------------------------------------------------


def measure(data=None, **more):
    context, ready, shared, keep = asked(tiny("opt"), tokens(8, 24) if data is None else data)
    table = Latency(ready, shared, keep, **more).table
    context.__exit__(None, None, None)
    return table


def test_a_table_serves_the_next_run_on_the_same_and_no_other(clock, cache):
    _, by_parts = clock
    first = measure()
    (file,) = cache.iterdir()
    measured = json.loads(file.read_text())["measured"]
    assert measured["torch"] == torch.__version__
    assert "[8, 24]" in measured["data"]
    timed = len(by_parts)
    assert timed > 0
    assert measure() == first
    assert len(by_parts) == timed
    measure(tokens(8, 16))
    assert len(by_parts) == 2 * timed
    measure(widths=Widths(2))
    assert len(by_parts) == 3 * timed
    assert len(list(cache.iterdir())) == 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: text.replace('"osscar.latency/1"', '"osscar.latency/2"'),
        lambda text: text.replace('"torch": "', '"torch": "0.'),
        lambda text: text.replace("self_attn", "other_attn"),
        lambda text: text.replace('"dense_seconds": ', '"dense_seconds": -'),
        lambda text: text.replace('"shares": [', '"shares": [2.0,'),
        lambda text: re.sub(r'"parts": \[.*\]', '"parts": []', text, flags=re.DOTALL),
        lambda text: re.sub(r'("dense_seconds": )[^,]*', r"\g<1>5e-324", text),
    ],
)
def test_a_damaged_or_foreign_table_is_measured_anew(clock, cache, damage):
    first = measure()
    (file,) = cache.iterdir()
    sound = file.read_text()
    assert damage(sound) != sound
    file.write_text(damage(sound))
    with pytest.warns(UserWarning, match=rf"{file.name}.*measured anew"):
        assert measure() == first
    assert file.read_text() == sound


def test_without_a_place_to_keep_it_a_table_serves_its_run(clock, cache):
    cache.parent.write_text("a file")
    with pytest.warns(UserWarning, match="not kept for the next run"):
        measure()


def test_a_pipe_in_the_place_of_a_table_is_not_waited_for(clock, cache):
    first = measure()
    (file,) = cache.iterdir()
    file.unlink()
    os.mkfifo(file)
    with pytest.warns(UserWarning, match="not kept for the next run: .* is no file"):
        assert measure() == first


def test_a_directory_that_cannot_be_searched_holds_no_table(clock, cache, monkeypatch):
    first = measure()

    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "exists", refuse)
        with pytest.warns(UserWarning, match="Permission denied"):
            assert measure() == first


def test_a_table_that_is_none_is_not_sound():
    assert Part(("a",), (0.25, 1.0), (1.0, 2.0)).sound
    for shares, times in [
        ((), ()), ((1.0,), (1.0, 2.0)), ((0.5, 0.25), (1.0, 1.0)), ((0.5, 0.5), (1.0, 1.0)),
        ((0.0, 1.0), (1.0, 1.0)), ((0.5, 1.5), (1.0, 1.0)), ((0.5, 1.0), (-1.0, 1.0)),
        ((0.25, 0.5), (1.0, 2.0)),
    ]:  # fmt: skip
        assert not Part(("a",), shares, times).sound
