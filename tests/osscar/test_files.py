"""Files: whole or absent, locked by one, and read without being believed."""

import dataclasses
import os
import pickle
import signal
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ConfigDict

from osscar.base import files
from osscar.base.errors import BusyError, FileError, OutputError
from osscar.base.files import (
    atomic_write,
    digest,
    file_digest,
    file_lock,
    write_json,
    write_text,
)
from osscar.base.json_files import STRICT, read_json
from osscar.base.process import uninterrupted
from tests.osscar.forked import PATIENCE, forked

# ---- JSON --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    share: float
    inner: tuple[Inner, ...] = ()


def test_what_is_written_is_read_again(tmp_path):
    value = Outer("n", 0.5, (Inner(1), Inner(2)))
    write_json(tmp_path / "x.json", dataclasses.asdict(value))
    assert read_json(tmp_path / "x.json", Outer) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "nan", float("nan"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid JSON"),
        ('{"name": "n", "share": true}', "share: input should be a valid number, not True"),
        ('{"name": "n", "share": 1.0, "inner": [{"size": 1, "x": 2}]}', "inner.0.x: unexpected"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_one_error(text, reason, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(FileError) as caught:
        read_json(file, Outer)
    assert caught.value.path == file
    assert reason in caught.value.reason
    assert len(caught.value.reason) < 200
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker hands it to its parent
    assert str(again) == str(caught.value) == f"{file}: {caught.value.reason}"


# ---- writing -----------------------------------------------------------------------------


def test_what_is_being_written_bears_the_process_and_goes_if_it_fails(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("old")

    def fail(error):
        with atomic_write(file) as partial:
            assert partial.name == "x.csv"  # whose suffix says what it holds
            assert str(os.getpid()) in partial.parent.name
            partial.write_text("new")
            raise error

    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    for text in ("I/O error: No space left (os error 28)", "[Errno 28] No space left"):
        with pytest.raises(OutputError, match=r"x\.csv: No space left on device; make room"):
            fail(Exception(text))  # as libraries in Rust say it
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    assert file.read_text() == "old"


def test_what_a_killed_process_was_writing_goes_and_what_others_write_stays(tmp_path):
    def write():
        with atomic_write(tmp_path / "x[1].csv") as partial:
            partial.write_text("half")
            time.sleep(PATIENCE)

    killed = forked(write, tmp_path)
    while not list(tmp_path.glob(".*.partial/x*")):
        time.sleep(0.01)
    write_text(tmp_path / "x[1].csv", "whole")
    of_another_host = tmp_path / f".x[1].csv.elsewhere-{killed.pid}.partial"
    of_another_host.mkdir()
    running = f".x[1].csv.{socket.gethostname()}-{killed.pid}.partial"
    others = {"x[1].csv", of_another_host.name}
    assert {p.name for p in tmp_path.iterdir()} == {*others, running}
    killed.kill()
    killed.wait()
    write_text(tmp_path / "x[1].csv", "again")
    assert {p.name for p in tmp_path.iterdir()} == others


def test_links_pipes_and_modes_are_respected(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    write_text(Path(os.devnull), "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", "missing/x", "real/x"):
        with pytest.raises(OutputError, match="cannot write"):
            write_text(tmp_path / name, "x")
    assert {file.name for file in tmp_path.iterdir()} == {"real", "link", "loop"}


def test_files_are_on_the_disk_before_they_take_their_names_and_their_own_is_last(
    tmp_path, monkeypatch
):
    path, done = tmp_path / "new.txt", list[tuple[str, bool]]()
    fsync, replace = files.fsync, Path.replace
    monkeypatch.setattr(files, "fsync", lambda place: done.append((place.name, path.exists())))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: done.append((f"to {to.name}", False)) or replace(self, to)
    )
    with atomic_write(path) as partial:
        partial.write_text("abc")
        (partial.parent / "zzz").write_text("which it names")
    names = ["zzz", "new.txt", "to zzz", "to new.txt"]
    assert done == [*((name, False) for name in names), (tmp_path.name, True)]
    fsync(path)
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256
    assert digest("abc") == digest(b"abc") == file_digest(path) == expected


# ---- locks and signals -------------------------------------------------------------------


def test_a_lock_is_held_by_one_who_is_named_until_the_block_ends(tmp_path):
    place = tmp_path / ".lock"
    with file_lock(place, tmp_path):
        expected = rf"is at work in {tmp_path}; wait for it"
        with pytest.raises(BusyError, match=expected):
            file_lock(place, tmp_path).__enter__()
    with pytest.raises(ZeroDivisionError), file_lock(place, tmp_path):
        raise ZeroDivisionError
    with file_lock(place, tmp_path):
        pass


def test_signals_wait_for_short_blocks():
    done = []

    def interrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
