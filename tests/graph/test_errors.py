"""What happens with models and inputs that cannot be traced."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import graph

from .families import MHA, build


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_data_dependent_control_flow_names_the_module_and_the_remedy() -> None:
    with pytest.raises(graph.TraceError, match="depends on the values") as caught:
        graph.trace(DataDependent(), (torch.randn(3, 4),))
    assert caught.value.module == "inner"
    assert caught.value.reason
    assert caught.value.__cause__ is not None


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


def test_sizes_that_depend_on_data_are_explained() -> None:
    with pytest.raises(graph.TraceError, match="products with the mask") as caught:
        graph.trace(nn.Sequential(Masked()), (torch.randn(3, 4),))
    assert caught.value.module == "0"


def test_inputs_of_the_wrong_shape_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(6, 2))
    with pytest.raises(graph.TraceError, match="check their shapes") as caught:
        graph.trace(model, (torch.randn(3, 4),))
    assert caught.value.module == "1"


def test_inputs_of_the_wrong_type_are_explained() -> None:
    model = build("opt", MHA, "sdpa")
    with pytest.raises(graph.TraceError, match="check their shapes and types"):
        graph.trace(model, {"input_ids": torch.randn(2, 7)})


@pytest.mark.parametrize("inputs", [(), (1, 2), {"y": 1}], ids=str)
def test_inputs_that_do_not_fit_the_signature_are_refused(inputs: tuple[object, ...]) -> None:
    with pytest.raises(graph.ExampleInputError, match=r"Linear\.forward"):
        graph.trace(nn.Linear(4, 5), inputs)


def test_inputs_that_are_no_arguments_are_refused() -> None:
    with pytest.raises(graph.ExampleInputError, match="pass a tuple"):
        graph.trace(nn.Linear(4, 5), torch.randn(3, 4))  # type: ignore[arg-type]


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = DataDependent().train()
    with pytest.raises(graph.TraceError):
        graph.trace(model, (torch.randn(3, 4),))
    assert model.training
    assert model.inner.training


class _Writing(nn.Module):
    """Keeps a tensor, and counts in a list, before it branches on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        self.kept = self.linear(x)
        return self.kept + 1 if self.kept.sum() > 0 else self.kept


def test_a_failing_trace_leaves_no_fake_tensors_behind() -> None:
    model = nn.Sequential(_Writing())
    with pytest.raises(graph.TraceError):
        graph.trace(model, (torch.randn(3, 4),))
    assert not hasattr(model[0], "kept")
    assert model[0].calls == []


def test_a_failing_trace_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    class Talking(_Writing):
        def forward(self, x: Tensor) -> Tensor:
            print("said by the model", file=sys.stderr)
            return super().forward(x)

    levels = {name: logger.level for name, logger in _loggers().items()}
    with pytest.raises(graph.TraceError):
        graph.trace(Talking(), (torch.randn(3, 4),))
    assert set(capfd.readouterr().err.splitlines()) == {"said by the model"}
    assert {name: logger.level for name, logger in _loggers().items()} == levels


def _loggers() -> dict[str, logging.Logger]:
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch")]
    return {name: logging.getLogger(name) for name in names}


@dataclass
class Pair:
    one: Tensor
    two: Tensor


class ReturnsPair(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x, x + 1)


class TakesPair(nn.Module):
    def forward(self, x: Pair) -> Tensor:
        return x.one + x.two


class Branches(nn.Module):
    """One of whose branches puts out another form: "Expected ..." of it is not about the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda x: x.double(), lambda x: x[:1], (x,))
        return chosen


class BranchesUntyped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda x: x.double(), lambda x: x, (x,))
        mapped: Tensor = self.map(chosen)
        return mapped


def _quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 5)), {nn.Linear})


_ROWS = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("build", "value", "hint"),
    [
        (ReturnsPair, _ROWS, "register_dataclass"),
        (TakesPair, Pair(_ROWS, _ROWS), "register_dataclass"),
        (lambda: torch.jit.script(nn.Linear(4, 5)), _ROWS, "pass the Python module"),
        (_quantized, _ROWS, "prune the floating-point model"),
        (Branches, _ROWS, "torch.cond"),
        (BranchesUntyped, _ROWS, "torch.cond"),
    ],
    ids=["dataclass-out", "dataclass-in", "script", "quantized", "branches", "branches-untyped"],
)
def test_what_cannot_be_exported_is_explained(
    build: Callable[[], nn.Module], value: object, hint: str
) -> None:
    with pytest.raises(graph.TraceError) as caught:
        graph.trace(build(), (value,))
    assert hint in caught.value.hint
