"""A problem survives being written and read, and foreign files are refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import stat
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

from solvers import ProblemError, SubsetProblem, solve, storage
from tests.solvers.instances import INSTANCES


@pytest.mark.parametrize("name", ["ragged_consumers", "uncentred"])
def test_round_trip(tmp_path, name):
    problem = INSTANCES[name].problem
    path = tmp_path / "layer.safetensors"
    problem.save(path)
    loaded = SubsetProblem.load(path)
    assert (loaded.keep, loaded.name) == (problem.keep, problem.name)
    for a, b in zip(loaded.consumers, problem.consumers, strict=True):
        assert (a.e, a.damping) == (b.e, b.damping)
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("H", "G", "W0", "rows"))
        assert (a.variance is None) == (b.variance is None) == (name != "uncentred")
        assert a.variance is None or torch.equal(a.variance, b.variance)
    for backend in ("greedy", "flap"):
        assert torch.equal(solve(loaded, backend).support, solve(problem, backend).support)
        assert solve(loaded, backend).loss == solve(problem, backend).loss
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    # What is written to the file later, in place, does not reach it.
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.consumers[0].H, problem.consumers[0].H)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_files_get_the_mode_that_the_umask_says(tmp_path, umask):
    path, before = tmp_path / "layer.safetensors", os.umask(umask)
    try:
        INSTANCES["scalar"].problem.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_saving_replaces_a_file_whole(tmp_path, monkeypatch):
    """A write that fails leaves the old file, and no debris."""
    path = tmp_path / "layer.safetensors"
    problem = INSTANCES["scalar"].problem
    problem.save(path)
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage.safetensors.torch, "save_file", full_disk)
    with pytest.raises(ProblemError, match=f"{path.name} cannot be written: no space"):
        problem.with_keep(2).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    problem.with_keep(2).save(path)
    assert SubsetProblem.load(path).keep == 2


def test_names_that_are_none_of_a_problem_file(tmp_path):
    problem = INSTANCES["scalar"].problem
    for name in ("layer.npz", "layer"):
        for use in (problem.save, SubsetProblem.load):
            with pytest.raises(ProblemError, match=r"ends in \.safetensors"):
                use(tmp_path / name)


class Bomb:
    """Fails the test that unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("a problem file was unpickled",)


def test_what_is_no_problem_file(tmp_path):
    """Missing, truncated, garbage, pickled, or of another kind: one error, nothing unpickled."""
    path = tmp_path / "layer.safetensors"
    with pytest.raises(ProblemError, match="there is no problem file"):
        SubsetProblem.load(path)
    INSTANCES["scalar"].problem.save(path)
    whole, garbage = path.read_bytes(), np.random.default_rng(0).bytes(4000)
    parts = [whole[: int(share * len(whole))] for share in (0.0, 0.1, 0.5, 0.98)]
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.eye(2))
    np.savez(archive, header=np.array("{}"), H=np.array([Bomb()], dtype=object))
    others = [safetensors.torch.save({"H": torch.eye(2)}), array.getvalue(), archive.getvalue()]
    for content in (*parts, garbage, pickle.dumps(Bomb()), *others):
        path.write_bytes(content)
        with pytest.raises(ProblemError, match="is not a problem file"):
            SubsetProblem.load(path)


def rewritten(path, change):
    """Write a valid problem file with its header changed."""
    header, tensors = storage.read(path)
    change(header, tensors)
    storage.write(path, header, tensors)


CHANGES = [
    (lambda h, t: h.update(format="osscar-subset-problem/99"), "not a problem file of format"),
    (lambda h, t: h.pop("consumers"), "not a complete problem file"),
    (lambda h, t: h.update(consumers=3), "not a complete problem file"),
    (lambda h, t: h.update(consumers=[]), "at least one consumer"),
    (lambda h, t: h["consumers"][0].update(e="much"), "e is 'much'; it must be a number"),
    (lambda h, t: h["consumers"][0].update(e=10**400), "e has more digits than a number may"),
    (lambda h, t: h["consumers"][0].update(e=1e-9), "consumer 0: e is 1e-09, with which"),
    (lambda h, t: h["consumers"][0].update(damping=float("nan")), "damping is nan"),
    (lambda h, t: h.update(keep=4.0), "keep is 4.0"),
    (lambda h, t: h.update(name=5), "name is 5"),
    (lambda h, t: t.pop("0.H"), "not a complete problem file"),
    (lambda h, t: h.update(keep=100), "keep is 100"),
    (lambda h, t: t.update({"0.G": t["0.G"] * torch.nan}), "G has NaN"),
    (lambda h, t: t.update({"0.H": t["0.H"].triu()}), "H is not symmetric"),
    (lambda h, t: t.update({"0.G": t["0.G"].float()}), r"G must be \(9, .* in torch.float32"),
    (lambda h, t: t.update({"0.variance": t["0.H"].clone()}), r"variance must be \(9,\)"),
    (lambda h, t: t.update({"0.variance": -t["0.H"][0].abs()}), "no variance is negative"),
]


def test_damaged_contents(tmp_path):
    path = tmp_path / "layer.safetensors"
    for change, message in CHANGES:
        INSTANCES["scalar"].problem.save(path)
        rewritten(path, change)
        with pytest.raises(ProblemError, match=f"{path.name}.*{message}"):
            SubsetProblem.load(path)


def test_random_damage_ends_in_problem_errors(tmp_path):
    """Or is not noticed, where it changed a digit."""
    path = tmp_path / "layer.safetensors"
    INSTANCES["keep_1"].problem.save(path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), generator.integers(1, 20)):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        with contextlib.suppress(ProblemError):
            SubsetProblem.load(path)


def test_what_cannot_be_written(tmp_path):
    problem = INSTANCES["scalar"].problem
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("missing/layer.safetensors", "folder.safetensors"):
        with pytest.raises(ProblemError, match=f"{name} cannot be written: "):
            problem.save(tmp_path / name)
    with pytest.raises(ProblemError, match=r"the header takes .* characters; shorten"):
        SubsetProblem(problem.consumers, 3, "x" * (1 << 20)).save(tmp_path / "layer.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_control_characters_are_refused_and_escaped(tmp_path):
    path = tmp_path / "layer.safetensors"
    for key, value in [("name", "\x1b[31m\n"), ("keep", "\x1b[31m"), ("format", "\x1b[31m")]:
        INSTANCES["scalar"].problem.save(path)
        rewritten(path, lambda header, _, key=key, value=value: header.update({key: value}))
        with pytest.raises(ProblemError) as error:
            SubsetProblem.load(path)
        assert str(error.value).isprintable()
    # What readers say of it, too.
    fields = {"dtype": "\x1b[31m\n" * 99, "shape": [], "data_offsets": []}
    header = json.dumps({"x\x1b[31m": fields}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ProblemError, match="is not a problem file: ") as error:
        SubsetProblem.load(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000 + len(str(path))
