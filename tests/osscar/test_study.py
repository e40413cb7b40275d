"""The optimality-gap study: its records, its arithmetic, its resumption, and what it refuses."""

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import sys

import pytest
import torch

import solvers
from osscar.base.errors import OutputError
from osscar.cli import main
from osscar.study.directory import Store, Study
from osscar.study.page import scores_table, summarize, write_report
from osscar.study.records import (
    WINDOW,
    ProofBasis,
    Record,
    StudyDesign,
    window_layer,
    without_refuted,
)

CERTIFIED = {"perspective", "branch_and_bound", "enumerate"}
EXACT = ("branch_and_bound", "enumerate", "highs")


def problem(units, seed=0, *, width=1, name="layer"):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(units * width, units * width, generator=generator, dtype=torch.float64)
    X = torch.randn(400, units * width, generator=generator, dtype=torch.float64) @ (
        mix / (units * width) ** 0.5 + torch.eye(units * width)
    )
    W0 = torch.randn(units * width, 5, generator=generator, dtype=torch.float64)
    return solvers.SubsetProblem.from_gram(X.T @ X / 400, W0, units=units, keep=units, name=name)


PROBLEMS = (("heads", problem(6, width=2, name="a")), ("neurons", problem(11, 1, name="b")))
DESIGN = StudyDesign(
    sparsities=(0.4,), backends=("magnitude", "local_search", "perspective", *EXACT),
    exact_units=6, window_units=6, windows=2, bound_rounds=2,
)  # fmt: skip
WINDOWS = len(DESIGN.sparsities) * DESIGN.windows
QUICK = StudyDesign(sparsities=(0.5,), backends=("greedy", "enumerate"))


