"""The rows of `benchmarks/peers`: each method meets the size, and the page says who is better."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.case import Case
from benchmarks.measuring import read
from benchmarks.page import DENSE
from benchmarks.peers import backends
from benchmarks.peers.__main__ import BENCH, methods
from benchmarks.peers.decoders import short_gpt, slice_gpt
from benchmarks.quality import Row
from osscar.network.modules import count_parameters
from tests.zoo import transformers_case

SETTING = "30% of heads and neurons"
METHODS = [name for name in methods("demo") if "public code" not in name]  # in no package


def slow_but(always, names):
    """Mark all names as slow but one."""
    return [
        name if name == always else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("peers")
    told = argparse.Namespace(
        directory=place, windows=1, images=1, device="cpu", data=None, official=None
    )
    BENCH.written(row(DENSE), told)
    return told


def row(method, **fields):
    return Row("demo", SETTING, method, samples=4, scored=(1, 1), **fields)


def found(one, options):
    BENCH.written(one, options)
    return read(options.directory / one.key)


@pytest.mark.parametrize("method", slow_but("SliceGPT", METHODS))
def test_each_method_meets_the_size(method, options):
    if method.startswith("Torch"):
        pytest.importorskip("torch_pruning")
    dense = read(options.directory / row(DENSE).key)
    one = found(row(method), options)
    assert "failed" not in one, one["failed"]
    most = dense["size"]["params"]
    if method == "ShortGPT":  # whole blocks, as many as come nearest
        most += dense["parameters"] / 8
    assert dense["parameters"] / 2 < one["parameters"] <= most
    assert bool(one["proved"]) == (method in ("FLAP", *backends.METHODS))


def test_what_a_peer_raises_is_the_row(options):
    one = found(row("the paper's public code"), options)
    assert one["failed"].startswith("FileNotFoundError: needs --official")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_slices_of_full_width_and_no_removed_block_leave_the_model_as_it_is(family):
    model = transformers_case(family).build()
    tokens = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    case = Case(model, tokens, SimpleNamespace(), {"params": 10**9}, 0, SimpleNamespace())
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        sliced = slice_gpt(case).model(input_ids=tokens).logits
        short = short_gpt(replace(case, size={"params": count_parameters(model)})).model
        assert torch.allclose(sliced, expected, atol=1e-4)
        assert torch.equal(short(input_ids=tokens).logits, expected)


def test_flap_adds_up_the_variances_that_the_weights_see():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(1, 5) + 2
    data = x + torch.randn(64, 5)
    ((_, found),) = backends.fluctuations(model, data, 0).items()
    with torch.no_grad():
        variance = model[:2](data).double().var(0, correction=0)
        expected = model[2].weight.double().square().sum(0) * variance
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
