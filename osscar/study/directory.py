"""The optimality-gap study: every problem, at every sparsity, by every backend, one record each.

A study is a journal.  Problems lie in it as files that anyone can solve again, and each answer is
written as a small file of its own as soon as it is known, so that a killed study loses no more than
the solves in flight and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast

import torch
from pydantic import with_config

import solvers
from osscar.base.errors import JournalError
from osscar.base.files import atomic_write, digest, file_digest, resolved
from osscar.base.inputs import checked, count_from, file_name
from osscar.base.json_files import MEGABYTE, STRICT
from osscar.base.printable import pluralize
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.preparation.fingerprint import Fingerprint
from osscar.preparation.journal import Journal, JournalManifest
from osscar.study.design import StudyDesign
from osscar.study.jobs import RECORDS, Task, affordable_jobs, solve_here, solve_task
from osscar.study.records import (
    ROOT_BOUND,
    WINDOW,
    Instance,
    Options,
    Record,
    window_name,
    without_refuted,
    write_csv,
)
from solvers.closed_forms.windows import borderline_window, random_window, window_problem

_RESULTS_FILE = "results.csv"
_PROBLEMS = "problems"
_INDEX = "problems.json"
_SUFFIX = ".safetensors"
_READABLE_NAME = 80
"""Characters of a problem's name that go into the name of its file."""

Solve: TypeAlias = Callable[[Sequence[Task]], Iterator[Record]]
"""Solves tasks, and gives their records as they come."""

_INCUMBENT = "local_search"
"""Whose answer the units outside a window are held at."""


class _StudyJournal(Journal):
    what = "study"
    manifest_file = "study.json"
    done_files = (_INDEX, f"{RECORDS}/*.json")
    other_files = (f"{_PROBLEMS}/*{_SUFFIX}", _PROBLEMS, RECORDS)
    otherwise = "give another --out"


@with_config(STRICT)
@dataclass(frozen=True)
class _Problems:
    """``problems.json``: the problems that were captured, and the windows that were drawn."""

    schema: Literal["osscar.study-problems/1"]
    captured: tuple[Instance, ...]
    windows: tuple[Instance, ...]


