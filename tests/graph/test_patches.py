"""What is replaced for the whole process is put back, and is still needed.

A test that says "delete" fails once torch no longer needs a patch: then the patch goes, and the
test with it.
"""

from __future__ import annotations

import builtins
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.fx.experimental import _config as size_config
from torch.overrides import TorchFunctionMode

import graph
from graph.errors import TraceError
from graph.tracing import patches
from graph.tracing.patches import ModeDepths, enter_again
from graph.tracing.standalone import export_standalone

from .topologies import network


@network(up=(12, 8), down=(8, 4))
def lengths(net, x):
    """Takes the number of samples with `len`, casts its layers, and keeps what it has seen."""
    net.seen = x.reshape(len(x), 12)
    return net.down(torch.relu(net.up.to(torch.float32)(net.seen)))


branching = network()(lambda net, x: x + 1 if x.sum() > 0 else x)
single = network()(lambda net, x: x + 1 if x.shape[0] == 1 else x)
EXAMPLE, OPEN = {"x": torch.randn(3, 3, 4)}, {"x": {0: torch.export.Dim.AUTO}}


def _state():
    loggers = [name for name in logging.root.manager.loggerDict if name.startswith("torch")]
    return [
        (builtins.len, builtins.max, builtins.min, sys.stderr, nn.Module.to, nn.Module.__setattr__),
        size_config.backed_size_oblivious,
        {name for name in loggers if logging.getLogger(name).level == logging.CRITICAL},
        ModeDepths.now(),
    ]


def test_exports_in_several_threads_leave_nothing_replaced():
    graph.trace(lengths(), EXAMPLE)  # what torch loads on the way is there
    before, models = _state(), [lengths(), branching(), lengths(), lengths()]

    def traced(model):
        try:
            return len(graph.trace(model, EXAMPLE).prunable)
        except TraceError:
            return "refused"

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(traced, models)) == [1, "refused", 1, 1]
    assert _state() == before
    assert all("to" not in vars(module) for model in models for module in model.modules())
    assert not any(hasattr(model, "seen") for model in models)


def test_a_program_that_has_taken_a_length_holds_for_any_number_of_samples():
    """Its code is written when it is run: delete `compiled_when_run` once torch does so itself."""
    model = lengths().eval()
    program = export_standalone(model, EXAMPLE, {"x": (0,)}).module
    assert "_code" not in vars(program)
    assert torch.equal(program(**EXAMPLE), model(**EXAMPLE))
    assert "_code" in vars(program)
    assert "_code" in vars(torch.fx.GraphModule(program, program.graph))
    assert program(torch.randn(5, 3, 4)).shape == (5, 4)


def test_torch_still_takes_for_granted_that_open_sizes_are_none_or_one():
    exported = torch.export.export(single(), (), EXAMPLE, dynamic_shapes=OPEN)
    told = [guard for guard in exported._guards_code if "[0]" in guard]
    assert not told, "a guard says so now: delete every_size"
    assert export_standalone(single(), EXAMPLE, {"x": (0,)}).sizes.guards == ("x.shape[0] != 1",)


def test_an_export_whose_code_asks_without_end_about_open_sizes_is_given_up(monkeypatch):
    monkeypatch.setattr(patches, "_MOST_QUESTIONS", 20)
    asking = network()(lambda net, x: x + sum(x.shape[0] % n == 1 for n in range(2, 40)))
    with pytest.raises(TraceError, match="compares sizes more than 20 times"):
        export_standalone(asking(), EXAMPLE, {"x": (0,)})
    assert export_standalone(asking(), EXAMPLE, {}).sizes.guards == ()


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_suspended_pass_takes_its_modes_along():
    mode, here = Counting(), getcurrent()

    def suspended():
        with mode:
            here.switch()
            torch.ones(1)

    around = ModeDepths.now()
    running = greenlet(suspended)
    running.switch()
    assert ModeDepths.now() != around, (
        "torch keeps modes by greenlet now: delete ModeDepths and enter_again"
    )
    left = around.leave_others()
    torch.ones(1)
    assert mode.calls == 0
    enter_again(left)
    running.switch()
    assert mode.calls == 1
    assert ModeDepths.now() == around
