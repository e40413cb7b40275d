"""The optimality-gap study: its records, its arithmetic, its resumption, and what it refuses."""

import csv
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
import shutil
import sys

import pytest
import torch

import osscar
import solvers
from osscar.base.errors import JournalError, OptionError, OutputError
from osscar.cli import main
from osscar.study import jobs as workers
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.page import scores_table, summarize, write_report
from osscar.study.problems import model_problems
from osscar.study.records import WINDOW, ProofBasis, Record, window_layer, without_refuted
from solvers.exact.highs import Highs
from tests.osscar.families import CALIBRATION, tiny

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


PROBLEMS = (("heads", problem(7, width=2, name="a")), ("neurons", problem(20, 1, name="b")))


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "study", {"model": "made up"})
    study.capture(PROBLEMS)
    return study


DESIGN = StudyDesign(
    sparsities=(0.3, 0.6), backends=("magnitude", "local_search", "perspective", *EXACT),
    exact_units=10, window_units=8, windows=2, time_limit=30.0,
)  # fmt: skip


QUICK = StudyDesign(sparsities=(0.5,), backends=("greedy", "enumerate"))


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A study that is done, and its records; for tests that change nothing in it."""
    study = Study(tmp_path_factory.mktemp("solved") / "study", {"model": "made up"})
    study.capture(PROBLEMS)
    return study, study.run(DESIGN)


@pytest.fixture
def done(solved, tmp_path):
    """A copy of it."""
    shutil.copytree(solved[0].directory, tmp_path / "done")
    return Study(tmp_path / "done", solved[0].source)


def optimum(instance):
    """The least loss of all supports, by refitting each."""
    return min(
        solvers.refit(instance, torch.tensor(support))[1]
        for support in itertools.combinations(range(instance.units), instance.keep)
    )


def test_rows_hold_true_optima_and_valid_bounds(solved):
    study, records = solved
    optima = {}
    assert {record.kind for record in records} == {"heads", "neurons", WINDOW}
    assert not [record.error for record in records if record.error]
    for record in records:
        if record.units > 10:
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


def test_a_window_has_the_loss_of_its_layer(solved):
    study, records = solved
    incumbents = {
        (r.instance, r.keep): r for r in records if r.kind != WINDOW and r.backend == "local_search"
    }
    windows = [
        record for record in records if record.kind == WINDOW and record.backend == "enumerate"
    ]
    assert len(windows) == len(DESIGN.sparsities) * DESIGN.windows
    for record in windows:
        incumbent = incumbents[window_layer(record.instance)]
        assert record.loss <= incumbent.loss * (1 + 1e-9)
        whole = solvers.SubsetProblem.load(study.directory / incumbent.file)
        empty = whole.scale
        assert record.relative_loss != pytest.approx(
            record.loss / empty
        )  # relative to the window's own


def scores_of(summary):
    """How backends did on closed problems, as a table shows it: by kind and backend."""
    return {(kind, backend): more for backend, kind, *more in scores_table(summary).rows}


def test_the_summary_counts_hits_and_compares_solvers(solved):
    summary = summarize(solved[1])
    closed = [case for case in summary.cases if case.closed]
    assert all(case.best.units <= 10 for case in closed)
    assert len(closed) == 2 + len(DESIGN.sparsities) * DESIGN.windows
    largest, several = summary.largest_disagreement
    assert several == len(closed)
    assert largest < 1e-4
    scores = scores_of(summary)
    for kind, count in (("heads", 2), (WINDOW, len(DESIGN.sparsities) * DESIGN.windows)):
        assert scores[kind, "enumerate"][:2] == [str(count), f"{count} (100%)"]
        worse, better = (float(scores[kind, b][2][:-1]) for b in ("magnitude", "local_search"))
        assert worse >= better
    still_open = [case for case in summary.cases if not case.closed]
    assert {case.best.instance for case in still_open} == {"b"}
    for case in still_open:
        assert case.gap == pytest.approx(1 - max(0.0, case.bound) / case.loss)
    assert all(0 < case.gap < 1 for case in still_open)
    assert "20 units" in still_open[0].why_open


def record(backend, loss, status="FEASIBLE", bound=None, **more):
    fields = {"instance": "x", "kind": "heads", "file": "f", "units": 9, "width": 1}
    fields |= {"keep": 4, "sparsities": (0.5,)} | more
    return Record(**fields, backend=backend, options={}, status=status, loss=loss,
               relative_loss=loss, lower_bound=bound, seconds=1.0)  # fmt: skip


def test_a_planted_disagreement_is_seen():
    records = [
        record("greedy", 1.0),
        record("enumerate", 1.0, "OPTIMAL", 1.0),
        record("highs", 1.01, "OPTIMAL", 1.01),
    ]
    summary = summarize(records)
    assert summary.largest_disagreement == (pytest.approx(0.01), 1)
    assert dict(summary.facts())["optima"].startswith("at most 1.0e-02 apart")
    assert scores_of(summary)["heads", "greedy"][1:4] == ["1 (100%)", "0.000%", "0.00%"]
    summary = summarize([one for one in records if one.backend == "enumerate"] + [
        record("highs", 1.0, "OPTIMAL", 1.0)
    ])  # fmt: skip
    told = "the same, where two or more exact backends finished (1 problem)"
    assert dict(summary.facts())["optima"] == told


def test_a_bound_above_a_known_loss_proves_nothing():
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


def test_a_problem_is_solved_as_it_says_where_nothing_is_asked(tmp_path):
    said = problem(8, name="said").with_keep(3)
    study = captured(tmp_path / "study", said, problem(8, 1, name="silent"))
    design = StudyDesign(backends=("greedy",))
    keeps = [(record.instance, record.keep) for record in study.run(design)]
    assert keeps == [("said", 3), *(("silent", keep) for keep in (6, 4, 2))]
    asked = study.run(dataclasses.replace(design, sparsities=(0.5,)))
    assert [record.keep for record in asked] == [4, 4]


def test_an_open_case_is_never_counted_as_optimal():
    summary = summarize([record("greedy", 1.0), record("branch_and_bound", 0.9, "TIME_LIMIT", 0.5)])
    assert not scores_of(summary)
    (case,) = summary.cases
    assert case.gap == pytest.approx(4 / 9)
    assert case.why_open == "branch_and_bound: time limit"


def test_what_a_backend_cannot_take_is_a_row_with_its_reason_and_kept(study, monkeypatch):
    design = dataclasses.replace(QUICK, exact_units=40)
    study.run(design)
    monkeypatch.setattr(solvers, "solve", None)  # any solve would fail
    records = study.run(design)
    (refused,) = (record for record in records if record.error)
    assert (refused.instance, refused.backend, refused.loss) == ("b", "enumerate", None)
    assert refused.error == "enumerate takes at most 16 units, and this problem has 20"
    summary = summarize([record for record in records if record.backend == "enumerate"])
    (still_open,) = summary.unanswered
    assert still_open.records == (refused,)
    assert still_open.why_open == f"enumerate: {refused.error}"
    assert dict(summary.facts())["no answer"] == f"b: {still_open.why_open}"


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


def test_it_resumes_without_solving_again(solved, done, monkeypatch):
    before = solved[1]
    monkeypatch.setattr(solvers, "solve", None)  # any solve would fail
    after = done.run(DESIGN)
    assert len({(r.instance, r.keep, r.backend) for r in after}) == len(after) == len(before)
    assert [dataclasses.replace(record, proof=ProofBasis.NONE) for record in after] == [
        dataclasses.replace(record, proof=ProofBasis.NONE) for record in before
    ]
    for record in after:
        certified = record.certificate != ""
        assert (record.proof is ProofBasis.RECOMPUTED) == certified == (record.backend in CERTIFIED)
        assert (record.proof is ProofBasis.RECORDED) == (record.backend == "highs")
    with (done.directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["backend"] for line in lines] == [record.backend for record in before]
    assert float(lines[0]["loss"]) == before[0].loss


def test_more_can_be_asked_of_a_study_later(study):
    first = study.run(StudyDesign(sparsities=(0.5,), backends=("greedy",)))
    more = study.run(StudyDesign(sparsities=(0.5, 0.3), backends=("greedy", "wanda")))
    assert len(first) == 2
    assert len(more) == 8
    assert all(record in more for record in first)


def test_several_processes_give_the_same_rows(solved, study):
    design = dataclasses.replace(DESIGN, backends=("local_search", "perspective", "enumerate"))
    alone = [record for record in solved[1] if record.backend in design.backends]
    together = study.run(design, jobs=2)
    strip = [dataclasses.replace(r, seconds=None, iterations=0) for r in alone]
    assert [dataclasses.replace(r, seconds=None, iterations=0) for r in together] == strip


@pytest.mark.usefixtures("drawn")
def test_the_report_is_one_page_with_everything_in_it(solved):
    study, records = solved
    page = write_report(study, DESIGN, records, summarize(records)).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    for expected in ("Settings", "why open", "osscar solve problems/"):
        assert expected in page
    for name in ("curves", "gaps"):
        assert f'alt="{name}"' in page
        assert (study.directory / f"{name}.svg").stat().st_size > 1000


def test_a_model_is_captured_densely(tmp_path):
    model = tiny("llama-gqa")
    tokens = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = {group.name: p for group, p in model_problems(model, tokens)}
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    heads = [name for name in captured if name.endswith("heads")]
    assert heads
    queries = {
        group.name: p
        for group, p in model_problems(
            model, tokens, query_heads=True, wanted=lambda name: name in heads
        )
    }
    assert set(queries) == set(heads)
    for name in heads:
        assert queries[name].units == model.config.num_attention_heads
        assert torch.equal(queries[name].consumers[0].H, captured[name].consumers[0].H)
    inputs = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    X = inputs[0].reshape(-1, layer.in_features).double()
    H = captured["model.layers.1.mlp.neurons"].consumers[0].H
    expected = X.T @ X / len(X)
    expected.diagonal().mul_(1.01)
    torch.testing.assert_close(H, expected, rtol=1e-5, atol=1e-8)


def test_what_is_no_study_is_refused_and_leaves_nothing(tmp_path):
    study = Study(tmp_path / "study", {})
    one, other = problem(1, name="one"), problem(1, name="other")
    for problems, words in (
        ((problem(4, name="same"), problem(5, name="same")), "two problems are called 'same'"),
        ((one, other), "nothing to choose in one, other: a problem of one unit"),
        ((), "there is no problem to study"),
    ):
        with pytest.raises(JournalError, match=words):
            study.capture(("heads", one) for one in problems)
        assert not study.directory.exists()
    with pytest.raises(JournalError, match="holds no problem yet"):
        study.run(QUICK)
    with pytest.raises(OptionError, match="jobs is"):
        study.run(QUICK, jobs=0)
    assert not study.directory.exists()


def captured(directory, *problems, kind="units"):
    study = Study(directory, {"problems": [{"file": p.name} for p in problems]})
    study.capture([(kind, p) for p in problems])
    return study


@pytest.mark.parametrize("names", [("x y", "x/y"), ("a" * 300, "a" * 299), ("", "problem")])
def test_problems_never_share_a_file(tmp_path, names):
    problems = [problem(8, seed, name=name) for seed, name in enumerate(names)]
    records = captured(tmp_path / "study", *problems).run(QUICK)
    assert len({record.file for record in records}) == 2
    for one in problems:
        (proved,) = (r for r in records if r.instance == one.name and r.backend == "enumerate")
        assert proved.loss == pytest.approx(optimum(one.with_keep(4)), rel=1e-9)


def test_a_problem_that_was_replaced_is_read_again(tmp_path):
    losses = []
    for seed in range(2):  # in one process, under one name
        shutil.rmtree(tmp_path / "study", ignore_errors=True)
        records = captured(tmp_path / "study", problem(8, seed, name="q")).run(QUICK)
        losses.append((records[-1].loss, optimum(problem(8, seed).with_keep(4))))
    for found, best in losses:
        assert found == pytest.approx(best, rel=1e-9)


def test_rows_of_two_problems_are_never_mixed(solved, done):
    extended = dataclasses.replace(DESIGN, backends=(*DESIGN.backends, "wanda"))
    layer = done.instances[0]
    window = next(r for r in solved[1] if r.kind == WINDOW)
    for file, units, name in ((layer.file, 7, layer.name), (window.file, 8, window.instance)):
        path = done.directory / file
        before = path.read_bytes()
        problem(units, 5, width=2 if units == 7 else 1, name=name).save(path)
        with pytest.raises(JournalError, match=re.escape(f"{path} is not the problem that")):
            done.run(extended)
        path.unlink()
        with pytest.raises(JournalError, match=re.escape(f"cannot read the problem file {path}")):
            done.run(extended)
        path.write_bytes(before)
    assert done.run(extended)


def test_a_backend_that_cannot_run_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(Highs, "available", classmethod(lambda cls: "not installed; install it"))
    with pytest.raises(solvers.BackendError, match="'highs' is not available: not installed; inst"):
        StudyDesign(backends=("greedy", "highs"))


def test_what_went_wrong_is_a_row_and_is_tried_again(study, monkeypatch):
    for error in (solvers.BackendError, solvers.VerificationError):

        def fail(*arguments, error=error, **options):
            raise error("no licence today")

        with monkeypatch.context() as patch:
            patch.setattr(solvers, "solve", fail)
            records = study.run(QUICK)
        assert {(record.status, record.loss) for record in records} == {("", None)}
        assert any(record.error == "no licence today" for record in records)
    again = study.run(QUICK)
    assert [record.error for record in again if record.instance == "a"] == ["", ""]


def test_sparsities_that_keep_as_many_are_one_solve(tmp_path):
    study = captured(tmp_path / "study", problem(3, name="kv"))
    study.run(dataclasses.replace(QUICK, sparsities=(0.75,)))
    design = dataclasses.replace(QUICK, sparsities=(0.25, 0.5, 0.75))
    records = study.run(design)
    assert [(r.keep, r.backend, r.sparsities) for r in records] == [
        *((2, name, (0.25,)) for name in QUICK.backends),
        *((1, name, (0.5, 0.75)) for name in QUICK.backends),
    ]
    assert len(list((study.directory / "records").glob("*.json"))) == 4
    summary = summarize(records)
    assert {cells[0] for cells in scores_of(summary).values()} == {"2"}
    page = write_report(study, design, records, summary).read_text()
    assert "50%, 75%" in page
    with (study.directory / "results.csv").open() as file:
        assert [line["sparsities"] for line in csv.DictReader(file)][-1] == "0.5 0.75"


def test_problems_of_one_unit_are_named(tmp_path):
    study = captured(tmp_path / "study", problem(5, name="five"), problem(1, name="lonely"))
    records = study.run(QUICK)
    assert {record.instance for record in records} == {"five"}
    summary = summarize(records, study.trivial)
    assert dict(summary.facts())["nothing to choose"] == "lonely (one unit each)"
    page = write_report(study, QUICK, records, summary).read_text()
    assert "lonely" in page


def index(**change):
    content = {"schema": "osscar.study-problems/1", "captured": [], "windows": []}
    return json.dumps({**content, **change})


INSTANCE = {"name": "p", "kind": "u", "file": "x", "units": 4, "keep": 4, "width": 1, "sha256": "0"}
INDEXES = (
    *("", "{}", index(captured=5), index(captured=[{"x": 1}]), index(schema="another")),
    index(captured=[{**INSTANCE, "file": "../../etc/passwd"}]),
    index(windows=[{**INSTANCE, "name": 5}]),
    index(captured=[{**INSTANCE, "name": "\x1b[31m"}]),
    index(captured=[{**INSTANCE, "units": True}]),
)


def test_a_list_of_problems_that_is_none_is_refused(study):
    for text in INDEXES:
        (study.directory / "problems.json").write_text(text)
        with pytest.raises(JournalError, match=r"problems\.json: .*give another out="):
            study.run(QUICK)
    (study.directory / "study.json").write_text("{}")
    with pytest.raises(JournalError, match=r"study\.json is not the manifest of a study"):
        Study(study.directory, study.source)


def test_rows_that_are_none_are_refused(study):
    study.run(QUICK)
    file, text = edit(study, "greedy")
    good = json.loads(text)
    for change in (
        *({"loss": "abc"}, {"loss": None}, {"support": ["x"]}, {"support": 5}, {"units": True}),
        *({"backend": "nope"}, {"keep": 1}, {"seconds": float("nan")}, {"unknown": 1}),
        *({"support": [10**30]}, {"iterations": 1e300}, {"support": [1e999]}, {"error": "\ud800"}),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(JournalError, match=re.escape(str(file))):
            study.run(QUICK)
    file.write_text("{")
    with pytest.raises(JournalError, match="delete it"):
        study.run(QUICK)


def test_places_that_are_taken_are_named(study):
    (study.directory / "results.csv").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*results.csv"):
        study.run(QUICK)
    (study.directory / "results.csv").rmdir()
    records = study.run(QUICK)
    (study.directory / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report.html"):
        write_report(study, QUICK, records, summarize(records))
    shutil.rmtree(study.directory / "records")
    (study.directory / "records").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*records"):
        study.run(QUICK)
    with pytest.raises(JournalError, match="File name too long"):
        Study(study.directory / ("x" * 300), {})


@pytest.mark.usefixtures("drawn")
def test_any_name_can_be_reported(tmp_path):
    """It marks up no page, moves no figure, and is no formula of a spreadsheet."""
    names = ["a" * 300, "$\\oops{$", "[bold]x[/bold] [/oops]", ":smile:", "日本", "<b>&</b>"]
    names += ["=1+1", "@SUM(1)", "+1", "-1"]
    study = Study(tmp_path / "study", {"model": "<script>alert(1)</script>"})
    study.capture(("units", problem(5, name=name)) for name in names)
    design = StudyDesign(sparsities=(0.5,), backends=("greedy",))
    records = study.run(design)
    page = write_report(study, design, records, summarize(records)).read_text()
    assert "<script>" not in page
    assert "<b>&" not in page
    with (study.directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["instance"] for line in lines] == [
        f"'{name}" if name[0] in "=@+-" else name for name in names
    ]
    assert all(float(line["loss"]) >= 0 for line in lines)


def test_proofs_are_told_from_the_solvers_word(tmp_path):
    study = captured(tmp_path / "study", problem(8, name="p"))
    word = dataclasses.replace(QUICK, backends=("highs",))
    records = study.run(word)
    assert [record.recomputed_bound for record in records] == [None]
    summary = summarize(records)
    assert summary.cases[0].proof == "the solver's word"
    assert (
        "0 of the proofs were recomputed, 1 are the solver's word"
        in dict(summary.facts())["proofs"]
    )
    checked = dataclasses.replace(QUICK, backends=("highs", "branch_and_bound"))
    records = study.run(checked)
    assert records[1].recomputed_bound == pytest.approx(records[1].loss, rel=1e-5)
    summary = summarize(records)
    assert summary.cases[0].proof == "recomputed"
    assert "every proof was recomputed" in dict(summary.facts())["proofs"]
    assert ">recomputed</td>" in write_report(study, checked, records, summary).read_text()
    with (study.directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["recomputed_bound"] == ""
    assert float(lines[1]["recomputed_bound"]) == records[1].recomputed_bound


def edit(study, backend, **change):
    """Change the record of a backend's answer to the first problem; return its file, as it was."""
    for file in (study.directory / "records").glob("*.json"):
        text = file.read_text()
        content = json.loads(text)
        if (content["instance"], content["backend"]) == ("a", backend):
            file.write_text(json.dumps({**content, **change}))
            return file, text
    raise AssertionError(f"no record of {backend}")


