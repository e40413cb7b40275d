"""What happens with models and inputs that cannot be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graph
import graph.tracing.export as graph_export
from tests.zoo import transformers_case


class Branching(nn.Module):
    """Keeps a tensor, counts in a list and prints, before it branches on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        print("said by the model", file=sys.stderr)
        self.calls.append(1)
        self.kept = self.linear(x)
        return self.kept + 1 if self.kept.sum() > 0 else self.kept


def test_a_decision_on_data_is_explained_and_leaves_nothing_behind(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Sequential(Branching())).train()
    with pytest.raises(graph.TraceError, match="depends on the values") as caught:
        graph.trace(model, (torch.randn(3, 4),))
    assert caught.value.module == "0.0"  # the innermost
    assert caught.value.reason
    assert caught.value.__cause__ is not None
    assert all(module.training for module in model.modules())
    assert not hasattr(model[0][0], "kept")
    assert model[0][0].calls == []
    assert set(capfd.readouterr().err.splitlines()) == {"said by the model"}


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


_NARROW = nn.Sequential(nn.Linear(4, 5), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("build", "inputs", "said", "module"),
    [
        (lambda: nn.Sequential(Masked()), (torch.randn(3, 4),), "products with the mask", "0"),
        (lambda: _NARROW, (torch.randn(3, 4),), "check their shapes", "1"),
        (
            transformers_case("opt").build,
            {"input_ids": torch.randn(2, 7)},
            "check their shapes and types",
            None,
        ),
    ],
    ids=["sizes of data", "shapes", "types"],
)
def test_inputs_that_a_model_cannot_read_name_the_module(
    build: Callable[[], nn.Module], inputs: graph_export.ExampleInputs, said: str, module: str
) -> None:
    with pytest.raises(graph.TraceError, match=said) as caught:
        graph.trace(build(), inputs)
    assert module in (None, caught.value.module)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), r"Linear\.forward"),
        ((1, 2), r"Linear\.forward"),
        ({"y": 1}, r"Linear\.forward"),
        (torch.ones(3), "a tuple"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_the_signature_are_refused(inputs: Any, said: str) -> None:
    with pytest.raises(graph.ExampleInputError, match=said):
        graph.trace(nn.Linear(4, 5), inputs)


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
