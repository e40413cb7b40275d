"""Exported programs that shrink where code cannot follow, against networks without their units."""

import copy
import importlib
import inspect
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import graph
from osscar.base.errors import AdapterError, EquivalenceError, ModelError, OptionError
from osscar.proof import literals
from osscar.proof.plan import Form, PruningPlan
from osscar.shrinking.shrink_program import ProgramTrial, shrink_program
from osscar.shrinking.slice import slice_units
from tests.graph.test_random_networks import random_network
from tests.osscar.programs import (
    CASES,
    far_apart,
    kept_at_random,
    made,
    without_units,
)

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
    plan = plan or kept_at_random(graph.trace(net, example).prunable)
    proofs = [{name: sample(shape, 3)}, {name: sample(shape, 1)}]
    return plan, shrink_program(net, plan, proofs, example)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES)
def test_a_program_computes_what_the_network_does_without_its_units(case):
    kind, shape = CASES[case]
    net = made(kind)
    before = copy.deepcopy(net.state_dict())
    plan, result = shrunk(net, shape)
    assert result.proof.plan.form is Form.EXPORTED
    assert result.proof.certificate.error < EXACT
    expected = without_units(net, plan)
    for count in (1, 2, 5):
        x = sample(shape, count, seed=7)
        assert far_apart(expected(x), result.model(x)) < EXACT
        assert torch.equal(result.model(x), result.model(**{argument(net): x}))
        assert far_apart(expected(x), net(x)) > 1e-3, "nothing of weight was removed"
    sizes = [sum(p.numel() for p in m.parameters()) for m in (result.model, net)]
    assert sizes[0] < sizes[1]
    for group in plan.groups:
        for slot in group.slots:
            was, now = (m.get_parameter(slot.tensor).shape[slot.dim] for m in (net, result.model))
            assert now < was
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_each_group_leaves_alone(case):
    kind, shape = CASES[case]
    net = made(kind)
    example = {argument(net): sample(shape, 2)}
    trial = ProgramTrial(net, example, [example])
    x = sample(shape, 3)
    for group in graph.trace(net, example).prunable:
        plan = kept_at_random([group], share=0.4, seed=3)
        made_, _ = trial.proved(plan)
        assert far_apart(without_units(net, plan)(x), made_(x)) < EXACT


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_networks(data):
    net = random_network(data).double()
    example = {"x": sample((5,), 4)}
    trial = ProgramTrial(net, example, [example])
    for group in graph.trace(net, example).prunable:
        plan = kept_at_random([group], share=data.draw(st.sampled_from([0.3, 0.6])))
        try:
            program, _ = trial.proved(plan)
        except AdapterError:
            continue
        x = sample((5,), 7)
        expected = without_units(net, plan)(x)
        scale = max(float(expected.detach().abs().max()), 1e-30)
        assert float((expected - program(x)).abs().max()) / scale < 1e-9


def test_most_of_random_networks_follow():
    """So that the test above cannot pass by refusing everything: a fixed draw of plain nets."""
    for width, heads in ((24, 4), (18, 3), (32, 8)):

        class Net(nn.Module):
            def __init__(self, width=width, heads=heads):
                super().__init__()
                self.enter, self.leave = nn.Linear(5, width), nn.Linear(width, 5)
                self.sizes = [heads, width // heads]

            def forward(self, x):
                y = self.enter(x).view(x.shape[0], self.sizes[0], self.sizes[1]).softmax(-1)
                return self.leave(y.reshape(x.shape[0], self.sizes[0] * self.sizes[1]))

        _, result = shrunk(made(Net), (5,))
        assert result.proof.certificate.error < EXACT


# ---- what must never be accepted ---------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "operator"),
    [("sliced", "aten.slice"), ("sliced", "aten.narrow"), ("option A", "aten.pad")],
)
def test_a_wrong_number_of_the_right_shape_is_refused(case, operator, monkeypatch):
    rule = literals._RULES[operator]

    def wrong(call):
        rule(call)
        name = {"aten.slice": "start", "aten.narrow": "start", "aten.pad": "pad"}[operator]
        value = call.argument(name)
        if operator == "aten.pad":
            call.replace(name, [*value[:4], value[4] - 1, value[5] + 1])
        elif value and not call.input("self")[call.argument("dim")].whole:
            call.replace(name, value - 1)
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