LIE = {"loss": 1e-9, "status": "OPTIMAL", "lower_bound": 1e-9, "relative_loss": 1e-9}


def test_what_a_record_claims_is_recomputed_when_a_study_goes_on(study):
    design = dataclasses.replace(QUICK, backends=("greedy", "branch_and_bound"), exact_units=10)
    design = dataclasses.replace(design, sparsities=(0.4,))
    study.run(design)
    for backend, change, words in (
        ("greedy", {**LIE, "support": [0, 0, 99, -5]}, "it keeps (0, 0, 99, -5)"),
        ("greedy", {"support": [4, 5, 6]}, "it keeps (4, 5, 6), not 4 of 7 units"),
        ("greedy", {"support": [3, 4, 5, 6]}, "loss is"),
        ("greedy", {"status": "PERFECT"}, "its status is 'PERFECT'"),
        ("greedy", {"status": "OPTIMAL"}, "optimality is claimed without a bound"),
        ("branch_and_bound", {"lower_bound": 1e3}, "lies above the loss"),
        ("branch_and_bound", {"gap_tolerance": 1e9}, "its gap tolerance is"),
        ("branch_and_bound", {"certificate": "0" * 64}, "not the certificate that its record"),
        ("greedy", LIE, "loss is"),
    ):
        file, good = edit(study, backend, **change)
        with pytest.raises(JournalError, match=re.escape(words)) as caught:
            study.run(design, jobs=2 if change is LIE else 1)
        assert f"{file} is the record of" in str(caught.value)
        assert "delete it" in str(caught.value)
        file.write_text(good)
    file.unlink()
    assert all(not record.error for record in study.run(design))


