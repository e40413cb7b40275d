"""The library of instances: its files, its best known values, and what compares with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
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

NAMES = library().chosen(["*"])
CERTIFIED = [name for name in NAMES if library().instances[name].best.certificate]
SMALL = sorted(NAMES, key=lambda name: library().sources[library().instances[name].source].rows)
EASY = "demo-heads-k4"


def recheck(name: str) -> None:
    """Recompute what the index says, from the problem, the support and the certificate alone."""
    problem, best = library().problem(name), library().instances[name].best
    assert relative_loss(problem, best.support) == pytest.approx(best.loss, rel=1e-7)
    assert 0 <= best.bound <= best.loss
    if best.certificate:
        path = DIRECTORY / CERTIFICATES / f"{name}.safetensors"
        proof, _ = load_certificate(path, best.certificate)
        assert proof is not None
        assert proof.bound(problem) / problem.scale >= best.bound - 1e-7 * best.loss


@pytest.mark.parametrize("name", [n for n in SMALL if n in CERTIFIED][:12])
def test_values_of_a_dozen_small_instances_are_recomputed(name: str) -> None:
    recheck(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_values_of_all_shipped_instances_are_recomputed(name: str) -> None:
    recheck(name)


def test_the_index_and_the_files_belong_together() -> None:
    known = library()
    assert {one.source for one in known.instances.values()} == set(known.sources)
    for name, source in known.sources.items():
        path = DIRECTORY / f"{name}.safetensors"
        assert file_digest(path) == source.sha256
        assert len(read(path)[1]["0.rows"]) == source.units
    assert {path.stem for path in DIRECTORY.glob("*.safetensors")} == set(known.sources)
    proofs = {path.stem for path in (DIRECTORY / CERTIFICATES).iterdir()}
    assert proofs == {n for n, one in known.instances.items() if one.best.certificate}
    size = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    assert size < 6_500_000


def test_several_consumers_and_wide_units_are_among_them() -> None:
    sources = library().sources.values()
    assert any(one.consumers > 1 for one in sources)
    assert any(one.rows > one.units for one in sources)


# ---- commands ------------------------------------------------------------------------------


def solution(path: Path, **changed: object) -> Path:
    best = library().instances[EASY].best
    content = {"instance": EASY, "support": list(best.support), "lower_bound": None, "by": "a test"}
    path.write_text(json.dumps(content | changed))
    return path


def test_a_solution_is_compared_with_the_best_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["instances", "check", str(solution(tmp_path / "a.json"))])
    assert "as good as the best known, which is proved optimal" in capsys.readouterr().out
    worse = [unit for unit in range(8) if unit not in library().instances[EASY].best.support]
    app(["instances", "check", str(solution(tmp_path / "a.json", support=worse))])
    assert "% above the best known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"support": [0, 1, 2]}, "must name 4 distinct ones from 0 to 7"),
        ({"support": [0, 1, 2, 2]}, "3 of them distinct"),
        ({"support": [0, 1, 2, 8]}, "from 0 to 7"),
        ({"lower_bound": 0.99}, "the bound is wrong"),
        ({"instance": "none"}, "no instance 'none'"),
    ],
)
def test_what_is_no_solution_is_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        app(["instances", "check", str(solution(tmp_path / "a.json", **changed))])


def test_an_instance_is_written_for_any_solver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(["instances", "make", EASY, "--out", str(tmp_path)])
    app(["solve", str(tmp_path / f"{EASY}.safetensors"), "--backend", "enumerate"])
    assert "OPTIMAL" in capsys.readouterr().out


def test_the_list_names_every_instance(capsys: pytest.CaptureFixture[str]) -> None:
    app(["instances", "list"])
    said = capsys.readouterr().out
    assert all(name in said for name in library().instances)


def test_a_study_of_instances_tells_of_what_improves(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = library()
    one, other = true.instances[EASY], true.instances["demo-heads-k6"]
    worse = dataclasses.replace(one.best, loss=2 * one.best.loss, bound=0.0, proved=False)
    instances = {EASY: dataclasses.replace(one, best=worse), "demo-heads-k6": other}
    changed = dataclasses.replace(true, instances=instances)
    monkeypatch.setattr("osscar.cli.instances.library", lambda: changed)
    command = ("gap", "demo-heads-k[46]", "--backends", "greedy,enumerate", "--jobs", 1)
    place = tmp_path / "study"
    status, out, err = run(*command, "--out", place, "--json", tmp_path / "gap.json")
    assert status == 0, err
    said = " ".join(out.split())
    assert f"{EASY}: greedy improves the best known value by 50.0000%" in said
    assert f"{EASY}: enumerate proves 0.1116" in said
    assert "demo-heads-k6: greedy is as good as the best known, which is proved optimal" in said
    sent = json.loads((place / f"{EASY}.json").read_text())
    assert (sent["support"], sent["by"]) == (list(one.best.support), "greedy and enumerate")
    assert sent["lower_bound"] == pytest.approx(one.best.loss)
    assert not (place / "demo-heads-k6.json").exists()
    records = json.loads((tmp_path / "gap.json").read_text())["records"]
    assert {(one["instance"], one["keep"]) for one in records} == {(EASY, 4), ("demo-heads-k6", 6)}
    assert run(*command, "--out", place)[0] == 0  # it goes on with the solution lying there
    status, _, err = run("gap", "demo-heads-k6", "--out", place)
    assert (status, "other problems" in err) == (2, True), err


def test_public_code_is_given_blocks_of_rows_and_its_support_is_read_back() -> None:
    problem = library().problem("resnet20-c16-k8")
    (one,) = problem.consumers
    shuffled = dataclasses.replace(
        problem, consumers=(dataclasses.replace(one, rows=one.rows.flip(0)),)
    )
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])  # 5 and 11 have no weights, in either order

    def pruned(W: torch.Tensor, H: torch.Tensor, G: torch.Tensor, *asked: int) -> Any:
        assert asked == (16, 8, 2)
        assert torch.allclose(H @ W, G)
        blocks = W.reshape(16, -1)
        found = torch.zeros_like(blocks)
        found[kept] = blocks[kept]
        # Columns first, as what torch solves for may be.
        return found.view(W.shape).T.contiguous().T, 0.0

    code: Any = SimpleNamespace(OSSCAR_fastprune=pruned)
    for posed in (problem, shuffled):
        assert torch.equal(official(code, 2, 0, posed, *in_blocks(posed)), kept)


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(OutputError, match=r"cannot write "):
            app(["instances", "make", EASY, "--out", str(tmp_path / place)])
