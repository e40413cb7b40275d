"""Sweeps: points as single runs make them, measured once, kept, gone on with, and shown."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import osscar
import osscar.run.sweep as points_room
from osscar.base.errors import JournalError, OptionError
from osscar.evaluation.speed import measure_forward
from osscar.request import BASELINES, METHODS, BudgetKind, PruningRequest
from osscar.run.jobs import SweepJob, jobs
from osscar.run.prune import prune_as_asked
from osscar.run.sweep import prune_points
from osscar.walk.walk import Walk
from tests.osscar.families import tiny as tiny_of
from tests.osscar.families import tokens
from tests.osscar.networks import images

SPARSITY, FLOPS = BudgetKind.SPARSITY, BudgetKind.FLOPS
MEASURED = "measured"
BASE = PruningRequest(sparsity=0.5, backend="greedy", device="cpu")


def grouped_net():
    """A network whose convolutions in groups lose a channel of every group at a time."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 12, 1), nn.Conv2d(12, 12, 3, groups=2), nn.Conv2d(12, 10, 1),
    )  # fmt: skip
    between = [one for layer in layers for one in (layer, nn.ReLU())]
    return nn.Sequential(*between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)).eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["opt", "images"])
def test_a_point_is_what_a_run_of_its_own_makes(kind):
    of_text = kind == "opt"
    model, data = (tiny_of("opt", layers=1), tokens()) if of_text else (grouped_net(), images(48))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    points = (
        SweepJob(MEASURED, SPARSITY if of_text else FLOPS, 0.7),
        SweepJob("wanda", SPARSITY, 0.5),
    )
    found = dict(prune_points(model, data, BASE, points))
    assert tuple(found) == points
    for job, result in found.items():
        alone = prune_as_asked(model, data, job.request(BASE))
        assert result.plan == alone.plan
        assert result.request == alone.request
        mine, theirs = result.model.state_dict(), alone.model.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
        if job.method == MEASURED:  # others hold nothing out when they run by themselves
            assert result.distance.value == pytest.approx(alone.distance.value, rel=1e-3)
        if of_text:
            assert result.model.config.use_cache == model.config.use_cache
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_points_share_curves_that_are_measured_once_at_their_widths(monkeypatch):
    walks, original = [], Walk.__init__

    def noted(self, *given, **more):
        walks.append(more.get("rough", False))
        original(self, *given, **more)

    monkeypatch.setattr(Walk, "__init__", noted)
    points = (*jobs(SPARSITY, (0.2, 0.25, 0.7)), SweepJob("wanda", SPARSITY, 0.7))
    torch.manual_seed(0)
    hidden = nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU()
    model, data = nn.Sequential(*hidden, nn.Linear(24, 4)).eval(), torch.randn(64, 12)
    found = dict(prune_points(model, data, BASE, points))
    assert walks.count(True) == 1
    budgets = [found[job].budget for job in points[:3]]
    assert budgets[0].measured == budgets[1].measured == budgets[2].measured
    for name, known in budgets[0].measured.items():
        known, width = [point.kept for point in known], budgets[0].widths[name]
        for share in (0.8, 0.75, 0.3):  # one of 0.8 and 0.75 is near the other
            assert min(abs(kept - share * width.units) for kept in known) <= 0.3 * width.units
    assert any(len(known) == 2 for known in budgets[0].measured.values())
    assert all(job.method == MEASURED or one.budget.predicted is None for job, one in found.items())
    # A sweep that goes on, with the last one to do, makes the same.
    ((job, last),) = prune_points(model, data, BASE, points[:3], done=points[:2])
    assert (job, last.budget, last.plan) == (points[2], found[job].budget, found[job].plan)
    for name, value in found[job].model.state_dict().items():
        assert torch.equal(value, last.model.state_dict()[name])


# ---- points and budgets ------------------------------------------------------------------


