"""Pages of pruning runs and studies as a browser shows them, and what is refused."""

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import pytest
import torch

import osscar
import solvers
from osscar.allocation.measured import dense_reference
from osscar.preparation.prepare import prepare
from osscar.recovery.page import loading_text
from osscar.run.prune_page import prune_page, run_facts, verdict
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.page import summarize, write_report
from tests.osscar.browser import DESK, PHONE, seen, seen_at
from tests.osscar.conftest import lacking
from tests.osscar.families import tiny as tiny_of
from tests.osscar.families import tokens

PROSE = "the quick brown fox jumps over the lazy dog and runs back again before night falls. " * 200


@pytest.fixture(scope="module")
def document(runs):
    run = runs["opt"]
    return json.loads(json.dumps(run.result.document(run.dense, run.data, source="demo")))


def written(tmp_path, document):
    page = tmp_path / "page.html"
    page.write_text(prune_page(document), encoding="utf-8")
    return page


def check_shown(shown, *, pictures):
    """Return the text of a page that fits its window, is drawn whole, and fetches nothing."""
    assert shown["overflow"] <= 0
    assert len(shown["pictures"]) == pictures
    for name, natural, drawn in shown["pictures"]:
        assert name
        assert natural > 300
        assert drawn > 300
    assert not shown["scripts"]
    assert not shown["fetched"]
    return shown["text"]


# ---- of a pruning run --------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_the_page_of_a_run_shows_its_numbers(document, tmp_path):
    on_phone, on_desk = seen_at(written(tmp_path, document), PHONE, DESK)
    assert not on_phone["scrolled"]  # no table is wider than the window
    assert "3 of 6" in check_shown(on_phone, pictures=2)
    check_numbers(document, check_shown(on_desk, pictures=2))


def check_numbers(document, text):
    for number in (document["parameters_before"], document["parameters_after"]):
        assert f"{number:,}" in text
    budget, forward = document["budget"], document["forward"]
    assert f"{budget['limits'][0]['reached']:,.0f}" in text
    for nats in (budget["predicted"], document["divergence"]):
        assert f"{nats:.4f}" in text
    assert f"{1000 * forward['dense']['seconds']:,.1f} ms" in text
    both = sorted(forward[which]["seconds_between"] for which in ("dense", "pruned"))
    speed = f"{forward['dense']['seconds'] / forward['pruned']['seconds']:.2f} times the speed"
    assert (speed in text) == (both[0][1] < both[1][0])  # told where turns differ by less
    for layer in document["layers"]:
        lines = [line for line in text.splitlines() if line.startswith(layer["name"])]
        assert f"{layer['kept']} of {layer['units']}" in lines[-1]
        assert f"{layer['relative_loss']:.4f}" in lines[-1]
        assert "optimal, recomputed" in lines[-1] or "bounded, recomputed" in lines[-1]
    assert text.index("Dense against pruned") < text.index("Loss by layer") < text.index("Settings")
    assert 'model = osscar.load("smaller")' in text
    assert f"likeliest token as dense\t\t{document['agreement']:.1%}" in text
    assert f"exp(divergence)\t1\t{math.exp(document['divergence']):.4g}" in text
    assert "sparsity\t0.6\tasked" in text
    assert "round to\t1\tby default" in text
    rows = [line.split("\t") for line in text.splitlines()]
    for name, seconds in document["stages"].items():
        assert [name, f"{seconds:.1f}"] in [row[:2] for row in rows]


@pytest.mark.usefixtures("drawn")
def test_a_result_shows_itself_in_a_line_in_words_and_in_a_notebook(runs):
    result = runs["opt"].result
    assert repr(result) == (
        f"PruningResult({result.parameters_before:,} -> {result.parameters_after:,} parameters, "
        f"{len(result.layers)} groups smaller; {result.divergence:.4g} nats from dense; "
        f"{result.seconds:.1f} s)"
    )
    first = result.layers[0]
    assert repr(first).startswith(f"LayerReport('{first.name}', {first.kept} of {first.units} ")
    text, html = result.summary(), result._repr_html_()
    for word in (first.name, f"{first.kept} of {first.units}", "parameters became", "measured"):
        assert word in text
        assert word in html
    assert all(line == line.rstrip() for line in text.splitlines())
    assert html.count("<figure") == 2
    assert not re.search(r"<body|<html|<script|src=.(?!data:)", html)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)  # which touches nothing else
    rules = re.findall(r"^ *([^\s@}].*?) \{", style, re.MULTILINE)
    assert rules
    assert all(re.match(r"(body)?\.(osscar|shown)\b", rule) for rule in rules)
    # What names hold neither marks up a page nor moves a terminal.
    evil = dataclasses.replace(first, name="<b>[red]\x1b[31m.0.neurons")
    strange = dataclasses.replace(result, layers=(evil,), budget=None)
    assert "<b>" not in strange._repr_html_()
    assert "<b>[red]\\x1b[31m.0.neurons" in strange.summary()