def test_a_bound_is_that_of_its_certificate_which_is_read_like_any_file(study):
    design = dataclasses.replace(QUICK, backends=("perspective",))
    (first, *_) = study.run(design)
    assert first.recomputed_bound == pytest.approx(first.lower_bound, rel=1e-9)
    record, good = edit(study, "perspective", lower_bound=first.lower_bound * 1.001)
    with pytest.raises(JournalError, match="its certificate proves"):
        study.run(design)
    record.write_text(good)
    file = next((study.directory / "records").glob("*.safetensors"))
    for damage in (b"", b"\0" * 100, b"\xff" * 8):
        file.write_bytes(damage)
        sha256 = hashlib.sha256(damage).hexdigest()
        for record in (study.directory / "records").glob("*.json"):
            content = json.loads(record.read_text())
            record.write_text(json.dumps({**content, "certificate": sha256}))
        with pytest.raises(JournalError, match="certificate"):
            study.run(design)


def test_without_its_certificate_a_proof_is_only_as_recorded(study):
    design = dataclasses.replace(QUICK, backends=("branch_and_bound",), exact_units=10)
    assert "every proof was recomputed" in dict(summarize(study.run(design)).facts())["proofs"]
    edit(study, "branch_and_bound", certificate="")
    summary = summarize(study.run(design))
    assert summary.cases[0].proof is ProofBasis.RECORDED
    assert "0 of the proofs were recomputed, 1 are as recorded" in dict(summary.facts())["proofs"]
    page = write_report(study, design, study.run(design), summary).read_text()
    assert ">as recorded</td>" in page


