"""Clocks time what is asked for: operators at their shapes, passes, and tokens with a cache."""

import dataclasses
import itertools
import math
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import graph
import osscar
from graph import Size
from osscar.allocation import clocks, speedup
from osscar.allocation.clocks import InTorch, clock_of, operator_models, random_like
from osscar.allocation.task import PruningTask
from osscar.network.modules import tensors_in
from osscar.network.onnx_runtime import session_of
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest as Asked
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net
from tests.zoo import transformers_case

DECODE = {"timed": "decode", "context": 12, "batch": 3}
IN_ONNX = {"timed_in": "onnxruntime"}

CASES = {
    "a pass": (small_net, images(6), {}),
    "a pass in ONNX Runtime": (small_net, images(6), IN_ONNX),
    "a token": (lambda: tiny("llama-gqa"), tokens(4, 8), DECODE),
    "a first token": (lambda: tiny("opt"), tokens(4, 8), {**DECODE, "context": 1}),
    "a token, windows": (
        lambda: transformers_case("gemma2", sliding_window=8).build(),
        tokens(4, 8) % 64,
        DECODE,
    ),
}


@pytest.fixture(autouse=True)
def has_onnx(request):
    if "onnx" in request.node.name.lower():
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


@contextmanager
def timed_by(case):
    """Yield a task, its clock, and widths: half of each group that can be pruned."""
    build, data, asked = CASES[case]
    with prepare(build(), data) as prepared:
        task = PruningTask(prepared, Asked(speedup=1.5, **asked))
        kept = {g.name: max(1, g.units // 2) for g in task.shared}
        yield task, clock_of(task), kept


def sizes_at(clock, kept):
    """Return what tells the values of sizes where groups keep so many units."""
    units = {group.name: group.units for group in clock.traced.groups}
    return partial(Size.at, kept={**units, **kept})


def shapes_in(tree):
    return tuple(sorted(tuple(tensor.shape) for tensor in tensors_in(tree)))


def shapes_of(operator, size):
    return tuple(sorted(tuple(map(size, operand.dims)) for operand in operator.reads))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", CASES)
def test_operators_are_timed_at_the_shapes_that_are_asked_for(case):
    with timed_by(case) as (_, clock, kept):
        size, seen, calls = sizes_at(clock, kept), {}, []
        of_groups = [
            one
            for one in clock.traced.operators
            if any(kept.keys() & {n for names, _ in s.terms for n in names}
                   for operand in one.reads for s in operand.dims)
        ]  # fmt: skip
        for operator in of_groups[:12]:

            def spied(operator=operator, **given):
                seen[operator.name] = shapes_in(given)
                return operator.function(**given)

            calls.append((dataclasses.replace(operator, function=spied), size))
        timers = clock.ready(calls)
        assert all(timer() > 0 for timer in timers)  # NaN is not
        assert seen == {one.name: shapes_of(one, size) for one, _ in calls}
        assert len(seen) > 5


NAMES = "linear", "conv2d", "cat", "scaled_dot_product_attention"


def query_and_positions(query, key, *_):
    """Of attention: while it is traced there is a mask, and heads that serve several are copied."""
    return query, key[-2]


class Called(TorchFunctionMode):
    """Counts calls of functions by the shapes of what they read."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == NAMES[-1]:
            self.seen[name, query_and_positions(*(tuple(one.shape) for one in args))] += 1
        elif name in NAMES:
            self.seen[name, shapes_in((args, kwargs))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", [name for name in CASES if "ONNX" not in name])
@pytest.mark.parametrize("smaller", [False, True])
def test_the_shapes_are_those_of_models_that_run(case, smaller):
    """Each model that is timed calls its layers on what the trace says, at its widths."""
    with timed_by(case) as (task, clock, kept):
        kept = kept if smaller else {}
        model = speedup._built(task.prepared, kept)
        size, expected = sizes_at(clock, kept), Counter()
        for one in clock.traced.operators:
            name = one.target.split(".")[1]
            if name == NAMES[-1]:
                given = one.arguments_at(size, lambda shape, dtype: shape)
                expected[name, query_and_positions(given["query"], given["key"])] += 1
            elif name in NAMES and one.reads:
                expected[name, shapes_of(one, size)] += 1
        with Called() as called:
            timer = clock.timer(model) if smaller else clock.dense
            called.seen.clear()  # what fills a cache is not timed
            for _ in range(2):
                timer.timeit(1)
        assert called.seen == Counter({key: 2 * n for key, n in expected.items()})


# ---- in torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_called_in_the_format_of_the_model(last, dtype, monkeypatch):
    model, x = small_net().to(dtype), images(2).to(dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)
    traced = graph.trace(model, (x,))
    clock = InTorch(model, traced, "", lambda model: partial(model, x))
    operator = next(one for one in traced.operators if one.target == "aten.conv2d.default")
    seen, ticks = [], itertools.count()
    monkeypatch.setattr(clocks, "busy_clock", lambda: next(ticks))
    spied = dataclasses.replace(
        operator, function=lambda **given: seen.append(operator.function(**given))
    )
    (timer,) = clock.ready([(spied, sizes_at(clock, {}))])
    assert timer() == 1
    (made,) = seen
    assert made.dtype is dtype
    assert made.is_contiguous(memory_format=torch.channels_last) == last
    assert math.isfinite(made.float().sum())


# ---- in ONNX Runtime ---------------------------------------------------------------------


@pytest.mark.slow
def test_an_operator_is_the_same_in_onnx_and_one_that_cannot_be_written_is_left_out():
    with timed_by("a pass in ONNX Runtime") as (_, clock, kept):
        size = sizes_at(clock, kept)
        each = {one.target: one for one in clock.traced.operators if one.outputs and one.arguments}
        calls = [(one, size) for one in each.values()]

        def refuses(**given):
            raise NotImplementedError("no such operator")

        failing = dataclasses.replace(calls[0][0], function=refuses), size
        first, none = operator_models([calls[0], failing])
        models = [first, *operator_models(calls[1:])]
        assert none is None
        for (operator, _), model in zip(calls, models, strict=True):
            inputs = {name: random_like(one) for name, one in model.inputs.items()}
            session = session_of(model.with_weights(inputs), 1)
            names = {one.name for one in session.get_inputs()}
            assert names == model.inputs.keys() - model.weights
            (found,) = session.run(None, {name: inputs[name] for name in names})
            given = iter(inputs.values())
            arguments = operator.arguments_at(size, lambda *_, left=given: torch.tensor(next(left)))
            due, *_ = tensors_in(operator.function(**arguments))
            torch.testing.assert_close(torch.from_numpy(found), due, rtol=1e-4, atol=1e-4)
        assert {len(model.weights) for model in models} >= {0, 1, 2, 4}


@pytest.mark.slow
def test_a_network_is_pruned_to_a_speed_in_onnx_runtime(monkeypatch):
    """Any speed will do, since other processes have a share in it."""
    monkeypatch.setattr(speedup, "CLOSE", 1.0)
    runs, plain = [], clocks.session_of
    monkeypatch.setattr(clocks, "session_of", lambda *given: runs.append(given) or plain(*given))
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    result = osscar.prune(net, images(24), speedup=1.2, **IN_ONNX, backend="wanda")
    assert result.parameters_after < result.parameters_before
    assert "by ONNX Runtime" in result.budget.of("speedup").assumed
    whole = [given for given in runs if not isinstance(given[0], bytes)]
    assert len(whole) >= 3  # the dense model, that of the least widths, and one that was proposed
    assert {threads for _, threads in runs} == {torch.get_num_threads()}
