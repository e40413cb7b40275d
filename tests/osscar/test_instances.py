"""The library of instances: its files, its best known values, and what compares with them."""

from __future__ import annotations

import dataclasses
import json

import pytest

import solvers
from osscar.base.errors import OptionError, OutputError
from osscar.base.files import file_digest
from osscar.cli.commands import app
from osscar.cli.instances import relative_loss
from osscar.study.library import CERTIFICATES, DIRECTORY, library
from solvers.storage import read

KNOWN = library()
NAMES = sorted(KNOWN.instances, key=lambda name: KNOWN.sources[KNOWN.instances[name].source].rows)
EASY = "demo-heads-k4"
BEST = KNOWN.instances[EASY].best


def test_a_gap_is_a_share_of_the_loss():
    best = dataclasses.replace(BEST, loss=0.5, bound=0.4)
    assert best.gap == pytest.approx(0.2)
    assert dataclasses.replace(best, bound=0.6).gap == 0


@pytest.mark.parametrize(
    "name", [*NAMES[:6], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[6:])]
)
def test_values_are_recomputed_from_problem_support_and_certificate_alone(name):
    problem, best = KNOWN.problem(name), KNOWN.instances[name].best
    assert relative_loss(problem, best.support) == pytest.approx(best.loss, rel=1e-7)
    assert 0 <= best.bound <= best.loss
    if best.certificate:
        path = DIRECTORY / CERTIFICATES / f"{name}.safetensors"
        proof = solvers.load_certificate(path)
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
        ({"lower_bound": 0.99}, "lower_bound 0.99 is wrong"),
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