def test_stages_are_those_of_the_whole_run(document):
    stages = document["stages"]
    assert {
        "open and trace",
        "trial shrink",
        "loss curves",
        "calibration passes",
        "solver and refit",
    } <= stages.keys()
    assert [*stages][-1] == "other"
    assert sum(stages.values()) == pytest.approx(document["seconds"])
    assert min(stages.values()) >= 0
    assert stages["other"] < 0.5 * document["seconds"]
    longest = max(stages, key=stages.get)
    assert f"s ({longest} {stages[longest]:.1f}, " in dict(run_facts(document))["time"]


def test_the_likeliest_prediction_of_a_model_like_the_dense_one_is_the_same():
    model, calibration = tiny_of("opt"), tokens()
    with prepare(model, calibration) as prepared:
        reference = dense_reference(prepared, 2)
        assert reference.likeness(prepared.model) == (pytest.approx(0, abs=1e-9), 1.0)
        bias = torch.zeros(model.config.vocab_size)
        bias[0] = 1e4
        hook = prepared.model.lm_head.register_forward_hook(lambda _, __, logits: logits + bias)
        dense = torch.cat(list(reference.expected))
        share = float((dense.argmax(-1) == 0).double().mean())
        assert reference.likeness(prepared.model).agreement == pytest.approx(share)
        hook.remove()


@pytest.mark.usefixtures("drawn")
def test_what_a_document_does_not_hold_is_left_out(document, tmp_path):
    bare = {**document, "budget": None, "divergence": None, "agreement": None, "held_out": 0}
    bare["forward"] = None
    bare["settings"] = {**document["settings"], "sparsity": None, "heads": "3/4"}
    unbounded = {"lower_bound": None, "relative_bound": None, "gap": None, "bound_from": None}
    unbounded |= {"recomputed_bound": None, "proved_optimal": False}
    bare["layers"] = [{**layer, **unbounded} for layer in document["layers"]]
    text = check_shown(seen(written(tmp_path, bare), PHONE), pictures=1)
    assert "heads\t3/4\tasked" in text or "heads\n3/4" in text
    assert "nats" not in text
    assert "None" not in text
    assert "certificate" not in text


@pytest.mark.usefixtures("drawn")
def test_a_run_in_which_nothing_predicts_still_shows_its_budget(document, tmp_path):
    budget = {**document["budget"], "predicted": None, "lower_bound": None}
    budget |= {"curves": {}, "frontier": {"cost": [], "distance": []}}
    budget["widths"] = {
        name: {**width, "predicted": None} for name, width in budget["widths"].items()
    }
    text = check_shown(seen(written(tmp_path, {**document, "budget": budget}), DESK), pictures=1)
    assert f"at most {budget['limits'][0]['limit']:,.0f} were asked for" in text


@pytest.mark.usefixtures("drawn")
def test_what_was_skipped_fits_the_page_with_its_reason(document, tmp_path):
    line = f"qkv = self.qkv(x).reshape(B, N, 3, {'self.blocks_with_a_long_name.' * 3}num_heads)"
    group = {"name": "blocks.0.attn.heads", "kind": "heads", "units": 4, "reason": line}
    for shown in seen_at(written(tmp_path, {**document, "skipped": [group]}), PHONE, DESK):
        text = check_shown(shown, pictures=2)
        assert text.index("Loss by layer") < text.index("Skipped groups") < text.index("Settings")
        assert "4 heads" in text
        assert line in text


@pytest.mark.parametrize("own_code", [False, True])
def test_the_page_says_how_its_directory_is_loaded_and_what_comes_next(document, own_code):
    page = html.unescape(prune_page({**document, "own_code": own_code}, "mine"))
    assert ('osscar.load("mine", dense=dense)' if own_code else 'osscar.load("mine")') in page
    commands = re.findall(r"osscar (\w+) mine (--.*?)(?:<|\n)", page)
    assert [command for command, _ in commands] == ["eval", "recover", "export"]
    for command, options in commands:
        assert not lacking([command], options)
    recovered = {**document, "recovery": {**document, "recovery": None}}
    assert " recover mine" not in str(loading_text(recovered, "mine", document["calibration"]))


