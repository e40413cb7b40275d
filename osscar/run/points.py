"""The points of a sweep: one model pruned to several budgets, and the directory of the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config
from torch import nn

from osscar.allocation.divergence import Compared, Measure
from osscar.allocation.task import SkippedGroup
from osscar.base.errors import JournalError, OptionError, RequestError
from osscar.base.files import resolved
from osscar.base.inputs import checked
from osscar.base.json_files import STRICT
from osscar.base.printable import are, pluralize
from osscar.preparation.journal import Journal, JournalManifest
from osscar.proof.plan import Form
from osscar.recovery.recover import Recovery
from osscar.recovery.request import RecoveryRequest
from osscar.request import BASELINES, METHODS, BudgetKind, Keep, PruningRequest, parse_size_kept
from osscar.run.chain import (
    note_origin,
    prepare_for,
    prune_prepared,
    run_dense,
    tried,
    within_memory,
)
from osscar.run.result import PruningResult


@dataclass(frozen=True)
class SweepJob:
    """One point of a sweep: one of `METHODS`, or a baseline's backend, at some budget."""

    method: str
    budget: BudgetKind
    value: float | int

    def request(self, base: PruningRequest) -> PruningRequest:
        """Return the request of this point."""
        asked: dict[str, Any] = {self.budget: self.value}
        if self.method in METHODS:
            return dataclasses.replace(base, **asked | {"allocation": self.method})
        if base.routed:
            raise RequestError(
                f"the baseline {self.method} removes no experts; omit baselines (`--baselines`), "
                f"or experts (`--experts`)"
            )
        asked |= {"allocation": "uniform", "backend": self.method, "backend_options": {}}
        return dataclasses.replace(base, **asked, target="weights", correction_weight=None)

    def __str__(self) -> str:
        return f"{self.method} at {self.budget} {self.value:g}"


def jobs(
    budget: BudgetKind,
    values: Sequence[Keep],
    *,
    baselines: bool = False,
    allocation: str = "measured",
) -> tuple[SweepJob, ...]:
    """Return the points of a sweep, the method itself first, the largest model first."""
    if not values:
        raise OptionError(
            f"a sweep needs budgets; give a list such as {budget.examples} for {budget}"
        )
    read = [_number(budget, value) for value in values]
    if len({isinstance(value, int) for value in read}) > 1:
        raise OptionError(
            f"{budget} has counts and fractions: {', '.join(map(str, read))}; give one kind only"
        )
    if budget in _SIZES and any(isinstance(value, int) for value in read):
        raise OptionError(
            f"a sweep takes sizes as fractions of the dense model's, not {read[0]}; give a list "
            f"such as {budget.examples} for {budget}"
        )
    methods = (allocation, *(BASELINES if baselines else ()))
    removes = budget in (BudgetKind.SPARSITY, BudgetKind.SPEEDUP)
    ordered = sorted(set(read), reverse=not removes)
    return tuple(SweepJob(method, budget, value) for method in methods for value in ordered)


_SIZES = (BudgetKind.SIZE, BudgetKind.MEMORY)


def _number(budget: BudgetKind, value: Any) -> float | int:
    """Return a value as a plain number, which names its point."""
    value = checked(budget, PruningRequest.__annotations__[budget], value)
    if value is None:
        raise OptionError(f"a budget is None; give a list such as {budget.examples} for {budget}")
    if budget in (BudgetKind.PARAMS, *_SIZES):
        value = parse_size_kept(value)
    return value if isinstance(value, int) else float(value)


def prune_points(
    model: nn.Module,
    calibration: Any,
    base: PruningRequest,
    points: Sequence[SweepJob],
    tell: Callable[[str], None] = lambda line: None,
) -> Generator[tuple[SweepJob, PruningResult]]:
    """Prune a model once for each point; the given model is not changed, and traced once.

    Divergences are all measured on the samples that the base request holds out; baselines whose
    damping is given hold out none, and are fitted to these as well.
    """
    if not points:
        return
    with prepare_for(model, calibration, points[0].request(base)) as first:
        tasks = [dataclasses.replace(first, request=job.request(base)) for job in points]
        each = [(job, within_memory(task)) for job, task in zip(points, tasks, strict=True)]
        common = tried(dataclasses.replace(first, request=base))
        dense = run_dense(common, tell)
        for job, task in each:
            own = dataclasses.replace(task, feasible=common.feasible)

            def tell_of(line: str, job: SweepJob = job) -> None:
                tell(f"{job}: {line}")

            result = prune_prepared(own.on_copy(), dense, tell=tell_of)
            note_origin(result, model, calibration)
            yield job, result


