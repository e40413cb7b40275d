"""Runs that are killed go on, and end with the same bits; nothing that a log says is believed."""

import dataclasses
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch

from osscar.allocation.costs import CountedCost, Table
from osscar.base.errors import JournalError
from osscar.base.json_files import read_json
from osscar.data.batches import as_inputs
from osscar.preparation.journal import JournalManifest
from osscar.request import PruningRequest
from osscar.run import groups, run_log
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import TIMES, RunLog, run_manifest
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Concat, images, small_net


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    """With batch norm, in a walk in two."""
    build, data, count = small_net, images(), 3
    request = PruningRequest(sparsity=0.5, allocation="uniform", device="cpu")
    whole = prune_as_asked(build(), data, request)
    log, original, solve, names = RunLog(tmp_path), RunLog.append, groups.solved, []

    def append(self, index, record):
        original(self, index, record)
        if index + 1 == count:
            raise Killed

    def spy(step, *rest):
        names.append(step.group.name)
        return solve(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "append", append)
        with pytest.raises(Killed):
            prune_as_asked(build(), data, request, log)
    assert log.committed == count
    monkeypatch.setattr(groups, "solved", spy)
    again = prune_as_asked(build(), data, request, log)
    assert names == [layer.name for layer in whole.layers][count:]
    assert log.committed == len(whole.layers)
    assert again.plan == whole.plan
    assert [layer.name for layer in again.layers] == [layer.name for layer in whole.layers]
    assert [layer.loss for layer in again.layers] == [layer.loss for layer in whole.layers]
    found = again.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, found[key]), key


# ---- a log of a whole run ----------------------------------------------------------------

OPT = PruningRequest(sparsity=0.5, memory=0.9, context=24, backend="wanda", device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a log in which everything is done."""
    log = RunLog(tmp_path_factory.mktemp("finished") / "log")
    prune_as_asked(tiny("opt", layers=1), tokens(), OPT, log)
    return log.directory


@pytest.fixture
def log(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "log")
    return RunLog(tmp_path / "log")


@pytest.fixture
def manifest(finished):
    return read_json(finished / "log.json", JournalManifest)


def test_another_run_is_refused_with_the_difference(log, manifest, monkeypatch):
    dense, other = tiny("opt", layers=1), tiny("opt", layers=1, seed=1)
    for model, data, request, versions, message in (
        (other, tokens(), OPT, {}, "the model's weights differ"),
        (dense, tokens(seed=2), OPT, {}, "the calibration data differ"),
        (dense, tokens(), dataclasses.replace(OPT, damp=0.02), {}, "damp was None and is 0.02"),
        (dense, tokens(), OPT, {"torch": "0"}, "torch was .* and is '0'"),
        (dense, tokens(), OPT, {"transformers": "0"}, "transformers was .* and is '0'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run_log, "version", lambda name, v=versions: v.get(name, version(name)))
            inputs = as_inputs(model, data)
            asked = run_manifest(request, model, inputs)
        with pytest.raises(JournalError, match=f"{message}.*--restart"):
            log.begun(asked).__enter__()
    with log.begun(manifest) as records:
        assert len(records) == log.committed > 1
    log.remove()
    assert not log.directory.exists()


def test_groups_that_share_a_consumer_go_on_to_the_same_bits(tmp_path):
    """The dense weights of a consumer are those before the first of its groups was committed."""
    torch.manual_seed(0)
    model, x, log = Concat().eval(), torch.randn(64, 6), RunLog(tmp_path)
    request = PruningRequest(sparsity=0.5, allocation="uniform")
    whole = prune_as_asked(model, x, request, log)
    for file in sorted(tmp_path.glob("0*.safetensors"))[4:]:
        file.unlink()
    assert log.committed == 4  # two groups before them, and two of the four branches
    again = prune_as_asked(model, x, request, log)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_times_are_read_as_they_were_noted(tmp_path):
    grids = np.array([1, 8, 9]), np.array([2, 4])
    tables = (
        Table(("a",), grids[:1], np.array([0.0, 0.1, 1 / 3])),
        Table(("a", "b"), grids, np.arange(6.0).reshape(3, 2) / 7),
    )
    times, log = CountedCost(1 / 9, tables, {"a": 9, "b": 4}, "a pass"), RunLog(tmp_path)
    log.write(TIMES, times)
    found = log.read(TIMES, CountedCost)
    for kept in ({}, {"a": 3}, {"a": 8, "b": 2}):
        assert found.of(kept) == times.of(kept)
    assert (found.assumed, found.coupled) == (times.assumed, times.coupled)
