"""The optimality-gap study: every problem, at every sparsity, by every backend, one record each.

A study is a journal.  Problems lie in it as files that anyone can solve again, and each answer is
written into a table as soon as it is known, so that a killed study loses no more than the solves in
flight and goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, cast

import torch
from torch import nn

import solvers
from graph import CouplingGroup
from osscar.base.errors import JournalError, OutputError, RequestError
from osscar.base.files import atomic_write, digest, resolved
from osscar.base.inputs import checked, count_from
from osscar.base.json_files import parse_json
from osscar.base.printable import pluralize
from osscar.base.timing import Stage, progress_bar, timed
from osscar.preparation.journal import Fingerprint, Journal, JournalManifest
from osscar.preparation.prepare import prepare
from osscar.request import DAMP
from osscar.study.jobs import CERTIFICATES, Task, affordable_jobs, solve_here
from osscar.study.records import (
    INCUMBENT,
    ROOT_BOUND,
    WINDOW,
    Instance,
    Record,
    StudyDesign,
    window_name,
    without_refuted,
)
from osscar.walk.walk import Walk
from solvers import SubsetProblem
from solvers.closed_forms.schur import borderline_window, random_window, window_problem


def model_problems(
    model: nn.Module,
    calibration: Any,
    *,
    damp: float = 0.01,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[CouplingGroup, SubsetProblem]]:
    """Pose the problem of every prunable group on the dense model's own activations.

    This is the walk of `osscar.prune`, by its default seed, with nothing committed, so that
    problems do not depend on each other's answers.  Each keeps all units until
    `SubsetProblem.with_keep` says otherwise.
    """
    checked("damp", Annotated[float, DAMP], damp)
    with prepare(model, calibration, seed=0) as prepared:
        groups = [group for group in prepared.groups if group.prunable and wanted(group.name)]
        if not groups:
            raise RequestError("no prunable group has such a name; `osscar inspect` lists them")
        with progress_bar("measuring", total=len(groups)) as bar:
            for step in Walk(prepared, groups, in_turn=False):
                yield step.group, step.problem(step.group.units, damp)
                bar.advance()


T = TypeVar("T")

_TABLE = "entries (kind TEXT, key TEXT, json TEXT, PRIMARY KEY (kind, key))"


class Store:
    """Dataclasses by kind and key, in a file that need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, kind: str, schema: type[T]) -> dict[str, T]:
        """Return what is there of a kind by key, in the order in which it was written."""
        if not self._path.exists():
            return {}
        with self._opened() as database:
            asked = "SELECT key, json FROM entries WHERE kind = ? ORDER BY rowid"
            rows = database.execute(asked, (kind,)).fetchall()
        return {key: parse_json(text, schema, self._path) for key, text in rows}

    def write(self, kind: str, entries: Mapping[str, Any]) -> None:
        """Write dataclasses by key; once this returns, all of them are on the disk."""
        texts = {key: json.dumps(dataclasses.asdict(one)) for key, one in entries.items()}
        with self._opened() as database:
            rows = [(kind, key, text) for key, text in texts.items()]
            database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Give a connection, whose changes become one transaction."""
        try:
            with closing(sqlite3.connect(self._path)) as database, database:
                database.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
                yield database
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"cannot use {self._path}: {error}; make room there, or give another directory "
                "(`--out`)"
            ) from error


_PROBLEMS = "problems"
_STORE = "study.sqlite"
_PROBLEM, _RECORD = "problem", "record"
"""Kinds of entries in the store; windows are of the kind `WINDOW`."""

_SUFFIX = ".safetensors"
_READABLE_NAME = 80
"""Characters of a problem's name that go into the name of its file."""

Solve: TypeAlias = Callable[[Sequence[Task]], Iterator[Record]]
"""Solves tasks, and gives their records as they come."""


