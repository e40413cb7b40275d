"""Pages of runs, recoveries, sweeps and studies as a browser shows them, and what they say."""

import dataclasses
import html
import json
import math
import re

import pytest
import torch

import solvers
from osscar.recovery.page import loading_text, recover_page, recovery_facts, recovery_table
from osscar.report.sections import Figure
from osscar.request import BudgetKind
from osscar.run.prune_page import compared_table, prune_page, run_facts, verdict
from osscar.run.sweep_page import sections, sweep_page, sweep_table, sweep_verdict
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.page import summarize, write_report
from tests.osscar.browser import DESK, PHONE, seen
from tests.osscar.conftest import lacking


@pytest.fixture(scope="module")
def document(runs):
    run = runs["opt"]
    return json.loads(json.dumps(run.result.document(run.dense, run.data, source="demo")))


EVIL = "<script>document.title = 'gone'</script>\x1b[31m\u202e{{ 7 * 7 }}<img src=x>"
SKIPPED = {
    **{"name": "blocks.0.attn.heads", "kind": "heads", "units": 4},
    "reason": f"qkv = self.qkv(x).reshape(B, N, 3, {'self.blocks_with_a_long_name.' * 3}num_heads)",
}


def bare(document):
    """A run of which little is known."""
    known = dict.fromkeys(("budget", "divergence", "agreement", "forward"))
    unbounded = dict.fromkeys(("lower_bound", "relative_bound", "gap", "recomputed_bound"))
    unbounded |= {"bound_from": None, "proved_optimal": False}
    layers = [{**layer, **unbounded} for layer in document["layers"]]
    settings = {**document["settings"], "sparsity": None, "heads": "3/4"}
    known["distance"] = {**document["distance"], "value": None}
    return {**document, **known, "held_out": 0, "layers": layers, "settings": settings}


def evil(document):
    """A run whose names are of a stranger."""
    layers = [{**layer, "name": f"{EVIL}.{i}"} for i, layer in enumerate(document["layers"])]
    settings = {**document["settings"], "groups": {EVIL: "3"}, "skip": [EVIL], "backend": EVIL}
    return {**document, "model": EVIL, "layers": layers, "settings": settings}


POINTS = [
    {"step": 0, "rate": 1e-3, "loss": None, "held_out": 0.4, "seconds": 0.0},
    {"step": 2, "rate": 1e-3, "loss": 0.5, "held_out": 0.2, "seconds": 1.0},
    {"step": 4, "rate": 1e-3, "loss": None, "held_out": None, "seconds": 2.0},
    {"step": 6, "rate": 1e-4, "loss": 0.5, "held_out": 0.3, "seconds": 2.0},
]


def recovered(**changed):
    chosen = {"lora": None, "micro_batch_size": 4, "augment": "none", "mixed_precision": "bf16"}
    recovery = {
        "settings": {"steps": 16, "lora": None, "learning_rate": None, "seed": 0},
        "chosen": chosen,
        "data": {"source": "<b>text</b>.txt", "seen": {"count": 2, "least": ""}},
        "distance": {"measure": "nats", "over": "'logits'", "why": "it is called so"},
        **{"measure": "nats", "points": POINTS, "kept": 2, "before": 0.4, "after": 0.2},
        **{"learning_rate": 1e-4, "samples": 9, "held_out": 2, "trained": 1234, "seconds": 2.5},
        "stages": {"recovery: training": 2.0, "other": 0.5},
    }
    return {
        **{"model": "small", "dense": "large", "parameters": 9876, "own_code": False},
        "computed": {"dtype": "float32", "device": "cpu"},
        **{"recovery": {**recovery, **changed}, "before": None},
    }


