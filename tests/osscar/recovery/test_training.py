"""The loop: its steps, its rates, where it looks and when it ends."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn

import osscar
from osscar.base import progress
from osscar.data.samples import named_generator
from osscar.recovery import training as loop
from osscar.recovery.log import Point
from osscar.recovery.setup import Setup
from osscar.recovery.training import Training, kept_point
from tests.osscar.families import tiny, tokens
from tests.osscar.recovery.perturbed import perturbed

CPU = {"device": "cpu"}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def numbers(count=24):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 64, 100])
def test_each_step_moves_and_eight_looks_are_taken(steps, monkeypatch):
    rates = []
    original = torch.optim.AdamW.step

    def step(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(loop, "_RISES", 100)
    recovery = osscar.recover(
        perturbed(net()), net(), numbers(), steps=steps, learning_rate=1e-3, **CPU
    )
    del rates[:2]  # of the steps that are tried
    taken = [point.step for point in recovery.points]
    every = math.ceil(steps / 8)
    assert taken == sorted({*range(0, steps + 1, every), steps})
    warm = math.ceil(steps / 10)
    assert rates[:warm] == pytest.approx([1e-3 * (i + 1) / warm for i in range(warm)])
    assert len(rates) == steps
    assert all(0 < rate <= 1e-3 for rate in rates)
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert steps == warm or rates[-1] == pytest.approx(1e-4)


def test_a_step_is_one_of_adamw_on_the_mean_loss_however_it_is_split():
    """Against a loop of its own, with torch's optimizer; gradients are clipped to 1."""
    dense, data = net(), numbers(12)
    smaller = perturbed(dense, 2.0)
    order = torch.randperm(12, generator=named_generator("held out", 0)).tolist()
    samples = data[sorted(order[:10])]
    mine = copy.deepcopy(smaller)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, weight_decay=0.0)
    with torch.no_grad():
        power = dense(data[sorted(order[10:])]).square().sum(1).mean()
    drawn = torch.Generator().manual_seed(0)
    passes = [torch.randperm(10, generator=drawn).tolist() for _ in range(2)]
    for start, rate in ((0, 1e-3), (5, 1e-3 * (0.9 * (0.5 + 0.5 * math.cos(math.pi / 3)) + 0.1))):
        now = samples[passes[0][start : start + 5]]
        optimizer.zero_grad()
        error = (mine(now) - dense(now).detach()).square().sum(1).mean() / power
        error.backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    asked = {"steps": 4, "batch_size": 5, "held_out": 2, **CPU}
    for micro in (1, 2, 5, 9):
        standings = []

        class Log:
            def keep(self, standing, standings=standings):
                standings.append({n: t.clone() for n, t in standing.tensors.items()})

        set_up(smaller, dense, data, micro_batch_size=micro, **asked).run(1.0, 1e-3, Log())
        for name, weight in mine.named_parameters():
            found = standings[1][f"value.{name}"]
            torch.testing.assert_close(found, weight.detach(), rtol=1e-5, atol=1e-6)


def set_up(smaller, dense, data, **asked):
    request = osscar.RecoveryRequest(**asked)
    return Training.of(Setup.of(smaller, dense, data, request), request)


def test_each_pass_takes_every_sample_once_in_an_order_of_its_own():
    data = torch.arange(12.0)[:, None].expand(-1, 6)

    def drawn(steps, seed=3):
        asked = {"batch_size": 4, "seed": seed, **CPU}
        training = set_up(net(), net(), data, held_out=2, **asked)
        return [[int(one["input"][0, 0]) for one in step] for step in training._steps(steps)]

    flat = [*itertools.chain(*drawn(10))]
    assert [len(step) for step in drawn(10)] == [4] * 10
    assert drawn(3) == drawn(10)[:3]
    assert drawn(10, seed=4) != drawn(10)
    passes = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert [sorted(one) for one in passes] == [sorted(passes[0])] * 4
    assert len(set(passes[0])) == 10
    assert len({tuple(one) for one in passes}) == 4


def points(*held):
    return tuple(Point(index, None, one, 0.0) for index, one in enumerate(held))


def test_what_is_kept_and_when_it_ends():
    for found, kept, over in (
        (points(1.0), 0, False),
        (points(1.0, 1.0), 0, False),
        (points(1.0, 0.5, None), 1, True),
        (points(1.0, 0.5, 0.6, 0.5, 0.7), 1, False),
        (points(1.0, 0.5, 0.6, 0.7, 0.65, 0.8), 1, False),
        (points(1.0, 0.5, 0.6, 0.7, 0.8), 1, True),
        (points(1.0, 2.0, 3.0, 4.0, 5.0), 0, True),
        (points(1.0, 2.0, 3.0, 4.0, 0.9), 4, False),
    ):
        assert kept_point(found).step == kept
        assert loop._is_over(found) == over


def test_the_range_test_finds_a_rate_that_leads_nearest_and_leaves_the_model():
    dense = tiny("opt", layers=1)
    data = tokens(12)
    smaller = perturbed(dense)
    asked = {"steps": 4, "batch_size": 4, **CPU}
    found = osscar.recover(smaller, dense, data, **asked)
    assert found.learning_rate in loop._RATES
    given = osscar.recover(smaller, dense, data, learning_rate=found.learning_rate, **asked)
    assert given.after == found.after  # nothing of the test has stayed
    afters = {
        rate: osscar.recover(smaller, dense, data, learning_rate=rate, **asked).after
        for rate in (1e-5, found.learning_rate)
    }
    assert afters[found.learning_rate] < afters[1e-5] < found.before


def test_rates_that_diverge_end_the_range_test(monkeypatch):
    monkeypatch.setattr(loop, "_RATES", (1e-3, 1e20, 1e30, 1e38, 1e38))
    tried = []
    original = loop.Training.distance
    monkeypatch.setattr(loop.Training, "distance", lambda self: tried.append(1) or original(self))
    smaller = perturbed(net())
    recovery = osscar.recover(smaller, net(), numbers(), steps=1, **CPU)
    assert recovery.learning_rate == 1e-3
    assert len(tried) == 1 + 1 + 3 + 1  # of the step that is tried, before, three rates, after
    assert recovery.after <= recovery.before


def test_progress_tells_the_loss_and_the_distance(monkeypatch):
    said = []
    monkeypatch.setattr(progress._Bar, "describe", lambda _, words: said.append(words))
    osscar.recover(perturbed(net()), net(), numbers(), steps=2, learning_rate=1e-3, **CPU)
    assert len(said) == 2
    assert all(
        re.fullmatch(r"recover: loss 0\.\d+, held out 0\.\d+ to 0\.\d+", one) for one in said
    )
