"""Code that changes between a kill and the same command, wherever it lies, is noticed."""

import dataclasses
import sys

import numpy as np
import pytest

import osscar
from osscar.base.errors import JournalError
from osscar.cli import main
from osscar.data.batches import as_inputs
from osscar.models.user_code import build
from osscar.preparation.fingerprint import DenseOutputs
from osscar.request import PruningRequest
from osscar.run.points import BudgetKind, SweepDirectory, sweep_manifest
from osscar.run.run_log import LayerRecord, RunLog, run_manifest
from osscar.study.directory import Study
from osscar.study.problems import model_problems
from tests.osscar.networks import images
from tests.osscar.test_sweep import point

NET = """
import torch
import torch.nn.functional as F
from torch import nn

GAIN = 1.5

def squashed(x, steep=2.0):
    return torch.tanh(steep * x)

class Net(nn.Module):
    floor = 0.1

    def __init__(self):
        super().__init__()
        self.act = F.relu
        self.enter, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1)
        self.same, self.leave = nn.Identity(), nn.Linear(12, 5)

    def mixed(self, x):
        return x + 0.5 * x.square()

    def forward(self, x):
        x = self.act(self.enter(self.mixed(squashed(GAIN * x))))
        x = self.act(self.middle(self.same(x) + self.floor))
        return self.leave(x.mean((2, 3)))

def build():
    torch.manual_seed(0)
    net = Net()
    net.enter.register_forward_hook(lambda module, args, y: 1.25 * y)
    net.same.forward = lambda x: 0.75 * x
    return net.eval(), torch.zeros(2, 3, 12, 12)
"""

EDITS = {
    "helper": ("0.5 * x.square()", "0.25 * x.square()"),
    "constant": ("GAIN = 1.5", "GAIN = 1.25"),
    "hook": ("1.25 * y", "1.0 * y"),
    "forward of an instance": ("0.75 * x", "0.5 * x"),
    "last bits": ("GAIN = 1.5", "GAIN = 1.5000001"),
}
NOTICED = "the dense model puts out other values on the same inputs: its code has changed"
REQUEST = PruningRequest(sparsity=0.5, backend="wanda", device="cpu")


def built(place, edit=("", "")):
    """Return the network of edited code, with its data."""
    file = place / "net.py"
    file.write_text(NET.replace(*edit))
    model, *_ = build(f"{file}:build")
    return model, images(16)


def manifest_of(model, data):
    return run_manifest(REQUEST, model, as_inputs(model, data), 8)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A log, a sweep and a study that were begun with the code as it is above."""
    place = tmp_path_factory.mktemp("begun")
    model, data = built(place)
    manifest = manifest_of(model, data)
    log = RunLog(place / "log")
    result = osscar.prune(model, data, sparsity=0.5, backend="wanda", device="cpu")
    group, layer = result.plan.groups[0], result.layers[0]
    with log.begun(manifest):
        log.append(0, LayerRecord(group, layer, ()))
    sweep = SweepDirectory(place / "sweep")
    with sweep.begun(sweep_manifest(manifest, BudgetKind.FLOPS, {})):
        sweep.keep(point())
    posed = ((str(group.kind), problem) for group, problem in model_problems(model, data))
    Study(place / "study", {}).capture(posed, manifest.dense)
    return place


def go_on(place, manifest):
    """Yield what happens where a log, a sweep and a study go on."""
    sweep = sweep_manifest(manifest, BudgetKind.FLOPS, {})
    yield JournalError, lambda: RunLog(place / "log").begun(manifest).__enter__()
    yield JournalError, lambda: SweepDirectory(place / "sweep").begun(sweep).__enter__()
    yield JournalError, lambda: Study(place / "study", {}).check_dense(manifest.dense)


def test_changed_code_is_noticed_by_what_the_model_puts_out(begun, tmp_path):
    for edit in EDITS.values():
        manifest = manifest_of(*built(tmp_path, edit))
        for error, step in go_on(begun, manifest):
            with pytest.raises(error, match=NOTICED):
                step()
    model, data = built(tmp_path, ("def build", '"""Words that change nothing."""\n\ndef build'))
    for _, step in go_on(begun, manifest_of(model, data)):
        step()


def test_outputs_that_another_device_rounds_otherwise_are_the_same(tmp_path):
    """Only there: what the same device puts out is the same to the bit."""
    model, data = built(tmp_path)
    first, leave = DenseOutputs.of(model, as_inputs(model, data)), model.leave.forward
    for factor in (1 + 1e-6, 1.01):
        model.leave.forward = lambda x, factor=factor: factor * leave(x)
        found = DenseOutputs.of(model, as_inputs(model, data))
        for elsewhere in ({"threads": "64"}, {"device": "another"}, {}):
            before = dataclasses.replace(first, device={**first.device, **elsewhere})
            assert found.differs(before) == (not elsewhere or factor > 1.001)


def test_a_run_that_goes_on_in_other_threads_keeps_what_was_committed(begun, tmp_path):
    """Its records bear the digest of the manifest that it was begun with."""
    now = manifest_of(*built(tmp_path))
    outputs = now.dense.outputs
    other = {**outputs.device, "threads": "64"}
    outputs = dataclasses.replace(outputs, device=other, sha256="0" * 64)
    now = dataclasses.replace(now, dense=dataclasses.replace(now.dense, outputs=outputs))
    with RunLog(begun / "log").begun(now) as records:
        assert len(records) == 1


# ---- as a person runs it -----------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in this process; return its status and what it says is wrong."""
    pixels = (images(16) * 40 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1)
    np.savez(tmp_path / "images.npz", images=pixels.numpy())
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        data = ("--calibration", "images.npz", "--no-normalize")
        common = ("net.py:build", *data, "--device", "cpu", "--out", "out")
        monkeypatch.setattr(sys, "argv", ["osscar", arguments[0], *common, *arguments[1:]])
        sys.modules.pop("osscar_user_net", None)
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, " ".join(capsys.readouterr().err.split())

    return call


def interrupted(method):
    """Return a method that ends with Ctrl-C once it has done what it does."""

    def call(*arguments):
        method(*arguments)
        raise KeyboardInterrupt

    return call


def test_a_command_that_was_killed_does_not_go_on_with_other_code(run, tmp_path, monkeypatch):
    command = ("prune", "--sparsity", "0.5")
    built(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "append", interrupted(RunLog.append))
        status, err = run(*command)
    assert status == 130, err
    kept = {path: path.read_bytes() for path in tmp_path.rglob("out*/**/*") if path.is_file()}
    built(tmp_path, EDITS["helper"])
    status, err = run(*command)
    assert status == 2
    assert NOTICED in err
    assert "--restart" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("out*/**/*") if p.is_file()} == kept
    built(tmp_path)
    status, err = run(*command)
    assert status == 0, err