_NO_PROBLEMS = _Problems("osscar.study-problems/1", (), ())
_LONGEST_INDEX = 64 * MEGABYTE


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
    JournalError
        If the directory holds something else, or a study of other problems.
    OutputError
        If its name is none that can be written; see `osscar.base.files.resolved`.
    """

    def __init__(self, directory: Path, source: Mapping[str, Any]) -> None:
        self.directory = Path(file_name(directory, "the study", "its directory"))
        self.source = dict(source)
        self._journal = _StudyJournal(self.directory)
        self._journal.refuse_foreign()
        self._journal.check(self._manifest(None))
        resolved(self.directory)

    def __repr__(self) -> str:
        return f"Study({str(self.directory)!r})"

    def _manifest(self, dense: Fingerprint | None) -> JournalManifest:
        # Through JSON, as it will be read back.
        return JournalManifest("osscar.study/5", json.loads(json.dumps(self.source)), dense)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The captured problems, none before `capture` has finished; windows are not listed."""
        return self._problems().captured

    @property
    def trivial(self) -> tuple[Instance, ...]:
        """Those captured problems in which there is nothing to choose: they have one unit."""
        return tuple(instance for instance in self.instances if instance.units == 1)

    @property
    def kept(self) -> str:
        """What a study that ends now leaves, in words; nothing if that is nothing."""
        if not self.instances:
            return ""
        solved = len(list((self.directory / RECORDS).glob("*.json")))
        problems = pluralize(len(self.instances), "problem")
        return f"{problems} and {pluralize(solved, 'answer')} are kept in {self.directory}"

    def affordable_jobs(self) -> int:
        """Return how many processes may solve at once: as many as cores, if memory allows."""
        files = [self.directory / instance.file for instance in self.instances]
        try:
            return affordable_jobs(max((file.stat().st_size for file in files), default=0))
        except OSError as error:
            raise JournalError(f"cannot read {error.filename}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes from writing to the directory while the block runs.

        `capture` and `run` lock for themselves; lock around them to do several things as one.  A
        directory into which nothing was captured goes again.
        """
        with self._journal.held():
            self._journal.check(self._manifest(None))
            yield

    def capture(
        self,
        problems: Iterable[tuple[str, solvers.SubsetProblem]],
        dense: Fingerprint | None = None,
    ) -> None:
        """Write the problems, given with their kinds; a new directory goes again if that fails.

        What tells the model and the data that they are posed on from others is `dense`, for
        `check_dense`.

        Raises
        ------
        JournalError
            If there is none, or two have one name, or none leaves a choice.
        """
        with self.locked():
            (self.directory / _INDEX).unlink(missing_ok=True)
            self._journal.begin(self._manifest(dense), anew=True)
            self._journal.make(_PROBLEMS)
            instances: dict[str, Instance] = {}
            for kind, problem in problems:
                if problem.name in instances:
                    raise JournalError(f"two problems are called {problem.name!r}; rename one")
                instances[problem.name] = self._write_problem(kind, problem)
            if not instances:
                raise JournalError(
                    "there is no problem to study; give one, or a model with a group to prune"
                )
            if all(instance.units == 1 for instance in instances.values()):
                raise JournalError(
                    f"there is nothing to choose in {', '.join(instances)}: a problem of one unit "
                    "has one support; give problems of at least 2 units"
                )
            found = dataclasses.replace(_NO_PROBLEMS, captured=tuple(instances.values()))
            self._journal.write(_INDEX, found)

    def check_dense(self, dense: Fingerprint) -> None:
        """Refuse a model or data that are not those which the problems were posed on."""
        self._journal.check(self._manifest(dense))

    def run(
        self, design: StudyDesign, jobs: int = 1, *, solve: Solve | None = None
    ) -> list[Record]:
        """Solve what has not been solved yet, and return all records of the design.

        What earlier runs have recorded is recomputed: losses from their supports, bounds from their
        certificates.

        Parameters
        ----------
        design
            What to solve.
        jobs
            Processes of this machine that solve at once; they share out its cores evenly.
        solve
            Solves elsewhere instead, such as `osscar.study.cluster.RayCluster.solve`.

        Raises
        ------
        JournalError
            If nothing has been captured, a file of the study is damaged or has been replaced, a
            record claims what is not true, or a worker was killed; what was solved until then is
            kept.
        OutputError
            If another process is at work in the directory, or it cannot be written.
        """
        checked("jobs", Annotated[int, count_from(1)], jobs)

        @timed(Stage.SOLVES)
        def solved(tasks: Sequence[Task]) -> list[Record]:
            records: dict[tuple[str, int, str], Record] = {}
            with stage("solving", total=len(tasks)) as bar:
                for record in solve_here(tasks, jobs) if solve is None else solve(tasks):
                    records[record.instance, record.keep, record.backend] = record
                    bar.advance()
            return [
                records[task.asked.instance, task.asked.keep, task.asked.backend] for task in tasks
            ]

        with self.locked():
            layers = [instance for instance in self.instances if instance.units > 1]
            if not layers:
                raise JournalError(f"{self.directory} holds no problem yet; capture some first")
            self._journal.make(RECORDS)
            whole = ((layer, design.keeps(layer)) for layer in layers)
            records = solved([task for one in whole for task in self._tasks(design, *one)])
            if design.window_units is not None:
                large = [layer for layer in layers if layer.units > design.window_units]
                tasks = [task for layer in large for task in self._window_tasks(design, layer)]
                records += solved(tasks)
            records = without_refuted(records)
            write_csv(self.directory / _RESULTS_FILE, records)
        return records

    def _tasks(
        self, design: StudyDesign, instance: Instance, keeps: Mapping[int, tuple[float, ...]]
    ) -> Iterator[Task]:
        """Yield what is to be solved of a problem at numbers of kept units."""
        limits = {"time_limit": design.time_limit, "gap_tolerance": design.gap_tolerance}
        for keep, sparsities in keeps.items():
            for name in design.backends:
                backend = solvers.backend_class(name)
                exact = backend.kind is solvers.BackendKind.EXACT
                if exact and instance.units > design.exact_units:
                    continue
                known = {f.name for f in dataclasses.fields(cast(Any, backend))}
                options = {k: v for k, v in limits.items() if exact and k in known}
                if name == ROOT_BOUND:
                    options["rounds"] = design.bound_rounds
                yield self._task(instance, keep, sparsities, name, options)

    def _task(
        self,
        instance: Instance,
        keep: int,
        sparsities: tuple[float, ...],
        backend: str,
        options: Options,
    ) -> Task:
        asked = instance.asked(keep, sparsities, backend, options)
        return Task(self.directory.absolute(), instance.sha256, asked)

    def _window_tasks(self, design: StudyDesign, layer: Instance) -> Iterator[Task]:
        """Draw windows around the incumbent of each sparsity; the first holds its borderline."""
        assert design.window_units is not None
        for keep, sparsities in design.keeps(layer).items():
            generator = torch.Generator().manual_seed(design.seed)
            task = self._task(layer, keep, sparsities, _INCUMBENT, {})
            incumbent = solve_task(task)
            if incumbent.error:
                continue
            support = torch.tensor(incumbent.support)
            for index in range(design.windows):
                name = window_name(layer.name, keep, design.window_units, design.seed, index)
                whole = task.problem
                units = (
                    random_window(whole, support, design.window_units, generator)
                    if index
                    else borderline_window(whole, support, design.window_units)
                )
                part = dataclasses.replace(window_problem(whole, support, units), name=name)
                yield from self._tasks(design, self._window(part), {part.keep: sparsities})

    def _window(self, problem: solvers.SubsetProblem) -> Instance:
        """Return a window of the study, which is written when it is drawn for the first time."""
        known = self._problems()
        for window in known.windows:
            if window.name == problem.name:
                return window
        window = self._write_problem(WINDOW, problem)
        self._journal.write(_INDEX, dataclasses.replace(known, windows=(*known.windows, window)))
        return window

    def _write_problem(self, kind: str, problem: solvers.SubsetProblem) -> Instance:
        if not problem.name.isprintable():
            raise JournalError(
                f"a problem is called {problem.name!r}; give it a name in plain text"
            )
        file = f"{_PROBLEMS}/{_file_name(problem.name)}{_SUFFIX}"
        path = self.directory / file
        with atomic_write(path) as partial:
            problem.save(partial)
        units, keep, width = problem.units, problem.keep, problem.width
        return Instance(problem.name, kind, file, units, keep, width, file_digest(path))

    def _problems(self) -> _Problems:
        found = self._journal.read(_INDEX, _Problems, limit=_LONGEST_INDEX)
        if found is None:
            return _NO_PROBLEMS
        for one in (*found.captured, *found.windows):
            named = one.name.isprintable() and one.kind.isprintable()
            file = f"{_PROBLEMS}/{_file_name(one.name)}{_SUFFIX}"
            if not named or one.file != file or not 1 <= one.units < 2**31:
                raise JournalError(
                    f"{self.directory / _INDEX}: {one.name!r} is not a problem of this study; "
                    "give another --out"
                )
        return found


def _file_name(name: str) -> str:
    """Return a name for a file: what can be read of `name`, and what tells it from all others."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:_READABLE_NAME].strip("-.") or "problem"
    return f"{readable}-{digest(name)[:10]}"
