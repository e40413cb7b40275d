"""What is replaced for the whole process is put back, and is still needed.

A test that says "delete" fails once torch no longer needs a patch: then the patch goes, and the
test with it.
"""

from __future__ import annotations

import builtins
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.fx.experimental import _config as size_config
from torch.overrides import TorchFunctionMode

import graph
from graph.errors import TraceError
from graph.tracing.export import varies
from graph.tracing.patches import ModeDepths, assignments_told, enter_again
from graph.tracing.standalone import export_standalone


class Lengths(nn.Module):
    """Takes the number of samples with `len`, casts its layers, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.reshape(len(x), 12)
        return self.down(torch.relu(self.up.to(torch.float32)(self.seen)))  # type: ignore[no-any-return]


class Branching(Lengths):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


EXAMPLE = {"x": torch.randn(3, 3, 4)}


def _state() -> list[Any]:
    loggers = [name for name in logging.root.manager.loggerDict if name.startswith("torch")]
    return [
        (builtins.len, builtins.max, builtins.min, sys.stderr, nn.Module.to, nn.Module.__setattr__),
        size_config.backed_size_oblivious,
        {name for name in loggers if logging.getLogger(name).level == logging.CRITICAL},
        ModeDepths.now(),
    ]


def test_exports_in_several_threads_leave_nothing_replaced() -> None:
    graph.trace(Lengths(), EXAMPLE)  # what torch loads on the way is there
    before = _state()
    models = [Lengths(), Branching(), Lengths(), Lengths()]

    def traced(model: nn.Module) -> int | str:
        try:
            return len(graph.trace(model, EXAMPLE).prunable)
        except graph.TraceError as error:
            return error.reason

    with ThreadPoolExecutor(4) as threads:
        first, failure, *others = threads.map(traced, models)
    assert first == 1
    assert others == [1, 1]
    assert isinstance(failure, str)
    assert _state() == before
    assert all("to" not in vars(module) for model in models for module in model.modules())
    assert not any(hasattr(model, "seen") for model in models)


def test_code_of_graphs_is_written_when_they_are_run() -> None:
    """Delete `compiled_when_run` once torch does so by itself."""
    model = Lengths().eval()
    program = export_standalone(model, EXAMPLE, {"x": (0,)}).module
    assert "_code" not in vars(program)
    assert torch.equal(program(**EXAMPLE), model(**EXAMPLE))
    assert "_code" in vars(program)
    assert "_code" in vars(torch.fx.GraphModule(program, program.graph))


def test_a_program_that_has_taken_a_length_holds_for_any_number_of_samples() -> None:
    traced = export_standalone(Lengths().eval(), EXAMPLE, {"x": (0,)})
    assert traced.module(torch.randn(5, 3, 4)).shape == (5, 4)


def test_torch_still_makes_a_number_of_a_length() -> None:
    auto: Any = torch.export.Dim.AUTO
    plain = nn.Module()
    plain.forward = lambda x: x.reshape(len(x), 12)  # type: ignore[method-assign]
    exported = torch.export.export(plain, (), EXAMPLE, dynamic_shapes={"x": {0: auto}})
    (given,) = exported.graph.find_nodes(op="placeholder")
    assert not varies(given.meta["val"].shape[0]), (
        "torch.export leaves the length of a tensor open now: delete symbolic_lengths"
    )


def test_torch_still_takes_for_granted_that_open_sizes_are_none_or_one() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] == 1 else x

    auto: Any = torch.export.Dim.AUTO
    exported = torch.export.export(Single(), (), EXAMPLE, dynamic_shapes={"x": {0: auto}})
    told = [guard for guard in exported._guards_code if "[0]" in guard]
    assert not told, "a guard says so now: delete every_size"
    assert export_standalone(Single(), EXAMPLE, {"x": (0,)}).sizes.guards == ("x.shape[0] != 1",)


def test_an_export_whose_code_asks_without_end_about_open_sizes_is_given_up() -> None:
    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + sum(x.shape[0] % n == 1 for n in range(2, 400))

    with pytest.raises(TraceError, match="more than 80 questions about sizes"):
        export_standalone(Asking(), EXAMPLE, {"x": (0,)})
    assert export_standalone(Asking(), EXAMPLE, {}).sizes.guards == ()


def test_torch_still_prints_the_errors_that_it_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Branching(), (), EXAMPLE)
    assert "def forward" in capfd.readouterr().err, (
        "torch.export prints no graph of a failed export any more: delete that part of _quiet"
    )


def test_torch_still_tells_of_no_assignment() -> None:
    hooks = {name for name in dir(nn.modules.module) if name.endswith("_registration_hook")}
    assert hooks == {
        f"register_module_{of}_registration_hook" for of in ("buffer", "module", "parameter")
    }, "torch may tell of attributes, too: use that hook, and delete assignments_told"


def test_assignments_are_told_to_all_who_listen() -> None:
    model, before = nn.Linear(2, 2), nn.Module.__setattr__
    outer: list[str] = []
    inner: list[str] = []
    with assignments_told(lambda _, name: outer.append(name)):
        model.first = 1  # type: ignore[assignment]
        with assignments_told(lambda _, name: inner.append(name)):
            model.second = 2  # type: ignore[assignment]
    model.third = 3  # type: ignore[assignment]
    assert (outer, inner) == (["first", "second"], ["second"])
    assert nn.Module.__setattr__ is before


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_suspended_pass_takes_its_modes_along() -> None:
    mode, here = Counting(), getcurrent()

    def suspended() -> None:
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
