"""Studies on a Ray cluster: the same files as on one machine, also where a worker is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from osscar.base.errors import JournalError, MissingDependency
from osscar.study.cluster import RayCluster, connected
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.jobs import solve_task
from tests.osscar.interrupted_cases import _problem
from tests.osscar.interruptions import content

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that nothing takes, however busy the machine is."""

DESIGN = StudyDesign(
    sparsities=(0.4, 0.6), backends=("greedy", "local_search", "branch_and_bound"), exact_units=20
)
UNITS = (18, 22, 26)


def _study(place: Path) -> Study:
    study = Study(place, {"of": "tests"})
    study.capture(("units", _problem(units)) for units in UNITS[:2])
    return study


class Ray:
    """Solves in this process; workers that are given certain problems are lost."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause):
            self.cause = cause

    def __init__(self, lost=()):
        self.exceptions, self.lost, self.asked = self, lost, []

    def nodes(self):
        resources = ({"CPU": 3.0, "memory": 10.0}, {"CPU": 1.0, "memory": 7.0}, {"CPU": 8.0})
        alive = (True, True, False)
        return [{"Resources": r, "Alive": a} for r, a in zip(resources, alive, strict=True)]

    def remote(self, **options):
        self.asked.append(options)
        return lambda function: self

    def options(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(remote=lambda task: task)

    def wait(self, tasks):
        return tasks[:1], tasks[1:]

    def get(self, tasks):
        if tasks[0].asked.backend in self.lost:
            raise self.RayError
        try:
            return [solve_task(task) for task in tasks]
        except JournalError as error:
            raise self.RayTaskError(error) from error


def test_a_cluster_and_any_executor_solve_a_study_to_the_same_files(tmp_path, monkeypatch):
    study, alone = _study(tmp_path / "here"), _study(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    ray = Ray()
    cluster = RayCluster(ray)
    assert cluster.workers == 4
    records = Study(Path("here"), study.source).run(DESIGN, solve=cluster.solve)
    with ThreadPoolExecutor(1) as executor:
        alone.run(DESIGN, solve=lambda tasks: executor.map(solve_task, tasks))
    assert content(study.directory) == content(alone.directory)
    assert not [record.error for record in records if record.error]
    assert ray.asked[:2] == [{"num_cpus": 1, "max_retries": 3}, {"memory": 10.0}]


def test_what_a_task_raises_and_a_lost_worker_end_the_study_and_what_was_solved_is_kept(tmp_path):
    study = _study(tmp_path / "study")
    with pytest.raises(JournalError, match=r"a worker was killed.*is kept"):
        study.run(DESIGN, solve=RayCluster(Ray(lost=["branch_and_bound"])).solve)
    records = list((study.directory / "records").glob("*.json"))
    assert records
    good = records[0].read_text()
    records[0].write_text("{")
    with pytest.raises(JournalError, match="is not a record of a study"):
        study.run(DESIGN, solve=RayCluster(Ray()).solve)
    records[0].write_text(good)
    assert all(not record.error for record in study.run(DESIGN))


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingDependency, match=r"pip install 'osscar\[ray\]'"),
        connected("auto"),
    ):
        pass


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
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::solve_task")
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_study_on_ray_is_that_of_one_machine_though_a_worker_is_killed(ray_cluster, tmp_path):
    address, head = ray_cluster
    problems = [tmp_path / f"p{units}.safetensors" for units in UNITS]
    for units, file in zip(UNITS, problems, strict=True):
        _problem(units).save(file)
    arguments = (
        *("gap", *map(str, problems), "--sparsity", "0.4,0.6", "--exact-units", "30"),
        *(
            "--backends",
            "greedy,local_search,branch_and_bound",
            "--window-units",
            "8",
            "--windows",
            "1",
        ),
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
