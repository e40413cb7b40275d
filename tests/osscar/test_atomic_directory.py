"""Where checkpoints go: nothing of anyone's is lost, whatever happens in the middle of a save."""

import os
import signal
import stat

import pytest
from torch import nn

import osscar
from osscar.base.errors import CheckpointError, OutputError
from osscar.base.files import temporary_sibling
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.files import Manifest, atomic_directory, check_output, finish_killed
from osscar.proof.lineage import Lineage
from tests.osscar.forked import forked


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def write(path, text="new"):
    """Write what counts as a checkpoint."""
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_text(text)
    Manifest.of(False, Lineage(), ("config.json", "model.safetensors")).write(path)


# ---- what may be replaced ----------------------------------------------------------------


@pytest.mark.parametrize("foreign", [".git/inside", "README.md"])
@pytest.mark.parametrize("marked", [False, True])
def test_a_directory_that_holds_anything_else_is_never_replaced(foreign, marked, tmp_path):
    target = tmp_path / "project"
    (target / foreign).parent.mkdir(parents=True)
    (target / foreign).write_text("years of work")
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_text("")
    if marked:
        write(target)
    before, name = sorted(target.rglob("*")), foreign.partition("/")[0]
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=f"would be lost: {name}") as error:
            check_output(target, overwrite=overwrite)
        assert "overwrite" not in str(error.value)  # which would not help
    with pytest.raises(OutputError, match="would be lost"):
        checkpoint.save(model(), target, overwrite=True)
    assert sorted(target.rglob("*")) == before


def test_what_a_checkpoint_is(tmp_path):
    """It has a manifest of ours: those of others are none."""
    target = tmp_path / "theirs"
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (target / name).write_text("{}")
    other = {"osscar.json": '{"schema": "theirs"}'}
    for overwrite, more in ((False, {}), (True, {}), (True, other)):
        for name, text in more.items():
            (target / name).write_text(text)
        with pytest.raises(OutputError, match=r"not a checkpoint of OSSCAR.* lost: config"):
            check_output(target, overwrite=overwrite)
    Manifest.of(True, Lineage(), tuple(one.name for one in target.iterdir())).write(target)
    with pytest.raises(OutputError, match=r"or overwrite=True in Python"):
        check_output(target, overwrite=False)
    assert check_output(target, overwrite=True) == target.resolve()
    (target / "codes.of.a.tokenizer").write_text("")
    with pytest.raises(OutputError, match=r"codes\.of\.a\.tokenizer"):
        check_output(target, overwrite=True)


# ---- replacing ---------------------------------------------------------------------------


def test_what_another_process_has_written_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "model"
    second = atomic_directory(target, overwrite=False)
    write(second.__enter__(), "second")
    write(target, "first")
    with pytest.raises(OutputError, match="not empty"):
        second.__exit__(None, None, None)
    assert (target / "model.safetensors").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


MOMENTS = {
    "writing": "proved = die",
    "between": "Path.rename = lambda self, to: die() if to == target else rename(self, to)",
    "cleaning": "rmtree = module.shutil.rmtree\nmodule.shutil.rmtree = lambda path, **options: "
    "die() if path.name.endswith('replaced') and path.exists() else rmtree(path, **options)",
}
SAVE = """
import os, signal
from pathlib import Path

from osscar.checkpoint import files as module
from osscar.checkpoint.files import MANIFEST_FILE, Manifest
from osscar.proof.lineage import Lineage

proved, rename = lambda: None, Path.rename


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


MOMENT
with module.atomic_directory(target, overwrite=True) as new:
    (new / "model.safetensors").write_text("new")
    proved()
    Manifest.of(False, Lineage(), ("model.safetensors",)).write(new)
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_save_leaves_one_whole_checkpoint_and_the_next_start_finds_it(moment, tmp_path):
    target, alike = tmp_path / "model", tmp_path / ".model.osscar-of-mine"
    alike.mkdir()
    write(target, "old")
    code = compile(SAVE.replace("MOMENT", MOMENTS[moment]), "<a save>", "exec")
    status = forked(lambda: exec(code, {"target": target}), tmp_path).wait()
    assert status == -signal.SIGKILL
    check_output(target, overwrite=True)
    expected = "new" if moment == "cleaning" else "old"
    assert [path.read_text() for path in target.glob("*.safetensors")] == [expected]
    assert {path.name for path in tmp_path.iterdir()} - {"model"} == {alike.name}


# ---- found at the start ------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_get_the_mode_that_the_umask_says(umask, tmp_path):
    path, before = tmp_path / "model", os.umask(umask)
    try:
        checkpoint.save(model(), path, report={})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}


def test_a_process_that_is_replacing_a_directory_is_left_alone(tmp_path):
    path, old = tmp_path / "out", tmp_path / ".out.osscar-replaced"
    old.mkdir()
    with temporary_sibling(path) as new:
        finish_killed(path)
        assert [place.exists() for place in (new, old, path)] == [True, True, False]
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            osscar.load(path)
    finish_killed(path)
    assert [place.exists() for place in (old, path)] == [False, True]
