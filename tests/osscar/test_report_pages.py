"""What pages of runs, recoveries, sweeps and studies say."""

import json
from dataclasses import replace

import pytest

from osscar.run.prune_page import prune_page, run_facts, verdict
from osscar.study.directory import Study
from osscar.study.page import summarize, write_report
from osscar.study.records import StudyDesign
from tests.solvers.instances import random_problem


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
        (0.1, 0.586, None, "much was lost: 58.6% of most likely tokens agree, 0.1 nats from the"),
        (0.9, 0.5, 0.3, "much was lost: 0.3 nats from the dense model; recover on more data, or"),
    ],
)
def test_much_is_said_to_be_lost_beyond_the_stated_thresholds(
    document, nats, agreement, after, said
):
    recovery = None if after is None else {"distance": {"measure": "nats"}, "after": after}
    found = verdict({**document, "divergence": nats, "agreement": agreement, "recovery": recovery})
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_a_study_begins_with_the_answer_and_ends_with_what_was_asked(tmp_path):
    study = Study(tmp_path / "study", {"model": "a model", "seed": 0})
    posed = [("heads", 6), ("heads", 6), ("neurons", 20), ("neurons", 20)]
    study.capture(
        (kind, replace(random_problem(i, units, 1, 4, units // 2), name=f"layers.{i}.{kind}"))
        for i, (kind, units) in enumerate(posed)
    )
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
