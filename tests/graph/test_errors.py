"""What happens with models and inputs that cannot be traced."""

from __future__ import annotations

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
    with pytest.raises(graph.TraceError, match="products with the mask"):
        graph.trace(Masked(), (torch.randn(3, 4),))


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
