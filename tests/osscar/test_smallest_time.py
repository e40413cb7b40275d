"""The fastest model within a quality target: sizes are times of operators, by a pretended clock."""

import itertools
from functools import partial

import pytest

import osscar
from osscar.base.errors import RequestError
from osscar.evaluation.confidence import Bounded, Judge
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import run_facts
from tests.osscar.families import tiny, tokens
from tests.osscar.pretended_clock import PretendedClock, seconds, seconds_alone


@pytest.fixture
def pretend(monkeypatch):
    """Return what lets models and operators take as long as functions say, in two attempts."""

    def patch(of_model=seconds, of_operator=seconds_alone):
        clocks = []

        def clock_of(task):
            prepared = task.prepared
            clocks.append(PretendedClock(prepared.model, prepared.traced, of_model, of_operator))
            return clocks[-1]

        monkeypatch.setattr("osscar.run.target.clock_of", clock_of)
        return clocks

    monkeypatch.setattr("osscar.run.target_search.MOST_ATTEMPTS", 2)
    return patch


@pytest.fixture
def first_is_within(monkeypatch):
    """Let the first model that is measured be well within a target of 0.004, and no other size."""
    sizes = []

    def measure(self, model):
        sizes.append(seconds(model))
        lost = 0.001 if sizes[-1] == sizes[0] else 0.008
        return Bounded(lost, lost, 16)

    monkeypatch.setattr(Judge, "measure", measure)
    return sizes


ASKED = {"max_divergence": 0.004, "smallest": "time", "backend": "wanda", "device": "cpu"}


def test_the_fastest_model_within_a_target_is_timed_as_a_whole(pretend, first_is_within):
    caches, dense = set(), tiny("opt", layers=1)

    def of_model(model):
        caches.add(model.config.use_cache)
        return seconds(model)

    clocks = pretend(of_model)
    result = prune_as_asked(dense, tokens(64, 8), PruningRequest(**ASKED))
    report, found = result.target, result.target.timed
    chosen = report.attempts[report.chosen]
    assert (report.cost, report.dense) == ("time", pytest.approx(1))
    assert chosen.reached <= chosen.limit * (1 + 1e-9)
    assert [len(one.timed) for one in clocks] == [1]  # no model but the one that was chosen
    assert found.speedup == pytest.approx(seconds(dense) / seconds(result.model))
    assert (caches, result.model.config.use_cache) == ({False}, True)
    assert found.expected == pytest.approx(1 / chosen.reached)
    assert found.expected != pytest.approx(found.speedup, rel=0.01)
    facts = dict(run_facts(result.record()))
    assert "; the fastest model that passed its test" in facts["quality target"]
    assert f"{found.expected:.2f} by the times of its operators: pretended" in facts["timed"]


def test_what_takes_longer_leaves_first(pretend, first_is_within):
    """By the same losses: what operators take decides, not what parameters there are."""
    dense, data, found = tiny("opt", layers=1), tokens(64, 8), []
    for attention in (1e-10, 1e-7):
        pretend(of_operator=partial(seconds_alone, attention=attention))
        first_is_within.clear()
        model = osscar.prune(dense, data, **ASKED).model
        found.append(sum(p.numel() for n, p in model.named_parameters() if "attn" in n))
    assert found[1] < found[0]


def test_a_device_too_noisy_to_time_does_not_lose_the_model(pretend, first_is_within):
    dense, noise = tiny("opt", layers=1), itertools.cycle([1.0, 4.0, 1 / 4, 9.0, 1 / 9])
    most = seconds(dense)

    def noisy(model):
        return seconds(model) * (next(noise) if seconds(model) < most else 1)

    pretend(of_model=noisy)
    result = osscar.prune(dense, tokens(64, 8), **ASKED)
    assert result.parameters_after < result.parameters_before
    found = result.target.timed
    assert (found.speedup, found.error) == (None, None)
    assert "too noisy to time" in found.unknown


def test_where_fewer_units_save_no_time_nothing_is_tried(pretend, monkeypatch):
    monkeypatch.setattr("osscar.allocation.allocate.measured_curves", None)
    pretend(of_operator=lambda operator, size: 1e-6)
    with pytest.raises(RequestError, match=r"no faster with fewer units; give smallest flops"):
        osscar.prune(tiny("opt", layers=1), tokens(64, 8), **ASKED)
