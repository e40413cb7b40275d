"""Studies on a Ray cluster: the same files as on one machine, also where a worker is lost."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from osscar.base.errors import JournalError
from osscar.study.directory import Study
from osscar.study.jobs import RayCluster, solve_task
from osscar.study.records import StudyDesign
from tests.osscar.interrupted_cases import problem
from tests.osscar.interruptions import content

DESIGN = StudyDesign(
    sparsities=(0.4,), backends=("greedy", "local_search", "branch_and_bound"), exact_units=20
)


class Ray:
    """Solves in this process; workers that are given a certain problem are lost."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause):
            self.cause = cause

    def __init__(self, lost=""):
        self.exceptions, self.lost = self, lost

    def nodes(self):
        return [{"Resources": {"CPU": 3.0, "memory": 10.0}, "Alive": True}]

    def remote(self, **options):
        return lambda function: self

    def options(self, **options):
        return types.SimpleNamespace(remote=lambda task: task)

    def wait(self, tasks):
        return tasks[:1], tasks[1:]

    def get(self, tasks):
        if tasks[0].asked.backend == self.lost:
            raise self.RayError
        try:
            return [solve_task(task) for task in tasks]
        except ArithmeticError as error:
            raise self.RayTaskError(error) from error


def test_what_a_task_raises_and_a_lost_worker_end_the_study_and_what_was_solved_is_kept(
    tmp_path, monkeypatch
):
    study = Study(tmp_path / "study", {"of": "tests"})
    study.capture(("units", problem(units)) for units in (18, 22))
    with pytest.raises(JournalError, match=r"a worker was killed.*is kept"):
        study.run(DESIGN, solve=RayCluster(Ray("branch_and_bound")).solve)
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
