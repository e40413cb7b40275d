"""Exported programs that shrink where code cannot follow, against networks without their units."""

import contextlib
import copy
import dataclasses
import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import graph
from osscar.base.errors import AdapterError, EquivalenceError, ModelError, OptionError
from osscar.base.json_files import validated
from osscar.proof import literals
from osscar.proof.plan import Form, PruningPlan
from osscar.shrinking.shrink_program import ProgramTrial, shrink_program
from osscar.shrinking.slice import slice_units
from tests.graph.test_random_networks import random_network
from tests.graph.topologies import network
from tests.osscar.programs import CASES, far_apart, kept_at_random, made, without_units

EXACT = 1e-12


def argument(net):
    return next(iter(inspect.signature(net.forward).parameters))


def sample(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed + count)
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator)


def shrunk(net, shape, plan=None):
    """Return plan and smaller program of a network of float64."""
    name = argument(net)
    example = {name: sample(shape, 2)}
    if plan is None:  # unlike counts, which tell groups side by side apart
        groups = enumerate(graph.trace(net, example).prunable)
        plans = [kept_at_random([g], share=0.6 - 0.2 * (i % 2), seed=i) for i, g in groups]
        plan = PruningPlan(tuple(one for plan in plans for one in plan.groups))
    proofs = [{name: sample(shape, 3)}, {name: sample(shape, 1)}]
    return plan, shrink_program(net, plan, proofs, example)


_OTHER_SIZES = {"option A": (3, 20, 16), "heads": (11, 16), "points": (3, 5)}
"""Of one sample, where the network takes other resolutions and lengths."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_a_program_computes_what_the_network_does_without_its_units(case):
    kind, shape = CASES[case]
    net = made(kind)
    before = copy.deepcopy(net.state_dict())
    plan, result = shrunk(net, shape)
    assert result.proof.plan.form is Form.EXPORTED
    assert result.proof.certificate.error < EXACT
    expected = without_units(net, plan)
    for count, size in ((1, shape), (2, shape), (5, _OTHER_SIZES.get(case, shape))):
        x = sample(size, count, seed=7)
        assert far_apart(expected(x), result.model(x)) < EXACT
        assert torch.equal(result.model(x), result.model(**{argument(net): x}))
        assert far_apart(expected(x), net(x)) > 1e-3, "nothing of weight was removed"
    for slot in (slot for group in plan.groups for slot in group.slots):
        was, now = (m.get_parameter(slot.tensor).shape[slot.dim] for m in (net, result.model))
        assert now < was
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_networks():
    proved = []

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def shrunk(data):
        net = random_network(data).double()
        example = {"x": sample((5,), 4)}
        trial = ProgramTrial(net, example, [example])
        for group in graph.trace(net, example).prunable:
            plan = kept_at_random([group], share=data.draw(st.sampled_from([0.3, 0.6])))
            with contextlib.suppress(AdapterError):
                proved.append(trial.proved(plan)[0])
                x = sample((5,), 7)
                expected = without_units(net, plan)(x)
                scale = max(float(expected.detach().abs().max()), 1e-30)
                assert float((expected - proved[-1](x)).abs().max()) / scale < 1e-9

    shrunk()
    assert proved


# ---- what must never be accepted ---------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "operator"),
    [("sliced", "aten.slice"), ("sliced", "aten.narrow"), ("option A", "aten.pad")],
)
def test_a_wrong_number_of_the_right_shape_is_refused(case, operator, monkeypatch):
    rule = literals._RULES[operator]

    def wrong(call):
        rule(call)
        if operator == "aten.pad":
            value = call.argument("pad")
            call.replace("pad", [*value[:4], value[4] - 1, value[5] + 1])
        elif call.argument("start") and not call.input("self")[call.argument("dim")].whole:
            call.replace("start", call.argument("start") - 1)
            if operator == "aten.slice" and call.argument("end") < 2**62:
                call.replace("end", call.argument("end") - 1)

    monkeypatch.setitem(literals._RULES, operator, wrong)
    kind, shape = CASES[case]
    with pytest.raises(EquivalenceError, match=r"differs|it makes"):
        shrunk(made(kind), shape)


def test_a_number_that_does_not_follow_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(literals._RULES, "aten.view")
    monkeypatch.delitem(literals._RULES, "aten.reshape")
    kind, shape = CASES["heads"]
    with pytest.raises(AdapterError, match=r"in module 'blocks\.0\.attn'.*aten\.(view|reshape)"):
        shrunk(made(kind), shape)


@network(enter=(8, 12), leave=(4, 3))
def Listed(net, x):
    """Reads features by a list of numbers in the code."""
    return net.leave(torch.tanh(net.enter(x))[:, [4, 5, 6, 7]])


class CountsSamples(nn.Module):
    """Works for two samples alone, or does something else for more than four."""

    def __init__(self, two):
        super().__init__()
        self.enter, self.leave, self.two = nn.Linear(8, 12), nn.Linear(12, 3), two

    def forward(self, x):
        if self.two and len(x) != 2:
            raise ValueError("two samples are needed")
        y = torch.relu(self.enter(x))
        return self.leave(2 * y if not self.two and x.shape[0] > 4 else y)


def test_networks_that_have_no_such_program_are_refused():
    for build, message in (
        (Listed, "it lists positions by number"),
        (lambda: CountsSamples(two=False), "is right for at most 4"),
    ):
        with pytest.raises(AdapterError, match=message):
            shrunk(made(build), (8,))
    net, example = made(lambda: CountsSamples(two=True)), {"x": sample((8,), 2)}
    plan = kept_at_random(graph.trace(net, example).prunable)
    with pytest.raises(AdapterError, match="is right for at most 2"):
        shrink_program(net, plan, [example], example)
    with pytest.raises(OptionError, match="the example is"):
        shrink_program(net, PruningPlan(()), [example], {"x": torch.zeros(1, 8)})


def test_a_plan_for_a_program_is_for_no_other_model_and_not_for_modules():
    net = made(CASES["gated"][0])
    plan, result = shrunk(net, (8,))
    with pytest.raises(AdapterError, match=r"'enter\.neurons' cannot leave .* no such group"):
        shrunk(made(CASES["generator"][0]), (8,), plan)
    with pytest.raises(ModelError, match=r"exported program.*osscar\.load"):
        slice_units(net, result.proof.plan)
    written = dataclasses.asdict(result.proof.plan)
    assert validated(written, PruningPlan, "the plan") == result.proof.plan


# ---- what the result is good for ---------------------------------------------------------


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.up, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

        def forward(self, x):
            a, b = self.up(self.one(x)).split(16, -1)
            return self.two(self.down(a * torch.sigmoid(b)))

    _, result = shrunk(made(Tied), (8,))
    assert result.model.one.weight is result.model.two.weight


def test_a_step_of_training_and_a_copy():
    kind, shape = CASES["gated"]
    _, result = shrunk(made(kind), shape)
    model, x = copy.deepcopy(result.model), sample(shape, 4)
    assert_close(model(x), result.model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    optimizer.step()
    assert model(x).square().mean() < loss
    assert not torch.equal(model(x), result.model(x))


@pytest.mark.slow
def test_it_is_compiled():
    kind, shape = CASES["heads"]
    _, result = shrunk(made(kind), shape)
    compiled = torch.compile(result.model, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (2, 5):
        x = sample(shape, count)
        assert far_apart(result.model(x), compiled(x)) < EXACT
