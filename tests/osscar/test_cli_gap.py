"""``osscar gap`` and ``osscar solve`` as a person runs them."""

import json
import os

import pytest
import torch

import solvers
from solvers import storage
from tests.osscar.families import CALIBRATION


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file with a problem, in the directory in which commands are given."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 9, generator=generator, dtype=torch.float64)
    W0 = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 100, W0, keep=5, name="nine")
    problem.save(tmp_path / "nine.safetensors")
    return tmp_path / "nine.safetensors"


def renamed(file, name):
    """The same problem by another name, in a file of its own."""
    header, tensors = storage.read(file)
    storage.write(file.with_name("renamed.safetensors"), {**header, "name": name}, tensors)
    return file.with_name("renamed.safetensors")


def read(file):
    return json.loads(file.read_text())


PROBLEM_FILES = ("--out", "study", "--backends", "greedy,enumerate", "--sparsity", "0.5")


# ---- gap ---------------------------------------------------------------------------------


def test_gap_on_a_model_writes_a_study(run, tiny, tmp_path):
    study, told = tmp_path / "study", tmp_path / "gap.json"
    asked = (
        *("gap", tiny, "--out", study, "--groups", "*layers.0*heads,*layers.1.*heads"),
        *("--sparsity", "0.5", "--backends", "wanda,local_search,perspective,branch_and_bound"),
        *("--calibration", CALIBRATION, "--samples", 8, "--seqlen", 32, "--window-units", 3),
        *("--windows", 1, "--jobs", 1, "--device", "cpu", "--json", told),
    )
    status, out, err = run(*asked)
    assert status == 0, err
    assert "2 of 2 problems are solved to proven optimality" in out
    document = read(told)
    assert document["schema"] == "osscar.gap/2"
    assert {record["kind"] for record in document["records"]} == {"heads", "window"}
    for name in ("report.html", "study.json"):
        assert (study / name).stat().st_size
    assert out.startswith("calibration: 8 windows of 32 tokens of")
    again = run(*asked)
    assert again[0] == 0
    untimed = [[line for line in said.splitlines() if not line.startswith("took ")]
               for said in (out, again[1])]  # fmt: skip
    assert untimed[0] == untimed[1]
    status, _, err = run(*asked[:-4], "--damp", "0.1")
    assert (status, "damp was 0.01 and is 0.1" in err) == (2, True)


# ---- solve -------------------------------------------------------------------------------


def test_solve_shows_loss_bound_and_proof_and_what_was_not_recomputed(run, file, tmp_path):
    asked = ("--backend", "enumerate", "--keep", 4, "--json", "s.json")
    status, out, err = run("solve", file, *asked)
    assert status == 0, err
    assert "keeps 4 of 9 units" in out
    assert "OPTIMAL" in out
    document = read(tmp_path / "s.json")
    assert document["schema"] == "osscar.solve/2"
    assert document["gap"] < 1e-9
    assert len(document["support"]) == 4
    assert document["verification"]["loss"] == document["loss"]
    for options, told in (
        (("enumerate",), "no support has a loss below"),
        (("greedy", "--bound"), "no support has a loss below"),  # for a heuristic
        (("greedy",), ""),
        (("highs",), "claimed by the solver, and not recomputed: lower bound and status"),
    ):
        status, out, err = run("solve", file, "--backend", *options)
        assert status == 0, err
        assert told in out
        assert ("claimed by" in out) == ("highs" in options)
        assert ("no support has a loss below" in out) == bool(told)


# ---- what is refused ---------------------------------------------------------------------

BAD = [
    (("gap", "demo", "--sparsity", "many"), "--sparsity is 'many'"),
    (("gap", "demo", "--backends", "nonsense"), "no backend 'nonsense'"),
    (("gap", "demo-heads-k4", "--samples", "3"), "--samples is 3; omit it: problem files"),
    (("solve", "text.safetensors"), "text.safetensors"),
]


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(run, file, tmp_path):
    (tmp_path / "text.safetensors").write_text("not an archive")
    before = sorted(tmp_path.iterdir())
    for arguments, words in BAD:
        out = ("--out", "study") if arguments[0] == "gap" else ()
        status, _, err = run(*arguments, *out)
        assert (status, words in err) == (2, True), (arguments, err)
        assert len(err.strip().splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before


def test_json_never_replaces_what_is_read_or_written(run, file, tmp_path):
    before = file.read_bytes()
    os.link(file, "hard.safetensors")
    os.symlink(file, "soft.safetensors")
    solve, gap = ("solve", file), ("gap", file, *PROBLEM_FILES)
    for place in (file, f"../{tmp_path.name}/nine.safetensors", "hard.safetensors"):
        status, _, err = run(*solve, "--json", place)
        assert (status, "which the command reads or writes; give another" in err) == (2, True)
    status, _, err = run(*gap, "--json", "soft.safetensors")
    assert (status, "which the command reads or writes; give another" in err) == (2, True)
    status, _, err = run(*gap, "--json", "study/certificates/x.json")
    assert (status, "which the command reads or writes; give another" in err) == (2, True)
    assert file.read_bytes() == before
    assert not (tmp_path / "study").exists()


# ---- names -------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b]0;owned\x07\x1b[2Jname\r", "owned"),
        ("[bold]x[/bold] [/oops] :smile: $x$", "[bold]x[/bold] [/oops] :smile: $x$"),
    ],
)
def test_names_are_shown_as_they_are_and_do_not_steer_the_terminal(run, file, name, shown):
    other = renamed(file, name)
    for command, *more in (("solve",), ("gap", *PROBLEM_FILES)):
        status, out, err = run(command, other, *more)
        assert (status, shown in out + err) == (0, True), err
        assert not {"\x1b", "\x07", "\r"} & set(out + err)
