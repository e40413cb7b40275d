"""The loop: its steps, its learning rate, its checks, and where it goes back."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import osscar
from osscar.base.ranks import ALONE
from osscar.data.samples import named_generator
from osscar.recovery import training as loop
from osscar.recovery.samples import Setup
from osscar.recovery.training import Check, Training, nearest
from tests.osscar.recovery.perturbed import net, numbers, perturbed

CPU = {"device": "cpu", "mixed_precision": "no"}


def set_up(smaller, dense, data, **asked):
    request = osscar.RecoveryRequest(**asked)
    return Training(Setup(smaller, dense, data, request), request)


@pytest.mark.parametrize("steps", [1, 64])
def test_the_rate_rises_and_falls_and_checks_are_made(steps, monkeypatch):
    rates = []
    original = torch.optim.AdamW.step

    def step(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(loop, "_RISES", 100)
    asked = {"steps": steps, "learning_rate": 1e-4, **CPU}
    recovery = osscar.recover(perturbed(net()), net(), numbers(), **asked)
    del rates[:2]  # of the step that is tried
    taken = [point.step for point in recovery.points]
    assert taken == sorted({*range(0, steps + 1, math.ceil(steps / 8)), 1, steps})
    warm = math.ceil(steps / 10)
    assert rates[:warm] == pytest.approx([1e-4 * (i + 1) / warm for i in range(warm)])
    assert len(rates) == steps
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert steps == warm or rates[-1] == pytest.approx(1e-5)


def test_a_step_is_one_of_adamw_on_the_mean_loss_however_it_is_split():
    """Against a loop of its own, with torch's optimizer; gradients are clipped to 1."""
    dense, data = net(), numbers(12)
    smaller = perturbed(dense, 2.0)
    order = torch.randperm(12, generator=named_generator("order", 0)).argsort()
    samples = data[order[:10]]
    mine = copy.deepcopy(smaller)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, weight_decay=0.0)
    with torch.no_grad():
        power = dense(data[order[10:]]).square().sum(1).mean()
    passes = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    for start, rate in ((0, 1e-3), (5, 1e-3 * (0.9 * (0.5 + 0.5 * math.cos(math.pi / 3)) + 0.1))):
        now = samples[passes[start : start + 5]]
        optimizer.zero_grad()
        error = (mine(now) - dense(now).detach()).square().sum(1).mean() / power
        error.backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    asked = {"steps": 4, "batch_size": 5, "held_out": 2, "learning_rate": 1e-3, **CPU}
    for micro in (2, 9):
        kept = []

        class Log:
            def keep(self, _, tensors, kept=kept):
                kept.append({name: tensor.clone() for name, tensor in tensors.items()})

        set_up(smaller, dense, data, micro_batch_size=micro, **asked).run(Log())
        for name, weight in mine.named_parameters():
            found = kept[1][f"value.{name}"]
            torch.testing.assert_close(found, weight.detach(), rtol=1e-5, atol=1e-6)


def test_each_pass_takes_every_sample_once_in_an_order_of_its_own():
    data = torch.arange(12.0)[:, None].expand(-1, 6)

    def drawn(steps, seed=3):
        asked = {"batch_size": 4, "seed": seed, "steps": steps, "held_out": 2, **CPU}
        training = set_up(net(), net(), data, **asked)
        return [[int(one["input"][0, 0]) for one in step] for step in training._steps()]

    flat = [*itertools.chain(*drawn(10))]
    assert [len(step) for step in drawn(10)] == [4] * 10
    assert drawn(3) == drawn(10)[:3]
    assert drawn(10, seed=4) != drawn(10)
    passes = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert [sorted(one) for one in passes] == [sorted(passes[0])] * 4
    assert len(set(passes[0])) == 10
    assert len({tuple(one) for one in passes}) == 4


