"""The optimality-gap study: its rows, its arithmetic, its resumption, and what it refuses."""

import csv
import dataclasses
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import osscar
import solvers
from osscar.errors import FrozenGroupError, OptionError, StudyError
from osscar.instances import capture_problems
from osscar.report.html import write_report
from osscar.report.summary import summarize
from osscar.rows import WINDOW, Row, window_layer
from osscar.study import Study, StudyDesign
from tests.osscar.families import tiny

EXACT = ("branch_and_bound", "enumerate", "highs")


def problem(units, seed=0, *, width=1, name="layer"):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(units * width, units * width, generator=generator, dtype=torch.float64)
    X = torch.randn(400, units * width, generator=generator, dtype=torch.float64) @ (
        mix / (units * width) ** 0.5 + torch.eye(units * width)
    )
    W0 = torch.randn(units * width, 5, generator=generator, dtype=torch.float64)
    return solvers.SubsetProblem.from_gram(X.T @ X / 400, W0, units=units, keep=units, name=name)


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path / "study", {"model": "made up"})
    study.capture([("heads", problem(7, width=2, name="a")), ("neurons", problem(30, 1, name="b"))])
    return study


DESIGN = StudyDesign(
    sparsities=(0.3, 0.6), backends=("magnitude", "local_search", "perspective", *EXACT),
    exact_units=10, window_units=8, windows=2, time_limit=30.0,
)  # fmt: skip


def optimum(instance):
    """The least loss of all supports, by refitting each."""
    return min(
        solvers.refit(instance, torch.tensor(support))[1]
        for support in itertools.combinations(range(instance.units), instance.keep)
    )


def test_rows_hold_true_optima_and_valid_bounds(study):
    rows = study.run(DESIGN)
    assert {row.kind for row in rows} == {"heads", "neurons", WINDOW}
    assert not [row.error for row in rows if row.error]
    for row in rows:
        if row.units > 10:
            assert row.backend not in EXACT
            continue
        loaded = solvers.SubsetProblem.load(study.directory / row.file).with_keep(row.keep)
        best = optimum(loaded)
        assert row.loss >= best * (1 - 1e-9)
        assert row.lower_bound is None or row.lower_bound <= best * (1 + 1e-9)
        if row.backend in EXACT:
            assert row.status == "OPTIMAL"
            assert row.loss == pytest.approx(best, rel=1e-6)


def test_a_window_has_the_loss_of_its_layer(study):
    rows = study.run(DESIGN)
    incumbents = {
        (r.instance, r.keep): r for r in rows if r.kind != WINDOW and r.backend == "local_search"
    }
    windows = [row for row in rows if row.kind == WINDOW and row.backend == "enumerate"]
    assert len(windows) == len(DESIGN.sparsities) * DESIGN.windows
    for row in windows:
        incumbent = incumbents[window_layer(row.instance)]
        assert row.loss <= incumbent.loss * (1 + 1e-9)
        whole = solvers.SubsetProblem.load(study.directory / incumbent.file)
        empty = whole.scale
        assert row.relative_loss != pytest.approx(row.loss / empty)  # relative to the window's own


def test_the_summary_counts_hits_and_compares_solvers(study):
    summary = summarize(study.run(DESIGN))
    closed = [case for case in summary.cases if case.closed]
    assert all(case.best.units <= 10 for case in closed)
    assert len(closed) == 2 + len(DESIGN.sparsities) * DESIGN.windows
    largest, several = summary.largest_disagreement
    assert several == len(closed)
    assert largest < 1e-4
    scores = {(score.kind, score.backend): score for score in summary.scores}
    for kind, count in (("heads", 2), (WINDOW, len(DESIGN.sparsities) * DESIGN.windows)):
        assert scores[kind, "enumerate"].hits == scores[kind, "enumerate"].cases == count
        assert scores[kind, "magnitude"].mean_excess >= scores[kind, "local_search"].mean_excess
    still_open = [case for case in summary.cases if not case.closed]
    assert {case.best.instance for case in still_open} == {"b"}
    assert all(0 < case.gap < 1 for case in still_open)
    assert "30 units" in still_open[0].why_open


