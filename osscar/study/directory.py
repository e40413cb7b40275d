"""The optimality-gap study: every problem, at every sparsity, by every backend, one record each.

A study is a directory.  Problems lie in it as files that anyone can solve again, and each answer is
written as a small file of its own as soon as it is known, so that a killed study loses no more than
the solves in flight and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import ConfigDict, JsonValue

import solvers
from osscar.base.errors import FileError, OptionError, OutputError, StudyError
from osscar.base.files import (
    PARTIAL,
    digest,
    file_digest,
    reason_of,
    remedy,
    resolved,
    stored,
    write_json,
)
from osscar.base.inputs import file_name
from osscar.base.json_files import MEGABYTE, STRICT, read_json
from osscar.base.locks import LOCK_FILE, file_lock
from osscar.base.progress import stage
from osscar.base.signals import uninterrupted
from osscar.preparation.fingerprint import Fingerprint
from osscar.study.design import StudyDesign, is_count
from osscar.study.jobs import (
    RECORDS,
    Executor,
    Processes,
    Task,
    affordable_jobs,
    load_problem,
    solve_task,
)
from osscar.study.records import WINDOW, Instance, Record, window_name, write_csv
from solvers.closed_forms.windows import borderline_window, random_window, window_problem

SETTINGS_FILE = "study.json"
RESULTS_FILE = "results.csv"
_PROBLEMS = "problems"
_SUFFIX = ".safetensors"
_READABLE_NAME = 80
"""Characters of a problem's name that go into the name of its file."""

_INCUMBENT = "local_search"
"""Whose answer the units outside a window are held at."""