def shown_sweep(budget, values):
    points = [
        {
            **{"method": method, "value": value, "parameters": 1000 - 100 * number},
            **{"limit": 800.0 if number else None, "reached": 900.0 - 100 * number},
            **{"parameter_bytes": 40, "flops": 100, "seconds": 0.5, "speedup": 1.0 + number},
            "seconds_between": [0.4, 0.625],
            "stages": {"calibration passes": 1.5, "other": 0.5},
            **{
                "quality": {"perplexity": 3.5 + number},
                "divergence": 0.1 * number,
                "distance": None,
            },
            **{"predicted": 0.2, "loss": 0.25, "prune_seconds": 1.0, "widths": {}},
            "recovered": None,
        }
        for number, (method, value) in enumerate(
            [("dense", BudgetKind(budget).dense), *(("measured", value) for value in values)]
        )
    ]
    return {
        **{"model": "demo", "calibration": {}, "scored": {}, "settings": {}, "budget": budget},
        **{"shapes": {}, "points": points, "recover": None},
        "skipped": [{"name": "a.b", "kind": "heads", "units": 4, "reason": "a size <in> it"}],
    }


def recovered_sweep():
    """Two methods at two sparsities, all recovered."""
    document = shown_sweep("sparsity", (0.25, 0.5))
    dense, *points = document["points"]
    others = [
        {**point, "method": "wanda", "quality": {"perplexity": point["quality"]["perplexity"] + 2}}
        for point in points
    ]
    recover = {"measure": "nats", "kept": 8, "steps": 16, "seconds": 2.0}
    recover |= {"samples": 28, "held_out": 4, "learning_rate": 1e-4}
    for number, point in enumerate((*points, *others)):
        quality = {"perplexity": 3.5 + 0.1 * number}
        distances = {"before": 0.5 + number, "after": 0.25 + number}
        point["recovered"] = {**recover, **distances, "quality": quality}
    others[-1]["recovered"]["kept"] = 0
    return {**document, "points": [dense, *points, *others], "recover": {"steps": 16}}


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
    study.capture([*named, *(("neurons", problem(20, f"layers.{i}.mlp", i)) for i in (3, 4))])
    backends = ("greedy", "local_search", "perspective", "enumerate")
    design = StudyDesign(sparsities=(0.5,), backends=backends, exact_units=8)
    records = study.run(design, 1)
    summary = summarize(records)
    return summary, write_report(study, design, records, summary).read_text()


@pytest.fixture(scope="module")
def shown(document, study, tmp_path_factory):
    """What a browser shows on a phone and on a desk, by name of the page and width."""
    pages = {
        "run": prune_page({**document, "skipped": [SKIPPED]}),
        "bare": prune_page(bare(document)),
        "evil": prune_page(evil(document)),
        "recovery": recover_page(recovered()),
        "sweep": sweep_page(recovered_sweep()),
        "study": study[1],
    }
    return seen(tmp_path_factory.mktemp("pages"), pages, PHONE, DESK)


def test_pages_fit_their_window_are_drawn_whole_and_fetch_nothing(shown):
    pictures = {"run": 1, "bare": 1, "evil": 1, "recovery": 1, "sweep": 1, "study": 1}
    for (name, width), page in shown.items():
        assert page["overflow"] <= 0, (name, width)
        assert len(page["pictures"]) == pictures[name]
        assert all(alt and min(sizes) > 300 for alt, *sizes in page["pictures"])
        assert not page["scripts"]
        assert not page["fetched"]
    assert not shown["run", PHONE]["scrolled"]  # no table is wider than the window


# ---- of a pruning run --------------------------------------------------------------------


def test_the_page_of_a_run_shows_its_numbers(document, shown):
    first = document["layers"][0]
    assert f"{first['kept']} of {first['units']}" in shown["run", PHONE]["text"]
    text = shown["run", DESK]["text"]
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
    order = ("Dense against pruned", "Loss by layer", "Skipped groups", "Settings")
    assert [*order] == sorted(order, key=text.index)
    assert f"4 heads\t{SKIPPED['reason']}" in text
    assert 'model = osscar.load("smaller")' in text
    assert f"same token as dense\t\t{document['agreement']:.1%}" in text
    assert f"exp(divergence)\t1\t{math.exp(document['divergence']):.4g}" in text
    assert "sparsity\t0.6\tasked" in text
    assert "round to\tauto\tby default" in text
    rows = [line.split("\t")[:2] for line in text.splitlines()]
    assert all([name, f"{took:.1f}"] in rows for name, took in document["stages"].items())


