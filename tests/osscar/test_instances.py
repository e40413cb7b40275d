"""The library of instances: its files, its best known values, and what compares with them."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.official import in_blocks, official
from osscar.base.errors import OptionError, OutputError
from osscar.base.files import file_digest
from osscar.cli.commands import app
from osscar.cli.instances import relative_loss
from osscar.study.answers import load_certificate
from osscar.study.library import CERTIFICATES, DIRECTORY, library
from solvers.storage import read

KNOWN = library()
NAMES = sorted(KNOWN.instances, key=lambda name: KNOWN.sources[KNOWN.instances[name].source].rows)
EASY, OTHER = "demo-heads-k4", "demo-heads-k6"
BEST = KNOWN.instances[EASY].best


@pytest.mark.parametrize(
    "name", [*NAMES[:6], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[6:])]
)
def test_values_are_recomputed_from_problem_support_and_certificate_alone(name):
    problem, best = KNOWN.problem(name), KNOWN.instances[name].best
    assert relative_loss(problem, best.support) == pytest.approx(best.loss, rel=1e-7)
    assert 0 <= best.bound <= best.loss
    if best.certificate:
        path = DIRECTORY / CERTIFICATES / f"{name}.safetensors"
        proof, _ = load_certificate(path)
        assert proof is not None
        assert proof.bound(problem) / problem.scale >= best.bound - 1e-7 * best.loss


def test_the_index_and_the_files_belong_together():
    assert {one.source for one in KNOWN.instances.values()} == set(KNOWN.sources)
    for name, source in KNOWN.sources.items():
        path = DIRECTORY / f"{name}.safetensors"
        assert file_digest(path) == source.sha256
        assert len(read(path)[1]["0.rows"]) == source.units
    assert {path.stem for path in DIRECTORY.glob("*.safetensors")} == set(KNOWN.sources)
    proofs = {path.stem for path in (DIRECTORY / CERTIFICATES).iterdir()}
    assert proofs == {n for n, one in KNOWN.instances.items() if one.best.certificate}
    size = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    assert size < 6_500_000


# ---- commands ------------------------------------------------------------------------------


def test_a_solution_is_compared_with_the_best_known(tmp_path, capsys):
    def check(**changed):
        content = {"instance": EASY, "support": list(BEST.support), "lower_bound": None}
        (tmp_path / "a.json").write_text(json.dumps(content | changed))
        app(["instances", "check", str(tmp_path / "a.json")])
        return capsys.readouterr().out

    assert "as good as the best known, which is proved optimal" in check()
    worse = [unit for unit in range(8) if unit not in BEST.support]
    assert "% above the best known" in check(support=worse)
    for changed, message in (
        ({"support": [0, 1, 2]}, "must name 4 distinct ones from 0 to 7"),
        ({"support": [0, 1, 2, 2]}, "3 of them distinct"),
        ({"support": [0, 1, 2, 8]}, "from 0 to 7"),
        ({"lower_bound": 0.99}, "lower_bound 0.99 is wrong"),
        ({"instance": "none"}, "no instance 'none'"),
    ):
        with pytest.raises(OptionError, match=message):
            check(**changed)


def test_instances_are_listed_and_written_for_any_solver(tmp_path, capsys):
    app(["instances", "list"])
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    app(["instances", "make", EASY, "--out", str(tmp_path)])
    app(["solve", str(tmp_path / f"{EASY}.safetensors"), "--backend", "enumerate"])
    assert "OPTIMAL" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write "):
        app(["instances", "make", EASY, "--out", str(tmp_path / "file")])


def test_a_study_of_instances_tells_of_what_improves(run, tmp_path, monkeypatch):
    worse = dataclasses.replace(BEST, loss=2 * BEST.loss, bound=0.0, proved=False)
    mine = dataclasses.replace(KNOWN.instances[EASY], best=worse)
    changed = dataclasses.replace(KNOWN, instances={EASY: mine, OTHER: KNOWN.instances[OTHER]})
    monkeypatch.setattr("osscar.cli.instances.library", lambda: changed)
    command = ("gap", "demo-heads-k[46]", "--backends", "greedy,enumerate", "--jobs", 1)
    place = tmp_path / "study"
    status, out, err = run(*command, "--out", place, "--json", tmp_path / "gap.json")
    assert status == 0, err
    said = " ".join(out.split())
    assert f"{EASY}: greedy improves the best known value by 50.0000%" in said
    assert f"{EASY}: enumerate proves 0.1116" in said
    assert f"{OTHER}: greedy is as good as the best known, which is proved optimal" in said
    sent = json.loads((place / f"{EASY}.json").read_text())
    assert (sent["support"], sent["by"]) == (list(BEST.support), "greedy and enumerate")
    assert sent["lower_bound"] == pytest.approx(BEST.loss)
    assert not (place / f"{OTHER}.json").exists()
    records = json.loads((tmp_path / "gap.json").read_text())["records"]
    assert {(one["instance"], one["keep"]) for one in records} == {(EASY, 4), (OTHER, 6)}
    assert run(*command, "--out", place)[0] == 0  # it goes on with the solution lying there
    status, _, err = run("gap", OTHER, "--out", place)
    assert (status, "other problems" in err) == (2, True), err


def test_public_code_is_given_blocks_of_rows_and_its_support_is_read_back():
    problem = KNOWN.problem("resnet20-c16-k8")
    (one,) = problem.consumers
    flipped = dataclasses.replace(one, rows=one.rows.flip(0))
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])  # 5 and 11 have no weights, in either order

    def pruned(W, H, G, *asked):
        assert asked == (16, 8, 2)
        assert torch.allclose(H @ W, G)
        found = torch.zeros_like(W).reshape(16, -1)
        found[kept] = W.reshape(16, -1)[kept]
        # Columns first, as what torch solves for may be.
        return found.view(W.shape).T.contiguous().T, 0.0

    code: Any = SimpleNamespace(OSSCAR_fastprune=pruned)
    for posed in (problem, dataclasses.replace(problem, consumers=(flipped,))):
        assert torch.equal(official(code, 2, 0, posed, *in_blocks(posed)), kept)