class Listed(nn.Module):
    """Reads features by a list of numbers in the code."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 12), nn.Linear(4, 3)

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x))[:, [4, 5, 6, 7]])


def test_positions_listed_by_number_are_left_alone():
    net = made(Listed)
    with pytest.raises(AdapterError, match="it lists positions by number"):
        shrunk(net, (8,))


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


@pytest.mark.parametrize(("two", "most"), [(True, 2), (False, 4)])
def test_a_program_of_some_numbers_of_samples_is_refused(two, most):
    net = made(lambda: CountsSamples(two))
    example = {"x": sample((8,), 2)}
    plan = kept_at_random(graph.trace(net, example).prunable)
    with pytest.raises(AdapterError, match=f"holds for up to {most} samples"):
        shrink_program(net, plan, [example], example)


@pytest.mark.parametrize(
    "example",
    [{}, {"x": 3}, {"x": torch.zeros(())}, {"x": torch.zeros(1, 8)}, (torch.zeros(2, 8),), None],
)
def test_what_is_no_example_is_refused(example):
    net = made(Listed)
    with pytest.raises(OptionError, match="the example is"):
        shrink_program(net, PruningPlan(()), [{"x": torch.zeros(2, 8)}], example)


def test_a_plan_of_another_model_is_refused():
    plan, _ = shrunk(made(CASES["gated"][0]), (8,))
    other = made(CASES["generator"][0])
    with pytest.raises(AdapterError, match=r"'enter\.neurons' cannot leave .* no group"):
        shrunk(other, (8,), plan)


def test_a_plan_for_a_program_is_not_carried_out_on_modules():
    kind, shape = CASES["gated"]
    net = made(kind)
    _, result = shrunk(net, shape)
    with pytest.raises(ModelError, match=r"exported program.*osscar\.load"):
        slice_units(net, result.proof.plan)
    again = PruningPlan.from_json(result.proof.plan.to_json())
    assert again == result.proof.plan


class Named(nn.Module):
    """Has a module whose name the modules of torch.fx have for themselves."""

    def __init__(self):
        super().__init__()
        self.enter, self.graph = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.graph(torch.relu(self.enter(x)).view(-1, 12))


def test_names_that_a_program_cannot_have_are_no_crash():
    with pytest.raises(AdapterError, match="there is no exported program"):
        shrunk(made(Named), (8,))


# ---- what the result is good for ---------------------------------------------------------


def test_other_resolutions_and_lengths_pass_where_the_network_takes_them():
    for case, shape in (("option A", (3, 20, 16)), ("heads", (11, 16)), ("points", (3, 5))):
        net = made(CASES[case][0])
        plan, result = shrunk(net, CASES[case][1])
        x = sample(shape, 3)
        assert far_apart(without_units(net, plan)(x), result.model(x)) < EXACT


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
    kind, shape = CASES["option A"]
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


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime: pip install 'osscar[onnx]'",
)
@pytest.mark.parametrize("case", ["heads", "option A"])
def test_onnx_runtime_runs_it(case, tmp_path):
    runtime = importlib.import_module("onnxruntime")
    kind, shape = CASES[case]
    _, result = shrunk(made(kind), shape)
    model, name = result.model.float(), argument(result.model)
    torch.onnx.export(
        model,
        (sample(shape, 2).float(),),
        tmp_path / "net.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("samples")},),
    )
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    for count in (2, 5):
        x = sample(shape, count).float()
        (found,) = session.run(None, {name: x.numpy()})
        assert far_apart(model(x), torch.from_numpy(found)) < 1e-4