_POINTS = "points"


def sweep_manifest(
    run: JournalManifest,
    budget: BudgetKind,
    scored: Mapping[str, Any],
    recover: RecoveryRequest | None = None,
) -> JournalManifest:
    """Describe what all points of a sweep share; pruned models are not kept to be recovered."""
    shared = {name: value for name, value in run.asked.items() if name != budget}
    asked = {**shared, "budget": str(budget), **scored}
    if recover is not None:
        asked["recover"] = True
        asked |= {f"recover_{name}": value for name, value in recover.to_json().items()}
    return JournalManifest("osscar.sweep-asked/3", asked, run.dense)


Quality = dict[str, int | float | str | dict[str, float | None] | None]


@with_config(STRICT)
@dataclass(frozen=True)
class Recovered:
    """What a recovery made of a pruned model, as in `Recovery`; `steps` counts those made."""

    quality: Quality
    measure: Measure
    before: float
    after: float
    kept: int
    steps: int
    learning_rate: float
    samples: int
    held_out: int
    seconds: float

    @classmethod
    def of(cls, recovery: Recovery, quality: Quality) -> Recovered:
        """Return what is kept of a recovery."""
        names = {one.name for one in dataclasses.fields(cls)} - {"quality", "steps"}
        same = {name: getattr(recovery, name) for name in names}
        return cls(quality=quality, steps=recovery.points[-1].step, **same)


@with_config(STRICT)
@dataclass(frozen=True)
class SweepPoint:
    """What became of the model at one budget by one method, as ``docs/json.md`` describes it.

    All but `recovered` is of the model in one shot.  `stages` are the seconds since the point
    before, so that the first point of a run has what its points share.
    """

    schema: Literal["osscar.sweep-point/9"]
    method: str
    budget: str
    value: float | int
    limit: float | None
    reached: float | None
    parameters: int
    parameter_bytes: int
    flops: int
    form: Form
    seconds: float
    seconds_between: list[float]
    speedup: float
    quality: Quality
    distance: Compared | None
    divergence: float | None
    agreement: float | None
    predicted: float | None
    loss: float
    prune_seconds: float
    widths: dict[str, int]
    skipped: tuple[SkippedGroup, ...]
    recovered: Recovered | None
    stages: dict[str, float] = field(default_factory=dict)


class SweepDirectory(Journal):
    """The points of a sweep, in a directory of its own."""

    what = "sweep"
    manifest_file = "asked.json"
    done_files = (f"{_POINTS}/*.json",)
    other_files = (_POINTS,)
    otherwise = "give another place (`--out`)"

    def __init__(self, directory: Path) -> None:
        super().__init__(resolved(directory))
        self.refuse_foreign()

    @contextmanager
    def begun(self, manifest: JournalManifest) -> Iterator[None]:
        """Begin a sweep, or go on with one, and hold its lock while the block runs."""
        with self.held():
            self.begin(manifest)
            self.make(_POINTS)
            yield

    @property
    def kept(self) -> str:
        """What a sweep that ends now leaves, in words."""
        points = len(self.done)
        where = f"kept in {self.directory}"
        return f"{pluralize(points, 'point')} {are(points)} {where}" if points else ""

    def point(self, job: SweepJob) -> SweepPoint | None:
        """Return a point; None if it is not finished."""
        again = "remove it, and it is measured again"
        point = self.read(_file(job), SweepPoint, otherwise=again)
        if point is not None and (point.method, point.budget, point.value) != (
            (job.method, job.budget, job.value)
        ):
            raise JournalError(
                f"{self.directory / _file(job)} holds the result of another budget; {again}"
            )
        return point

    def keep(self, point: SweepPoint) -> None:
        """Keep a point."""
        self.write(_file(SweepJob(point.method, BudgetKind(point.budget), point.value)), point)


def _file(job: SweepJob) -> str:
    return f"{_POINTS}/{job.method}-{job.budget}-{job.value!r}.json"