def test_going_back_sets_the_weights_and_forgets_the_moments():
    dense = net()
    training = set_up(perturbed(dense, 2.0), dense, numbers(12), held_out=2, **CPU)
    before = training._values()
    training.step(training.setup.samples[:2], 1e-2, ALONE)
    assert any(not torch.equal(one, before[name]) for name, one in training.weights.items())
    training._go_back(before)
    assert all(torch.equal(one, before[name]) for name, one in training.weights.items())
    assert not training._adam.state


def test_what_is_kept_and_when_it_ends():
    for held, kept, over in (
        ((1.0, 1.0), 0, False),
        ((1.0, 0.5, None), 1, False),
        ((1.0, 0.5, 0.6, 0.5, 0.7), 1, False),
        ((1.0, 0.5, 0.6, 0.7, 0.65, 0.8), 1, False),
        ((1.0, 0.5, 0.6, 0.7, 0.8), 1, True),
        ((1.0, 2.0, 3.0, 4.0, 5.0), 0, True),
        ((1.0, 2.0, 3.0, 4.0, 0.9), 4, False),
    ):
        found = tuple(Check(index, 0.1, None, one, 0.0) for index, one in enumerate(held))
        assert nearest(found).step == kept
        assert loop._is_over(found) == over


def test_a_training_ends_with_the_weights_of_its_nearest_check(monkeypatch):
    dense, told, seen = net(), iter([1.0, 0.5, 0.9, 0.8]), []
    training = set_up(perturbed(dense, 2.0), dense, numbers(12), steps=3, learning_rate=1e-3, **CPU)

    def distance(_):
        seen.append(training._values())
        return next(told)

    monkeypatch.setattr(training, "distance", distance)
    assert [one.step for one in training.run()] == [0, 1, 2, 3]
    assert all(torch.equal(one, seen[1][name]) for name, one in training.weights.items())
    assert any(not torch.equal(one, seen[3][name]) for name, one in training.weights.items())


def test_a_rate_is_lowered_by_a_doubling_and_in_the_second_half_by_any_rise():
    half = (1.0, 2.0, 1.5, 1.9, 2.0)
    for held, rates, due in (
        ((1.0, 2.0), (1.0, 1.0), 1.0),
        ((1.0, 2.1), (1.0, 1.0), 0.1),
        ((1.0, 2.1, 1.9), (1.0, 1.0, 0.1), 0.1),
        ((1.0, 2.1, 2.1), (1.0, 1.0, 0.1), 0.01),
        ((1.0, None), (1.0, 1.0), 0.1),
        (half, (1.0,) * 5, 1.0),
        ((*half, 1.1), (1.0,) * 6, 0.1),
        ((*half, 0.9), (1.0,) * 6, 1.0),
    ):
        both = enumerate(zip(held, rates, strict=True))
        found = [Check(2 * i, rate, None, one, 0.0) for i, (one, rate) in both]
        assert loop._next_rate(found) == pytest.approx(due)


@pytest.mark.parametrize("rate", [1.0, 1e6])
def test_a_rate_that_leads_away_is_lowered_until_it_does_not(rate):
    """From 1.0 the outputs are finite and far off; 1e6 makes some that are not numbers."""
    dense, data = net(), numbers(64)

    def steep(outputs, dense, batch):
        apart = outputs - dense
        return (apart.exp().square() + (-apart).exp().square()).mean(1) - 2

    asked = {"steps": 64, "batch_size": 16, **CPU, "distance": steep if rate > 1 else None}
    training = set_up(perturbed(dense), dense, data, **asked)
    training.options.__dict__["learning_rate"] = rate
    points = training.run()
    first, *rest = points
    risen = [p.held_out is None or p.held_out > first.held_out for p in rest]
    assert risen[0]
    for before, after in itertools.pairwise(rest):
        harmed = before.held_out is None or before.held_out > 2 * first.held_out
        assert after.rate == pytest.approx(before.rate * (0.1 if harmed else 1.0))
    assert [one.step for one in points[:2]] == [0, 1]
    assert nearest(points).held_out < first.held_out
    assert all(bool(weight.isfinite().all()) for weight in training.weights.values())
