"""The rows of `benchmarks/peers`: each method meets the size."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.slow
@pytest.mark.parametrize("method", slow_but("SliceGPT", METHODS))
def test_each_method_meets_the_size(method, options):
    if method.startswith("Torch"):
        pytest.importorskip("torch_pruning")
    dense = read(options.directory / row(DENSE).key)
    BENCH.written(row(method), options)
    one = read(options.directory / row(method).key)
    assert "failed" not in one, one["failed"]
    most = dense["size"]["params"]
    if method == "ShortGPT":  # whole blocks, as many as come nearest
        most += dense["parameters"] / 8
    assert dense["parameters"] / 2 < one["parameters"] <= most
    assert bool(one["proved"]) == (method in ("FLAP", *backends.METHODS))


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
