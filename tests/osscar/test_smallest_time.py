"""The fastest model within a quality target: sizes are times of operators, by a pretended clock."""

import itertools
import math

import pytest
import torch
from torch import nn

import osscar
from osscar.allocation.costs import CountedCost
from osscar.allocation.task import PruningTask
from osscar.base import timing
from osscar.base.errors import RequestError
from osscar.evaluation.confidence import Bounded, Judge
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import attempts_table, run_facts
from tests.osscar.families import tiny, tokens
from tests.osscar.pretended_clock import PretendedClock


def seconds(model):
    """As long as parameters say, those of attention three times as long, and some for all else."""
    prices = ((name, p.numel()) for name, p in model.named_parameters())
    return 1e-9 * (5_000 + sum(3 * size if "attn" in name else size for name, size in prices))


def of_operator(operator, size, attention=2e-9):
    """Not quite what models take."""
    shapes = operator.arguments_at(size, lambda shape, dtype: shape)
    return (attention if "attn" in operator.module else 1e-9) * math.prod(
        shapes.get("weight", (1,))
    )


@pytest.fixture
def pretend(monkeypatch):
    """Return what lets models and operators take as long as functions say, in two attempts."""

    def patch(of_model=seconds, of_operator=of_operator):
        clocks = []

        def clock_of(task):
            prepared = task.prepared
            clocks.append(PretendedClock(prepared.model, prepared.traced, of_model, of_operator))
            return clocks[-1]

        monkeypatch.setattr("osscar.run.target.clock_of", clock_of)
        return clocks

    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)
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
    caches, dense, lines = set(), tiny("opt"), []

    def of_model(model):
        caches.add(model.config.use_cache)
        return seconds(model)

    clocks = pretend(of_model)
    result = prune_as_asked(dense, tokens(64, 24), PruningRequest(**ASKED), tell=lines.append)
    report, found = result.target, result.target.timed
    chosen = report.attempts[report.chosen]
    assert (report.cost, report.dense) == ("time", pytest.approx(1))
    assert chosen.reached <= chosen.limit * (1 + 1e-9)
    assert [len(one.timed) for one in clocks] == [1]  # no model but the one that was chosen
    assert found.speedup == pytest.approx(seconds(dense) / seconds(result.model))
    assert (caches, result.model.config.use_cache) == ({False}, True)
    assert found.expected == pytest.approx(1 / chosen.reached)
    assert found.expected != pytest.approx(found.speedup, rel=0.01)
    assert "pretended" in found.what
    assert any("of the time by its operators, 0.001 nats" in line for line in lines)
    check_page(result.record(), found)


def check_page(record, found):
    """Look at what is shown of times."""
    assert record["target"]["timed"]["speedup"] == found.speedup
    facts = dict(run_facts(record))
    assert "; the fastest model that passed its test" in facts["quality target"]
    assert "of the time by its operators" in facts["quality target"]
    assert facts["timed"] == (
        f"{found.speedup:.2f} times as fast as the dense model, known to {found.error:.1%}; "
        f"{found.expected:.2f} by the times of its operators: pretended"
    )
    assert attempts_table(record["target"]).columns[0].startswith("the time by its operators kept")


def test_what_takes_longer_leaves_first(pretend, first_is_within):
    """By the same losses: what operators take decides, not what parameters there are."""
    dense, data, found = tiny("opt"), tokens(64, 24), []
    for attention in (1e-10, 1e-7):
        pretend(
            of_operator=lambda operator, size, price=attention: of_operator(operator, size, price)
        )
        first_is_within.clear()
        model = osscar.prune(dense, data, **ASKED).model
        found.append(sum(p.numel() for n, p in model.named_parameters() if "attn" in n))
    assert found[1] < found[0]


def test_a_device_too_noisy_to_time_does_not_lose_the_model(pretend, first_is_within):
    dense, noise = tiny("opt"), itertools.cycle([1.0, 4.0, 1 / 4, 9.0, 1 / 9])
    most = seconds(dense)

    def noisy(model):
        return seconds(model) * (next(noise) if seconds(model) < most else 1)

    pretend(of_model=noisy)
    result = osscar.prune(dense, tokens(64, 24), **ASKED)
    assert result.parameters_after < result.parameters_before
    found = result.target.timed
    assert (found.speedup, found.error) == (None, None)
    assert "too noisy to time" in found.unknown
    facts = dict(run_facts(result.record()))
    assert facts["timed"].startswith("the speed of the whole model is not known (this device is")


def test_where_fewer_units_save_no_time_nothing_is_tried(pretend, monkeypatch):
    monkeypatch.setattr("osscar.allocation.allocate.measured_curves", None)
    pretend(of_operator=lambda operator, size: 1e-6)
    with pytest.raises(RequestError, match=r"no faster with fewer units; give smallest flops"):
        osscar.prune(tiny("opt"), tokens(64, 24), **ASKED)


def test_what_is_timed_may_be_a_token_too():
    assert PruningRequest(**ASKED, timed="decode", context=8).timing == "smallest time"
    with pytest.raises(RequestError, match=r"give speedup, too .* or smallest time"):
        PruningRequest(max_divergence=0.1, timed_in="onnxruntime")


def test_any_width_is_possible_where_the_table_has_all_stairs():
    model = nn.Sequential(
        nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 4)
    )
    with prepare(model, torch.randn(8, 8), device="cpu") as prepared:
        for round_to, expected in (("auto", (96, 14)), (32, (3, 6))):
            request = PruningRequest(**ASKED, round_to=round_to)
            task = PruningTask(prepared, request, times=CountedCost(1.0, (), {}))
            assert tuple(len(one) for one in task.options.values()) == expected
