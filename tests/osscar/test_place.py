"""Where checkpoints go: nothing of anyone's is lost, whatever happens in the middle of a save."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from osscar.base.errors import BusyError, OutputError
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint import place as runs
from osscar.checkpoint.manifest import MANIFEST_FILE, Manifest
from osscar.checkpoint.place import Run, check_output, replacing
from osscar.proof.lineage import Lineage
from tests.osscar.forked import forked

PRELUDE = """
import os, signal
from pathlib import Path

from osscar.checkpoint import place, place as runs
from osscar.checkpoint.manifest import Manifest
from osscar.proof.lineage import Lineage

proved = lambda: None


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

"""


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def write(path: Path, text: str = "new") -> None:
    """Write what counts as a checkpoint."""
    (path / "model.safetensors").write_text(text)
    Manifest.of(False, Lineage()).write(path)


def run(script: str, target: Path) -> int:
    """Save in another process, to which something happens; return its status."""
    code = compile(PRELUDE + script + SAVE, "<a save>", "exec")
    return forked(lambda: exec(code, {"target": target}), target.parent).wait()


# ---- what may be replaced ----------------------------------------------------------------


def test_a_directory_that_holds_anything_else_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "project"
    for foreign in (".git", "src", "thesis.tex", "README.md", "config.yaml"):
        for marked in (False, True):
            target.mkdir()
            (target / "config.json").write_text("{}")
            (target / "model.safetensors").write_text("")
            if marked:
                write(target)
            if "." in foreign[1:]:
                (target / foreign).write_text("years of work")
            else:
                (target / foreign).mkdir()
                (target / foreign / "inside").write_text("years of work")
            before = sorted(target.rglob("*"))
            with pytest.raises(OutputError, match=f"would be lost: {foreign}; give another dir"):
                check_output(target, overwrite=True)
            with pytest.raises(OutputError, match="would be lost"):
                checkpoint.save(model(), target, overwrite=True)
            assert sorted(target.rglob("*")) == before
            shutil.rmtree(target)


def test_names_alone_do_not_make_a_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        with pytest.raises(OutputError, match="something other than a checkpoint"):
            check_output(tmp_path / name, overwrite=True)


def test_checkpoints_of_others_and_all_that_a_tokenizer_wrote_can_be_replaced(
    tmp_path: Path,
) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert check_output(tmp_path, overwrite=True) == tmp_path.resolve()
    (tmp_path / "codes.of.a.tokenizer").write_text("")
    with pytest.raises(OutputError, match=r"codes\.of\.a\.tokenizer"):
        check_output(tmp_path, overwrite=True)
    Manifest.of(True, Lineage(), ("codes.of.a.tokenizer",)).write(tmp_path)
    check_output(tmp_path, overwrite=True)


# ---- two runs ----------------------------------------------------------------------------


def test_of_two_runs_to_one_place_the_second_fails_at_once(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing(target, overwrite=False) as first:
        write(first, "first")
        second = replacing(target, overwrite=False)
        with pytest.raises(BusyError, match=rf"at work in .*model \(process {os.getpid()} on "):
            second.__enter__()
    assert (target / "model.safetensors").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_another_run_has_written_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    second = replacing(target, overwrite=False)
    write(second.__enter__(), "second")
    target.mkdir()
    write(target, "first")
    with pytest.raises(OutputError, match="not empty"):
        second.__exit__(None, None, None)
    assert (target / "model.safetensors").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_last_moment_belongs_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the rename another run may still come first."""
    target = tmp_path / "model"
    rename = Path.rename

    def late(self: Path, to: Path) -> Path:
        if to == target and not target.exists():
            target.mkdir()
            write(target, "first")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    with (
        pytest.raises(OutputError, match="not empty"),
        replacing(target, overwrite=False) as second,
    ):
        write(second, "second")
    assert (target / "model.safetensors").read_text() == "first"


# ---- killed runs -------------------------------------------------------------------------

WHILE_WRITING = "proved = die\n"
BEFORE_THE_SWAP = "runs.Run.swap = die\n"
BETWEEN_THE_RENAMES = """
runs._exchanged = lambda one, other: False
rename = Path.rename
Path.rename = lambda self, to: die() if to == target else rename(self, to)
"""
AFTER_THE_SWAP = "runs._remove = die\n"
MOUNTED = "runs._is_mounted = lambda path: path == target\n"
EMPTIED = (
    MOUNTED
    + """
finish = runs.Run.finish
runs.Run.finish = lambda run: die() if run.going.is_dir() else finish(run)
"""
)
HALF_EMPTIED = """
runs._is_mounted = lambda path: path == target
rename = Path.rename
count = [0]
def some(self, to):
    count[0] += 1
    return die() if count[0] == 2 else rename(self, to)
Path.rename = some
"""
HALF_FILLED = HALF_EMPTIED.replace("== 2", "== 5")
SAVE = """
with place.replacing(target, overwrite=True) as new:
    (new / "model.safetensors").write_text("new")
    proved()
    Manifest.of(False, Lineage()).write(new)
"""