def test_baselines_are_the_methods_as_published():
    points = jobs(SPARSITY, (0.4, 0.2, 0.4), baselines=True)
    assert points[:2] == (SweepJob(MEASURED, SPARSITY, 0.2), SweepJob(MEASURED, SPARSITY, 0.4))
    assert len(points) == 2 * (1 + len(BASELINES))
    base = PruningRequest(sparsity=0.5, correction_weight=0.5)
    request = SweepJob("multistage", SPARSITY, 0.2).request(base)
    asked = {"allocation": "uniform", "target": "weights", "backend": "multistage"}
    assert request == PruningRequest(sparsity=0.2, **asked)
    for method in METHODS:
        assert SweepJob(method, SPARSITY, 0.2).request(BASE).allocation == method
        assert jobs(SPARSITY, (0.2,), allocation=method) == (SweepJob(method, SPARSITY, 0.2),)


@pytest.mark.parametrize(
    ("budget", "values", "ordered"),
    [
        ("sparsity", (np.float64(0.5), np.float32(0.25)), [0.25, 0.5]),
        ("params", ("50%", 0.75, 0.5), [0.75, 0.5]),
        ("size", ("1/2", Fraction(3, 4)), [0.75, 0.5]),
        ("flops", (0.5, 0.75), [0.75, 0.5]),
        ("speedup", (2, 1.5), [1.5, 2.0]),
    ],
)
def test_the_largest_model_comes_first(budget, values, ordered):
    points = jobs(BudgetKind(budget), values)
    assert repr([job.value for job in points]) == repr(ordered)  # which name the files of points
    for job in points:
        request = job.request(BASE)
        assert {*request.budgets} == {budget, SPARSITY}
        assert getattr(request, budget) == job.value


# ---- from Python -------------------------------------------------------------------------


def test_a_sweep_from_python_goes_on_and_shows_each_point(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, data, out = grouped_net(), torch.randn(24, 3, 12, 12), tmp_path / "sweep"
    asked = {"baselines": True, "backend": "magnitude", "device": "cpu"}
    turns = []  # of the dense model, and of a smaller one

    def noted(models, batch):
        turns.append(measure_forward(models, batch))
        return turns[-1]

    monkeypatch.setattr("osscar.run.sweep.measure_forward", noted)
    document = osscar.sweep(model, data, out, sparsity=[0.4], **asked)
    assert document == json.loads((out / "sweep.json").read_text())
    _, *points = document["points"]
    for point, (before, after) in zip(points, turns[1:], strict=True):
        assert point["speedup"] == before["seconds"] / after["seconds"]
    assert [p["method"] for p in points] == [MEASURED, *BASELINES]
    assert [p["predicted"] is None for p in points] == [False, *(True for _ in BASELINES)]
    page = (out / "report.html").read_text()
    first, *others = (p["stages"].keys() for p in points)
    assert {"open and trace", "trial shrink"} <= first  # is what all of them share
    assert not any("trial shrink" in stages for stages in others)
    for p, stages in zip(points, (first, *others), strict=True):
        assert {"calibration passes", "solver and refit", "timing", "other"} <= stages
        assert sum(p["stages"].values()) >= p["prune_seconds"]
        assert p["seconds_between"][0] <= p["seconds"] <= p["seconds_between"][1]
        assert p["reached"] == p["parameters"] <= p["limit"] == points[0]["limit"]
        assert f"{p['parameters']:,}" in page

    monkeypatch.setattr(points_room, "prune_prepared", None)  # what is done is not done again
    assert osscar.sweep(model, data, out, sparsity=(0.4,), **asked) == document
    with pytest.raises(JournalError, match="seed was 0 and is 3"):
        osscar.sweep(model, data, out, sparsity=[0.4], **asked, seed=3)
    for wrong in ({"sparsity": 0.4}, {"sparsity": [0.4], "params": [0.5]}, {}):
        with pytest.raises(OptionError, match="a sweep has one list of budgets"):
            osscar.sweep(model, data, out, **wrong)
    (out / "points" / "measured-sparsity-0.4.json").write_text("{}")
    with pytest.raises(JournalError, match=r"measured-sparsity-0\.4\.json"):
        osscar.sweep(model, data, out, sparsity=[0.4], **asked)
