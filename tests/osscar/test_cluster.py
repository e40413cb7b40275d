"""Studies on a Ray cluster: the same files as on one machine, also where a worker is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from osscar.base.errors import JournalError
from osscar.cli import main
from osscar.study.cluster import RayCluster
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from osscar.study.jobs import solve_task
from tests.osscar.forked import PATIENCE, forked
from tests.osscar.interrupted_cases import problem
from tests.osscar.interruptions import content

DESIGN = StudyDesign(
    sparsities=(0.4,), backends=("greedy", "local_search", "branch_and_bound"), exact_units=20
)


def studied(place: Path) -> Study:
    study = Study(place, {"of": "tests"})
    study.capture(("units", problem(units)) for units in (18, 22))
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
        except ArithmeticError as error:
            raise self.RayTaskError(error) from error


def test_a_cluster_and_any_executor_solve_a_study_to_the_same_files(tmp_path, monkeypatch):
    study, alone = studied(tmp_path / "here"), studied(tmp_path / "there")
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


def test_what_a_task_raises_and_a_lost_worker_end_the_study_and_what_was_solved_is_kept(
    tmp_path, monkeypatch
):
    study = studied(tmp_path / "study")
    with pytest.raises(JournalError, match=r"a worker was killed.*is kept"):
        study.run(DESIGN, solve=RayCluster(Ray(lost=["branch_and_bound"])).solve)
    assert study.kept == f"2 problems and 2 answers are kept in {study.directory}"
    with monkeypatch.context() as patch:
        patch.setattr("solvers.solve", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.run(DESIGN, solve=RayCluster(Ray()).solve)
    assert all(not record.error for record in study.run(DESIGN))


@pytest.mark.slow
def test_a_study_on_ray_is_that_of_one_machine(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    root = Path(__file__).parents[2]
    for name, value in {
        **{"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        **{"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "900"},
    }.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "p18.safetensors"
    problem(18).save(file)
    command = (sys.executable, "-m", "osscar", "gap", str(file), "--sparsity", "0.4,0.6")
    for out, more in (("there", ("--ray", "local")), ("here", ("--jobs", "1"))):
        subprocess.run([*command, "--out", str(tmp_path / out), *more], check=True)
    assert content(tmp_path / "there") == content(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("victim", ["worker", "command"])
def test_a_pool_ends_with_its_command_and_the_command_with_its_pool(victim, tmp_path):
    problem(22).save(tmp_path / "p22.safetensors")

    def study():
        os.setsid()
        options = ("--out", "study", "--jobs", "2", "--sparsity", "0.4,0.6", "--time-limit", "3600")
        sys.argv = ["osscar", "gap", "p22.safetensors", *options]
        main()

    process = forked(study, tmp_path)

    def session():
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if _session_of(pid) == process.pid and pid != process.pid]

    def workers():
        return [
            pid for pid in session() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def wait_for(condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    wait_for(workers)
    os.kill(workers()[0] if victim == "worker" else process.pid, signal.SIGKILL)
    assert process.wait() == (2 if victim == "worker" else -signal.SIGKILL)
    assert ("a worker was killed" in process.stderr) == (victim == "worker")
    wait_for(lambda: not session())


def _session_of(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
