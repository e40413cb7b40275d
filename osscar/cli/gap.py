"""``osscar gap``: how far from optimal selections are, problem by problem."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from osscar.base.errors import OptionError
from osscar.base.files import file_digest
from osscar.base.inputs import checked, whole_number
from osscar.base.printable import published
from osscar.base.timing import Stage, profiled, timed
from osscar.cli.common import check_files, document, say, show, way_back, write_json
from osscar.cli.instances import tell_known
from osscar.cli.opening import calibration, opened, quiet, stated_preprocessing
from osscar.cli.options import DataOptions, GapOptions, refuse, request_of
from osscar.data.batches import as_inputs
from osscar.preparation.journal import Fingerprint
from osscar.report.sections import facts
from osscar.study.directory import Study, model_problems
from osscar.study.jobs import connected
from osscar.study.library import library
from osscar.study.page import cases_table, scores_table, summarize, write_report
from osscar.study.records import DEFAULT_BACKENDS, Sparsity, StudyDesign
from solvers import SubsetProblem

_PROBLEM_SUFFIX = ".safetensors"
_POSING = {"groups", "damp", "device"}
_POSING |= {one.name for one in dataclasses.fields(DataOptions)}
"""Options that mean nothing to problem files."""


def run(sources: Sequence[str], options: GapOptions) -> None:
    """Solve, bound and verify every problem with every backend, and report the gaps."""
    directory = options.out
    check_files(options, *sources)
    if options.jobs is not None:
        whole_number(options.jobs, "the number of processes (--jobs)", 1)
    if options.ray is not None:
        refuse(options, ("jobs",), "omit it, or --ray: it counts processes of this machine")
    removed = None if options.sparsity is None else _names(options.sparsity)
    design = request_of(
        options,
        StudyDesign,
        sparsities=removed and tuple(checked("--sparsity", Sparsity, one) for one in removed),
        backends=DEFAULT_BACKENDS if options.backends is None else _names(options.backends),
    )
    problems = _problems(sources)
    if problems:
        posing = _POSING - {"device"} if options.device == "cpu" else _POSING
        refuse(options, posing, "omit it: problem files are solved as they are, on the CPU")
        source: dict[str, Any] = {"problems": [one.described for one in problems]}
    else:
        source = _described(sources[0], options)
    study = Study(directory, source)
    with way_back(lambda: study.kept):
        ray = nullcontext() if options.ray is None else connected(options.ray)
        with quiet(), study.locked(), ray as cluster:
            began = time.perf_counter()
            with profiled() as spent:
                if not problems:
                    _capture_model(study, sources[0], options)
                elif not study.instances:
                    study.capture(("units", one.load()) for one in problems)
                jobs = cluster.workers if cluster else options.jobs or study.affordable_jobs()
                records = study.run(design, jobs, solve=cluster.solve if cluster else None)
            stages = spent.of(time.perf_counter() - began)
            summary = summarize(records, study.trivial)
            report = write_report(study, design, records, summary, jobs=jobs, stages=stages)
        show(cases_table(summary.layers), scores_table(summary), facts("", summary.facts()))
        say(summary.answer)
        instances = {one.described["file"] for one in problems if "damp" in one.described}
        for case in summary.layers:
            if case.best.instance in instances:
                tell_known(case.records)
        say(f"report: {report}")
        content = {
            "directory": str(directory),
            "source": source,
            "design": dataclasses.asdict(design),
            "answer": summary.answer,
            "records": [dataclasses.asdict(record) for record in records],
            "trivial": [instance.name for instance in study.trivial],
            "stages": stages,
        }
        write_json(options.json, document("gap", 2, content))


def _described(model: str, options: GapOptions) -> dict[str, Any]:
    """Return how the problems of a model are posed, as its study keeps it."""
    stated = stated_preprocessing(options)
    names = ("samples", "seqlen", "seed", "dtype", "damp", "groups")
    return {
        "model": published(model),
        "calibration": published(options.calibration or "the demo's calibration text"),
        **{name: getattr(options, name) for name in names},
        **{
            name: None if value is None else published(str(value))
            for name, value in (("dense", options.dense), ("weights", options.weights))
        },
        **({} if stated is None else {"preprocessing": stated.record()}),
    }


def _capture_model(study: Study, model: str, options: GapOptions) -> None:
    """Capture the problems of a model; of a study that goes on, check that they are its own."""
    with timed(Stage.LOAD):
        loaded = opened(model, options, device=options.device)
        data = calibration(loaded, options, options.seed)
    inputs = as_inputs(loaded.model, data)
    dense = Fingerprint.of(loaded.model, inputs)
    if study.instances:
        study.check_dense(dense)
        return
    patterns = ("*",) if options.groups is None else _names(options.groups)
    problems = model_problems(
        loaded.model,
        data,
        damp=options.damp,
        wanted=lambda name: any(fnmatchcase(name, pattern) for pattern in patterns),
    )
    study.capture(((str(group.kind), problem.to("cpu")) for group, problem in problems), dense)


@dataclass(frozen=True)
class _Problem:
    """A problem file, or an instance of the library."""

    described: dict[str, Any]
    """Its name, and what tells whether it is still the same."""
    load: Callable[[], SubsetProblem]


def _problems(sources: Sequence[str]) -> list[_Problem]:
    """Return the problems that are meant: files, and patterns of instances; none means a model."""
    known, found = library(), dict[str, _Problem]()
    models = []
    for source in sources:
        if source.endswith(_PROBLEM_SUFFIX):
            file = Path(source)
            described = {"file": file.name, "sha256": file_digest(file)}
            found[source] = _Problem(described, partial(_load, file))
        elif names := known.matching(source):
            for name in names:
                one = known.instances[name]
                sha256 = known.sources[one.source].sha256
                posed = {"file": name, "sha256": sha256, "keep": one.keep, "damp": one.damp}
                found[name] = _Problem(posed, partial(known.problem, name))
        else:
            models.append(source)
    if len(models) + bool(found) != 1:
        named = f", and not {' and '.join(map(repr, sources))}" if sources else ""
        raise OptionError(
            "give one model, or problem files (.safetensors) and instances (`osscar instances "
            f"list`){named}"
        )
    return list(found.values())


def _load(file: Path) -> SubsetProblem:
    problem = SubsetProblem.load(file)
    return dataclasses.replace(problem, name=problem.name or file.stem)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