def row(backend, loss, status="FEASIBLE", bound=None, **more):
    fields = {"instance": "x", "kind": "heads", "file": "f", "units": 9, "width": 1}
    fields |= {"keep": 4, "sparsity": 0.5} | more
    return Row(**fields, backend=backend, options={}, status=status, loss=loss,
               relative_loss=loss, lower_bound=bound, seconds=1.0)  # fmt: skip


def test_a_planted_disagreement_is_seen():
    rows = [
        row("greedy", 1.0),
        row("enumerate", 1.0, "OPTIMAL", 1.0),
        row("highs", 1.01, "OPTIMAL", 1.01),
    ]
    summary = summarize(rows)
    assert summary.largest_disagreement == (pytest.approx(0.01), 1)
    assert any("differ by at most 1.0e-02" in sentence for sentence in summary.headline)
    greedy = next(score for score in summary.scores if score.backend == "greedy")
    assert (greedy.hits, greedy.worst_excess) == (1, 0.0)


def test_an_open_case_is_never_counted_as_optimal():
    summary = summarize([row("greedy", 1.0), row("branch_and_bound", 0.9, "TIME_LIMIT", 0.5)])
    assert not summary.scores
    (case,) = summary.cases
    assert case.gap == pytest.approx(4 / 9)
    assert case.why_open == "branch_and_bound: time limit"


def test_what_a_backend_cannot_take_is_a_row_with_its_reason(study):
    design = dataclasses.replace(DESIGN, backends=("enumerate", "local_search"), exact_units=40)
    rows = study.run(design)
    refused = [row for row in rows if row.error]
    assert {(row.instance, row.backend) for row in refused} == {("b", "enumerate")}
    assert all("units" in row.error and row.loss is None for row in refused)
    assert summarize(rows).refused == tuple(refused)


def test_the_command_of_a_row_solves_it_again(study):
    rows = study.run(dataclasses.replace(DESIGN, window_units=None))
    chosen = next(r for r in rows if r.backend == "branch_and_bound")
    command = shlex.split(chosen.command)
    assert command.pop(0) == "osscar"
    ran = subprocess.run(
        [sys.executable, "-m", "osscar", *command, "--json", "solve.json", "--device", "cpu"],
        cwd=study.directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer = json.loads((study.directory / "solve.json").read_text())
    assert answer["loss"] == pytest.approx(chosen.loss, rel=1e-9)
    assert answer["support"] == list(chosen.support)


def test_it_resumes_without_solving_again(study, monkeypatch):
    before = study.run(DESIGN)
    again = Study(study.directory, {"model": "made up"})
    monkeypatch.setattr(solvers, "solve", None)  # any solve would fail
    assert again.run(DESIGN) == before
    with (study.directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["backend"] for line in lines] == [row.backend for row in before]
    assert float(lines[0]["loss"]) == before[0].loss


def test_more_can_be_asked_of_a_study_later(study):
    first = study.run(StudyDesign(sparsities=(0.5,), backends=("greedy",)))
    more = study.run(StudyDesign(sparsities=(0.5, 0.3), backends=("greedy", "wanda")))
    assert len(first) == 2
    assert len(more) == 8
    assert all(row in more for row in first)


def test_several_processes_give_the_same_rows(study, tmp_path):
    alone = study.run(DESIGN)
    other = Study(tmp_path / "other", {"model": "made up"})
    other.capture([("heads", problem(7, width=2, name="a")), ("neurons", problem(30, 1, name="b"))])
    together = other.run(DESIGN, jobs=2)
    strip = [dataclasses.replace(r, seconds=None, iterations=0) for r in alone]
    assert [dataclasses.replace(r, seconds=None, iterations=0) for r in together] == strip


def test_a_killed_study_goes_on(tmp_path):
    for index in range(6):
        problem(16, index, name=f"p{index}").save(tmp_path / f"p{index}.npz")
    files = [str(tmp_path / f"p{index}.npz") for index in range(6)]
    command = [
        *(sys.executable, "-m", "osscar", "gap", *files, "--out", str(tmp_path / "study")),
        *("--backends", "greedy,enumerate", "--sparsity", "0.3,0.5,0.7"),
    ]
    rows = tmp_path / "study" / "rows"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if rows.is_dir() and len(list(rows.glob("*.json"))) >= 5:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file.name: file.read_bytes() for file in rows.glob("*.json")}
    assert len(kept) >= 5
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    after = {file.name: file.read_bytes() for file in rows.glob("*.json")}
    assert len(after) == 6 * 3 * 2
    assert all(after[name] == content for name, content in kept.items())