@pytest.mark.parametrize(
    ("nats", "agreement", "after", "said"),
    [
        (0.2, 0.8, None, ""),
        (None, None, None, ""),
        (0.1, 0.586, None, "58.6% of likeliest tokens agree, 0.1 nats from the dense model: much"),
        (0.21, 0.9, None, "90.0% of likeliest tokens agree, 0.21 nats from the dense model: much"),
        (0.9, 0.5, 0.1, ""),
        (0.9, 0.5, 0.3, "0.3 nats from the dense model: much was lost: recover on more data, or"),
    ],
)
def test_much_is_said_to_be_lost_beyond_the_stated_thresholds(
    document, nats, agreement, after, said
):
    recovery = None if after is None else {"measure": "nats", "after": after}
    known = {"divergence": nats, "agreement": agreement, "recovery": recovery}
    found = verdict({**document, **known})
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_sizes_that_a_program_takes_no_others_of_are_a_remark(document):
    given = {"name": "x", "shape": [2, 9, 6], "dtype": "float32", "varies": [0, 1, 2]}
    words = "the exported program takes 9 alone along dimension 1 of x, where the dense model takes"
    assert words in prune_page({**document, "inputs": [{**given, "fixed": [1]}]})
    assert words not in prune_page({**document, "inputs": [{**given, "fixed": []}]})


def test_a_budget_of_time_is_a_share_of_the_dense_time(document):
    limit = {"cost": "time", "dense": 1.0, "limit": 0.5, "reached": 0.51, "price": None}
    limit["assumed"] = ""
    budget = {**document["budget"], "limits": [limit]}
    budget["frontier"] = {"cost": [0.25, 0.5, 1.0], "distance": [2.0, 0.5, 0.0]}
    settings = {**document["settings"], "sparsity": None, "speedup": 2.0}
    page = prune_page({**document, "budget": budget, "settings": settings})
    assert "1.96 times as fast as the dense model on a calibration batch; 2 was asked" in page


@pytest.mark.usefixtures("drawn")
def test_names_cannot_mark_up_a_page_nor_hide_in_it(document, tmp_path):
    evil = "<script>document.title = 'gone'</script>\x1b[31m\u202e{{ 7 * 7 }}<img src=x>"
    layers = [{**layer, "name": f"{evil}.{i}"} for i, layer in enumerate(document["layers"])]
    settings = {**document["settings"], "groups": {evil: "3"}, "skip": [evil], "backend": evil}
    other = {**document, "model": evil, "layers": layers, "settings": settings}
    page = written(tmp_path, other)
    shown = seen(page, PHONE)
    assert shown["title"].startswith("<script>")
    assert not shown["scripts"]
    assert not shown["fetched"]
    assert "\x1b" not in shown["text"]
    assert "\u202e" not in shown["text"]
    assert "\\x1b[31m" in shown["text"]
    assert "{{ 7 * 7 }}" in shown["text"]
    assert shown["overflow"] <= 0


@pytest.mark.usefixtures("drawn")
def test_an_evaluation_is_shown_beside_the_dense_model(document, tmp_path):
    def measured(perplexity, speed):
        return {
            "sample": "token",
            "quality": {"perplexity": perplexity, "tokens": 9, "windows": 1, "seqlen": 10},
            "speed": {"prefill_tokens_per_second": speed, "decode_tokens_per_second": speed / 10},
            "footprint": {"parameters": 77, "parameter_bytes": 308, "flops": 1e6},
        }

    ratios = {"perplexity": 1.25, "prefill_tokens_per_second": 2.0}
    evaluation = {"dense": measured(20.0, 1e4), "model": measured(25.0, 2e4), "ratios": ratios}
    page = written(tmp_path, {**document, "evaluation": evaluation})
    text = seen(page, DESK)["text"]
    assert "perplexity goes from 20.000 to 25.000" in text
    rows = [re.split(r"\t", line) for line in text.splitlines()]
    assert ["perplexity", "20.000", "25.000", "1.25x"] in rows
    assert ["prefill, tokens/s", "10,000", "20,000", "2.00x"] in rows


def small_prune(model, out, text, *more):
    return (
        *("prune", model, "--out", out, "--calibration", text, "--samples", 4, "--seqlen", 32),
        *("--backend", "magnitude", "--neurons", "0.5", "--device", "cpu", *more),
    )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(PROSE)
    return file


