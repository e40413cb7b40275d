"""The fastest model within a quality target: sizes are times of operators, by a pretended clock."""

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

    def patch(of_operator=seconds_alone):
        def clock_of(task):
            prepared = task.prepared
            return PretendedClock(prepared.model, prepared.traced, seconds, of_operator)

        monkeypatch.setattr("osscar.run.target.clock_of", clock_of)

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


@pytest.mark.slow
def test_the_sizes_of_attempts_are_times_of_operators(pretend, first_is_within):
    pretend()
    result = prune_as_asked(tiny("opt", layers=1), tokens(64, 8), PruningRequest(**ASKED))
    report = result.target
    chosen = report.attempts[report.chosen]
    assert (report.cost, report.dense) == ("time", pytest.approx(1))
    assert chosen.reached <= chosen.limit * (1 + 1e-9)
    facts = dict(run_facts(result.record()))
    assert "; the fastest model that passed its test" in facts["quality target"]


@pytest.mark.slow
def test_what_takes_longer_leaves_first(pretend, first_is_within):
    """By the same losses: what operators take decides, not what parameters there are."""
    dense, data, found = tiny("opt", layers=1), tokens(64, 8), []
    for attention in (1e-10, 1e-7):
        pretend(of_operator=partial(seconds_alone, attention=attention))
        first_is_within.clear()
        model = osscar.prune(dense, data, **ASKED).model
        found.append(sum(p.numel() for n, p in model.named_parameters() if "attn" in n))
    assert found[1] < found[0]


def test_where_fewer_units_save_no_time_nothing_is_tried(pretend, monkeypatch):
    monkeypatch.setattr("osscar.allocation.allocate.measured_curves", None)
    pretend(of_operator=lambda operator, size: 1e-6)
    with pytest.raises(RequestError, match=r"no faster with fewer units; give smallest flops"):
        osscar.prune(tiny("opt", layers=1), tokens(64, 8), **ASKED)
