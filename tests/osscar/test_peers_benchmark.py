"""The rows of `benchmarks/peers`: each method meets the size, and the page says who is better."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import solvers
from benchmarks import quality, tasks
from benchmarks.case import Case
from benchmarks.measuring import read
from benchmarks.page import DENSE, OURS, write_page
from benchmarks.peers import backends, depgraph
from benchmarks.peers.__main__ import BENCH, methods
from benchmarks.peers.decoders import short_gpt, slice_gpt
from benchmarks.quality import Row
from benchmarks.resnet20 import MEAN, STD, ResNet20
from benchmarks.tasks import flops
from osscar.base.files import write_json
from osscar.data.images import ImageSet
from osscar.data.preprocessing import Preprocessing
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
def test_each_method_meets_the_size_and_is_read_back(method, options):
    if method.startswith("Torch"):
        pytest.importorskip("torch_pruning")
    dense = read(options.directory / row(DENSE).key)
    one = found(row(method), options)
    assert "failed" not in one, one["failed"]
    most = dense["size"]["params"]
    if method == "ShortGPT":  # whole blocks, as many as come nearest
        most += dense["parameters"] / 8
    assert dense["parameters"] / 2 < one["parameters"] <= most
    assert one["read_back"] == "equal"
    assert bool(one["proved"]) == (method in ("FLAP", *backends.METHODS))


@pytest.mark.slow
def test_a_peer_is_recovered_as_this_toolkit_is(options):
    found(row("SliceGPT"), options)
    assert found(row("SliceGPT", steps=1), options)["quality"]["perplexity"] > 1


def test_what_a_peer_raises_is_the_row(options):
    one = found(row("the paper's public code"), options)
    assert one["failed"].startswith("FileNotFoundError: needs --official")


@pytest.mark.parametrize("name", slow_but("magnitude", depgraph.IMAGES))
def test_channels_leave_until_operations_are_few(name, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(depgraph, "STEPS", 25)
    torch.manual_seed(0)
    model = ResNet20().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    labels = torch.arange(4)
    images = ImageSet("random", pixels, Preprocessing(32, 32, MEAN, STD, channels=3), labels)
    (setting,) = flops(0.7)
    case = Case(model, images, setting, {"flops": 0.7}, 0, SimpleNamespace())
    if depgraph.IMAGES[name].everything:  # shortcuts of ResNet-20 pad by a number of their own
        with pytest.raises(IndexError):
            depgraph.prune_images(case, name)
        return
    smaller = depgraph.prune_images(case, name).model
    assert 0.6 * case.used(model) < case.used(smaller) <= 0.7 * case.used(model)


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


def rows(theirs, seconds):
    shared = {"task": "demo", "setting": SETTING, "samples": 2, "steps": 0}
    size = {"parameters": 80, "flops": 80, "forward": {"model": 1.0, "dense": 1.0}}
    done = {**size, "peak_bytes": 1e9, "form": "pickle", "read_back": "equal", "proved": ""}
    yield {**shared, "method": DENSE, "seed": 0, "quality": {"perplexity": 10.0}, **size,
           "parameters": 100, "flops": 100, "size": {"params": 80}}  # fmt: skip
    for seed in range(3):
        for method, value in ((OURS, 12.0), ("theirs", theirs)):
            known = {"quality": {"perplexity": value + seed}, "seconds": seconds[method]}
            yield {**shared, "method": method, "seed": seed, **done, **known}
    yield {**shared, "method": "broken", "seed": 0, "failed": "IndexError: index 32"}


@pytest.mark.parametrize(
    ("theirs", "seconds", "better"),
    [
        (11.0, 2.0, ["in one shot: theirs 12.00; this toolkit 13.00"]),
        (14.0, 1.0, ["seconds of pruning: theirs 1; this toolkit 2"]),
        (14.0, 3.0, ["Nowhere in these rows."]),
    ],
)
def test_the_page_says_first_where_a_peer_is_better(theirs, seconds, better, tmp_path):
    for index, one in enumerate(rows(theirs, {OURS: 2.0, "theirs": seconds})):
        write_json(tmp_path / f"{index}.json", one)
    page = write_page(tmp_path)
    first, rest = page.split("## Quality over time")
    assert first.startswith("## Where a peer is better")
    assert all(words in first for words in better)
    assert first.count("\n- ") == (better != ["Nowhere in these rows."])
    assert f"| theirs | 80% | 80% | {theirs + 1:.2f} ({theirs:.2f} to {theirs + 2:.2f}) |" in rest
    assert "- broken: `IndexError: index 32`" in rest


UNITS = ([[3], [0, 4], [6, 5], [1], [2]], [[0], [5, 1], [2], [3], [4]])


@pytest.mark.parametrize("known", [True, False])
def test_flap_adds_up_the_variances_that_the_weights_see(known):
    """Of centred inputs, whose variances the diagonal of H tells, and of others."""
    draw, scores, consumers = np.random.default_rng(0), np.zeros(5), []
    for p, m, units in ((7, 3, UNITS[0]), (6, 4, UNITS[1])):
        X, W0 = (
            draw.normal(size=(60, p)) + known * 3 * draw.normal(size=p),
            draw.normal(size=(p, m)),
        )
        X -= 0 if known else X.mean(0)
        rows = X.var(0) * np.square(W0).sum(1)
        scores += [rows[own].sum() for own in units]
        H, W0, variance = map(torch.from_numpy, (X.T @ X / 60, W0, X.var(0)))
        given = {"variance": variance} if known else {}
        consumers.append(solvers.Consumer.from_gram(H, W0, units=units, damp=0.01, **given))
    problem = solvers.SubsetProblem(tuple(consumers), 3)
    kept = solvers.solve(problem, backends.Flap()).support.tolist()
    assert kept == sorted(np.argsort(-scores)[:3].tolist())


def test_a_peer_is_made_smaller_until_it_is_as_fast_as_asked(monkeypatch):
    tried = []

    def method(case):
        tried.append(case.size["flops"])
        return SimpleNamespace(model=case.size["flops"])

    def times(share, _):
        return {"forward": {"model": share**0.5, "dense": 1.0}}

    monkeypatch.setattr(quality, "measured", times)
    monkeypatch.setattr(quality, "same_size", lambda model, data, setting: setting.asked)
    case = Case(None, None, tasks.speeds(3)[0], {"speedup": 3}, 0, SimpleNamespace())
    found = quality.at_speed(method, case, None)
    assert times(found.model, None)["forward"]["model"] == pytest.approx(1 / 3, rel=0.02)
    assert 1 < len(tried) <= quality.TRIES
