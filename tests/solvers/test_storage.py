"""A problem survives being written and read, and foreign files are refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from solvers import ProblemError, SubsetProblem, solve, storage
from tests.solvers.instances import INSTANCES

suffixes = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


@suffixes
@pytest.mark.parametrize("name", ["scalar", "ragged_consumers"])
def test_round_trip(tmp_path, suffix, name):
    problem = INSTANCES[name].problem
    path = tmp_path / f"layer{suffix}"
    problem.save(path)
    loaded = SubsetProblem.load(path)
    assert (loaded.keep, loaded.name) == (problem.keep, problem.name)
    for a, b in zip(loaded.consumers, problem.consumers, strict=True):
        assert (a.e, a.damping) == (b.e, b.damping)
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("H", "G", "W0", "rows"))
    assert solve(loaded, "greedy").loss == solve(problem, "greedy").loss
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@suffixes
def test_saving_replaces_a_file_whole(tmp_path, suffix, monkeypatch):
    """A write that fails leaves the old file, and no debris."""
    path = tmp_path / f"layer{suffix}"
    problem = INSTANCES["scalar"].problem
    problem.save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.np, "savez", full_disk)
    monkeypatch.setattr(storage.safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        problem.with_keep(2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    problem.with_keep(2).save(path)
    assert SubsetProblem.load(path).keep == 2


@pytest.mark.parametrize("name", ["layer.pt", "layer", "layer.npz.gz"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ProblemError, match=r"ends in \.npz or \.safetensors"):
        INSTANCES["scalar"].problem.save(tmp_path / name)
    with pytest.raises(ProblemError, match=r"ends in \.npz or \.safetensors"):
        SubsetProblem.load(tmp_path / name)


@suffixes
def test_missing_file(tmp_path, suffix):
    with pytest.raises(ProblemError, match="there is no problem file"):
        SubsetProblem.load(tmp_path / f"nothing{suffix}")


@suffixes
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.98])
def test_truncated_file(tmp_path, suffix, share):
    path = tmp_path / f"layer{suffix}"
    INSTANCES["scalar"].problem.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ProblemError, match="is not a problem file"):
        SubsetProblem.load(path)


@suffixes
def test_garbage(tmp_path, suffix):
    path = tmp_path / f"layer{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(ProblemError, match="is not a problem file"):
        SubsetProblem.load(path)


class Bomb:
    """Fails the test that unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("a problem file was unpickled",)


@suffixes
def test_nothing_is_unpickled(tmp_path, suffix):
    path = tmp_path / f"layer{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ProblemError, match="is not a problem file"):
        SubsetProblem.load(path)


def test_pickled_arrays_inside_an_archive_are_refused(tmp_path):
    path = tmp_path / "layer.npz"
    np.savez(path, header=np.array("{}"), H=np.array([Bomb()], dtype=object))
    with pytest.raises(ProblemError, match="is not a problem file"):
        SubsetProblem.load(path)


def test_foreign_archives(tmp_path):
    np.savez(tmp_path / "other.npz", H=np.eye(2))
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.eye(2))
    safetensors.torch.save_file({"H": torch.eye(2)}, tmp_path / "other.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ProblemError, match="is not a problem file"):
            SubsetProblem.load(path)


def rewritten(path, change):
    """Write a valid problem file with its header changed."""
    header, tensors = storage.read(path)
    change(header, tensors)
    storage.write(path, header, tensors)


@suffixes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format="osscar-subset-problem/99"), "not a problem file of format"),
        (lambda h, t: h.pop("consumers"), "not a complete problem file"),
        (lambda h, t: h.update(consumers=3), "not a complete problem file"),
        (lambda h, t: h["consumers"][0].update(e="much"), "not a complete problem file"),
        (lambda h, t: t.pop("0.H"), "not a complete problem file"),
        (lambda h, t: h.update(keep=100), "keep is 100"),
        (lambda h, t: t.update({"0.G": t["0.G"] * torch.nan}), "G has NaN"),
        (lambda h, t: t.update({"0.G": t["0.G"].float()}), "G must be a float64 matrix"),
    ],
)
def test_damaged_contents(tmp_path, suffix, change, message):
    path = tmp_path / f"layer{suffix}"
    INSTANCES["scalar"].problem.save(path)
    rewritten(path, change)
    with pytest.raises(ProblemError, match=message):
        SubsetProblem.load(path)


def test_header_is_plain_json(tmp_path):
    path = tmp_path / "layer.npz"
    INSTANCES["ragged"].problem.save(path)
    with np.load(path, allow_pickle=False) as archive:
        header = json.loads(str(archive["header"]))
    assert header["format"] == "osscar-subset-problem/1"
    assert header["keep"] == 3