def test_prune_writes_a_page_and_replaces_none_of_somebody_elses(run, tiny, text, tmp_path):
    out, elsewhere = tmp_path / "small", tmp_path / "elsewhere.html"
    status, printed, err = run(*small_prune(tiny, out, text, "--report", elsewhere))
    assert status == 0, err
    assert f"report: {out / 'report.html'}" in printed
    page = (out / "report.html").read_text()
    assert elsewhere.read_text() == page
    assert prune_page(json.loads((out / "osscar_report.json").read_text()), "small") == page
    assert "report.html" in json.loads((out / "osscar.json").read_text())["files"]
    # A page that the manifest does not name is somebody's own.
    manifest = json.loads((out / "osscar.json").read_text())
    manifest["files"].remove("report.html")
    (out / "osscar.json").write_text(json.dumps(manifest))
    status, _, err = run(*small_prune(tiny, out, text, "--overwrite"))
    assert status == 2
    assert "report.html" in err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/page.html", "a directory that exists"),
        (".", "cannot write"),
        ("small/page.html", "would write to"),
        ("text.txt", "would write to"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    run, tiny, text, tmp_path, monkeypatch, place, message
):
    def never(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr("osscar.cli.opening.load_model", never)
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*small_prune(tiny, "small", "text.txt", "--report", place))
    assert status == 2
    assert message in err
    assert text.read_text() == PROSE


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that nobody can write")
def test_a_report_that_cannot_be_written_after_all_keeps_the_model(run, tiny, text, tmp_path):
    status, _, err = run(
        *small_prune(tiny, tmp_path / "small", text, "--report", "/proc/page.html")
    )
    assert status == 2
    assert "cannot write /proc/page.html" in err
    assert (tmp_path / "small" / "report.html").is_file()
    assert osscar.load(tmp_path / "small") is not None


# ---- of a study --------------------------------------------------------------------------


def problem(units, name, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, units, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(units, units, generator=generator, dtype=torch.float64)
    W0 = torch.randn(units, 4, generator=generator, dtype=torch.float64)
    return solvers.SubsetProblem.from_gram(X.T @ X / 200, W0, keep=units // 2, name=name)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    study = Study(tmp_path_factory.mktemp("study") / "study", {"model": "a model", "seed": 0})
    named = [("heads", problem(6, f"layers.{i}.heads", i)) for i in range(2)]
    study.capture([*named, ("neurons", problem(30, "layers.0.neurons", 3))])
    backends = ("wanda", "greedy", "local_search", "perspective", "enumerate")
    design = StudyDesign(sparsities=(0.5,), backends=backends, exact_units=8)
    records = study.run(design, 1)
    summary = summarize(records)
    return summary, write_report(study, design, records, summary)


@pytest.mark.usefixtures("drawn")
def test_a_study_begins_with_the_answer_and_ends_with_what_was_asked(study):
    summary, page = study
    assert repr(summary) == f"Summary({summary.answer!r})"
    assert summary.answer in summary.summary()
    assert "Best answers" in summary.summary()
    assert "proved optimal" in summary._repr_html_()
    (still,) = (case for case in summary.cases if not case.closed)
    assert summary.answer == (
        "2 of 3 problems are solved to proven optimality; the gap of the others is at most "
        f"{float(f'{100 * still.gap:.2g}'):g}%."
    )
    on_phone, on_desk = seen_at(page, PHONE, DESK)
    for shown in (on_phone, on_desk):
        text = check_shown(shown, pictures=3)
        assert (
            text.index(summary.answer) < text.index("proved optimal") < text.index("Best answers")
        )
        assert text.index("Every solve") < text.index("Settings")
    assert "a model\tasked" in on_desk["text"]
    assert "processes at once\t1\tasked" in on_desk["text"]
    assert "window units" not in on_desk["text"]
    lines = on_desk["text"].splitlines()
    (heads,) = (line for line in lines if line.startswith("heads\t50%"))
    assert heads.split("\t")[2:4] == ["2", "2"]
    (neurons,) = (line for line in lines if line.startswith("neurons\t50%"))
    assert neurons.split("\t")[2:6] == ["1", "0", f"{still.gap:.2%}", f"{still.gap:.2%}"]


def test_answers_say_how_many_are_proved():
    assert summarize([]).answer == "Nothing was solved: see the reasons below."