@pytest.mark.parametrize(
    ("moment", "is_new"),
    [
        (WHILE_WRITING, False),
        (BEFORE_THE_SWAP, False),
        (BETWEEN_THE_RENAMES, True),
        (AFTER_THE_SWAP, True),
        (HALF_EMPTIED, False),
        (EMPTIED, True),
        (HALF_FILLED, True),
    ],
    ids=["writing", "before", "between", "after", "half emptied", "emptied", "half filled"],
)
def test_a_killed_run_leaves_one_whole_checkpoint_and_the_next_start_finds_it(
    moment: str, is_new: bool, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    write(target, "old")
    before = content(target)
    alike = tmp_path / ".model.osscar-of-mine"  # of nobody knows whom
    alike.mkdir()
    (alike / "new").write_text("mine")
    assert run(moment, target) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) + len(list(target.glob(".*"))) > 2 or not target.exists()
    check_output(target, overwrite=True)
    assert (content(target) != before) == is_new
    assert set(content(target)) == set(before)
    assert {path.name for path in tmp_path.iterdir()} == {"model", alike.name}
    assert (alike / "new").read_text() == "mine"
    with replacing(target, overwrite=True) as new:
        write(new, "old")
    assert content(target) == before


def test_what_a_killed_run_was_writing_for_the_first_time_goes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert run(WHILE_WRITING, target) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] != []
    check_output(target, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing(target, overwrite=False) as new:
        check_output(target, overwrite=False)
        write(new)
    assert set(content(target)) == {"model.safetensors", MANIFEST_FILE}


def test_two_directories_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if runs._exchanged(tmp_path / "one", tmp_path / "other"):
        assert (tmp_path / "one" / "other").is_file()
        assert (tmp_path / "other" / "one").is_file()
    else:
        assert not sys.platform.startswith("linux") or os.uname().release.startswith("2.")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_with_or_without_the_exchange(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(runs, "_renameat2", lambda: None)
    target = tmp_path / "model"
    for text in ("first", "second"):
        with replacing(target, overwrite=True) as new:
            write(new, text)
    assert (target / "model.safetensors").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- mount points ------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that behaves like a mount point of another file system."""
    target = tmp_path / "volume"
    target.mkdir()
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if target in (self, to) or (target in self.parents) != (target in Path(to).parents):
            raise OSError(16, "Device or resource busy")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(runs, "_is_mounted", lambda path: path == target)
    return target


def test_a_mount_point_can_be_written_and_replaced(volume: Path) -> None:
    checkpoint.save(model(), check_output(volume, overwrite=False))
    first = content(volume)
    with pytest.raises(OutputError, match="not empty"):
        checkpoint.save(model(1), volume)
    checkpoint.save(model(1), volume, overwrite=True)
    assert set(content(volume)) == set(first)
    assert content(volume) != first
    assert [path.name for path in volume.parent.iterdir()] == ["volume"]


def test_a_failure_leaves_a_mount_point_as_it_was(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(model(), volume)
    first = content(volume)

    def fail(self: Run) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "_fill", fail)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.save(model(1), volume, overwrite=True)
    assert content(volume) == first


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mount_points_are_found() -> None:
    assert runs._is_mounted(Path("/proc"))
    assert not runs._is_mounted(Path("/proc/self"))


# ---- found at the start ------------------------------------------------------------------


def test_a_path_through_a_file_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file"):
        check_output(tmp_path / "file" / "deep" / "model", overwrite=False)


def test_a_place_that_cannot_be_written_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path}: Read-only file system"):
        check_output(tmp_path / "not" / "there", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_at_the_start_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"may take 1,000,000,000,000,000 MB, and .* MB left"):
        check_output(tmp_path / "model", overwrite=False, needed_bytes=10**21)
    check_output(tmp_path / "model", overwrite=False, needed_bytes=1)
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.weight_bytes(model()) == 4 * (3 * 4 + 4 + 4 * 2 + 2)
    assert checkpoint.weight_bytes(model(), torch.bfloat16) == 2 * (3 * 4 + 4 + 4 * 2 + 2)


# ---- modes and signals -------------------------------------------------------------------


def test_all_files_get_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    for umask in (0o022, 0o077, 0o007):
        path, before = tmp_path / f"{umask}", os.umask(umask)
        try:
            checkpoint.save(model(), path, report={})
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["proved", "place.finish_killed", "place._check_replaceable"])
def test_a_signal_in_the_middle_of_a_save_leaves_nothing(
    number: signal.Signals, place: str, tmp_path: Path
) -> None:
    script = f"""
before = {place}
def interrupted(*arguments, **options):
    os.kill(os.getpid(), {int(number)})
    return before(*arguments, **options)
{place} = interrupted
"""
    returned = run(script, tmp_path / "model")
    assert returned == (-number if number == signal.SIGTERM else 1)  # 1: of a KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_cleaning_up_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = runs.shutil.rmtree

    def impatient(path: Path, **options: bool) -> None:
        signal.raise_signal(signal.SIGINT)
        rmtree(path, **options)

    run = replacing(tmp_path / "model", overwrite=False)
    write(run.__enter__())
    monkeypatch.setattr(runs.shutil, "rmtree", impatient)
    with pytest.raises(KeyboardInterrupt):
        run.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_directory_of_someone_else_is_not_worked_in(tmp_path: Path) -> None:
    (tmp_path / ".model.osscar-save").mkdir()
    (tmp_path / ".model.osscar-save" / "thesis.tex").write_text("mine")
    check_output(tmp_path / "model", overwrite=False)
    with pytest.raises(OutputError, match=r"osscar-save holds something else; move that away"):
        replacing(tmp_path / "model", overwrite=False).__enter__()
    assert (tmp_path / ".model.osscar-save" / "thesis.tex").exists()


def test_overwriting_is_named_only_where_it_would_help(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"other than a checkpoint.*mine\.txt") as refused:
        check_output(tmp_path / "notes", overwrite=False)
    assert "overwrite" not in str(refused.value)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    with pytest.raises(OutputError, match=r"or overwrite=True to replace"):
        check_output(tmp_path / "model", overwrite=False)
