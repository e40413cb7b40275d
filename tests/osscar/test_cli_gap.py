"""``osscar gap`` and ``osscar solve`` as a person runs them."""

import dataclasses
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

import solvers
from osscar.cli import main
from osscar.walk.gram import damped_by_input
from solvers import storage
from solvers.linalg.symmetric import Symmetric
from tests.osscar.forked import PATIENCE, forked


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 9, generator=generator, dtype=torch.float64)
    W0 = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 100, W0, keep=5, name="nine")
    problem.save(tmp_path / "nine.safetensors")
    return tmp_path / "nine.safetensors"


def untimed(said):
    """Return what is said but for the seconds that it took."""
    return [line for line in said.splitlines() if not line.startswith("took ")]


def test_gap_on_a_model_writes_a_study(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog before night falls. " * 400)
    arguments = (
        *(
            "gap",
            "demo",
            "--out",
            tmp_path / "study",
            "--groups",
            "*layers.0*heads,*layers.1.*heads",
        ),
        *("--sparsity", "0.5", "--backends", "wanda,local_search,perspective,branch_and_bound"),
        *(
            "--calibration",
            text,
            "--samples",
            8,
            "--seqlen",
            64,
            "--window-units",
            6,
            "--windows",
            1,
        ),
        *("--jobs", 1, "--device", "cpu", "--json", tmp_path / "gap.json"),
    )
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "2 of 2 problems are solved to proven optimality" in out
    document = json.loads((tmp_path / "gap.json").read_text())
    assert document["schema"] == "osscar.gap/2"
    assert {record["kind"] for record in document["records"]} == {"heads", "window"}
    for name in ("report.html", "results.csv", "gaps.svg", "study.json"):
        assert (tmp_path / "study" / name).stat().st_size
    again = run(*arguments)
    assert again[0] == 0
    assert out.startswith("calibration: 8 windows of 64 tokens of")
    assert untimed(again[1]) == untimed(out)
    changed = [*arguments[:-4], "--damp", "0.1"]
    status, _, err = run(*changed)
    assert status == 2
    assert "damp was 0.01 and is 0.1" in err


def test_solve_shows_loss_bound_and_proof(run, file, tmp_path):
    status, out, err = run(
        "solve", file, "--backend", "enumerate", "--keep", 4, "--json", tmp_path / "s.json"
    )
    assert status == 0, err
    assert "keeps 4 of 9 units" in out
    assert "OPTIMAL" in out
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["schema"] == "osscar.solve/2"
    assert document["gap"] < 1e-9
    assert len(document["support"]) == 4
    assert document["verification"]["loss"] == document["loss"]


def test_solve_says_what_was_not_recomputed(run, file):
    """A bound without a certificate is the solver's word; the output did not say so."""
    for backend, options in (("enumerate", ()), ("local_search", ()), ("greedy", ("--bound",))):
        status, out, _ = run("solve", file, "--backend", backend, *options)
        assert (status, "word" in out) == (0, False)
        if options:  # a bound for a heuristic
            assert "no support has a loss below" in out
            assert "and the bound" in out
    assert "no support has a loss below" not in run("solve", file, "--backend", "greedy")[1]
    status, out, err = run("solve", file, "--backend", "highs")
    assert status == 0, err
    assert "OPTIMAL" in out
    assert "not recomputed, but the solver's word: lower bound and status" in out


def test_a_problem_says_what_fixed_rows_make_up_for(run, file, tmp_path):
    plain = solvers.SubsetProblem.load(file)
    assert "fixed rows" not in run("solve", file, "--list-problem")[1]
    (consumer,) = plain.consumers
    larger = dataclasses.replace(consumer, scale=4 * consumer.e)
    dataclasses.replace(plain, consumers=(larger,)).save(tmp_path / "joined.safetensors")
    status, out, err = run("solve", tmp_path / "joined.safetensors", "--list-problem")
    assert status == 0, err
    said = f"loses {4 * consumer.e:.6g}, {consumer.e:.6g} once fixed rows make up for it"
    assert said in " ".join(out.split())


def test_list_problem_says_who_takes_it(run, file, tmp_path, monkeypatch):
    status, out, _ = run("solve", file, "--list-problem", "--json", tmp_path / "p.json")
    assert status == 0
    assert "keep 5 of 9 units" in out
    assert "126 supports" in out
    assert all(name in out for name in solvers.backend_names())
    assert json.loads((tmp_path / "p.json").read_text())["consumers"][0]["outputs"] == 4
    monkeypatch.setattr("math.comb", lambda n, k: 10**5000)
    assert "about 10^5000 supports" in run("solve", file, "--list-problem")[1]


def test_solve_asks_how_many_stay_where_a_file_does_not_say(run, tmp_path):
    """Problems of studies keep all of their units, and came out at a loss of 0."""
    problem = solvers.SubsetProblem.from_gram(torch.eye(6, dtype=torch.float64),
                                              torch.ones(6, 2, dtype=torch.float64), keep=6,
                                              name="whole")  # fmt: skip
    file = tmp_path / "whole.safetensors"
    problem.save(file)
    status, out, err = run("solve", file)
    assert (status, out) == (2, "")
    assert "keeps all of its 6 units" in err
    assert "--keep" in err
    for keep in (6, 3):
        status, out, err = run("solve", file, "--keep", keep)
        assert status == 0, err
        assert f"keeps {keep} of 6 units" in out
    status, out, _ = run("solve", file, "--list-problem")
    assert status == 0
    assert "whole: 6 units; how many stay is for --keep to say" in out
    assert "1 support" not in out


def test_list_problem_tells_damping_of_all_inputs_from_that_in_the_matrix(run, tmp_path):
    torch.manual_seed(0)
    X = torch.randn(60, 9, dtype=torch.float64) * torch.arange(1, 10)
    H, W0 = X.T @ X / 60, torch.randn(9, 4, dtype=torch.float64)
    alike = solvers.SubsetProblem.from_gram(H, W0, keep=5, damp=0.1)
    damping = 0.1 * float(H.diagonal().mean())
    units = [[row] for row in range(9)]
    consumer = damped_by_input(Symmetric.of(H), W0, units=units, damp=0.1, positions=60)
    by_input = solvers.SubsetProblem((consumer,), 5)
    alike.save(tmp_path / "alike.safetensors")
    by_input.save(tmp_path / "by-input.safetensors")
    said = run("solve", tmp_path / "alike.safetensors", "--list-problem")[1]
    assert f"damping {damping:.3g} of all inputs alike" in said
    said = run("solve", tmp_path / "by-input.safetensors", "--list-problem")[1]
    assert "damping, if any, is in H, input by input" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gap", "demo", "--sparsity", "many"), "is not a list such as"),
        (("gap", "demo", "--sparsity", "1.5"), "--sparsity is 1.5"),
        (("gap", "demo", "--sparsity", ","), "is not a list such as"),
        (("gap", "demo", "--backends", "nonsense"), "no backend 'nonsense'"),
        (("gap", "demo", "--groups", "nothing*"), "osscar inspect"),
        (("gap", "demo", "--damp", "-1"), "damp"),
        (("gap", "demo", "other"), "give one model, not 2"),
        (("gap", "demo", "demo-heads-k4"), "either one model or problems: 'demo' is neither"),
        (("gap", "demo-heads-k4", "--samples", "3"), "--samples is for models"),
        (("gap", "there-is-no-such-model"), "there-is-no-such-model"),
        (("gap", "demo", "--time-limit", "nan"), "time-limit is nan"),
    ],
)
def test_gap_refuses_bad_input_and_leaves_nothing(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(
        *arguments[:2], "--out", "study", "--samples", 2, "--seqlen", 32, *arguments[2:]
    )
    assert status == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--keep", "0"), "keep is 0"),
        (("--keep", "10"), "keep is 10"),
        (("--backend", "nonsense"), "no backend 'nonsense'"),
        (("--option", "color=red"), "has no option color"),
        *((("--option", f"{name}=1"), f"no option {name}") for name in ("device", "backend")),
        (("--option", "seed"), "is not NAME=VALUE"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_solve_refuses_bad_input(run, file, arguments, words):
    status, _, err = run("solve", file, *arguments)
    assert status == 2
    assert words in err


def test_solve_refuses_files_that_are_no_problem(run, tmp_path):
    (tmp_path / "text.safetensors").write_text("not an archive")
    for name in ("text.safetensors", "missing.safetensors", "text.txt"):
        status, _, err = run("solve", tmp_path / name)
        assert status == 2
        assert name in err


PROBLEM_FILES = ("--out", "study", "--backends", "greedy,enumerate", "--sparsity", "0.5")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cuda"), "--device is for models"),
        (("--groups", "*"), "--groups is for models"),
        (("--query-heads",), "--query-heads is for models"),
        (("missing.safetensors",), "missing.safetensors"),
        (("--ray", "auto", "--jobs", "2"), "--jobs counts processes of this machine, and --ray"),
    ],
)
def test_what_is_not_for_files_of_problems_is_refused(run, file, monkeypatch, options, words):
    monkeypatch.chdir(file.parent)
    status, _, err = run("gap", file, *PROBLEM_FILES, *options)
    assert status == 2
    assert words in err
    assert not (file.parent / "study").exists()


