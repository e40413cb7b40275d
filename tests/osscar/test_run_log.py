"""Runs that are killed go on, and end with the same bits; nothing that a log says is believed."""

import copy
import dataclasses
import json
import shutil
from importlib.metadata import version

import pytest
import safetensors.torch
import torch

import osscar
from osscar.base.errors import JournalError
from osscar.base.json_files import read_json
from osscar.data.batches import as_inputs
from osscar.network.tensor_files import write_record
from osscar.preparation.fingerprint import JournalManifest
from osscar.request import PruningRequest
from osscar.run import run_log
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog, run_manifest
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Concat, images, small_net

REQUEST = PruningRequest(sparsity=0.5, device="cpu")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture
def killing(monkeypatch):
    """Let the run end when the n-th record has been written."""

    def after(count):
        original = RunLog.append

        def append(self, index, record):
            original(self, index, record)
            if index + 1 == count:
                raise Killed

        monkeypatch.setattr(RunLog, "append", append)

    return after


CASES = {
    "language": (lambda: tiny("llama-gqa"), tokens),
    "vision": (small_net, images),  # with a walk that sets out again, and batch norm
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_that_was_killed_ends_with_the_same_bits(name, count, killing, tmp_path, monkeypatch):
    build_model, data = CASES[name]
    whole = prune_as_asked(build_model(), data(), REQUEST)
    killing(count)
    log = RunLog(tmp_path / "log")
    with pytest.raises(Killed):
        prune_as_asked(build_model(), data(), REQUEST, log)
    monkeypatch.undo()
    assert log.committed == count
    solved, prune_group = [], osscar.run.groups._prune_group

    def spy(step, *rest):
        solved.append(step.group.name)
        return prune_group(step, *rest)

    monkeypatch.setattr(osscar.run.groups, "_prune_group", spy)
    again = prune_as_asked(build_model(), data(), REQUEST, log)
    assert solved == [layer.name for layer in whole.layers][count:]
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
    prune_as_asked(tiny("opt"), tokens(), OPT, log)
    return log.directory


@pytest.fixture
def log(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "log")
    return RunLog(tmp_path / "log")


@pytest.fixture
def manifest(finished):
    return read_json(finished / "log.json", JournalManifest)


def test_another_run_is_refused_with_the_difference(log, manifest, monkeypatch):
    for model, data, request, message in (
        (tiny("opt", seed=1), tokens(), OPT, "the model's weights are others"),
        (tiny("opt"), tokens(seed=2), OPT, "the calibration data are others"),
        (tiny("opt"), tokens(), dataclasses.replace(OPT, damp=0.02), "damp was None and is 0.02"),
    ):
        inputs = as_inputs(model, data)
        other = run_manifest(request, model, inputs, inputs.batch_size)
        with pytest.raises(JournalError, match=f"{message}.*--restart"):
            log.begun(other).__enter__()
    inputs = as_inputs(tiny("opt"), tokens())
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            versions = {"torch": version("torch"), "transformers": version("transformers")}
            patch.setattr(run_log, "version", (versions | {package: "0"}).__getitem__)
            other = run_manifest(OPT, tiny("opt"), inputs, inputs.batch_size)
            with pytest.raises(JournalError, match=f"{package} was .* and is '0'"):
                log.begun(other).__enter__()
    with log.begun(manifest) as records:
        assert len(records) == log.committed > 2
    log.remove()
    assert not log.directory.exists()


def opened(file):
    """Return the header and the tensors of a record."""
    with safetensors.safe_open(file, "pt") as found:
        return found.metadata(), {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118


def test_a_record_that_was_damaged_is_refused(log, manifest):
    first, second = (log.directory / f"0000{index}.safetensors" for index in range(2))
    good = first.read_bytes()
    header, tensors = opened(first)
    changed = {**tensors, "00000": tensors["00000"] + 1}
    unread = {**header, "words": header["words"].replace('"units"', '"unit"', 1)}
    damages = (
        lambda: first.write_bytes(good[:-40]),
        lambda: first.write_bytes(second.read_bytes()),
        lambda: safetensors.torch.save_file(changed, first, header),
        lambda: safetensors.torch.save_file(tensors, first, unread),
        lambda: safetensors.torch.save_file(tensors, first),
        lambda: write_record(first, manifest, tensors, "another run"),
        first.unlink,
    )
    for damage in damages:
        damage()
        with pytest.raises(JournalError, match=r"00000\.safetensors cannot be read.*--restart"):
            log.begun(manifest).__enter__()
        first.write_bytes(good)
    with log.begun(manifest) as records:
        assert len(records) == log.committed


NEURONS = "model.decoder.layers.0.neurons"


def test_what_a_log_says_that_groups_keep_is_not_believed(log, manifest):
    file = log.directory / "allocation.json"
    good = json.loads(file.read_text())
    for part, key, value in (
        *(("keep", NEURONS, 10**6), ("keep", "nowhere", 1), ("budget", "limits", [])),
        *(("budget", "curves", {"nowhere": [1.0, 0.0]}), ("budget", "predicted", 1e-9)),
    ):
        content = copy.deepcopy(good)
        content["allocated"][part][key] = value
        for forged in (content, {**good, "run": "0" * 64}, {**good, "digest": "0" * 64}):
            file.write_text(json.dumps(forged))
            with log.begun(manifest), pytest.raises(JournalError, match=r"was changed.*--restart"):
                log.allocation()
    file.write_text(json.dumps(good))
    with log.begun(manifest):
        assert log.allocation().keep == good["allocated"]["keep"]


def test_groups_that_share_a_consumer_go_on_to_the_same_bits(tmp_path):
    """The dense weights of a consumer are those before the first of its groups was committed."""
    torch.manual_seed(0)
    model, x = Concat().eval(), torch.randn(64, 6)
    request = PruningRequest(sparsity=0.5, allocation="uniform")
    whole = prune_as_asked(model, x, request, RunLog(tmp_path / "whole"))
    count = len(list((tmp_path / "whole").glob("0*.safetensors")))
    assert count > 4
    for kept in range(1, count):
        log = RunLog(tmp_path / f"log{kept}")
        shutil.copytree(tmp_path / "whole", log.directory)
        for file in sorted(log.directory.glob("0*.safetensors"))[kept:]:
            file.unlink()
        again = prune_as_asked(model, x, request, log)
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