def test_what_a_document_does_not_hold_is_left_out(shown):
    text = shown["bare", DESK]["text"]
    assert "heads\t3/4\tasked" in text
    assert not re.search("nats from|None|certificate", text)


def test_names_cannot_mark_up_a_page_nor_hide_in_it(shown):
    page = shown["evil", PHONE]
    assert page["title"].startswith("<script>")
    assert not {"\x1b", "\u202e"} & set(page["text"])
    assert "\\x1b[31m" in page["text"]
    assert "{{ 7 * 7 }}" in page["text"]


@pytest.mark.usefixtures("drawn")
def test_a_result_shows_itself_in_a_line_in_words_and_in_a_notebook(runs):
    result = runs["opt"].result
    assert repr(result) == (
        f"PruningResult({result.parameters_before:,} -> {result.parameters_after:,} parameters, "
        f"{len(result.layers)} groups smaller, form 'eager'; "
        f"{result.divergence:.4g} nats from dense; {result.seconds:.1f} s)"
    )
    first = result.layers[0]
    assert repr(first).startswith(f"LayerReport('{first.name}', {first.kept} of {first.units} ")
    text, html = result.summary(), result._repr_html_()
    for word in (first.name, f"{first.kept} of {first.units}", "parameters became", "measured"):
        assert word in text
        assert word in html
    assert all(line == line.rstrip() for line in text.splitlines())
    assert html.count("<figure") == 1
    assert not re.search(r"<body|<html|<script|src=.(?!data:)", html)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)  # which touches nothing else
    rules = re.findall(r"^ *([^\s@}].*?) \{", style, re.MULTILINE)
    assert rules
    assert all(re.match(r"(body)?\.(osscar|shown)\b", rule) for rule in rules)
    # What names hold moves no terminal either.
    strange = dataclasses.replace(first, name="<b>[red]\x1b[31m.0.neurons")
    strange = dataclasses.replace(result, layers=(strange,), budget=None)
    assert "<b>[red]\\x1b[31m.0.neurons" in strange.summary()


def test_stages_are_those_of_the_whole_run(document):
    stages = document["stages"]
    known = {"open and trace", "trial shrink", "loss curves", "calibration passes"}
    assert known | {"solver and refit"} <= stages.keys()
    assert [*stages][-1] == "other"
    assert sum(stages.values()) == pytest.approx(document["seconds"])
    assert min(stages.values()) >= 0
    assert stages["other"] < 0.5 * document["seconds"]
    longest = max(stages, key=stages.get)
    assert f"s ({longest} {stages[longest]:.1f}, " in dict(run_facts(document))["time"]


@pytest.mark.parametrize("own_code", [False, True])
def test_the_page_says_how_its_directory_is_loaded_and_what_comes_next(document, own_code):
    page = html.unescape(prune_page({**document, "own_code": own_code}, "mine"))
    assert ('osscar.load("mine", dense=dense)' if own_code else 'osscar.load("mine")') in page
    commands = re.findall(r"osscar (\w+) mine (--.*?)(?:<|\n)", page)
    assert [command for command, _ in commands] == ["eval", "recover", "export"]
    assert not any(lacking([command], options) for command, options in commands)
    after = {**document, "recovery": {**document, "recovery": None}}
    assert " recover mine" not in str(loading_text(after, "mine", document["calibration"]))