def test_json_never_replaces_what_is_read_or_written(run, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    before = file.read_bytes()
    os.link(file, "hard.safetensors")
    os.symlink(file, "soft.safetensors")
    for place in (
        "nine.safetensors",
        file,
        "../" + file.parent.name + "/nine.safetensors",
        "hard.safetensors",
        "soft.safetensors",
    ):
        for arguments in (("solve", file), ("solve", file, "--list-problem"),
                          ("gap", file, *PROBLEM_FILES)):  # fmt: skip
            status, _, err = run(*arguments, "--json", place)
            assert status == 2
            assert "which the command reads; give another" in err
    for place in ("study", "study/gap.json", "study/records/x.json"):
        status, _, err = run("gap", file, *PROBLEM_FILES, "--json", place)
        assert status == 2
        assert "which the command writes; give another" in err
    assert file.read_bytes() == before
    assert not (file.parent / "study").exists()
    assert run("gap", file, *PROBLEM_FILES, "--json", "gap.json")[0] == 0


def named(file, name, units=9):
    problem = solvers.SubsetProblem.load(file)
    if units == 1:
        H, W0 = torch.eye(1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
        problem = solvers.SubsetProblem.from_gram(H, W0, keep=1)
    other = file.with_name(f"other-{units}.safetensors")
    solvers.SubsetProblem(problem.consumers, problem.keep, name).save(other)
    return other


@pytest.mark.usefixtures("drawn")
def test_names_are_shown_as_they_are(run, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    name = "[bold]x[/bold] [/oops] :smile: $x$"
    other = named(file, name)
    for arguments in (("solve", other), ("solve", other, "--list-problem"),
                      ("gap", other, *PROBLEM_FILES)):  # fmt: skip
        status, out, err = run(*arguments)
        assert status == 0, err
        assert name in out


def test_gap_names_problems_without_a_choice(run, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    lonely = named(file, "lonely", units=1)
    status, out, err = run("gap", file, lonely, *PROBLEM_FILES, "--json", "gap.json")
    assert status == 0, err
    assert "nothing to choose: lonely" in out
    assert json.loads((file.parent / "gap.json").read_text())["trivial"] == ["lonely"]
    status, _, err = run("gap", lonely, "--out", "alone")
    assert status == 2
    assert "nothing to choose in lonely" in err
    assert not (file.parent / "alone").exists()


@pytest.mark.slow
def test_an_interrupted_study_says_how_to_go_on(tmp_path):
    """The study, as a terminal interrupts it: with all processes that it has started."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 56, generator=generator, dtype=torch.float64)
    W0 = torch.randn(56, 4, generator=generator, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 400, W0, keep=28, name="hard")
    problem.save(tmp_path / "hard.safetensors")

    def study():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [
            *("osscar", "gap", "hard.safetensors", "--out", "study", "--jobs", "2"),
            *("--backends", "greedy,branch_and_bound", "--sparsity", "0.4,0.5,0.6"),
            *("--time-limit", "3600"),
        ]
        main()

    process = forked(study, tmp_path)
    end = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("study/records/*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130, process.stderr
    lines = process.stderr.strip().splitlines()
    (line,) = (line for line in lines if not line.startswith("progress: "))  # of a slow machine
    answers = len(list(tmp_path.glob("study/records/*.json")))
    kept = f"1 problem and {answers} answers are kept in study"
    assert line == f"interrupted: {kept}; give the same command again to go on"


def test_the_names_of_problems_do_not_steer_the_terminal(run, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    header, tensors = storage.read(file)
    forged = file.with_name("forged.safetensors")
    storage.write(forged, {**header, "name": "\x1b]0;owned\x07\x1b[2Jname\r"}, tensors)
    for arguments in (("solve", forged), ("solve", forged, "--list-problem"),
                      ("gap", forged, *PROBLEM_FILES)):  # fmt: skip
        status, out, err = run(*arguments)
        assert status == 2
        assert not {"\x1b", "\x07", "\r"} & set(out + err)
        assert "owned" in err


CONVOLUTIONS = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()
"""


def test_a_model_that_reads_images_is_studied_as_well(run, tmp_path):
    (tmp_path / "mine.py").write_text(CONVOLUTIONS)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    status, shown, _ = run(
        "gap", f"{tmp_path / 'mine.py'}:build", "--calibration", tmp_path / "images.npz",
        "--samples", 30, "--sparsity", "0.5", "--backends", "greedy,branch_and_bound",
        "--out", tmp_path / "study", "--jobs", 1, "--no-normalize", "--image-size", "3x12x12",
    )  # fmt: skip
    assert status == 0, shown
    assert "images: RGB, resized to a shorter side of 12 (bilinear)" in shown
    source = json.loads((tmp_path / "study/study.json").read_text())["asked"]
    assert source["preprocessing"]["crop"] == 12
    kinds = {json.loads(f.read_text())["kind"] for f in (tmp_path / "study/records").glob("*.json")}
    assert kinds == {"channels"}
