"""Code that changes between a kill and the same command, wherever it lies, is noticed."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import JournalError
from osscar.data.batches import as_inputs
from osscar.proof.plan import Form
from osscar.request import BudgetKind, PruningRequest
from osscar.run.jobs import SweepJob
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import LayerRecord, RunLog, run_manifest
from osscar.run.sweep import SweepDirectory, SweepPoint, sweep_manifest
from osscar.study import jobs
from osscar.study.directory import Study, model_problems
from osscar.study.records import StudyDesign
from solvers.own_code import source_digests
from tests.osscar.test_user_code import BACKEND, SCORES

NOTICED = "the dense model returns other values on the same inputs: its code has changed"
REQUEST = PruningRequest(neurons=0.5, backend="wanda", device="cpu")
DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def built(gain=1.0):
    """Return a network with a forward pass of its own, which no weight or class tells of."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Identity(), nn.ReLU(), nn.Linear(12, 5)).eval()
    net[1].forward = lambda x: gain * x
    return net


def manifest_of(model):
    return run_manifest(REQUEST, model, as_inputs(model, DATA))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A log, a sweep and a study that were begun with the code as it is above."""
    place, model = tmp_path_factory.mktemp("begun"), built()
    manifest = manifest_of(model)
    log = RunLog(place / "log")
    result = prune_as_asked(model, DATA, REQUEST)
    with log.begun(manifest):
        log.append(0, LayerRecord(result.plan.groups[0], result.layers[0], ()))
    sweep = SweepDirectory(place / "sweep")
    with sweep.begun(sweep_manifest(manifest, BudgetKind.FLOPS, {})):
        parts = ("dense", 1.0, 1.0, 1.0, 1, 4, 1, Form.EAGER, 1.0, [1.0, 1.0], 1.0)
        parts += ({"perplexity": 2.0}, None, None, None, None, 1.0, {}, ())
        sweep.keep(SweepJob("dense", BudgetKind.FLOPS, 1.0), SweepPoint(*parts))
    posed = ((str(group.kind), problem) for group, problem in model_problems(model, DATA))
    Study(place / "study", {}).capture(posed, manifest.dense)
    return place


def test_changed_code_is_noticed_where_a_log_a_sweep_and_a_study_go_on(begun):
    study, noticed = Study(begun / "study", {}), partial(pytest.raises, JournalError, match=NOTICED)
    for gain, told in ((1.0, nullcontext), (1.0 + 1e-6, noticed), (1.5, noticed)):
        manifest = manifest_of(built(gain))
        sweep = sweep_manifest(manifest, BudgetKind.FLOPS, {})
        with told(), RunLog(begun / "log").begun(manifest):
            pass
        with told(), SweepDirectory(begun / "sweep").begun(sweep):
            pass
        with told():
            study.check_dense(manifest.dense)


def test_outputs_are_compared_where_the_same_device_computed_both(begun):
    now = manifest_of(built(1.5))
    elsewhere = dataclasses.replace(now.dense, device={**now.dense.device, "threads": "64"})
    with RunLog(begun / "log").begun(dataclasses.replace(now, dense=elsewhere)) as records:
        assert len(records) == 1


@pytest.mark.slow
def test_a_study_solves_again_what_a_changed_backend_of_ones_own_has_answered(
    tmp_path, monkeypatch
):
    """And keeps what others have answered."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"mine.py": BACKEND, "scores.py": SCORES}.items():
        (tmp_path / name).write_text(text)
    study = Study(tmp_path / "study", {})
    study.capture([("neurons", problem) for _, problem in model_problems(built(), DATA)])
    design = StudyDesign(backends=("mine.py:First", "magnitude"), sparsities=(0.5,))
    asked, solve = list[str](), jobs.solve_task
    monkeypatch.setattr(jobs, "solve_task", lambda t: asked.append(t.asked.backend) or solve(t))
    first = study.run(design)
    study.run(design)
    assert asked == ["mine.py:First", "magnitude"]
    (tmp_path / "scores.py").write_text(f"{SCORES}# another\n")
    again = Study(tmp_path / "study", {}).run(design)
    assert asked == ["mine.py:First", "magnitude", "mine.py:First"]
    assert [one.key for one in again] != [one.key for one in first]
    assert [bool(one.code) for one in again] == [True, False]


def test_functions_of_ones_own_are_known_by_their_files_and_those_of_packages_by_nothing():
    here = Path(__file__).name
    assert here in source_digests(built)
    for other in (torch.relu, nn.ReLU(), osscar.prune, "wanda", "torchvision:resnet18", 3, None):
        assert source_digests(other) == {}
