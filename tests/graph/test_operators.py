"""Operators say what they read and write at other widths: as a trace of the smaller model does."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graph
from graph import Size
from osscar.network.modules import copied
from osscar.shrinking.slice import slice_units
from tests.coverage.measure import half_of
from tests.zoo import transformers_case

from .topologies import conv, network


@network(
    stem=conv(3, 12, 3, padding=1),
    beside=conv(3, 8, 3, padding=1),
    norm=lambda: nn.BatchNorm2d(12),
    depthwise=conv(12, 24, 3, groups=12, padding=1),
    grouped=conv(32, 16, 3, groups=4),
    up=lambda: nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2),
    head=(8, 5),
)
def convolutions(net, x):
    """A depthwise and a grouped one, norms of both kinds, a concatenation, and one transposed."""
    y = net.depthwise(torch.relu(net.norm(net.stem(x))))
    y = net.grouped(torch.cat([y, net.beside(x)], 1))
    y = net.up(y)[:, :, 1:]
    return net.head(nn.functional.max_pool2d(y, 2).mean((2, 3)))


@network(
    table=lambda: nn.Embedding(20, 12),
    both=(12, 32),
    norm=lambda: nn.LayerNorm(16),
    lstm=lambda: nn.LSTM(16, 6, batch_first=True),
    head=(6, 4),
)
def recurrent(net, ids):
    """What a recurrent layer reads, halves of one projection, and a table that is looked up."""
    one, other = net.both(net.table(ids)).chunk(2, -1)
    x = net.norm(one * torch.sigmoid(other) * net.both.bias[16:])
    return net.head(net.lstm(x)[0].softmax(-1))


CASES = {
    "convolutions": lambda: (convolutions(), (torch.randn(2, 3, 12, 12),)),
    "recurrent": lambda: (recurrent(), (torch.randint(20, (2, 7)),)),
    **{
        family: lambda family=family: (
            transformers_case(family).build(),
            transformers_case(family).make_inputs()[0],
        )
        for family in ("llama", "gpt2", "phi3")
    },
}


def shapes(operator, kept):
    """Return the shapes of what an operator reads and writes."""
    every = (*operator.reads, *operator.outputs)
    return [tuple(size.at(kept) for size in operand.dims) for operand in every]


@pytest.mark.parametrize("case", CASES)
def test_operators_have_the_shapes_of_the_model_that_is_really_smaller(case):
    model, inputs = CASES[case]()
    traced, smaller = graph.trace(model.eval(), inputs), copied(model)
    plan = half_of(traced.prunable)
    assert plan.groups
    slice_units(smaller, plan)
    again = graph.trace(smaller, inputs)
    dense = {group.name: group.units for group in traced.groups}
    kept = dense | {group.name: len(group.kept) for group in plan.groups}
    small = {group.name: group.units for group in again.groups}

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    assert {operator.function for operator in traced.operators} >= {torch.ops.aten.linear.default}
    for one, other in zip(traced.operators, again.operators, strict=True):
        assert one.target == other.target
        assert shapes(one, kept) == shapes(other, small)
        if "aten.to." in one.target:  # there are no numbers to move to another device
            continue
        for widths in (dense, kept):
            made = one.function(**one.arguments_at(lambda size, at=widths: size.at(at), empty))
            found = [tuple(tensor.shape) for tensor in pytree.tree_leaves(made)]
            assert found == shapes(one, widths)[-len(found) :]
    for name, tensor in smaller.named_parameters():
        assert tuple(size.at(kept) for size in traced.tensors[name]) == tuple(tensor.shape)


def test_sizes_multiply_and_take_widths_and_names():
    side = Size.summed({("a",): 3, (): 2})
    square = side * side
    assert square.at({"a": 4}) == 14 * 14
    assert square.given({"a": 4}) == Size.summed({(): 196})
    assert square.given({"a": "b"}).at({"b": 1}) == 25
    assert (square * Size.summed({("b",): 2})).given({"a": 0}) == Size.summed({("b",): 8})
    assert Size.summed({("a",): 0}).terms == ()