@dataclass(frozen=True)
class _Settings:
    """``study.json``: where the problems come from, of which model, and which there are."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    schema: Literal["osscar.study/3"]
    source: dict[str, JsonValue]
    dense: Fingerprint | None
    instances: tuple[Instance, ...]
    windows: tuple[Instance, ...]


_SCHEMA: Literal["osscar.study/3"] = "osscar.study/3"

_LONGEST_SETTINGS = 64 * MEGABYTE


class Study:
    """A directory of problems and records.

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
    OutputError
        If its name is none that can be written; see `osscar.base.files.resolved`.
    """

    def __init__(self, directory: Path, source: Mapping[str, Any]) -> None:
        self.directory = directory = Path(file_name(directory, "the study", "its directory"))
        if not isinstance(source, Mapping):
            raise OptionError(f"the source is a {type(source).__name__}; give a mapping")
        self.source = dict(source)
        self._settings = directory / SETTINGS_FILE
        self._made = self._held = False
        try:
            if directory.is_file():
                raise StudyError(f"{directory} is a file and holds no study; give another --out")
            there = {path.name for path in directory.iterdir()} if directory.exists() else set()
        except OSError as error:
            raise StudyError(f"cannot look into {directory}: {error.strerror}") from error
        if SETTINGS_FILE in there:
            self._check_same()
        elif there - {LOCK_FILE} and LOCK_FILE not in there:
            raise StudyError(f"{directory} is not empty and holds no study; give another --out")
        resolved(directory)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The captured problems, none before `capture` has finished; windows are not listed."""
        return self._read_settings().instances if self._settings.exists() else ()

    @property
    def trivial(self) -> tuple[Instance, ...]:
        """Those captured problems in which there is nothing to choose: they have one unit."""
        return tuple(instance for instance in self.instances if instance.units == 1)

    @property
    def kept(self) -> str:
        """What a study that ends now leaves, in words."""
        if not self.instances:
            return "nothing was captured yet"
        return f"what was solved is kept in {self.directory}"

    def affordable_jobs(self) -> int:
        """Return how many processes may solve at once: as many as cores, if memory allows."""
        files = [self.directory / instance.file for instance in self.instances]
        try:
            return affordable_jobs(max((file.stat().st_size for file in files), default=0))
        except OSError as error:
            raise StudyError(f"cannot read {error.filename}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes from writing to the directory while the block runs.

        `capture` and `run` lock for themselves; lock around them to do several things as one.  A
        directory that was made for this, and into which nothing was captured, goes again.

        Raises
        ------
        OutputError
            If another process is at work there, or the directory cannot be written.
        """
        if self._held:
            yield
            return
        self._make_directory()
        try:
            with file_lock(self.directory / LOCK_FILE, self.directory):
                self._held = True
                try:
                    if self._settings.exists():
                        self._check_same()
                    yield
                finally:
                    self._held = False
                    with uninterrupted():
                        self._tidy()
        except OutputError:
            if self._made:  # where not even a lock can be written
                with suppress(OSError):
                    self.directory.rmdir()
            raise

    def _tidy(self) -> None:
        """Remove what was being written, and a directory into which nothing was captured."""
        if self._made and not self._settings.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        for place in (self.directory, self.directory / _PROBLEMS, self.directory / RECORDS):
            for partial in place.glob(f"*{PARTIAL}"):
                with suppress(OSError):
                    partial.unlink()

    def capture(
        self,
        problems: Iterable[tuple[str, solvers.SubsetProblem]],
        dense: Fingerprint | None = None,
    ) -> None:
        """Write the problems, given with their kinds; a new directory goes again if that fails.

        Parameters
        ----------
        problems
            Each with its kind.
        dense
            What tells the model and the data that they are posed on from others, for `check_dense`.

        Raises
        ------
        StudyError
            If there is none, or two have one name, or none leaves a choice.
        """
        with self.locked():
            self._write_settings((), (), dense)
            try:
                self._capture(problems)
            except BaseException:
                if self._made:
                    self._settings.unlink()  # so that the directory goes
                raise

    def check_dense(self, dense: Fingerprint) -> None:
        """Refuse a model or data that are not those which the problems were posed on.

        Raises
        ------
        StudyError
            Saying in what they differ.
        """
        before = self._read_settings().dense
        difference = None if before is None else dense.difference(before)
        if difference is not None:
            raise StudyError(
                f"{self.directory} holds problems of another model: {difference}; ask for the "
                "same, or give another --out"
            )

    def _capture(self, problems: Iterable[tuple[str, solvers.SubsetProblem]]) -> None:
        self._make_parts()
        instances: dict[str, Instance] = {}
        for kind, problem in problems:
            if problem.name in instances:
                raise StudyError(f"two problems are called {problem.name!r}; rename one")
            instances[problem.name] = self._write_problem(kind, problem)
        if not instances:
            raise StudyError("there is no problem to study")
        if all(instance.units == 1 for instance in instances.values()):
            raise StudyError(
                f"there is nothing to choose in {', '.join(instances)}: a problem of one unit has "
                "one support; give problems of at least 2 units"
            )
        self._write_settings(tuple(instances.values()), (), self._read_settings().dense)

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True)
            self._made = True
        except FileExistsError:
            return  # what it holds has been looked at
        except OSError as error:
            reason = f"{reason_of(error)}{remedy(error)}"
            raise OutputError(f"cannot write {self.directory}: {reason}") from error

    def _make_parts(self) -> None:
        """Make the directories in the directory, and remove what a killed study was writing."""
        try:
            for name in (_PROBLEMS, RECORDS):
                (self.directory / name).mkdir(exist_ok=True)
        except OSError as error:
            reason = f"{reason_of(error)}{remedy(error)}"
            raise OutputError(
                f"cannot write {error.filename or self.directory}: {reason}"
            ) from error
        self._tidy()

    def run(
        self, design: StudyDesign, jobs: int = 1, *, cluster: Executor | None = None
    ) -> tuple[Record, ...]:
        """Solve what has not been solved yet, and return all records of the design.

        What earlier runs have recorded is recomputed: losses from their supports, bounds from their
        certificates.

        Parameters
        ----------
        design
            What to solve.
        jobs
            Processes at once; the cores are shared out evenly among them.
        cluster
            Who solves instead of processes of this machine, such as
            `osscar.study.cluster.RayCluster`.

        Raises
        ------
        OptionError
            If `jobs` is not positive.
        StudyError
            If nothing has been captured, a file of the study is damaged or has been replaced, a
            record claims what is not true, or a worker was killed; what was solved until then is
            kept.
        OutputError
            If another process is at work in the directory, or it cannot be written.
        """
        if not isinstance(design, StudyDesign):
            raise OptionError(f"the design is a {type(design).__name__}; give a StudyDesign")
        if not is_count(jobs, 1):
            raise OptionError(f"jobs is {jobs!r}; give at least 1")
        executor = Processes(jobs) if cluster is None else cluster
        with self.locked():
            layers = [instance for instance in self.instances if instance.units > 1]
            if not layers:
                raise StudyError(f"{self.directory} holds no problem yet; capture some first")
            self._make_parts()
            tasks = [task for layer in layers for task in self._tasks(design, layer)]
            records = self._solve_all(tasks, executor)
            if design.window_units is not None:
                large = [layer for layer in layers if layer.units > design.window_units]
                tasks = [task for layer in large for task in self._window_tasks(design, layer)]
                records += self._solve_all(tasks, executor)
            write_csv(self.directory / RESULTS_FILE, records)
        return tuple(records)

    def _tasks(self, design: StudyDesign, layer: Instance) -> Iterator[Task]:
        for keep, sparsities in design.keeps(layer.units).items():
            yield from self._tasks_at(design, layer, keep, sparsities)

    def _tasks_at(
        self, design: StudyDesign, instance: Instance, keep: int, sparsities: tuple[float, ...]
    ) -> Iterator[Task]:
        for name in design.backends:
            backend = solvers.backend_class(name)
            if backend.kind is solvers.BackendKind.EXACT and instance.units > design.exact_units:
                continue
            known = {f.name for f in dataclasses.fields(cast(Any, backend))}
            limits = {
                "time_limit": float(design.time_limit),
                "gap_tolerance": float(design.gap_tolerance),
            }
            exact = backend.kind is solvers.BackendKind.EXACT
            options = {k: v for k, v in limits.items() if exact and k in known}
            yield Task(self.directory, instance, keep, sparsities, name, options)

    def _window_tasks(self, design: StudyDesign, layer: Instance) -> Iterator[Task]:
        """Draw windows around the incumbent of each sparsity; the first holds its borderline."""
        assert design.window_units is not None
        for keep, sparsities in design.keeps(layer.units).items():
            generator = torch.Generator().manual_seed(design.seed)
            incumbent = solve_task(Task(self.directory, layer, keep, sparsities, _INCUMBENT))
            if incumbent.error:
                continue
            support = torch.tensor(incumbent.support)
            for index in range(design.windows):
                name = window_name(layer.name, keep, design.window_units, design.seed, index)
                whole = load_problem(self.directory, layer).with_keep(keep)
                units = (
                    random_window(whole, support, design.window_units, generator)
                    if index
                    else borderline_window(whole, support, design.window_units)
                )
                part = dataclasses.replace(window_problem(whole, support, units), name=name)
                yield from self._tasks_at(design, self._window(part), part.keep, sparsities)

    def _window(self, problem: solvers.SubsetProblem) -> Instance:
        """Return a window of the study, which is written when it is drawn for the first time."""
        windows = self._read_settings().windows
        for window in windows:
            if window.name == problem.name:
                return window
        window = self._write_problem(WINDOW, problem)
        settings = self._read_settings()
        self._write_settings(settings.instances, (*settings.windows, window), settings.dense)
        return window

    def _write_problem(self, kind: str, problem: solvers.SubsetProblem) -> Instance:
        if not problem.name.isprintable():
            raise StudyError(f"a problem is called {problem.name!r}; give it a name in plain text")
        file = f"{_PROBLEMS}/{_file_name(problem.name)}{_SUFFIX}"
        path = self.directory / file
        with stored(path):
            problem.save(path)
        return Instance(problem.name, kind, file, problem.units, problem.width, file_digest(path))

    def _solve_all(self, tasks: Sequence[Task], executor: Executor) -> list[Record]:
        records: dict[Path, Record] = {}
        with stage("solving", total=len(tasks)) as bar:
            for task, record in executor.solve_all(tasks):
                records[task.file] = record
                bar.advance()
        return [records[task.file] for task in tasks]

    def _check_same(self) -> None:
        before = self._read_settings().source
        if before == json.loads(json.dumps(self.source)):
            return
        changed = sorted(k for k in before | self.source if before.get(k) != self.source.get(k))
        raise StudyError(
            f"{self.directory} holds a study of other problems ({', '.join(changed)} differ); "
            "ask for the same, or give another --out"
        )

    def _read_settings(self) -> _Settings:
        try:
            settings = read_json(self._settings, _Settings, limit=_LONGEST_SETTINGS)
            for instance in (*settings.instances, *settings.windows):
                _check_instance(instance, self._settings)
        except FileError as error:
            raise StudyError(
                f"{self._settings} is not a study's settings, or those of a study that another "
                f"version made: {error.reason}; give another --out"
            ) from error
        return settings

    def _write_settings(
        self,
        instances: Sequence[Instance],
        windows: Sequence[Instance],
        dense: Fingerprint | None,
    ) -> None:
        settings = _Settings(_SCHEMA, self.source, dense, tuple(instances), tuple(windows))
        write_json(self._settings, dataclasses.asdict(settings), indent=1)


def _check_instance(instance: Instance, file: Path) -> None:
    """Refuse a problem that this study cannot have written."""
    named = instance.name.isprintable() and instance.kind.isprintable()
    place = f"{_PROBLEMS}/{_file_name(instance.name)}{_SUFFIX}"
    if not named or instance.file != place or not 1 <= instance.units < 2**31:
        raise FileError(file, f"{instance.name!r} is not a problem of it")


def _file_name(name: str) -> str:
    """Return a name for a file: what can be read of `name`, and what tells it from all others."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:_READABLE_NAME].strip("-.") or "problem"
    return f"{readable}-{digest(name)[:10]}"
