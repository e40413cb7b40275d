"""Nothing is lost: what was killed, or found the disk full, goes on to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from osscar.cli import main
from osscar.run.run_log import RunLog
from osscar.study.directory import Study
from tests.osscar.interrupted_cases import (
    Case,
    both_case,
    outputs,
    plan_case,
    pruning,
    recovery_case,
    stock_case,
    study_case,
)
from tests.osscar.interruptions import Ended, Full, Kill, Refusal, Victim, hidden, orphans, run

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc"),
    pytest.mark.usefixtures("drawn"),  # bytes of pictures are compared
]

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module", autouse=True)
def imported(tiny, tmp_path_factory):
    """Run a command in this process, whose children then have imported what it takes."""
    place = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["osscar", *pruning(tiny, "--sparsity", "0.5"), *outputs(place)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code


@pytest.fixture(scope="module")
def plan(tiny, tmp_path_factory):
    return plan_case(tiny, tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    return stock_case(tiny, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory):
    return both_case(tiny, tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def recovery(tiny, tmp_path_factory):
    return recovery_case(tiny, tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return study_case(tmp_path_factory.mktemp("study"), jobs=2)


@pytest.fixture(scope="module")
def study_alone(tmp_path_factory):
    return study_case(tmp_path_factory.mktemp("alone"), jobs=1)


@pytest.fixture
def case(request):
    return request.getfixturevalue(request.param)


# ---- kills -------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["plan", "stock", "both", "recovery"], indirect=True)
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(case, seed, tmp_path):
    _kill_and_go_on(case, seed, tmp_path / "root", (Victim.COMMAND,))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plan", "stock", "both", "recovery"], indirect=True)
@pytest.mark.parametrize("seed", range(100, 105))
def test_ten_runs_that_are_killed_go_on_to_the_same_bytes(case, seed, tmp_path):
    _kill_and_go_on(case, seed, tmp_path / "root", (Victim.COMMAND,))


@pytest.mark.slow
def test_a_study_whose_worker_is_killed_goes_on_to_the_same_bytes(study, tmp_path):
    _kill_and_go_on(study, 1, tmp_path / "root", (Victim.WORKER,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_thirty_studies_that_are_killed_go_on_to_the_same_bytes(study, seed, tmp_path):
    _kill_and_go_on(study, seed, tmp_path / "root", tuple(Victim))


def _kill_and_go_on(case: Case, seed: int, root: Path, victims: tuple[Victim, ...]) -> None:
    """Kill a command once or twice, somewhere, and let the same command finish it."""
    draw = random.Random(seed)
    case.begin(root)
    for _ in range(draw.choice((1, 2))):
        victim = draw.choice(victims)
        number = signal.SIGINT if victim == Victim.GROUP else draw.choice(SIGNALS)
        if victim == Victim.WORKER:
            number = signal.SIGKILL
        ended = case.run(root, Kill(draw.randrange(1, case.events + 1), number, victim))
        assert orphans(ended) == []
        if ended.status == 0:
            break
        _check_end(case, root, ended, victim, number)
    if ended.status:
        again = case.run(root)
        assert again.status == 0, again.err
    assert case.wrong(root) == []


def _last_word(ended: Ended) -> str:
    """Return the one line that is said of an end; a warning before it is of random weights."""
    *before, line = ended.err.strip().splitlines()
    expected = ("warning: the dense model does no better than chance", "progress: ")
    assert [one for one in before if not one.startswith(expected)] == []
    return line


def _check_end(case: Case, root: Path, ended: Ended, victim: Victim, number: int) -> None:
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert ended.status == (2 if victim == Victim.WORKER else expected), ended.err
    if case.keeps_old:
        assert case.is_whole(root)
    if ended.status == -signal.SIGKILL:
        return
    line = _last_word(ended)
    if victim == Victim.WORKER:
        assert "what was solved is kept: give the same command again" in line
    elif not case.is_done(root):
        logs = ("out.run", "out.recover") if case.keeps_old else ("out",)
        goes_on = any((root / name).exists() for name in logs)
        assert ("same command again to go on" in line) == goes_on, line
        assert ("nothing was done that could be kept" in line) == (not goes_on), line
    assert hidden(root, case.shown) == []


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_removed_its_log_is_known_to_be_saved(plan, tmp_path):
    root = tmp_path / "root"
    plan.begin(root)
    plan.run(root, Kill(plan.events))  # the last event is that the --json file is there
    assert (root / "out").exists()
    assert (root / "out.run" / "log.json").exists()
    other = run(root, [*plan.arguments, "--damp", "0.02", *outputs(root)])
    assert other.status == 2
    assert "is not empty" in other.err
    (root / "said.json").unlink(missing_ok=True)
    again = plan.run(root)
    assert again.status == 0
    assert (root / "said.json").exists()
    assert plan.wrong(root) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["both", "recovery"], indirect=True)
def test_a_recovery_that_was_killed_while_it_removed_its_log_is_known_to_be_saved(case, tmp_path):
    root = tmp_path / "root"
    case.begin(root)
    case.run(root, Kill(case.events))
    assert (root / "out.recover" / "report.json").exists() or (root / "out.run").exists()
    assert (root / "out.recover").exists()
    (root / "said.json").unlink(missing_ok=True)
    again = case.run(root)
    assert again.status == 0, again.err
    assert (root / "said.json").exists()
    assert case.wrong(root) == []


# ---- two at once -------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--restart",), ("--overwrite",)])
def test_a_second_run_to_one_output_is_refused_before_it_reads_its_model(more, tmp_path):
    root = tmp_path / "root"
    with RunLog(root / "out.run").held():
        asked = ("prune", "no-such-model", "--sparsity", "0.5", *more)
        ended = run(root, [*asked, *outputs(root)])
        assert ended.status == 2
        assert f"out.run (process {os.getpid()} on " in ended.err
    assert not root.exists()


def test_a_second_study_in_one_directory_is_refused_before_it_reads_its_model(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with Study(root / "out", {}).locked():
        ended = run(root, ["gap", "no-such-model", *outputs(root)])
        assert ended.status == 2
        assert f"out (process {os.getpid()} on " in ended.err
    assert list(root.iterdir()) == []


# ---- a full disk -------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("case", "refusal"),
    [
        *(("plan", refusal) for refusal in Refusal),
        ("stock", Refusal.FROM_NOW_ON),
        ("recovery", Refusal.ONCE),
        ("study_alone", Refusal.SHORT),
    ],
    indirect=["case"],
)
def test_a_full_disk_is_said_and_nothing_is_lost(case, refusal, tmp_path):
    at = random.Random(f"{case.arguments[0]} {refusal}").randrange(1, case.writes + 1)
    _fill_and_go_on(case, Full(at, refusal), tmp_path / "root")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["plan", "stock", "both", "recovery", "study_alone"], indirect=True
)
@pytest.mark.parametrize("refusal", Refusal)
def test_each_write_may_find_the_disk_full(case, refusal, tmp_path):
    for at in range(1, case.writes + 1):
        _fill_and_go_on(case, Full(at, refusal), tmp_path / f"{at}")
        shutil.rmtree(tmp_path / f"{at}")


def _fill_and_go_on(case: Case, full: Full, root: Path) -> None:
    case.begin(root)
    ended = case.run(root, full)
    _check_refusal(case, root, ended)
    if ended.status:
        again = case.run(root)
        assert again.status == 0, again.err
    assert case.wrong(root) == []


def _check_refusal(case: Case, root: Path, ended: Ended) -> None:
    """Look at what a command has said and left that may have found the disk full."""
    if ended.status == 0:
        return  # what failed was not needed: the number of the process in a lock
    assert ended.status == 2, ended.err
    line = _last_word(ended)
    assert line.startswith("error: cannot write")
    assert str(root) in line
    assert "make room" in line or "ulimit" in line
    if case.keeps_old:
        assert case.is_whole(root)
    assert hidden(root, case.shown) == []


@pytest.fixture
def small_disk(tmp_path):
    """Give a file system of so many bytes, and let it become as large as is needed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size: str) -> Path:
        remount = ("remount,",) if os.path.ismount(place) else ("",)
        command = ["mount", "-t", "tmpfs", "-o", f"{remount[0]}size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield mounted
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts file systems")
@pytest.mark.parametrize("case", ["plan", "stock", "study_alone"], indirect=True)
def test_a_small_file_system_is_filled_and_then_made_larger(case, small_disk, tmp_path):
    _fill_a_file_system(case, 0, small_disk)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts file systems")
@pytest.mark.parametrize("case", ["plan", "stock", "study"], indirect=True)
@pytest.mark.parametrize("seed", range(1, 11))
def test_file_systems_of_thirty_sizes_are_filled_and_then_made_larger(case, seed, small_disk):
    _fill_a_file_system(case, seed, small_disk)


def _fill_a_file_system(case: Case, seed: int, small_disk) -> None:
    before = sum(file.stat().st_size + 4096 for file in case.before.iterdir()) if case.before else 0
    needed = sum(len(data) if isinstance(data, bytes) else 4096 for data in case.result.values())
    size = before + random.Random(seed).randrange(8192, needed)
    root = small_disk(str(size)) / "root"
    case.begin(root)
    ended = case.run(root)
    _check_refusal(case, root, ended)
    small_disk("64m")
    again = case.run(root)
    assert again.status == 0, again.err
    assert case.wrong(root) == []