class _StudyJournal(Journal):
    what = "study"
    manifest_file = "study.json"
    done_files = (_STORE,)
    other_files = (f"{_PROBLEMS}/*{_SUFFIX}", _PROBLEMS, CERTIFICATES)
    otherwise = "give another directory (`--out`)"


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
        self.directory = Path(directory)
        self.source = dict(source)
        self._journal = _StudyJournal(self.directory)
        self._store = Store(self.directory / _STORE)
        self._journal.refuse_foreign()
        self._journal.check(self._manifest(None))
        resolved(self.directory)

    def _manifest(self, dense: Fingerprint | None) -> JournalManifest:
        # Through JSON, as it will be read back.
        return JournalManifest("osscar.study/7", json.loads(json.dumps(self.source)), dense)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """The captured problems, none before `capture` has finished; windows are not listed."""
        return tuple(self._store.read(_PROBLEM, Instance).values())

    @property
    def trivial(self) -> tuple[Instance, ...]:
        """Those captured problems in which there is nothing to choose: they have one unit."""
        return tuple(instance for instance in self.instances if instance.units == 1)

    @property
    def kept(self) -> str:
        """What a study that ends now leaves, in words; nothing if that is nothing."""
        if not (captured := self.instances):
            return ""
        solved = len(self._store.read(_RECORD, Record))
        problems = pluralize(len(captured), "problem")
        return f"{problems} and {pluralize(solved, 'answer')} are kept in {self.directory}"

    def affordable_jobs(self) -> int:
        """Return how many processes may solve at once: as many as cores, if memory allows."""
        files = [self.directory / instance.file for instance in self.instances]
        return affordable_jobs(max((file.stat().st_size for file in files), default=0))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other processes from writing to the directory while the block runs.

        `capture` and `run` lock for themselves; lock around them to do several things as one.  A
        directory into which nothing was captured goes again.
        """
        with self._journal.locked():
            self._journal.check(self._manifest(None))
            yield

    def capture(
        self,
        problems: Iterable[tuple[str, solvers.SubsetProblem]],
        dense: Fingerprint | None = None,
    ) -> None:
        """Write the problems, given with their kinds; a new directory goes again if that fails.

        What tells the model and the data that they are posed on from others is `dense`, for
        `check_dense`.  Raises JournalError if two have one name, or none leaves a choice.
        """
        with self.locked():
            (self.directory / _STORE).unlink(missing_ok=True)
            self._journal.begin(self._manifest(dense), anew=True)
            self._journal.make(_PROBLEMS)
            instances: dict[str, Instance] = {}
            for kind, problem in problems:
                if problem.name in instances:
                    raise JournalError(f"two problems are called {problem.name!r}; rename one")
                instances[problem.name] = self._write_problem(kind, problem)
            if all(instance.units == 1 for instance in instances.values()):
                raise JournalError(
                    f"there is nothing to choose in {', '.join(instances) or 'no problem'}; give "
                    "problems of at least 2 units"
                )
            self._store.write(_PROBLEM, instances)

    def check_dense(self, dense: Fingerprint) -> None:
        """Refuse a model or data that are not those which the problems were posed on."""
        self._journal.check(self._manifest(dense))

    def run(
        self, design: StudyDesign, jobs: int = 1, *, solve: Solve | None = None
    ) -> list[Record]:
        """Solve what has not been solved yet, and return all records of the design.

        Parameters
        ----------
        design
            What to solve.
        jobs
            Processes of this machine that solve at once; they share out its cores evenly.
        solve
            Solves elsewhere instead, such as `osscar.study.jobs.RayCluster.solve`.

        Raises
        ------
        JournalError
            If nothing has been captured, the table of the study is damaged, or a worker was killed;
            what was solved until then is kept.
        OutputError
            If another process is at work in the directory, or it cannot be written.
        """
        checked("jobs", Annotated[int, count_from(1)], jobs)

        with self.locked():
            layers = [instance for instance in self.instances if instance.units > 1]
            self._journal.make(CERTIFICATES)
            known = self._store.read(_RECORD, Record)
            send = partial(solve_here, jobs=jobs) if solve is None else solve

            @timed(Stage.SOLVES)
            def solved(tasks: Sequence[Task]) -> list[Record]:
                missing = [task for task in tasks if task.asked.key not in known]
                failed: dict[str, Record] = {}
                with progress_bar("solving", total=len(missing)) as bar:
                    for record in send(missing):
                        if record.error:  # it is tried again
                            failed[record.key] = record
                        else:
                            self._store.write(_RECORD, {record.key: record})
                            known[record.key] = record
                        bar.advance()
                found = {**known, **failed}
                # Shares are those asked for today: the same `keep` may have come of another.
                return [
                    dataclasses.replace(found[asked.key], sparsities=asked.sparsities)
                    for asked in (task.asked for task in tasks)
                ]

            whole = ((layer, design.keeps(layer)) for layer in layers)
            records = solved([task for one in whole for task in self._tasks(design, *one)])
            if design.window_units is not None:
                large = [layer for layer in layers if layer.units > design.window_units]
                drawn = (self._window_tasks(design, layer, solved) for layer in large)
                records += solved([task for tasks in drawn for task in tasks])
        return without_refuted(records)

    def _tasks(
        self, design: StudyDesign, instance: Instance, keeps: Mapping[int, tuple[float, ...]]
    ) -> Iterator[Task]:
        """Yield what is to be solved of a problem at numbers of kept units."""
        directory = self.directory.absolute()
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
                yield Task(directory, instance.asked(keep, sparsities, name, options))

    def _window_tasks(
        self, design: StudyDesign, layer: Instance, solved: Callable[[Sequence[Task]], list[Record]]
    ) -> Iterator[Task]:
        """Draw windows around the incumbent of each sparsity; the first holds its borderline."""
        assert design.window_units is not None
        for keep, sparsities in design.keeps(layer).items():
            generator = torch.Generator().manual_seed(design.seed)
            task = Task(self.directory.absolute(), layer.asked(keep, sparsities, INCUMBENT, {}))
            (incumbent,) = solved([task])
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
        known = self._store.read(WINDOW, Instance)
        if problem.name not in known:
            known[problem.name] = self._write_problem(WINDOW, problem)
            self._store.write(WINDOW, {problem.name: known[problem.name]})
        return known[problem.name]

    def _write_problem(self, kind: str, problem: solvers.SubsetProblem) -> Instance:
        file = f"{_PROBLEMS}/{_file_name(problem.name)}{_SUFFIX}"
        path = self.directory / file
        with atomic_write(path) as partial:
            problem.save(partial)
        units, keep, width = problem.units, problem.keep, problem.width
        return Instance(problem.name, kind, file, units, keep, width)


def _file_name(name: str) -> str:
    """Return a name for a file: what can be read of `name`, and what tells it from all others."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:_READABLE_NAME].strip("-.") or "problem"
    return f"{readable}-{digest(name)[:10]}"
