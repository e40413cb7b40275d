"""``osscar gap`` and ``osscar solve`` as a person runs them."""

import json
import sys

import pytest
import torch

import solvers
from osscar.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; return status, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["osscar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 9, generator=generator, dtype=torch.float64)
    W0 = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 100, W0, keep=5, name="nine")
    problem.save(tmp_path / "nine.npz")
    return tmp_path / "nine.npz"


def test_gap_on_a_model_writes_a_study(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog before night falls. " * 400)
    arguments = (
        *("gap", "demo", "--out", tmp_path / "study", "--groups", "*layers.0*,*layers.1.*heads"),
        *("--sparsity", "0.5", "--backends", "wanda,local_search,perspective,branch_and_bound"),
        *("--calibration", text, "--samples", 8, "--seqlen", 64, "--units", 10, "--windows", 1),
        *("--device", "cpu", "--json", tmp_path / "gap.json"),
    )
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "2 of 2 heads problems are solved to proven optimality" in out
    document = json.loads((tmp_path / "gap.json").read_text())
    assert document["schema"] == "osscar.gap/1"
    assert {row["kind"] for row in document["rows"]} == {"heads", "neurons", "window"}
    assert document["headline"]
    for name in ("report.html", "results.csv", "gaps.svg", "gaps.png", "study.json"):
        assert (tmp_path / "study" / name).stat().st_size
    again = run(*arguments)
    assert again[0] == 0
    assert again[1] == out
    changed = [*arguments[:-4], "--damp", "0.1"]
    status, _, err = run(*changed)
    assert status == 2
    assert "damp differ" in err


def test_solve_shows_loss_bound_and_proof(run, file, tmp_path):
    status, out, err = run(
        "solve", file, "--backend", "enumerate", "--keep", 4, "--json", tmp_path / "s.json"
    )
    assert status == 0, err
    assert "keeps 4 of 9 units" in out
    assert "OPTIMAL" in out
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["schema"] == "osscar.solve/1"
    assert document["gap"] < 1e-9
    assert len(document["support"]) == 4
    assert document["verification"]["loss"] == document["loss"]


def test_solve_adds_a_bound_to_a_heuristic(run, file):
    status, out, _ = run("solve", file, "--backend", "greedy", "--bound")
    assert status == 0
    assert "no support has a loss below" in out
    assert "and the bound" in out
    status, out, _ = run("solve", file, "--backend", "greedy")
    assert "no support has a loss below" not in out


def test_list_problem_says_who_takes_it(run, file, tmp_path):
    status, out, _ = run("solve", file, "--list-problem", "--json", tmp_path / "p.json")
    assert status == 0
    assert "keep 5 of 9 units" in out
    assert "126 supports" in out
    assert all(name in out for name in solvers.backend_names())
    assert json.loads((tmp_path / "p.json").read_text())["consumers"][0]["outputs"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gap", "demo", "--sparsity", "many"), "is not a list such as"),
        (("gap", "demo", "--sparsity", "1.5"), "sparsity is 1.5"),
        (("gap", "demo", "--backends", "nonsense"), "no backend 'nonsense'"),
        (("gap", "demo", "--groups", "nothing*"), "osscar inspect"),
        (("gap", "demo", "--damp", "-1"), "damp"),
        (("gap", "demo", "other"), "give one model, not 2"),
        (("gap", "demo", "nine.npz"), "either one model or problem files"),
        (("gap", "missing.npz"), "missing.npz"),
        (("gap", "there-is-no-such-model"), "there-is-no-such-model"),
        (("gap", "demo", "--time-limit", "nan"), "time limit is nan"),
    ],
)
def test_gap_refuses_bad_input_and_leaves_nothing(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments, "--out", "study", "--samples", 2, "--seqlen", 32)
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
        (("--option", "seed"), "is not NAME=VALUE"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_solve_refuses_bad_input(run, file, arguments, words):
    status, _, err = run("solve", file, *arguments)
    assert status == 2
    assert words in err


def test_solve_refuses_files_that_are_no_problem(run, tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("text.npz", "missing.npz", "text.txt"):
        status, _, err = run("solve", tmp_path / name)
        assert status == 2
        assert name in err