def test_what_is_optimal_within_windows_is_recomputed_from_their_trees(tmp_path):
    study = captured(tmp_path / "study", problem(20, name="a"))
    design = dataclasses.replace(QUICK, backends=("window_search",))
    records = study.run(design)
    assert any(record.status == "WINDOW_OPTIMAL" for record in records)
    assert study.run(design) == records
    edit(study, "window_search", certificate="", status="WINDOW_OPTIMAL")
    with pytest.raises(JournalError, match="window optimality is claimed without a window"):
        study.run(design)


def test_what_the_bound_of_an_open_case_rests_on_is_said(study):
    design = dataclasses.replace(QUICK, backends=("greedy", "perspective"))
    summary = summarize(study.run(design))
    assert [case.proof for case in summary.cases if not case.closed]
    assert {case.proof for case in summary.cases} == {ProofBasis.RECOMPUTED}
    edit(study, "perspective", certificate="")
    summary = summarize(study.run(design))
    assert {case.best.instance: case.proof for case in summary.cases} == {
        "a": ProofBasis.RECORDED,
        "b": ProofBasis.RECOMPUTED,
    }


def test_jobs_are_as_many_as_cores_and_memory_allow():
    assert 1 <= workers.affordable_jobs(10**6) <= workers.cores()
    assert workers.affordable_jobs(10**15) == 1