@pytest.mark.parametrize(
    ("nats", "agreement", "after", "said"),
    [
        (0.2, 0.8, None, ""),
        (None, None, None, ""),
        (0.1, 0.586, None, "much was lost: 58.6% of most likely tokens agree, 0.1 nats from the"),
        (0.21, 0.9, None, "much was lost: 90.0% of most likely tokens agree, 0.21 nats from the"),
        (0.9, 0.5, 0.1, ""),
        (0.9, 0.5, 0.3, "much was lost: 0.3 nats from the dense model; recover on more data, or"),
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


def test_what_few_runs_have_is_told_where_they_have_it(document):
    given = {"name": "x", "shape": [2, 9, 6], "dtype": "float32", "varies": [0, 1, 2]}
    words = "the exported program takes 9 alone along dimension 1 of x, where the dense model takes"
    for fixed in ([1], []):
        told = dict(run_facts({**document, "inputs": [{**given, "fixed": fixed}]}))["inputs"]
        assert (words in told) == bool(fixed)

    limit = {"cost": "time", "dense": 1.0, "limit": 0.5, "reached": 0.51, "price": None}
    budget = {**document["budget"], "limits": [{**limit, "assumed": "a pass by torch"}]}
    told = dict(run_facts({**document, "budget": budget}))["timed"]
    assert told == "1.96 times as fast as the dense model, 2 was asked for: a pass by torch"

    def measured(perplexity, speed):
        return {
            "sample": "token",
            "quality": {"perplexity": perplexity, "tokens": 9, "windows": 1, "seqlen": 10},
            "speed": {"prefill_tokens_per_second": speed},
            "footprint": {"parameters": 77, "parameter_bytes": 308, "flops": 1e6},
        }

    ratios = {"perplexity": 1.25, "prefill_tokens_per_second": 2.0}
    scored = {"dense": measured(20.0, 1e4), "model": measured(25.0, 2e4), "ratios": ratios}
    evaluated = {**document, "evaluation": scored}
    rows = compared_table(evaluated).rows
    assert ("perplexity", "20.000", "25.000", "1.25x") in rows
    assert ("prefill, tokens/s", "10,000", "20,000", "2.00x") in rows
    assert "perplexity goes from 20.000 to 25.000" in prune_page(evaluated)


# ---- of a recovery, and of a study -------------------------------------------------------


def test_the_page_of_a_recovery_shows_its_numbers(shown):
    text = shown["recovery", DESK]["text"]
    for expected in (
        *("small, recovered", "9876", "not finite", "<b>text</b>.txt", "kept: step 2"),
        "0.4000 nats a prediction from the dense model became 0.2000 on 2 held-out samples",
        "1,234 weights on 9 samples, matrix products in bfloat16",
        "learning rate\t0.001, lowered to 0.0001 as the held-out loss rose",
        "after 6 of 16 steps, as the held-out loss rose again and again",
        *("steps\t16\tasked", "seed\t0\tby default", "augment\tnone\tchosen"),
    ):
        assert expected in text


def test_what_a_recovery_came_to_is_told_as_it_was():
    nothing = recovered(kept=0, after=0.4, measure="relative", points=POINTS[:2])["recovery"]
    told = dict(recovery_facts(nothing))
    assert told["recovered"] == (
        "0.4000 of the squared dense outputs from the dense model became 0.4000 on 2 held-out "
        "samples; kept: the weights that it came with; 2.5 s"
    )
    chosen = {"lora": 4, "mixed_precision": "no"}
    given = recovered(settings={"steps": 2}, chosen=chosen, points=POINTS[:2])["recovery"]
    _, *facts = recovery_facts(given)
    products = "matrix products in the format of the weights"
    assert facts == [
        ("distance", "divergence in nats, of 'logits', since it is called so"),
        ("training", f"1,234 weights (adapters, rank 4) on 9 samples, {products}"),
        ("learning rate", "0.001"),
    ]
    close = [{**POINTS[1], "held_out": one} for one in (0.003512, 0.0034897, 3.49e-7, 0.0)]
    held = [row[2] for row in recovery_table({**given, "points": close}).rows]
    assert held == ["100%", "99.37%", "0.009937%", "0%"]


def test_a_study_begins_with_the_answer_and_ends_with_what_was_asked(study, shown):
    summary, _ = study
    assert repr(summary) == f"Summary({summary.answer!r})"
    assert summary.answer in summary.summary()
    assert "Best answers" in summary.summary()
    assert "proved optimal" in summary._repr_html_()
    gaps = sorted(case.gap for case in summary.cases if not case.closed)
    assert len(gaps) == 2
    assert summary.answer == (
        "2 of 4 problems are solved to proven optimality; the gap of the others is at most "
        f"{float(f'{100 * gaps[1]:.2g}'):g}%."
    )
    assert summarize([]).answer == "Nothing was solved: see the reasons below."
    text = shown["study", DESK]["text"]
    order = (summary.answer, "proved optimal", "Best answers", "Every solve", "Settings")
    assert [*order] == sorted(order, key=text.index)
    assert "a model\tasked" in text
    assert "processes at once\t1\tasked" in text
    assert "window units" not in text
    lines = [line.split("\t") for line in text.splitlines()]
    (heads,) = (line for line in lines if line[:2] == ["heads", "50%"])
    (neurons,) = (line for line in lines if line[:2] == ["neurons", "50%"])
    assert heads[2:4] == ["2", "2"]
    assert neurons[2:6] == ["2", "0", f"{sum(gaps) / 2:.2%}", f"{gaps[1]:.2%}"]


# ---- of a sweep -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "values", "texts", "told"),
    [
        ("sparsity", (0.25, 0.5), ["0%", "25%", "50%"], "with sparsity 50%"),
        ("params", (0.75, 0.5), ["100%", "75%", "50%"], "with params 50%"),
        ("params", (900, 800), ["1,000", "900", "800"], "with params 800"),
        ("speedup", (1.5, 2.0), ["1x", "1.5x", "2x"], "with speedup 2x"),
    ],
)
def test_a_page_tells_what_was_asked_in_its_own_terms(budget, values, texts, told):
    document = shown_sweep(budget, values)
    columns = list(zip(*sweep_table(document).rows, strict=True))
    assert list(columns[1]) == texts
    assert columns[3] == ("0.80 to 1.25", "1.60 to 2.50", "2.40 to 3.75")
    assert columns[-1] == ("", "100.0%", "87.5%")
    page = sweep_page(document)
    assert "Skipped groups" in page
    assert "a size &lt;in&gt; it" in page
    assert page.count("<figure") == 1
    assert sweep_verdict(document) == ""
    _, one, two = document["points"]
    two["divergence"], one["reached"] = 0.5, 808.0
    assert [row[-1] for row in sweep_table(document).rows] == ["", "101.0% (over)", "87.5%"]
    lost = f"{told}: much was lost: 0.5 nats from the dense model; recover"
    assert sweep_verdict(document).startswith(lost)
    one["agreement"] = 0.586
    first, then = sweep_verdict(document), f"much was also lost with {texts[2]}"
    assert first.startswith(
        f"with {budget} {texts[1]}: much was lost: 58.6% of most likely classes agree"
    )
    assert first.endswith(then)
    assert then in sweep_page(document)


@pytest.mark.usefixtures("drawn")
def test_a_page_shows_each_method_in_one_shot_and_recovered():
    document = recovered_sweep()
    found = sweep_table(document)
    columns = {
        title.removesuffix(" >"): cells
        for title, *cells in zip(found.columns, *found.rows, strict=True)
    }
    nats = "held-out divergence, nats"
    assert columns["perplexity"] == ["3.50", "4.50", "5.50", "6.50", "7.50"]
    assert columns["perplexity, recovered"] == ["", "3.50", "3.60", "3.70", "3.80"]
    assert columns[nats] == ["", "0.5000", "1.5000", "2.5000", "3.5000"]
    assert columns[f"{nats}, recovered"] == ["", "0.2500", "1.2500", "2.2500", "3.2500"]
    assert "divergence, nats" not in columns
    assert columns["recovery"][3:] == ["step 8 of 16, 2 s", "none of 16 steps, 2 s"]
    assert "on 28 calibration samples; 4 held-out ones choose the step" in sweep_page(document)
    (figure,) = [one for one in sections(document) if isinstance(one, Figure)]
    assert figure.name == "perplexity"
    assert "dashed in one shot, solid recovered" in figure.caption
    (axes,) = figure.draw().axes
    assert axes.get_xlabel() == "speed, times that of dense"
    lines, levels = (
        axes.lines[:4],
        ([3.5, 4.5, 5.5], [3.5, 3.5, 3.6], [3.5, 6.5, 7.5], [3.5, 3.7, 3.8]),
    )
    assert [line.get_linestyle() for line in lines] == ["--", "-", "--", "-"]
    for line, level in zip(lines, levels, strict=True):
        assert list(line.get_ydata()) == pytest.approx(level)
    colors = [line.get_color() for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