def captured(directory, *problems):
    study = Study(directory, {"problems": [{"file": p.name} for p in problems]})
    study.capture([("units", p) for p in problems])
    return study


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A study that is done, and its records; for tests that change nothing in it."""
    study = Study(tmp_path_factory.mktemp("solved") / "study", {"model": "made up"})
    study.capture(PROBLEMS)
    return study, study.run(DESIGN)


def optimum(instance):
    """The least loss of all supports, by refitting each."""
    return min(
        solvers.refit(instance, torch.tensor(support))[1]
        for support in itertools.combinations(range(instance.units), instance.keep)
    )


# ---- what is solved ----------------------------------------------------------------------


def test_rows_hold_true_optima_and_valid_bounds(solved):
    study, records = solved
    optima = {}
    assert {record.kind for record in records} == {"heads", "neurons", WINDOW}
    assert not [record.error for record in records if record.error]
    for record in records:
        if record.units > 6:
            assert record.backend not in EXACT
            continue
        posed = record.file, record.keep
        if posed not in optima:
            loaded = solvers.SubsetProblem.load(study.directory / record.file)
            optima[posed] = optimum(loaded.with_keep(record.keep))
        best = optima[posed]
        assert record.loss >= best * (1 - 1e-9)
        assert record.lower_bound is None or record.lower_bound <= best * (1 + 1e-9)
        if record.backend in EXACT:
            assert record.status == "OPTIMAL"
            assert record.loss == pytest.approx(best, rel=1e-6)

    incumbents = {
        (r.instance, r.keep): r for r in records if r.kind != WINDOW and r.backend == "local_search"
    }
    windows = [r for r in records if r.kind == WINDOW and r.backend == "enumerate"]
    assert len(windows) == WINDOWS
    for record in windows:  # whose loss is that of the layer, and relative to the window's own
        incumbent = incumbents[window_layer(record.instance)]
        assert record.loss <= incumbent.loss * (1 + 1e-9)
        whole = solvers.SubsetProblem.load(study.directory / incumbent.file)
        assert record.relative_loss != pytest.approx(record.loss / whole.scale)


def test_the_command_of_a_row_solves_it_again(solved, tmp_path, monkeypatch):
    study, records = solved
    chosen = next(r for r in records if r.backend == "branch_and_bound")
    command = shlex.split(chosen.command)
    assert command[0] == "osscar"
    monkeypatch.chdir(study.directory)
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "solve.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    answer = json.loads((tmp_path / "solve.json").read_text())
    assert answer["loss"] == pytest.approx(chosen.loss, rel=1e-9)
    assert answer["support"] == list(chosen.support)


def test_as_many_units_stay_as_are_asked_for_or_as_a_problem_says(tmp_path):
    problems = (problem(3, name="kv"), problem(8, name="said").with_keep(3))
    study = captured(tmp_path / "study", *problems)
    kv, said = study.instances
    assert StudyDesign().keeps(kv) == {2: (0.25,), 1: (0.5, 0.75)}  # as many are one solve
    assert StudyDesign().keeps(said) == {3: (1 - 3 / 8,)}
    design = dataclasses.replace(QUICK, sparsities=(0.1, 0.95))
    assert design.keeps(kv) == {2: (0.1,), 1: (0.95,)}  # one goes, and one stays
    assert design.keeps(said) == {7: (0.1,), 1: (0.95,)}
    study.run(dataclasses.replace(QUICK, sparsities=(0.75,)))
    records = study.run(dataclasses.replace(QUICK, sparsities=(0.5, 0.75)))
    assert [(r.instance, r.keep, r.backend, r.sparsities) for r in records] == [
        *(("kv", 1, name, (0.5, 0.75)) for name in QUICK.backends),
        *(("said", 4, name, (0.5,)) for name in QUICK.backends),
        *(("said", 2, name, (0.75,)) for name in QUICK.backends),
    ]
    assert len(Store(study.directory / "study.sqlite").read("record", Record)) == 6


# ---- what is said of it ------------------------------------------------------------------


def scores_of(summary):
    """How backends did on closed problems, as a table shows it: by kind and backend."""
    return {(kind, backend): more for backend, kind, *more in scores_table(summary).rows}


def record(backend, loss, status="FEASIBLE", bound=None, **more):
    fields = {"instance": "x", "kind": "heads", "file": "f", "units": 9, "width": 1}
    fields |= {"keep": 4, "sparsities": (0.5,)} | more
    return Record(**fields, backend=backend, options={}, status=status, loss=loss,
               relative_loss=loss, lower_bound=bound, seconds=1.0)  # fmt: skip


def test_hits_are_counted_and_a_bound_above_a_known_loss_proves_nothing():
    proved = record("enumerate", 1.0, "OPTIMAL", 1.0)
    summary = summarize([record("greedy", 1.0), proved, record("highs", 1.01, "OPTIMAL", 1.01)])
    assert scores_of(summary)["heads", "greedy"][1:4] == ["1 (100%)", "0.000%", "0.00%"]
    records = [
        record("highs", 0.3, "OPTIMAL", 0.3, proof=ProofBasis.WORD),
        record("enumerate", 0.2, "OPTIMAL", 0.2),
        record("branch_and_bound", 0.3, "TIME_LIMIT", 0.1),
        record("highs", 0.3, "OPTIMAL", 0.3, instance="another"),
    ]
    found = without_refuted(records)
    assert found[1:] == records[1:]
    assert (found[0].loss, found[0].lower_bound, found[0].status) == (0.3, None, "FEASIBLE")
    assert found[0].error == "its bound 0.3 is wrong: a support of loss 0.2 is known"

    summary = summarize([record("greedy", 1.0), record("branch_and_bound", 0.9, "TIME_LIMIT", 0.5)])
    assert not scores_of(summary)
    (case,) = summary.cases
    assert case.gap == pytest.approx(4 / 9)
    assert case.why_open == "branch_and_bound: time limit"


def test_any_name_can_be_reported(tmp_path):
    """It marks up no page."""
    names = ["a" * 300, "$\\oops{$", "[bold]x[/bold] [/oops]", "日本", "<b>&</b>"]
    study = Study(tmp_path / "study", {"model": "<script>alert(1)</script>"})
    study.capture(("units", problem(5, name=name)) for name in names)
    design = StudyDesign(sparsities=(0.5,), backends=("greedy", "perspective"))
    records = study.run(design)
    page = write_report(study, design, records, summarize(records)).read_text()
    assert not re.search("<script>|<b>&", page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    for expected in ("Settings", "why open", "osscar solve problems/"):
        assert expected in page


# ---- proofs ------------------------------------------------------------------------------


def test_it_resumes_without_solving_again(solved, monkeypatch):
    study, before = solved
    monkeypatch.setattr(solvers, "solve", None)  # any solve would fail
    after = Study(study.directory, study.source).run(DESIGN)
    assert after == before
    assert len({record.key for record in after}) == len(after)
    for record in after:
        certified = record.backend in CERTIFIED
        assert (record.certificate != "") == certified
        assert (record.proof is ProofBasis.RECOMPUTED) == certified
        assert (record.proof is ProofBasis.WORD) == (record.backend == "highs")


def test_proofs_are_told_from_the_solvers_word(tmp_path):
    study = captured(tmp_path / "study", problem(8, name="a"))

    def told(*backends):
        records = study.run(dataclasses.replace(QUICK, backends=backends))
        summary = summarize(records)
        (case,) = summary.cases
        return records[-1], case.proof, dict(summary.facts()).get("proofs")

    one, *words = told("highs")
    said = "0 of the proofs were recomputed, 1 are the solver's word"
    assert (one.recomputed_bound, words) == (None, [ProofBasis.WORD, said])
    one, *words = told("highs", "branch_and_bound")
    assert one.recomputed_bound == pytest.approx(one.loss, rel=1e-5)
    assert words == [ProofBasis.RECOMPUTED, "every proof was recomputed from its problem alone"]
    # Of what is open, the same is said of the highest bound.
    assert told("greedy", "perspective")[1] is ProofBasis.RECOMPUTED


def test_what_proves_an_answer_is_a_file_from_which_it_is_verified_again(tmp_path):
    study = captured(tmp_path / "study", problem(12, name="a"))
    (record,) = study.run(dataclasses.replace(QUICK, backends=("branch_and_bound",)))
    posed = solvers.SubsetProblem.load(study.directory / record.file).with_keep(record.keep)
    proof = solvers.load_certificate(study.directory / record.certificate)
    again = solvers.solve(posed, "branch_and_bound", **record.options)
    assert not dataclasses.replace(again, certificate=proof).verify().not_recomputed
    assert proof.bound(posed) == pytest.approx(record.recomputed_bound, rel=1e-9)
    (study.directory / record.certificate).write_bytes((study.directory / record.file).read_bytes())
    with pytest.raises(solvers.ProblemError, match="is not a certificate"):
        solvers.load_certificate(study.directory / record.certificate)


# ---- what goes wrong ---------------------------------------------------------------------


def test_what_went_wrong_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    study = captured(tmp_path / "study", problem(7, name="a"))

    def fail(*arguments, **options):
        raise solvers.VerificationError("no licence today")

    with monkeypatch.context() as patch:
        patch.setattr(solvers, "solve", fail)
        records = study.run(QUICK)
    assert {(record.status, record.loss) for record in records} == {("", None)}
    assert any(record.error == "no licence today" for record in records)

    def full(path, *_):
        raise solvers.ProblemError(f"{path} cannot be written: [Errno 28] No space left on device")

    design = dataclasses.replace(QUICK, backends=("enumerate",))
    with monkeypatch.context() as patch:  # a full disk is no answer of a solver
        patch.setattr("solvers.storage.write", full)
        with pytest.raises(OutputError, match=r"cannot write .*: No space left on device; make"):
            study.run(design)
    assert [record.error for record in study.run(QUICK)] == ["", ""]


@pytest.mark.parametrize("names", [("x y", "x/y"), ("a" * 300, "a" * 299), ("", "problem")])
def test_problems_never_share_a_file_nor_what_is_known_of_it(tmp_path, names):
    for round_ in range(2):  # in one process, under the same names
        problems = [problem(6, 2 * round_ + seed, name=name) for seed, name in enumerate(names)]
        records = captured(tmp_path / "study", *problems).run(QUICK)
        assert len({record.file for record in records}) == 2
        for one in problems:
            (proved,) = (r for r in records if r.instance == one.name and r.backend == "enumerate")
            assert proved.loss == pytest.approx(optimum(one.with_keep(3)), rel=1e-9)
        shutil.rmtree(tmp_path / "study")
