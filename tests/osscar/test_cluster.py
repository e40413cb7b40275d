"""Studies on a Ray cluster: the same files as on one machine, also where a worker is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import osscar.cli
import solvers
from osscar.base.errors import MissingDependency, StudyError
from osscar.study import cluster
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.jobs import Task
from tests.osscar.interrupted_cases import _problem
from tests.osscar.interruptions import content

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that nothing takes, however busy the machine is."""

DESIGN = StudyDesign(
    sparsities=(0.4, 0.6), backends=("greedy", "local_search", "branch_and_bound"), exact_units=30
)
UNITS = (18, 22, 26)


@pytest.fixture
def tasks(tmp_path):
    """The tasks of a small study that lies in a directory."""
    study = _study(tmp_path / "here")
    return [t for layer in study.instances for t in study._tasks(DESIGN, layer)]


def _study(place: Path) -> Study:
    study = Study(place, {"of": "tests"})
    study.capture(("units", _problem(units)) for units in UNITS[:2])
    study._make_parts()
    return study


def _sent(task: Task, **changed: object) -> tuple[str, bytes, bytes]:
    """Let this process be the worker."""
    asked = {**dataclasses.asdict(cluster._Asked.of(task)), **changed}
    files = (task.file, task.certificate_file)
    known = (file.read_bytes() if file.exists() else b"" for file in files)
    return cluster._solve(
        json.dumps(asked), (task.directory / task.instance.file).read_bytes(), *known
    )


def test_a_worker_writes_what_this_process_would(tasks, tmp_path):
    other = _study(tmp_path / "there")
    for task in tasks:
        record = cluster._kept(task, *_sent(task))
        assert record == task.read()
        assert not record.error
    other.run(DESIGN)
    assert content(tasks[0].directory / "records") == content(tmp_path / "there" / "records")


def test_what_is_known_already_is_recomputed_and_not_written_again(tasks):
    [task] = [t for t in tasks if t.backend == "branch_and_bound"][:1]
    first = cluster._kept(task, *_sent(task))
    text, written, certificate = _sent(task)
    assert (written, certificate) == (b"", b"")
    assert cluster._kept(task, text, written, certificate) == first


def test_an_answer_that_is_not_true_is_refused(tasks):
    task = tasks[0]
    text, written, certificate = _sent(task)
    record = json.loads(written)
    cluster._kept(task, text, written, certificate)
    task.file.write_text(json.dumps({**record, "loss": record["loss"] / 2}))
    with pytest.raises(StudyError, match="an answer that is not true"):
        cluster._kept(task, *_sent(task))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"versions": {"osscar": "0.0.1"}}, "a worker has osscar .*, and 0.0.1 asks"),
        ({"keep": 0}, "keep"),
        ({"backend": "nobody"}, "nobody"),
    ],
)
def test_a_worker_that_cannot_says_why(changed, message, tasks):
    with pytest.raises((StudyError, solvers.SolverError), match=message):
        cluster._kept(tasks[0], *_sent(tasks[0], **changed))
    assert not tasks[0].file.exists()


def test_another_problem_or_another_answer_is_refused(tasks):
    first, *_, last = tasks
    with pytest.raises(StudyError, match="record of another solve"):
        cluster._kept(last, *_sent(first))
    assert not last.file.exists()
    (first.directory / first.instance.file).write_bytes(b"something else")
    with pytest.raises(StudyError, match="not the problem that the study was made with"):
        cluster._kept(first, *_sent(first))


def test_what_no_machine_holds_is_refused(tasks):
    class Ray:
        @staticmethod
        def put(data: bytes) -> bytes:
            return data

    small = cluster.RayCluster(1, 1e6, Ray())
    with pytest.raises(StudyError, match="the largest machine of the cluster has"):
        cluster._Problems(small).of(tasks[0])


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(MissingDependency, match=r"pip install 'osscar\[ray\]'"),
        cluster.connected("auto"),
    ):
        pass


def test_processes_and_a_cluster_exclude_each_other(monkeypatch, capsys, tmp_path):
    command = [
        "osscar",
        "gap",
        "demo",
        "--out",
        str(tmp_path / "x"),
        "--ray",
        "auto",
        "--jobs",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        osscar.cli.main()
    assert "--jobs are processes of this machine, and --ray has others" in capsys.readouterr().err


# ---- a real cluster ----------------------------------------------------------------------


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",  # as a worker has: sums are in the order of threads
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # or workers starve on a machine that is busy
    "RAY_raylet_start_wait_time_s": str(PATIENCE),
}


@pytest.fixture
def ray_cluster(tmp_path):
    """A cluster of two workers on this machine: its address, and the process that began it."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets are short
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *("--port", str(port), "--num-cpus", "2", "--include-dashboard=false"),
            *("--object-store-memory", str(10**8), "--memory", str(4 * 10**9)),
            *("--temp-dir", place),
        ],
        env=ENVIRONMENT,
        stdout=(tmp_path / "ray.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        end = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", head.pid
    finally:
        family = [head.pid, *descendants(head.pid)]
        for pid in family:
            _kill(pid)
        head.wait()
        shutil.rmtree(place, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _at_work(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_solve")
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_study_on_ray_is_that_of_one_machine_though_a_worker_is_killed(ray_cluster, tmp_path):
    address, head = ray_cluster
    problems = [tmp_path / f"p{units}.npz" for units in UNITS]
    for units, file in zip(UNITS, problems, strict=True):
        _problem(units).save(file)
    arguments = (
        *("gap", *map(str, problems), "--sparsity", "0.4,0.6", "--exact-units", "30"),
        *("--backends", "greedy,local_search,branch_and_bound", "--units", "8", "--windows", "1"),
    )
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not killed and not over.is_set():
            for pid in filter(_at_work, descendants(head)):
                _kill(pid)
                killed.append(pid)
                return
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    ended = [
        subprocess.run(
            [sys.executable, "-m", "osscar", *arguments, "--out", str(tmp_path / out), *more],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=PATIENCE,
        )
        for out, more in (("there", ("--ray", address)), ("here", ("--jobs", "1")))
    ]
    over.set()
    killer.join()
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    assert killed
    found, expected = content(tmp_path / "there"), content(tmp_path / "here")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