def test_the_report_is_one_page_with_everything_in_it(study):
    rows = study.run(DESIGN)
    page = write_report(study, DESIGN, rows, summarize(rows)).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    for expected in ("What was asked", "Headline", "could not be closed", "osscar solve problems/"):
        assert expected in page
    for name in ("curves", "gaps", "ratios", "times"):
        assert f'alt="{name}"' in page
        for suffix in (".svg", ".png"):
            assert (study.directory / (name + suffix)).stat().st_size > 1000


def test_the_report_escapes_names(tmp_path):
    study = Study(tmp_path / "study", {"model": "<script>alert(1)</script>"})
    study.capture([("heads", problem(5, name="<b>&</b>"))])
    design = StudyDesign(backends=("greedy",))
    rows = study.run(design)
    page = write_report(study, design, rows, summarize(rows)).read_text()
    assert "<script>" not in page
    assert "<b>&" not in page


def test_a_model_is_captured_densely(tmp_path):
    model = tiny("llama-gqa")
    tokens = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = {group.name: p for group, p in capture_problems(model, tokens)}
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    heads = [name for name in captured if name.endswith("heads")]
    assert heads
    queries = {
        group.name: p
        for group, p in capture_problems(
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
    damping = captured["model.layers.1.mlp.neurons"].consumers[0].damping
    expected = X.T @ X / len(X) + damping * torch.eye(len(H))
    torch.testing.assert_close(H, expected, rtol=1e-5, atol=1e-8)


def test_groups_that_do_not_exist_are_refused():
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(FrozenGroupError, match="osscar inspect"):
        next(capture_problems(tiny("llama-gqa"), tokens, wanted=lambda name: False))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsities": (0.0,)}, "sparsity is 0.0"),
        ({"sparsities": (1.0,)}, "sparsity is 1.0"),
        ({"sparsities": (float("nan"),)}, "sparsity is nan"),
        ({"sparsities": ()}, "at least one"),
        ({"backends": ()}, "at least one"),
        ({"window_units": 1}, "units is 1"),
        ({"windows": 0}, "windows is 0"),
        ({"exact_units": 0}, "exact units 0"),
        ({"time_limit": 0.0}, "time limit is 0"),
        ({"time_limit": float("inf")}, "time limit is inf"),
        ({"gap_tolerance": 1.0}, "gap tolerance is 1.0"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(fields, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        StudyDesign(**fields)


def test_an_unknown_backend_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(solvers.BackendError, match="no backend 'nonsense'"):
        StudyDesign(backends=("nonsense",))


def test_other_problems_in_the_same_directory_are_refused(study):
    with pytest.raises(StudyError, match="model differ"):
        Study(study.directory, {"model": "another"})


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="holds no study"):
        Study(tmp_path, {"model": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(StudyError, match="holds no study"):
        Study(tmp_path / "notes.txt", {"model": "x"})


def test_a_damaged_study_says_so(study):
    study.run(StudyDesign(sparsities=(0.5,), backends=("greedy",)))
    broken = next((study.directory / "rows").glob("*.json"))
    broken.write_text("{")
    with pytest.raises(StudyError, match="delete it"):
        study.run(StudyDesign(sparsities=(0.5,), backends=("greedy",)))


def test_two_problems_of_one_name_are_refused(tmp_path):
    study = Study(tmp_path / "study", {})
    with pytest.raises(StudyError, match="two problems are called 'same'"):
        study.capture([("heads", problem(4, name="same")), ("heads", problem(5, name="same"))])
    assert not study.directory.exists()


def test_jobs_must_be_positive(study):
    with pytest.raises(OptionError, match="jobs is 0"):
        study.run(DESIGN, jobs=0)


def test_everything_lies_in_the_public_package():
    assert osscar.Study is Study
