"""What pages of runs, recoveries, sweeps and studies say."""

import json

import pytest
import torch

import solvers
from osscar.recovery.page import recovery_facts
from osscar.request import BudgetKind
from osscar.run.prune_page import compared_table, prune_page, run_facts, verdict
from osscar.run.sweep_page import sweep_page, sweep_table, sweep_verdict
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.page import summarize, write_report


@pytest.fixture(scope="module")
def document(runs):
    run = runs["opt"]
    return json.loads(json.dumps(run.result.document(run.dense, run.data, source="demo")))


EVIL = "<script>document.title = 'gone'</script>\x1b[31m\u202e{{ 7 * 7 }}<img src=x>"


def test_a_page_shows_its_numbers_and_names_cannot_mark_it_up(document):
    layers = [{**layer, "name": f"{EVIL}.{i}"} for i, layer in enumerate(document["layers"])]
    settings = {**document["settings"], "groups": {EVIL: "3"}, "skip": [EVIL], "backend": EVIL}
    page = prune_page({**document, "model": EVIL, "layers": layers, "settings": settings})
    for layer in document["layers"]:
        assert f"{layer['kept']} of {layer['units']}" in page
        assert f"{layer['relative_loss']:.4f}" in page
    assert f"{document['parameters_after']:,}" in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\\x1b[31m" in page
    assert "{{ 7 * 7 }}" in page


def test_stages_are_those_of_the_whole_run(document):
    stages = document["stages"]
    known = {"open and trace", "trial shrink", "loss curves", "calibration passes"}
    assert known | {"solver and refit"} <= stages.keys()
    assert [*stages][-1] == "other"
    assert sum(stages.values()) == pytest.approx(document["seconds"])
    assert min(stages.values()) >= 0
    longest = max(stages, key=stages.get)
    assert f"s ({longest} {stages[longest]:.1f}, " in dict(run_facts(document))["time"]


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
    found = verdict({**document, "divergence": nats, "agreement": agreement, "recovery": recovery})
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_dense_and_pruned_are_compared_where_both_were_scored(document):
    def measured(perplexity, speed):
        return {
            "sample": "token",
            "quality": {"perplexity": perplexity, "tokens": 9, "windows": 1, "seqlen": 10},
            "speed": {"prefill_tokens_per_second": speed},
            "footprint": {"parameters": 77, "parameter_bytes": 308, "flops": 1e6},
        }

    ratios = {"perplexity": 1.25, "prefill_tokens_per_second": 2.0}
    scored = {"dense": measured(20.0, 1e4), "model": measured(25.0, 2e4), "ratios": ratios}
    rows = compared_table({**document, "evaluation": scored}).rows
    assert ("perplexity", "20.000", "25.000", "1.25x") in rows
    assert ("prefill, tokens/s", "10,000", "20,000", "2.00x") in rows


def test_what_a_recovery_came_to_is_told_as_it_was():
    point = {"step": 0, "rate": 1e-3, "loss": None, "held_out": 0.4, "seconds": 0.0}
    told = recovery_facts(
        {
            "settings": {"steps": 16, "lora": None, "learning_rate": None, "seed": 0},
            "chosen": {
                "lora": 4,
                "micro_batch_size": 4,
                "augment": "none",
                "mixed_precision": "no",
            },
            "data": {"source": "text.txt", "seen": {"count": 2, "least": ""}},
            "distance": {"measure": "nats", "over": "'logits'", "why": "the output has this name"},
            **{"measure": "nats", "kept": 2, "before": 0.4, "after": 0.2, "learning_rate": 1e-4},
            "points": [point, {**point, "step": 2}, {**point, "step": 6, "rate": 1e-4}],
            **{"samples": 9, "held_out": 2, "trained": 1234, "seconds": 2.5},
            "stages": {"recovery: training": 2.0, "other": 0.5},
        }
    )
    said = " ".join(f"{name}: {fact}." for name, fact in told)
    assert "0.4000 nats a prediction from the dense model became 0.2000 on 2 held-out samp" in said
    assert "1,234 weights (adapters, rank 4) on 9 samples" in said
    assert "learning rate: 0.001, lowered to 0.0001 as the held-out loss rose" in said


def problem(units, name, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, units, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(units, units, generator=generator, dtype=torch.float64)
    W0 = torch.randn(units, 4, generator=generator, dtype=torch.float64)
    return solvers.SubsetProblem.from_gram(X.T @ X / 200, W0, keep=units // 2, name=name)


def test_a_study_begins_with_the_answer_and_ends_with_what_was_asked(tmp_path):
    study = Study(tmp_path / "study", {"model": "a model", "seed": 0})
    named = [("heads", problem(6, f"layers.{i}.heads", i)) for i in range(2)]
    study.capture([*named, *(("neurons", problem(20, f"layers.{i}.mlp", i)) for i in (3, 4))])
    backends = ("greedy", "local_search", "perspective", "enumerate")
    design = StudyDesign(sparsities=(0.5,), backends=backends, exact_units=8)
    records = study.run(design, 1)
    summary = summarize(records)
    gaps = sorted(case.gap for case in summary.cases if not case.closed)
    assert len(gaps) == 2
    assert summary.answer == (
        "2 of 4 problems are solved to proven optimality; the gap of the others is at most "
        f"{float(f'{100 * gaps[1]:.2g}'):g}%."
    )
    assert summarize([]).answer == "Nothing was solved: see the reasons below."
    page = write_report(study, design, records, summary).read_text()
    order = (summary.answer, "Best answers", "Every solve", "Settings")
    assert [*order] == sorted(order, key=page.index)
    for number in (sum(gaps) / 2, gaps[1]):
        assert f"{number:.2%}" in page


@pytest.mark.parametrize(
    ("budget", "values", "texts"),
    [
        ("sparsity", (0.25, 0.5), ["0%", "25%", "50%"]),
        ("params", (900, 800), ["1,000", "900", "800"]),
        ("speedup", (1.5, 2.0), ["1x", "1.5x", "2x"]),
    ],
)
def test_a_page_tells_what_was_asked_in_its_own_terms(budget, values, texts):
    points = [
        {
            **{"method": method, "value": value, "parameters": 1000 - 100 * number},
            **{"limit": 800.0 if number else None, "reached": 900.0 - 100 * number},
            **{"parameter_bytes": 40, "flops": 100, "seconds": 0.5, "speedup": 1.0 + number},
            **{"seconds_between": [0.4, 0.625], "stages": {"calibration passes": 1.5}},
            **{"quality": {"perplexity": 3.5 + number}, "divergence": 0.1 * number},
            **{"distance": None, "predicted": 0.2, "loss": 0.25, "prune_seconds": 1.0},
            "widths": {},
        }
        for number, (method, value) in enumerate(
            [("dense", BudgetKind(budget).dense), *(("measured", value) for value in values)]
        )
    ]
    document = {
        **{"model": "demo", "calibration": {}, "scored": {}, "settings": {}, "budget": budget},
        **{"shapes": {}, "points": points},
        "skipped": [{"name": "a.b", "kind": "heads", "units": 4, "reason": "a size <in> it"}],
    }
    columns = list(zip(*sweep_table(document).rows, strict=True))
    assert list(columns[1]) == texts
    assert columns[3] == ("0.80 to 1.25", "1.60 to 2.50", "2.40 to 3.75")
    assert columns[-1] == ("", "100.0%", "87.5%")
    assert "a size &lt;in&gt; it" in sweep_page(document)
    assert sweep_verdict(document) == ""
    points[2]["divergence"], points[1]["reached"] = 0.5, 808.0
    assert [row[-1] for row in sweep_table(document).rows] == ["", "101.0% (over)", "87.5%"]
    told = f"with {budget} {texts[2]}: much was lost: 0.5 nats from the dense model; recover"
    assert sweep_verdict(document).startswith(told)
