"""The library of instances: its files, its best known values, and what compares with them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import osscar.study.library as room
import solvers
from benchmarks.instances import PAGE, instance_rows, source_rows
from benchmarks.official import in_blocks, official
from osscar.base.errors import FileError, JournalError, OptionError, OutputError
from osscar.cli.commands import app
from osscar.cli.instances import relative_loss
from osscar.models.load import load_model
from osscar.study.answers import load_certificate
from osscar.study.library import (
    CERTIFICATES,
    DIRECTORY,
    Best,
    Library,
    Recipe,
    exact_gram,
    library,
    made,
    source_digest,
)
from osscar.study.race import (
    anytime,
    best_known,
    better,
    limited,
    on_its_word,
    profile,
    proved,
    race,
    race_study,
    times,
    without_refuted,
)
from osscar.study.records import ProofBasis, Record
from solvers import Solution, SubsetProblem, VerificationError, solve
from solvers.storage import read

SHIPPED = library().matching((), shipped=True)
CERTIFIED = [name for name in SHIPPED if library().instances[name].best.certificate]
SMALL = sorted(SHIPPED, key=lambda name: library().sources[library().instances[name].source].rows)
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
@pytest.mark.parametrize("name", SHIPPED)
def test_values_of_all_shipped_instances_are_recomputed(name: str) -> None:
    recheck(name)


def test_the_index_and_the_files_belong_together() -> None:
    known = library()
    assert {one.source for one in known.instances.values()} == set(known.sources)
    shipped = {name for name, source in known.sources.items() if source.recipe is None}
    for name in shipped:
        header, tensors = read(DIRECTORY / f"{name}.safetensors")
        assert source_digest(header, tensors) == known.sources[name].sha256
        assert len(tensors["0.rows"]) == known.sources[name].units
    files = {path.stem for path in DIRECTORY.glob("*.safetensors")}
    assert files == shipped
    proofs = {path.stem for path in (DIRECTORY / CERTIFICATES).iterdir()}
    assert proofs == {n for n, one in known.instances.items() if one.best.certificate}
    size = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    assert size < 5_000_000


def test_the_page_has_what_the_index_has() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for row in (*instance_rows(library()), *source_rows(library())):
        assert row in text


def test_several_consumers_and_wide_units_are_among_them() -> None:
    sources = library().sources.values()
    assert any(one.consumers > 1 for one in sources)
    assert any(one.rows > one.units for one in sources)
    assert any(one.recipe is not None for one in sources)


# ---- recipes -------------------------------------------------------------------------------


def test_gram_matrices_do_not_depend_on_the_order_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, 7, generator=generator, dtype=torch.float64) * torch.logspace(-9, 3, 7)
    X[:, 3] = 0
    H = exact_gram(X)
    for _ in range(5):
        assert torch.equal(exact_gram(X[torch.randperm(300, generator=generator)]), H)
    assert torch.equal(H, H.T)
    largest = X.abs().amax(0)
    near = (H.double() - X.T @ X / 300).abs() <= 2**-14 * largest * largest[:, None]
    assert bool(near.all())


def test_gram_matrices_do_not_depend_on_the_last_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    noise = 1 + 1e-14 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(exact_gram(X * noise), exact_gram(X))


def test_a_recipe_reads_what_its_layer_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(3 * 16, dtype=np.uint16).reshape(3, 16)
    np.save(tmp_path / "tokens.npy", tokens)
    monkeypatch.setattr(room, "DIRECTORY", tmp_path)
    module = "model.decoder.layers.1.fc2"
    tensors = made(Recipe("demo", (module,), "tokens.npy"), 640)
    model = load_model("demo").model
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(module)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(tokens.astype(np.int64)))
    H = seen[0].T @ seen[0] / 48
    assert torch.allclose(tensors["0.H"], H, atol=1e-3 * float(H.max()))
    assert torch.equal(tensors["0.W0"], layer.weight.detach().T)
    assert tensors["0.rows"].shape == (640, 1)


@pytest.mark.slow
def test_the_demo_makes_the_instance_that_the_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSSCAR_CACHE", str(tmp_path))
    name = "demo-mlp-k320"
    best = library().instances[name].best
    assert relative_loss(library().problem(name), best.support) == pytest.approx(best.loss)


def test_a_file_of_other_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSSCAR_CACHE", str(tmp_path))
    (tmp_path / "instances").mkdir()
    other = DIRECTORY / "demo-heads.safetensors"
    (tmp_path / "instances" / "demo-mlp.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(FileError, match="another instance, of which no best value is known"):
        library().problem("demo-mlp-k320")


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


def test_a_race_tells_of_what_improves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = library()
    one = true.instances[EASY]
    worse = dataclasses.replace(
        one, best=dataclasses.replace(one.best, loss=2 * one.best.loss, bound=0.0, proved=False)
    )
    large = "resnet20-c32-k24"
    changed = dataclasses.replace(true, instances={EASY: worse, large: true.instances[large]})
    monkeypatch.setattr("osscar.cli.instances.library", lambda: changed)
    app(
        [
            *("instances", "race", EASY, large, "--backends", "greedy,enumerate"),
            *("--out", str(tmp_path / "race"), "--json", str(tmp_path / "race.json")),
            *("--time", "1e-6"),
        ]
    )
    said = " ".join(capsys.readouterr().out.split())
    assert f"greedy improves the best known loss of {EASY}" in said
    assert f"enumerate improves the best known bound of {EASY}" in said
    page = (tmp_path / "race" / "race.html").read_text()
    assert "greedy" in page
    assert "1 of 2, 1 late" in page
    assert "Answers are late that came after the 1e-06 s" in page
    assert (
        "loss most often: greedy (2 of 2, 2 late); proved the most: enumerate (1 of 2, 1 late)."
        in page
    )
    sent = json.loads((tmp_path / "race" / f"{EASY}.json").read_text())
    assert sent["support"] == list(one.best.support)
    assert sent["lower_bound"] == pytest.approx(one.best.loss)
    assert sent["by"] == "greedy and enumerate"
    records = json.loads((tmp_path / "race.json").read_text())["records"]
    answers = {(one["instance"], one["backend"]): one["error"] for one in records}
    assert [pair for pair, error in answers.items() if error] == [(large, "enumerate")]
    assert "takes at most 16 units" in answers[large, "enumerate"]


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


# ---- what a race comes to -------------------------------------------------------------------


def record_of(
    instance: str,
    backend: str,
    seconds: float,
    loss: float,
    bound: float | None = None,
    proof: ProofBasis = ProofBasis.NONE,
) -> Record:
    return Record(
        *(instance, "units", "", 8, 1, 4, 0.5, backend, {}),
        seconds=seconds,
        relative_loss=loss,
        relative_bound=bound,
        proof=proof,
    )


def test_profiles_count_instances_within_a_ratio_of_the_fastest() -> None:
    records = [
        record_of("x", "a", 1.0, 0.5),
        record_of("x", "b", 4.0, 0.5),
        record_of("y", "a", 3.0, 0.2),
        record_of("y", "b", 1.0, 0.2),
        record_of("z", "a", 90.0, 0.2),
    ]
    found = times(records, lambda record: True)
    assert found == {"a": {"x": 1.0, "y": 3.0, "z": 90.0}, "b": {"x": 4.0, "y": 1.0}}
    curves = profile(found, 4)
    assert curves["a"] == [(1.0, 0.25), (1.0, 0.5), (3.0, 0.75), (4.0, 0.75)]
    assert curves["b"] == [(1.0, 0.25), (4.0, 0.5), (4.0, 0.5)]


def test_anytime_curves_are_means_of_the_best_so_far() -> None:
    records = [
        record_of("x", "a", 1.0, 0.5),
        record_of("x", "a", 4.0, 0.1),
        record_of("y", "a", 2.0, 0.2),
    ]
    curve = anytime(records, lambda record: record.relative_loss or 0.0, 2)["a"]
    assert curve == [(1.0, 0.75), (2.0, pytest.approx(0.35)), (4.0, pytest.approx(0.15))]


def test_only_recomputed_bounds_count() -> None:
    problem = library().problem(EASY)
    record = solve(problem, "enumerate").record()
    best = Best(support=(), loss=1.0, found_by="nobody", found_in=0.0)
    assert record.recomputed_bound is None
    assert better(best, record).bound == 0.0
    sound = better(best, dataclasses.replace(record, recomputed_bound=record.lower_bound))
    assert sound.proved
    assert sound.loss == record.relative_loss
    assert better(sound, dataclasses.replace(record, recomputed_bound=1.0)) == sound


def test_the_best_loss_is_of_the_index_or_the_race() -> None:
    known: Library = library()
    best = known.instances[EASY].best.loss
    records = [record_of(EASY, "a", 1.0, best / 2), record_of(EASY, "b", 1.0, 2 * best)]
    assert best_known(known, records)[EASY].loss == best / 2
    assert best_known(known, records[1:]) == {EASY: known.instances[EASY].best}
    failed = dataclasses.replace(records[0], relative_loss=None, seconds=None, error="none")
    assert best_known(known, [failed]) == {EASY: known.instances[EASY].best}


def test_a_bound_above_a_known_loss_proves_nothing() -> None:
    """Nor does it count as one of less: a backend that claims too much is not to win the race."""
    records = [
        record_of(EASY, "a", 1.0, 0.3, 0.3),
        record_of(EASY, "b", 1.0, 0.2, 0.2),
        record_of(EASY, "c", 1.0, 0.3, 0.1),
    ]
    told: list[Record] = []
    best = Best(support=(), loss=0.2, found_by="", found_in=0.0)
    found = without_refuted(records, {EASY: best}, told.append)
    assert [record.relative_bound for record in found] == [None, 0.2, 0.1]
    assert [record.relative_loss for record in found] == [0.3, 0.2, 0.3]
    assert [record.error for record in told] == [
        "its bound 0.3 is wrong: a support of loss 0.2 is known",
    ]


@pytest.mark.parametrize("proof", ProofBasis)
@pytest.mark.parametrize(("bound", "closes"), [(0.3, True), (0.29, False), (None, False)])
def test_a_word_is_no_proof(proof: ProofBasis, bound: float | None, closes: bool) -> None:
    record = record_of(EASY, "a", 1.0, 0.3, bound, proof)
    recomputed = proof is ProofBasis.RECOMPUTED
    assert proved(record) == (closes and recomputed)
    assert on_its_word(record) == (closes and not recomputed)


def test_a_race_goes_on_after_a_claim_that_is_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Solution.verify

    def refusing(solution: Solution) -> object:
        if solution.backend == "greedy":
            raise VerificationError("it is none")
        return verify(solution)

    monkeypatch.setattr(Solution, "verify", refusing)
    study = race_study(tmp_path / "race", library(), [EASY])
    (records,) = race(study, library(), ["greedy", "magnitude"], 1.0)
    assert [(record.backend, record.error) for record in records] == [
        ("greedy", "it is none"),
        ("magnitude", ""),
    ]


@pytest.mark.parametrize("command", [["make"], ["race", "--backends", "greedy"]])
def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises((OutputError, JournalError), match=r"cannot write |is a file and holds"):
            app(["instances", *command, EASY, "--out", str(tmp_path / place)])


def test_an_interrupted_race_keeps_its_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, asked = tmp_path / "race", solvers.solve
    command = ["instances", "race", EASY, SMALL[0], "--backends", "greedy,magnitude"]
    command += ["--out", str(place)]
    solved: list[tuple[str, str]] = []

    def interrupted(problem: SubsetProblem, backend: str, **options: Any) -> Solution:
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append((problem.name, backend))
        return asked(problem, backend, **options)

    monkeypatch.setattr(solvers, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        app(command)
    assert "give the same command again to go on" in stop.value.__notes__[0]
    assert "So far: the race has 1 more to run." in (place / "race.html").read_text()
    solved.append(("", ""))
    app(command)
    assert len(set(solved)) == len(solved) == 5
    page = (place / "race.html").read_text()
    assert "most often: greedy (1 of 2); proved the most: none." in page
    assert not any(words in page for words in ("So far", "Answers are late", "by its word alone"))
    assert "A race on 2 instances" in page


def test_a_directory_holds_a_race_on_the_same_instances(tmp_path: Path) -> None:
    study = race_study(tmp_path, library(), [EASY])
    assert len(list(race(study, library(), ["magnitude"], 1.0))) == 1
    with pytest.raises(JournalError, match="instances was"):
        race_study(tmp_path, library(), [SMALL[0]])


def test_limits_are_options_of_backends() -> None:
    assert limited("greedy", 8.0) == {}
    assert limited("branch_and_bound", 8.0) == {"time_limit": 8.0}
    assert math.isclose(limited("window_search", 8.0)["time_limit"], 1.0)
    with pytest.raises(solvers.BackendError, match="there is no backend 'best'"):
        limited("best", 8.0)
