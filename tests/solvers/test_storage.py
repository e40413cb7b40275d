"""A problem survives being written and read, and foreign files are refused."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from solvers import ProblemError, SubsetProblem, load_certificate, save_certificate, solve, storage
from tests.solvers.instances import INSTANCES

PROBLEM = INSTANCES["scalar"].problem


@pytest.fixture
def path(tmp_path):
    PROBLEM.save(tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors"


@pytest.mark.parametrize("name", ["shuffled_consumers", "uncentred"])
def test_round_trip(path, name):
    problem = INSTANCES[name].problem
    problem.save(path)
    loaded = SubsetProblem.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # which does not reach it
    assert (loaded.keep, loaded.name) == (problem.keep, problem.name)
    for a, b in zip(loaded.consumers, problem.consumers, strict=True):
        assert (a.e, a.damping) == (b.e, b.damping)
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("H", "G", "W0", "rows"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_no_debris(path, monkeypatch):
    before = path.read_bytes()
    with pytest.raises(ProblemError, match=r"missing/layer\.safetensors cannot be written: "):
        PROBLEM.save(path.parent / "missing/layer.safetensors")

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.safetensors.torch, "save_file", full_disk)
    with pytest.raises(ProblemError, match=f"{path.name} cannot be written: no space"):
        PROBLEM.with_keep(2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class Bomb:
    """Fails the test that unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("a problem file was unpickled",)


def test_what_is_no_problem_file(path):
    """Missing, truncated, garbage, pickled, or of another kind: one error, nothing unpickled."""
    with pytest.raises(ProblemError, match="is not a problem file"):
        SubsetProblem.load(path.with_name("missing.safetensors"))
    whole, garbage = path.read_bytes(), np.random.default_rng(0).bytes(4000)
    parts = [whole[: int(share * len(whole))] for share in (0.0, 0.1, 0.5, 0.98)]
    others = [pickle.dumps(Bomb()), safetensors.torch.save({"H": torch.eye(2)})]
    others += [
        safetensors.torch.save({"H": torch.eye(2)}, {"header": header})
        for header in ("3", "[]", '"text"', "{")
    ]
    for content in (*parts, garbage, *others):
        path.write_bytes(content)
        with pytest.raises(ProblemError, match="is not a problem file"):
            SubsetProblem.load(path)


CHANGES = [
    (lambda h, t: h.update(format="osscar-subset-problem/99"), "not a problem file of format"),
    (lambda h, t: h["consumers"][0].update(e="much"), "not a complete problem file"),
    (lambda h, t: h["consumers"][0].update(e=1e-9), "consumer 0: e is 1e-09, with which"),
    (lambda h, t: h.update(keep=100), "keep is 100"),
    (lambda h, t: t.pop("0.H"), "not a complete problem file"),
    (lambda h, t: t.update({"0.H": t["0.H"].triu()}), "H is not symmetric"),
]


def test_damaged_contents(path):
    whole = path.read_bytes()
    for change, message in CHANGES:
        path.write_bytes(whole)
        header, tensors = storage.read(path)
        change(header, tensors)
        storage.write(path, header, tensors)
        with pytest.raises(ProblemError, match=f"{path.name}.*{message}"):
            SubsetProblem.load(path)


def test_random_damage_ends_in_problem_errors(path):
    """Or is not noticed, where it changed a digit."""
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), generator.integers(1, 20)):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        with contextlib.suppress(ProblemError):
            SubsetProblem.load(path)


# ---- certificates ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["perspective", "branch_and_bound", "enumerate"])
def test_a_certificate_proves_the_same_from_its_file(path, backend):
    solution = solve(PROBLEM, backend)
    assert save_certificate(path, solution)
    proof = load_certificate(path)
    assert type(proof) is type(solution.certificate)
    assert proof.bound(PROBLEM) == solution.certificate.bound(PROBLEM)


def test_what_proves_nothing_is_not_written(path):
    path.unlink()
    assert not save_certificate(path, solve(PROBLEM, "local_search"))
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda h, t: h.update(certificate="word of mouth"),
        lambda h, t: h.pop("certificate"),
        lambda h, t: t.pop(next(key for key in t if key.startswith("bound."))),
        lambda h, t: t.update({"bound.more": torch.zeros(1)}),
    ],
)
def test_what_is_no_certificate_is_refused(path, change):
    save_certificate(path, solve(PROBLEM, "perspective"))
    header, tensors = storage.read(path)
    change(header, tensors)
    storage.write(path, header, tensors)
    with pytest.raises(ProblemError, match="is not a certificate"):
        load_certificate(path)
