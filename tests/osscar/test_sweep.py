"""Sweeps: points as single runs make them, measured once, kept, gone on with, and shown."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import osscar
import osscar.run.points as points_room
from osscar.allocation.allocate import allocate
from osscar.base.errors import DataError, JournalError, OptionError, OsscarError
from osscar.models.names import DEMO_DIRECTORY
from osscar.preparation.fingerprint import DenseOutputs, Fingerprint, JournalManifest
from osscar.proof.plan import Form
from osscar.recovery.recover import recover_as_asked
from osscar.report.sections import Figure
from osscar.request import PruningRequest
from osscar.run.chain import prepare_for
from osscar.run.feasibility import SkippedGroup
from osscar.run.points import (
    BASELINES,
    METHODS,
    BudgetKind,
    Recovered,
    SweepDirectory,
    SweepJob,
    SweepPoint,
    jobs,
    prune_points,
)
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import budget_facts
from osscar.run.sweep_page import recovered_line, sections, sweep_page, sweep_table, sweep_verdict
from tests.docs.json_schema import missing, undescribed
from tests.osscar.browser import DESK, PHONE, seen
from tests.osscar.families import CALIBRATION, tiny, tokens
from tests.osscar.networks import images, small_net
from tests.osscar.test_costs import random_curves

SPARSITY, FLOPS = BudgetKind.SPARSITY, BudgetKind.FLOPS
MEASURED = "measured"
BASE = PruningRequest(sparsity=0.5, backend="greedy", device="cpu")


def assert_same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["opt", "images"])
def test_a_point_is_what_a_run_of_its_own_makes(kind, monkeypatch):
    model, data = (tiny("opt", layers=1), tokens()) if kind == "opt" else (small_net(), images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    points = (
        SweepJob(MEASURED, SPARSITY, 0.3),
        SweepJob(MEASURED, FLOPS, 0.7),
        SweepJob("wanda", SPARSITY, 0.5),
    )
    found = dict(prune_points(model, data, BASE, points))
    assert tuple(found) == points
    for job, result in found.items():
        alone = prune_as_asked(model, data, job.request(BASE))
        assert result.plan == alone.plan
        assert result.request == alone.request
        assert_same(result.model, alone.model)
        if job.method == MEASURED:  # others hold nothing out when they run by themselves
            assert result.divergence == pytest.approx(alone.divergence, rel=1e-3)
        if kind == "opt":
            assert result.model.config.use_cache == model.config.use_cache
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_baselines_are_the_methods_as_published():
    points = jobs(SPARSITY, (0.4, 0.2, 0.4), baselines=True)
    assert points[:2] == (SweepJob(MEASURED, SPARSITY, 0.2), SweepJob(MEASURED, SPARSITY, 0.4))
    assert len(points) == 2 * (1 + len(BASELINES))
    request = SweepJob("multistage", SPARSITY, 0.2).request(
        PruningRequest(sparsity=0.5, correction_weight=0.5)
    )
    assert (request.allocation, request.target, request.backend) == (
        "uniform",
        "weights",
        "multistage",
    )
    assert request.sparsity == 0.2
    for method in METHODS:
        assert SweepJob(method, SPARSITY, 0.2).request(BASE).allocation == method
        assert jobs(SPARSITY, (0.2,), allocation=method) == (SweepJob(method, SPARSITY, 0.2),)


@pytest.mark.parametrize(
    ("budget", "values", "ordered"),
    [
        ("sparsity", (0.5, 0.25), [0.25, 0.5]),
        ("params", (0.5, 0.75), [0.75, 0.5]),
        ("params", (500, 1000, 500), [1000, 500]),
        ("size", (0.5, 0.75), [0.75, 0.5]),
        ("flops", (0.5, 0.75), [0.75, 0.5]),
        ("speedup", (2, 1.5), [1.5, 2.0]),
        ("params", ("1/2", Fraction(3, 4)), [0.75, 0.5]),
        ("sparsity", (np.float64(0.5), np.float32(0.25)), [0.25, 0.5]),
    ],
)
def test_the_largest_model_comes_first(budget, values, ordered):
    points = jobs(BudgetKind(budget), values)
    assert repr([job.value for job in points]) == repr(ordered)  # which name the files of points
    for job in points:
        request = job.request(BASE)
        asked = {kind: getattr(request, kind) for kind in BudgetKind}
        assert {kind for kind, value in asked.items() if value is not None} == {budget, SPARSITY}
        assert asked[budget] == job.value


@pytest.mark.parametrize(
    ("budget", "values", "message"),
    [
        *((SPARSITY, v, "sparsit") for v in ((), (0.0,), (1.0,), (0.5, -0.1), (float("nan"),))),
        (FLOPS, (0.5, 1.5), "flops is 1.5"),
        (BudgetKind.SPEEDUP, (1.0,), "speedup is 1.0"),
        (BudgetKind.PARAMS, (0.5, 1000), "counts and shares"),
        (BudgetKind.PARAMS, (0,), "params is 0"),
        (BudgetKind.SIZE, ("300KB",), "not 300000; give a list such as size=0.3"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget, values, message):
    with pytest.raises(OsscarError, match=message):
        jobs(budget, values)


# ---- the budget's frontier ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["opt", "images"])
def test_no_run_is_predicted_to_lie_below_the_frontier(kind):
    model, data = (tiny("opt"), tokens()) if kind == "opt" else (small_net(), images())
    with prepare_for(model, data, BASE) as prepared:
        curves = random_curves(prepared, BASE)
        budgets = [
            allocate(prepared, SweepJob(MEASURED, SPARSITY, s).request(BASE), curves=curves).budget
            for s in (0.2, 0.5, 0.8)
        ]
    costs, nats = map(np.array, zip(*budgets[0].frontier, strict=True))
    assert len(costs) > 5
    assert (np.diff(costs) > 0).all()
    assert costs[-1] == budgets[0].tightest.dense
    assert nats[-1] == 0
    if kind == "opt":
        assert (np.diff(nats) <= 0).all()
        assert nats[0] == pytest.approx(sum(curve.losses[1] for curve in curves.values()))
    for budget in budgets:
        assert budget.frontier == budgets[0].frontier
        assert sum(width.predicted for width in budget.widths.values()) == budget.predicted
        if kind == "opt":  # costs add up: the frontier is the lower hull of all choices
            within, beyond = (
                nats[costs <= budget.tightest.reached],
                nats[costs >= budget.tightest.reached],
            )
            assert beyond.max() <= budget.predicted * (1 + 1e-9)
            assert budget.predicted <= within.min() * (1 + 1e-9)
    data = json.loads(json.dumps(budgets[0].to_json(), allow_nan=False))
    assert len(data["frontier"]["cost"]) == len(data["frontier"]["distance"]) == len(costs)
    assert data["widths"].keys() == curves.keys()


def test_uniform_shares_report_their_widths_without_a_prediction():
    result = osscar.prune(tiny("opt"), tokens(), sparsity=0.5, allocation="uniform", device="cpu")
    widths = result.budget.widths
    assert {layer.name: layer.kept for layer in result.layers}.items() <= {
        name: width.kept for name, width in widths.items()
    }.items()
    assert {width.predicted for width in widths.values()} == {None}
    assert result.budget.frontier == ()


# ---- the directory -----------------------------------------------------------------------


def manifest(**more):
    outputs = DenseOutputs({"device": "x", "threads": "1"}, "s", ("0x0.0p+0",), 1e-4)
    asked = {"backend": "greedy", "text": "builtin", **more}
    return JournalManifest("osscar.sweep-asked/3", asked, Fingerprint("w", "d", outputs))


def point(method=MEASURED, value=0.5):
    return SweepPoint(
        schema="osscar.sweep-point/8", method=method, budget="sparsity", value=value, limit=12.0,
        reached=11.0, parameters=10, parameter_bytes=40, flops=100, form=Form.EXPORTED, seconds=0.5,
        seconds_between=[0.4, 0.625], speedup=2.0, quality={"perplexity": 3.5},
        divergence=None, agreement=None, predicted=None, loss=0.25, prune_seconds=1.0,
        widths={"a": 3},
        skipped=(SkippedGroup("b", "heads", 4, "a size in the code"),),
        recovered=Recovered(
            quality={"perplexity": 3.1}, measure="nats", before=0.5, after=0.25, kept=8, steps=64,
            learning_rate=1e-4, samples=28, held_out=4, seconds=2.0,
        ),
        stages={"solver and refit": 0.75, "other": 0.25},
    )  # fmt: skip


def test_points_are_kept_and_a_sweep_of_something_else_is_refused(tmp_path):
    place = SweepDirectory(tmp_path / "sweep")
    with place.begun(manifest()):
        assert place.point(SweepJob(MEASURED, SPARSITY, 0.5)) is None
        place.keep(point())
    again = SweepDirectory(tmp_path / "sweep")
    with again.begun(manifest()):
        assert again.point(SweepJob(MEASURED, SPARSITY, 0.5)) == point()
        assert again.point(SweepJob(MEASURED, SPARSITY, 0.25)) is None
    with pytest.raises(JournalError, match=r"text was 'builtin' and is 'other\.txt'"):
        again.begun(manifest(text="other.txt")).__enter__()
    with pytest.raises(JournalError, match="seed was None and is 3"):
        again.begun(manifest(seed=3)).__enter__()
    long = SweepDirectory(tmp_path / "long")
    with long.begun(manifest(text=100 * "a")):
        long.keep(point())
    with pytest.raises(JournalError, match="another sweep: other text; ask"):  # alike as shown
        long.begun(manifest(text=101 * "a")).__enter__()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"flops": 100', '"flops": "many"'),
        lambda text: text.replace('"speedup": 2.0', '"speedup": NaN'),
        lambda text: text.replace('"method": "measured"', '"method": "wanda"'),
        lambda text: text.replace('"value": 0.5', '"value": 0.25'),
        lambda text: text.replace('"budget": "sparsity"', '"budget": "flops"'),
    ],
)
def test_a_damaged_point_is_refused_by_name(tmp_path, damage):
    place = SweepDirectory(tmp_path / "sweep")
    with place.begun(manifest()):
        place.keep(point())
        file = tmp_path / "sweep" / "points" / "measured-sparsity-0.5.json"
        file.write_text(damage(file.read_text()))
        with pytest.raises(JournalError, match=r"measured-sparsity-0\.5\.json"):
            place.point(SweepJob(MEASURED, SPARSITY, 0.5))


# ---- as a person runs it -----------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog before night falls. " * 60)
    return file


def small_sweep(out, sparsity, text, *more):
    return (
        *("sweep", "demo", "--sparsity", sparsity, "--out", out, "--text", text),
        *("--samples", 4, "--seqlen", 32, "--backend", "greedy", "--device", "cpu", *more),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.usefixtures("drawn")
def test_a_sweep_goes_on_and_its_page_shows_every_number(run, text, tmp_path):
    out = tmp_path / "sweep"
    status, printed, err = run(*small_sweep(out, "0.6", text))
    assert status == 0, err
    assert "measured at sparsity 0.6: done, 1 of 1" in printed
    kept = (out / "points" / "measured-sparsity-0.6.json").read_text()
    more = ("--baselines", "--json", tmp_path / "sweep.json")
    status, printed, err = run(*small_sweep(out, "0.3,0.6", text, *more))
    assert status == 0, err
    assert "measured at sparsity 0.3: done, 1 of 9" in printed
    assert "measured at sparsity 0.6: done" not in printed
    assert (out / "points" / "measured-sparsity-0.6.json").read_text() == kept
    document = json.loads((out / "sweep.json").read_text())
    assert document == json.loads((tmp_path / "sweep.json").read_text())
    assert document["schema"] == "osscar.sweep/6"
    points = document["points"]
    assert len(points) == 11
    assert points[0]["method"] == "dense"
    assert {p["method"] for p in points[1:]} == {MEASURED, *BASELINES}
    assert (out / "report.html").read_text() == sweep_page(document)
    for width in (PHONE, DESK):
        shown = seen(out / "report.html", width)
        assert shown["overflow"] <= 0
        assert [natural > 300 for _, natural, _ in shown["pictures"]] == [True] * 2
        assert not shown["fetched"]
        rows = [line.split("\t") for line in shown["text"].splitlines()]
        for p in points if width == DESK else ():  # on a phone, each cell has a line of its own
            quality, speed = f"{p['quality']['perplexity']:.2f}", f"{p['speedup']:.2f}x"
            (row,) = (
                r for r in rows
                if r[0] == p["method"] and r[1:2] == [f"{100 * p['value']:g}%"]
            )  # fmt: skip
            assert [row[2], *row[4:6]] == [speed, quality, f"{p['divergence']:.4f}"]
            assert row[6] == f"{p['parameters']:,}"
    # What was kept belongs to this text, and to no other.
    text.write_text("another text, in which other words stand in another order. " * 60)
    status, _, err = run(*small_sweep(out, "0.3", text))
    assert status == 2
    assert "scored-sha256 was" in err


@pytest.mark.slow
def test_a_model_on_disk_is_swept_to_the_same_numbers(run, text, tmp_path):
    dense, found = DEMO_DIRECTORY, []
    for name, limit in (("plain", ()), ("streamed", ("--max-memory", "64GB"))):
        asked = ("--calibration", CALIBRATION, "--allocation", "uniform", "--windows", 1, *limit)
        command = list(
            small_sweep(tmp_path / f"{name}-sweep", "0.5", text, *asked, "--json", tmp_path / name)
        )
        command[1] = dense
        status, printed, err = run(*command)
        assert status == 0, err
        assert "uniform at sparsity 0.5: done, 1 of 1" in printed
        content = json.loads((tmp_path / name).read_text())
        timed = ("seconds", "seconds_between", "speedup", "prune_seconds", "stages")
        found.append([{k: v for k, v in p.items() if k not in timed} for p in content["points"]])
    assert found[0] == found[1]
    assert "the same share of every group" in (tmp_path / "plain-sweep" / "report.html").read_text()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("--speedup", "1.2"), "--speedup times"),
        (("--sparsity", "0.5", "--allocation", "uniform", "--recover"), "training needs all"),
    ],
)
def test_a_model_on_disk_is_refused_before_it_is_scored(run, tmp_path, asked, named):
    dense = DEMO_DIRECTORY
    limit = ("--max-memory", "64GB", "--device", "cpu")
    status, _, err = run("sweep", dense, *asked, *limit, "--out", tmp_path / "sweep")
    assert status == 2
    assert named in " ".join(err.split())
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sparsity", "a,b"), "is not a list such as"),
        (("--sparsity", "0.5", "--recover-steps", 4), "--recover-steps is 4 without --recover"),
        (("--sparsity", "0.5", "--recover", "--samples", 1), "1 sample is too few: 1 is held out"),
        (("--sparsity", ","), "needs budgets"),
        (
            ("--size", "0.5"),
            "a sweep goes over one of the budgets; give a list for one of them, such as",
        ),
        (("--sparsity", "0.5,0.6", "--flops", "0.5,0.6"), "--sparsity and --flops: a sweep goes"),
        (("--sparsity", "0.5,1.5"), "sparsity is 1.5; it should be less than 1"),
        (("--images", "pictures"), "reads text, not images"),
        (("--backend", "none"), "none"),
        (("--calibration", "text.txt"), "calibrated or recovered this model"),
    ],
)
def test_what_cannot_be_swept_is_refused(run, text, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*small_sweep(tmp_path / "sweep", "0.5", text, *more))
    assert status == 2
    assert message in err
    assert not (tmp_path / "sweep" / "points").exists()


def grouped_net():
    """A network whose convolutions in groups lose a channel of every group at a time."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 12, 1), nn.Conv2d(12, 12, 3, groups=2), nn.Conv2d(12, 10, 1),
    )  # fmt: skip
    between = [one for layer in layers for one in (layer, nn.ReLU())]
    return nn.Sequential(*between, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)).eval()


