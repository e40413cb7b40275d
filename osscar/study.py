"""The optimality-gap study: every problem, at every sparsity, by every backend, one row each.

A study is a directory.  Problems lie in it as files that anyone can solve again, and each answer is
written as a small file of its own as soon as it is known, so that a killed study loses no more than
the solves in flight and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import solvers
from osscar.errors import OptionError, StudyError
from osscar.progress import stage
from osscar.rows import WINDOW, Instance, Row, read_row, window_name, write_csv, write_json
from osscar.workers import ROWS, Task, load_problem, solve_all, solve_task
from solvers.windows import borderline_window, random_window, window_problem

HEURISTICS = ("magnitude", "wanda", "greedy", "multistage", "local_search")
DEFAULT_BACKENDS = (*HEURISTICS, "perspective", "branch_and_bound")

SETTINGS_FILE = "study.json"
RESULTS_FILE = "results.csv"
_PROBLEMS = "problems"
_SUFFIX = ".safetensors"
_INCUMBENT = "local_search"
"""Whose answer the units outside a window are held at."""


@dataclass(frozen=True)
class StudyDesign:
    """What a study solves.

    Parameters
    ----------
    sparsities
        Shares of the units to remove, each above 0 and below 1.
    backends
        Registered names; those that prove optimality run only on problems of `exact_units` units
        or fewer.
    exact_units
        The most units of a problem that is given to an exact backend.
    window_units, windows
        Draw this many windows of that many units from every larger problem, at every sparsity;
        no windows if `window_units` is None.
    time_limit, gap_tolerance
        Seconds for one exact solve, and the relative gap at which it may stop.
    seed
        Of the windows.

    Raises
    ------
    OptionError
        If a number makes no sense.
    BackendError
        If a backend does not exist.
    """

    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    exact_units: int = 64
    window_units: int | None = None
    windows: int = 3
    time_limit: float = 60.0
    gap_tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                raise OptionError(f"sparsity is {sparsity}; give shares above 0 and below 1")
        if not self.sparsities or not self.backends:
            raise OptionError("a study needs at least one sparsity and one backend")
        for name in self.backends:
            solvers.backend_class(name)
        if self.window_units is not None and self.window_units < 2:
            raise OptionError(f"units is {self.window_units}; a window has at least 2")
        if self.windows < 1 or self.exact_units < 1:
            raise OptionError(
                f"windows is {self.windows} and exact units {self.exact_units}; give at least 1"
            )
        if not 0 < self.time_limit < math.inf:
            raise OptionError(f"time limit is {self.time_limit}; give seconds above 0")
        if not 0 <= self.gap_tolerance < 1:
            raise OptionError(f"gap tolerance is {self.gap_tolerance}; give a share below 1")

    def keep(self, units: int, sparsity: float) -> int:
        """Return how many of `units` stay: at least one, and at least one goes."""
        return max(1, min(units - 1, units - round(sparsity * units)))


class Study:
    """A directory of problems and rows.

    Parameters
    ----------
    directory
        Where it lies; `capture` makes it.
    source
        Where the problems come from, in full: whoever goes on with a study must ask for the same.

    Raises
    ------
    StudyError
        If the directory holds something else, or a study of other problems.
    """

    def __init__(self, directory: Path, source: Mapping[str, Any]) -> None:
        self.directory = directory
        self.source = dict(source)
        self._settings = directory / SETTINGS_FILE
        if self._settings.exists():
            self._check_same()
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise StudyError(f"{directory} is not empty and holds no study; give another --out")

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The captured problems, none before `capture` has finished; windows are not listed."""
        if not self._settings.exists():
            return ()
        return tuple(Instance(**entry) for entry in self._read_settings()["instances"])

    def capture(self, problems: Iterable[tuple[str, solvers.SubsetProblem]]) -> None:
        """Write the problems, given with their kinds; a new directory goes again if that fails.

        Raises
        ------
        StudyError
            If there is none, or two have one name.
        """
        remaining = iter(problems)
        first = next(remaining, None)
        if first is None:
            raise StudyError("there is no problem to study")
        made = not self.directory.exists()
        try:
            self._make_directories()
            instances: dict[str, Instance] = {}
            for kind, problem in itertools.chain([first], remaining):
                if problem.name in instances:
                    raise StudyError(f"two problems are called {problem.name!r}; rename one")
                instances[problem.name] = self._write_problem(kind, problem)
            self._write_settings(tuple(instances.values()))
        except BaseException:
            if made:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _make_directories(self) -> None:
        try:
            for name in (_PROBLEMS, ROWS):
                (self.directory / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"cannot write {self.directory}: {error.strerror}") from error
        self._write_settings(())

    def run(self, design: StudyDesign, jobs: int = 1) -> tuple[Row, ...]:
        """Solve what has not been solved yet, and return all rows of the design.

        Parameters
        ----------
        design
            What to solve.
        jobs
            Processes at once; the cores are shared out evenly among them.

        Raises
        ------
        OptionError
            If `jobs` is not positive.
        StudyError
            If a worker was killed; what was solved until then is kept.
        """
        if jobs < 1:
            raise OptionError(f"jobs is {jobs}; give at least 1")
        layers = [i for i in self.instances if i.units > 1]
        tasks = [task for layer in layers for task in self._tasks(design, layer)]
        rows = self._solve_all(tasks, jobs)
        if design.window_units is not None:
            large = [layer for layer in layers if layer.units > design.window_units]
            tasks = [task for layer in large for task in self._window_tasks(design, layer)]
            rows += self._solve_all(tasks, jobs)
        write_csv(self.directory / RESULTS_FILE, rows)
        return tuple(rows)

    def _tasks(self, design: StudyDesign, layer: Instance) -> Iterator[Task]:
        for sparsity in design.sparsities:
            keep = design.keep(layer.units, sparsity)
            yield from self._tasks_at(design, layer, keep, sparsity)

    def _tasks_at(
        self, design: StudyDesign, instance: Instance, keep: int, sparsity: float
    ) -> Iterator[Task]:
        for name in design.backends:
            backend = solvers.backend_class(name)
            if backend.kind is solvers.Kind.EXACT and instance.units > design.exact_units:
                continue
            known = {f.name for f in dataclasses.fields(cast(Any, backend))}
            limits = {"time_limit": design.time_limit, "gap_tolerance": design.gap_tolerance}
            exact = backend.kind is solvers.Kind.EXACT
            options = {k: v for k, v in limits.items() if exact and k in known}
            yield Task(self.directory, instance, keep, sparsity, name, options)

    def _window_tasks(self, design: StudyDesign, layer: Instance) -> Iterator[Task]:
        """Draw windows around the incumbent of each sparsity; the first holds its borderline."""
        assert design.window_units is not None
        for sparsity in design.sparsities:
            keep = design.keep(layer.units, sparsity)
            generator = torch.Generator().manual_seed(design.seed)
            incumbent = solve_task(Task(self.directory, layer, keep, sparsity, _INCUMBENT))
            if incumbent.error:
                continue
            support = torch.tensor(incumbent.support)
            for index in range(design.windows):
                name = window_name(layer.name, keep, design.window_units, design.seed, index)
                whole = load_problem(self.directory / layer.file).with_keep(keep)
                units = (
                    random_window(whole, support, design.window_units, generator)
                    if index
                    else borderline_window(whole, support, design.window_units)
                )
                part = dataclasses.replace(window_problem(whole, support, units), name=name)
                window = self._write_problem(WINDOW, part)
                yield from self._tasks_at(design, window, part.keep, sparsity)

    def _write_problem(self, kind: str, problem: solvers.SubsetProblem) -> Instance:
        file = f"{_PROBLEMS}/{_file_name(problem.name)}{_SUFFIX}"
        if not (self.directory / file).exists():
            problem.save(self.directory / file)
        return Instance(problem.name, kind, file, problem.units, problem.width)

    def _solve_all(self, tasks: Sequence[Task], jobs: int) -> list[Row]:
        pending = [task for task in tasks if not task.file.exists()]
        with stage("solving", total=len(pending)) as bar:
            for _ in solve_all(pending, min(jobs, max(1, len(pending)))):
                bar.advance()
        return [read_row(task.file) for task in tasks]

    def _check_same(self) -> None:
        before = self._read_settings()["source"]
        if before == json.loads(json.dumps(self.source)):
            return
        changed = sorted(k for k in before | self.source if before.get(k) != self.source.get(k))
        raise StudyError(
            f"{self.directory} holds a study of other problems ({', '.join(changed)} differ); "
            "ask for the same, or give another --out"
        )

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self._settings.read_text(encoding="utf-8"))
            settings["source"], settings["instances"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{self._settings} is not a study's settings: {error}") from error
        return cast("dict[str, Any]", settings)

    def _write_settings(self, instances: Sequence[Instance]) -> None:
        entries = [dataclasses.asdict(instance) for instance in instances]
        write_json(self._settings, {"source": self.source, "instances": entries})


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "problem"