def test_honest_bounds_of_a_trained_model_are_never_refused():
    """What rounding may have done weighs most on real activations, whose spectra fall fast."""
    loaded = osscar.load_model("demo", device="cpu")
    windows = osscar.load_calibration(CALIBRATION, loaded.tokenizer, samples=8, seqlen=128)
    of_two = re.compile(r".*layers\.[03]\..*heads").fullmatch
    for _, posed in model_problems(loaded.model, windows, wanted=of_two):
        for keep, backend in ((2, "perspective"), (6, "perspective"), (4, "branch_and_bound")):
            solution = solvers.solve(posed.with_keep(keep), backend)
            report = solution.verify()
            assert report.lower_bound <= solution.loss
            assert solution.lower_bound <= report.lower_bound + report.tolerance


def test_a_full_disk_is_no_answer_of_a_solver(study, monkeypatch):
    def full(path, *_):
        raise solvers.ProblemError(f"{path} cannot be written: [Errno 28] No space left on device")

    monkeypatch.setattr("osscar.study.answers.write", full)
    design = StudyDesign(sparsities=(0.5,), backends=("perspective",))
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device; make room"):
        study.run(design)
    assert not list((study.directory / "records").glob("*.json"))
    monkeypatch.undo()
    assert [record.error for record in study.run(design)] == ["", ""]