NETS = {
    "grouped": (grouped_net, lambda: torch.randn(8, 3, 12, 12)),
    "images": (small_net, lambda: images(8)),
    "heads": (lambda: tiny("llama-gqa"), lambda: tokens(4, 24)),
}


@pytest.mark.parametrize("net", NETS)
def test_every_method_meets_every_budget_and_is_asked_for_the_same(net):
    model, data = (make() for make in NETS[net])
    with prepare_for(model, data, BASE) as prepared:
        curves = random_curves(prepared, BASE)
        for kind, value in ((SPARSITY, 0.3), ("params", 0.8), ("size", 0.8), (FLOPS, 0.7)):
            base = dataclasses.replace(BASE, **{SPARSITY: None, kind: value})
            asked = [
                SweepJob(m, BudgetKind(kind), value).request(base) for m in (*METHODS, "wanda")
            ]
            budgets = [allocate(prepared, request, curves=curves).budget for request in asked]
            assert len({budget.tightest.limit for budget in budgets}) == 1
            assert all(
                0.9 < budget.tightest.reached / budget.tightest.limit <= 1 + 1e-12
                for budget in budgets
            )


def test_a_sweep_from_python_goes_on_and_says_what_each_point_has_spent(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, data, out = grouped_net(), torch.randn(24, 3, 12, 12), tmp_path / "sweep"
    asked = {"baselines": True, "backend": "magnitude", "device": "cpu"}
    document = osscar.sweep(model, data, out, sparsity=[0.4], **asked)
    assert document == json.loads((out / "sweep.json").read_text())
    dense, *points = document["points"]
    assert repr(document) == "SweepResult('Sequential', 6 points over sparsity)"
    assert "magnitude" in document.summary()
    assert document._repr_html_().count("<figure") == len({"divergence"})
    assert (dense["limit"], dense["reached"]) == (None, None)
    assert [p["method"] for p in points] == [MEASURED, *BASELINES]
    page = (out / "report.html").read_text()
    first, *others = (p["stages"].keys() for p in points)
    assert {"open and trace", "trial shrink"} <= first  # is what all of them share
    for p, stages in zip(points, (first, *others), strict=True):
        assert {"calibration passes", "solver and refit", "timing", "other"} <= stages
        assert sum(p["stages"].values()) >= p["prune_seconds"]
        assert p["seconds_between"][0] <= p["seconds"] <= p["seconds_between"][1]
    assert not any("trial shrink" in stages for stages in others)
    for p in points:
        assert p["reached"] == p["parameters"] <= p["limit"] == points[0]["limit"]
        assert f"{p['reached'] / p['limit']:.1%}" in page
    short = 1 - points[-1]["reached"] / points[-1]["limit"]
    told = {"limit": 100.0, "reached": 100 * (1 - short), "dense": 200, "cost": "parameters"}
    ((_, words),) = budget_facts([{**told, "price": 0.0, "assumed": ""}])
    assert words.endswith("at most 100 were asked for")

    monkeypatch.setattr(points_room, "prune_prepared", None)  # what is done is not done again
    assert osscar.sweep(model, data, out, sparsity=(0.4,), **asked) == document
    for other, words in (({"seed": 3}, "seed was 0 and is 3"), ({"damp": 0.1}, "damp was None")):
        with pytest.raises(JournalError, match=words):
            osscar.sweep(model, data, out, sparsity=[0.4], **asked, **other)
    for wrong in ({"out": None}, {"out": out, "score": data}):
        with pytest.raises(OsscarError, match=r"the sweep is None|to score are a Tensor"):
            osscar.sweep(model, data, sparsity=[0.4], **wrong)
    for none in ({"sparsity": 0.4}, {"sparsity": [0.4], "params": [0.5]}, {}):
        with pytest.raises(OptionError, match="a sweep has one list of budgets"):
            osscar.sweep(model, data, out, **none)


def test_each_point_is_scored_in_one_shot_and_recovered(tmp_path):
    model, data, out = small_net(), images(32), tmp_path / "sweep"
    asked = {"sparsity": [0.6], "allocation": "uniform", "backend": "magnitude"}
    asked |= {"device": "cpu", "seed": 3}
    few = osscar.RecoveryRequest(steps=4, learning_rate=1e-3, device="cpu")
    document = osscar.sweep(model, data, out, recover=few, **asked)
    assert json.loads((out / "sweep.json").read_text()) == document
    assert document["recover"] == few.to_json()
    dense, point = document["points"]
    assert dense["recovered"] is None
    alone = recover_as_asked(
        osscar.prune(model, data, **{**asked, "sparsity": 0.6}), model, data, few
    )
    timed = {**point["recovered"], "seconds": alone.seconds}
    assert Recovered(**timed) == Recovered.of(alone, {})
    assert alone.after < alone.before

    assert osscar.sweep(model, data, out, recover=few, **asked) == document
    for other, words in (
        ({}, "recover was True and is None"),
        ({"recover": True}, "recover-learning-rate was 0.001 and is None"),
        ({"recover": dataclasses.replace(few, steps=3)}, "recover-steps was 4 and is 3"),
    ):
        with pytest.raises(JournalError, match=f"another sweep: {words}"):
            osscar.sweep(model, data, out, **other, **asked)


@pytest.mark.parametrize(
    ("recover", "error", "message"),
    [
        (3, OptionError, r"recover is 3; give True, False, or an osscar\.RecoveryRequest"),
        ({"steps": 4}, OptionError, "recover is {'steps': 4}; give True"),
        (osscar.RecoveryRequest(held_out=8), DataError, "8 samples are too few: 8 are held out"),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_before_anything_is_pruned(
    tmp_path, recover, error, message
):
    with pytest.raises(error, match=message):
        osscar.sweep(small_net(), images(8), tmp_path / "a", sparsity=[0.4], recover=recover)
    assert not (tmp_path / "a").exists()


def test_images_are_scored_by_agreement_in_one_shot_and_recovered(run, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels[:20])
    np.savez(tmp_path / "b.npz", images=pixels[20:], labels=np.arange(20) % 5)
    code = tmp_path / "code.py"
    code.write_text(
        "from osscar import Preprocessing\nfrom tests.osscar.networks import images, small_net\n\n"
        "def net():\n    return small_net(), images(2, 16), Preprocessing(mean=0, std=1)\n"
    )
    status, printed, err = run(
        *("sweep", f"{code}:net", "--sparsity", "0.4", "--out", tmp_path / "sweep"),
        *("--calibration", tmp_path / "a.npz", "--images", tmp_path / "b.npz"),
        *("--allocation", "uniform", "--backend", "magnitude", "--device", "cpu"),
        *("--recover", "--recover-steps", 2),
    )
    assert status == 0, err
    document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert undescribed(document) == missing(document) == set()
    dense, pruned = document["points"]
    assert dense["quality"]["agreement"] in (None, 1.0)
    assert 0 <= pruned["quality"]["agreement"] <= 1
    assert 0 <= pruned["quality"]["top1"] <= 1
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "agreement with dense" in page
    assert f"{pruned['quality']['top1']:.2%}" in page
    assert (document["recover"]["steps"], document["recover"]["device"]) == (2, "cpu")
    found = pruned["recovered"]
    assert found["quality"].keys() == pruned["quality"].keys()
    assert (found["quality"] == pruned["quality"]) == (found["kept"] == 0)
    assert recovered_line(found) in " ".join(printed.split())
    assert f"{found['before']:.4f}" in page
    assert f"{found['after']:.4f}" in page
    assert "agreement with dense, recovered" in page


# ---- other budgets -----------------------------------------------------------------------


def shown_sweep(budget, values, dense_parameters=1000):
    points = [
        {
            **{"method": method, "value": value, "parameters": 1000 - 100 * number},
            **{"limit": 800.0 if number else None, "reached": 900.0 - 100 * number},
            **{"parameter_bytes": 40, "flops": 100, "seconds": 0.5, "speedup": 1.0 + number},
            **{
                "seconds_between": [0.4, 0.625],
                "stages": {"calibration passes": 1.5, "other": 0.5},
            },
            **{"quality": {"perplexity": 3.5 + number}, "divergence": 0.1 * number},
            **{"predicted": 0.2, "loss": 0.25, "prune_seconds": 1.0, "widths": {}},
            "recovered": None,
        }
        for number, (method, value) in enumerate(
            [("dense", BudgetKind(budget).dense), *((MEASURED, value) for value in values)]
        )
    ]
    return {
        **{"model": "demo", "calibration": {}, "scored": {}, "settings": {}, "budget": budget},
        **{"shapes": {}, "points": points, "recover": None},
        "skipped": [{"name": "a.b", "kind": "heads", "units": 4, "reason": "a size <in> it"}],
    }


@pytest.mark.parametrize(
    ("budget", "values", "texts", "told"),
    [
        ("sparsity", (0.25, 0.5), ["0%", "25%", "50%"], "with sparsity 50%"),
        ("params", (0.75, 0.5), ["100%", "75%", "50%"], "with params 50%"),
        ("params", (900, 800), ["1,000", "900", "800"], "with params 800"),
        ("size", (0.75, 0.5), ["100%", "75%", "50%"], "with size 50%"),
        ("flops", (0.75, 0.5), ["100%", "75%", "50%"], "with flops 50%"),
        ("speedup", (1.5, 2.0), ["1x", "1.5x", "2x"], "with speedup 2x"),
    ],
)
def test_a_page_tells_what_was_asked_in_its_own_terms(budget, values, texts, told):
    document = shown_sweep(budget, values)
    columns = list(zip(*sweep_table(document).rows, strict=True))
    assert list(columns[1]) == texts
    assert columns[-1] == ("", "100.0%", "87.5%")
    page = sweep_page(document)
    assert "Skipped groups" in page
    assert "a size &lt;in&gt; it" in page
    assert page.count("<figure") == 2
    assert "much was lost" not in page
    assert sweep_verdict(document) == ""
    document["points"][2]["divergence"] = 0.5
    lost = f"{told}: 0.5 nats from the dense model: much was lost: recover"
    assert sweep_verdict(document).startswith(lost)
    document["points"][1]["agreement"] = 0.586
    first, then = sweep_verdict(document), f"much was also lost with {texts[2]}"
    assert first.startswith(f"with {budget} {texts[1]}: 58.6% of likeliest classes agree, 0.1 nats")
    assert first.endswith(then)
    assert then in sweep_page(document)


def recovered_sweep():
    """Two methods at two sparsities, all recovered."""
    document = shown_sweep("sparsity", (0.25, 0.5))
    dense, *points = document["points"]
    others = [
        {**point, "method": "wanda", "quality": {"perplexity": point["quality"]["perplexity"] + 2}}
        for point in points
    ]
    recover = {"quality": {}, "measure": "nats", "kept": 8, "steps": 16, "seconds": 2.0}
    recover |= {"samples": 28, "held_out": 4, "learning_rate": 1e-4}
    for number, point in enumerate((*points, *others)):
        point["recovered"] = {
            **{**recover, "quality": {"perplexity": 3.5 + 0.1 * number}},
            **{"before": 0.5 + number, "after": 0.25 + number},
        }
    others[-1]["recovered"]["kept"] = 0
    return {**document, "points": [dense, *points, *others], "recover": {"steps": 16}}


@pytest.mark.usefixtures("drawn")
def test_a_page_shows_each_method_in_one_shot_and_recovered():
    document = recovered_sweep()
    found = sweep_table(document)
    columns = dict(zip(found.columns, map(list, zip(*found.rows, strict=True)), strict=True))
    columns = {title.removesuffix(" >"): cells for title, cells in columns.items()}
    assert columns["perplexity"] == ["3.50", "4.50", "5.50", "6.50", "7.50"]
    assert columns["perplexity, recovered"] == ["", "3.50", "3.60", "3.70", "3.80"]
    assert columns["held-out divergence, nats"] == ["", "0.5000", "1.5000", "2.5000", "3.5000"]
    assert columns["held-out divergence, nats, recovered"][1:] == [
        "0.2500", "1.2500", "2.2500", "3.2500",
    ]  # fmt: skip
    assert "divergence, nats" not in columns
    assert columns["recovery"][3:] == ["step 8 of 16, 2 s", "none of 16 steps, 2 s"]
    page = sweep_page(document)
    assert "on 28 calibration samples; 4 others trained nothing" in page
    figures = {one.name: one for one in sections(document) if isinstance(one, Figure)}
    assert list(figures) == ["perplexity", "held-out divergence, nats"]
    for name, levels in (
        ("perplexity", ([3.5, 4.5, 5.5], [3.5, 3.5, 3.6], [3.5, 6.5, 7.5], [3.5, 3.7, 3.8])),
        ("held-out divergence, nats", ([0.5, 1.5], [0.25, 1.25], [2.5, 3.5], [2.25, 3.25])),
    ):
        assert "dashed in one shot, solid recovered" in figures[name].caption
        speed, budget = figures[name].draw().axes
        assert (speed.get_xlabel(), budget.get_xlabel()) == (
            "speed, times that of dense",
            "sparsity",
        )
        for axes in (speed, budget):
            lines = axes.lines[:4]
            for line, level, style in zip(lines, levels, ("--", "-", "--", "-"), strict=True):
                assert list(line.get_ydata()) == pytest.approx(level)
                assert line.get_linestyle() == style
            colors = [line.get_color() for line in lines]
            assert colors[0] == colors[1] != colors[2] == colors[3]


def test_a_point_that_exceeds_its_budget_is_marked():
    document = shown_sweep("speedup", (1.5, 2.0))
    document["points"][1]["reached"] = 808.0
    assert [row[-1] for row in sweep_table(document).rows] == ["", "101.0% (over)", "87.5%"]
    assert "101.0% (over)" in sweep_page(document)


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.parametrize(("budget", "measured"), [("flops", "flops"), ("size", "parameter_bytes")])
def test_a_sweep_over_costs_says_what_each_point_came_to(run, text, tmp_path, budget, measured):
    asked = ("sweep", "demo", f"--{budget}", "0.8", "--out", tmp_path / "sweep", "--text", text)
    more = ("--samples", 4, "--seqlen", 32, "--backend", "greedy", "--device", "cpu")
    uniform = ("--allocation", "uniform")
    status, printed, err = run(*asked, *more, *uniform)
    assert status == 0, err
    begun, done = (f"uniform at {budget} 0.8: {word}" for word in ("keeps ", "done, 1 of 1"))
    assert 0 <= printed.find(begun) < printed.find(done)
    assert "budget:" in printed
    document = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    lost = sweep_verdict(document)
    assert [line for line in printed.splitlines() if "verdict" in line] == [
        f"verdict: {lost}"
    ] * bool(lost)
    dense, pruned = document["points"]
    assert 0.5 < pruned["agreement"] < dense["agreement"] == 1
    assert 0.7 * dense[measured] < pruned[measured] <= 0.8 * dense[measured]
    # Points of another budget are another sweep.
    status, _, err = run(*small_sweep(tmp_path / "sweep", "0.3", text, *uniform))
    assert status == 2
    assert f"budget was '{budget}' and is 'sparsity'" in err
