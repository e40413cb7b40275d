"""The pipeline: trace, allocate; measure, solve and refit group by group; shrink and prove.

This is Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) over coupling groups: each group
is measured on the stream that everything pruned before it has shaped.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import graph
import solvers
from graph import residual_groups
from graph.groups import CouplingGroup, UnitKind
from osscar.capture.gram import GramAccumulator, observe, pose
from osscar.capture.linear_maps import LinearMap, expose_attention, freeze_unreadable, linear_maps
from osscar.capture.stages import Stage, find_stages, start_stream
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.directory import SavedCheckpoint
from osscar.core.devices import resolve_device
from osscar.core.errors import CalibrationError, OptionError
from osscar.core.modules import (
    check_finite_weights,
    check_usable,
    copied,
    count_parameters,
    without_cache,
)
from osscar.core.progress import stage as progress_stage
from osscar.data.batches import as_inputs
from osscar.pruning.batch_norm import BatchNormMode, batch_norms, renew_statistics
from osscar.pruning.request import Keep, Targets, allocate
from osscar.shrinking.equivalence import finer_precision
from osscar.shrinking.follow import prepare
from osscar.shrinking.lineage import note_calibration
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink_proved
from solvers.exact.branch_and_bound import BranchAndBound

EXACT_UNITS = 32
"""Up to so many units a bound comes from branch and bound, which mostly closes the gap."""

_ROUNDING = 1e-9
"""Branch and bound often stops right at the tolerance, which the gap only meets up to rounding."""

EXACT_SECONDS = 10.0
"""How long branch and bound may take for one bound; what it has by then is valid."""


@dataclass(frozen=True)
class LayerReport:
    """What happened to one coupling group.

    Parameters
    ----------
    name, kind, units, kept
        The group, and how many of its units stayed.
    loss
        Mean squared change of what its consumer computes, with the proximal term, after the refit;
        if several layers read the group, the sum over them, each relative to its own scale.
    relative_loss
        The same as a share of the loss of removing everything.
    lower_bound, gap, bound_from
        As in `solvers.Solution`; None without a bound.
    proved_optimal
        Whether the bound proves that no other choice is better, within the tolerance.
    status
        The name of the solver's status.
    dead
        Units whose inputs were zero on all calibration data; they are removed first.
    iterations
        What the backend counts.
    measure_seconds, solve_seconds
        Wall time of the statistics and of the solver with the refit.
    """

    name: str
    kind: str
    units: int
    kept: int
    loss: float
    relative_loss: float
    lower_bound: float | None
    gap: float | None
    bound_from: str
    proved_optimal: bool
    status: str
    dead: int
    iterations: int
    measure_seconds: float
    solve_seconds: float


@dataclass(frozen=True, eq=False)
class PruningResult:
    """A physically smaller model and how it came about.

    Parameters
    ----------
    model
        The shrunk model, in evaluation mode, on the device it was pruned on.
    plan
        What stays of each group.
    layers
        One report for each group that lost units, in execution order.
    parameters_before, parameters_after
        Tied parameters counted once.
    equivalence_error
        Largest relative difference between the outputs of the shrunk and of the masked model.
    batch_norms
        How many batch-norm layers got new statistics after the proof.
    seconds
        Wall time of the whole run.
    settings
        What the run was asked for.
    """

    model: nn.Module = field(repr=False)
    plan: PruningPlan = field(repr=False)
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    equivalence_error: float
    batch_norms: int
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Sum of the relative losses of all layers."""
        return sum(layer.relative_loss for layer in self.layers)

    @property
    def solve_seconds(self) -> float:
        """Wall time spent in solvers."""
        return sum(layer.solve_seconds for layer in self.layers)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        report: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> SavedCheckpoint:
        """Write the smaller model; see `osscar.checkpoint.directory.save`."""
        return checkpoint.save(
            self.model,
            directory,
            tokenizer=tokenizer,
            report=report,
            dtype=dtype,
            overwrite=overwrite,
        )


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    sparsity: float | None = None,
    heads: Keep | None = None,
    neurons: Keep | None = None,
    channels: Keep | None = None,
    residual: Keep | None = None,
    groups: Mapping[str, Keep] | None = None,
    round_to: int = 1,
    skip: Sequence[str] = (),
    backend: str | solvers.Backend = "local_search",
    backend_options: Mapping[str, Any] | None = None,
    certify: bool = False,
    damp: float = 0.01,
    batch_norm: str = BatchNormMode.CORRECT,
    device: str = "auto",
    batch_size: int | None = None,
    seed: int = 0,
) -> PruningResult:
    """Prune a model in one shot; the model that comes in is not changed.

    Parameters
    ----------
    model
        A language model that takes ``input_ids``, or any model whose inputs are tensors.
    calibration
        Token windows, (samples, seqlen) int64, or a `CalibrationSet`; an `ImageSet`; or tensors
        whose first dimension is the sample: one, a tuple, or a mapping by argument name.
    sparsity
        Share of the heads, neurons and channels to remove.
    heads, neurons, channels
        What to keep of each kind instead: a fraction such as ``"2/3"``, or a count.
    residual
        What to keep of residual streams, such as the channels that shortcuts add up. They run
        through many layers, and nothing else touches them.
    groups
        What to keep of single groups, by name.
    round_to
        Kept widths are rounded to a multiple of this.
    skip
        Patterns, as of `fnmatch`, for the names of groups that are left alone whatever else is
        asked; each has to match one.
    backend, backend_options
        A registered name with its options, or a backend object.
    certify
        Add a lower bound to every layer's solution, so that its gap is known, and verify each
        solution from its problem alone; takes several times as long as the search. Up to 32 units
        the bound comes from branch and bound, which may take 10 seconds a group.
    damp
        Weight of the proximal term, relative to the mean of the Gram matrix's diagonal.
    batch_norm
        Where running statistics come from afterwards, as in
        `osscar.pruning.batch_norm.BatchNormMode`.
    device
        ``auto``, ``cpu`` or ``cuda``: where the model runs and the solver computes.
    batch_size
        Samples that run through the model at once; by default 8 windows, or 64 of anything else.
    seed
        Of the random inputs of the equivalence proof.

    Returns
    -------
    PruningResult
        The smaller model, and a report for each layer.

    Raises
    ------
    TargetError
        If what to keep makes no sense for this model.
    NonFiniteError
        If weights or activations are not finite.
    CalibrationError
        If the model cannot read the calibration data.
    ModelError
        If it has no weights, cannot be copied, or a consumer cannot be refitted.
    graph.GraphError
        If the model cannot be traced.
    EquivalenceError
        If the shrunk model does not compute what the masked one computes.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> calibration = osscar.load_calibration(None, loaded.tokenizer, samples=4, seqlen=64)
    >>> result = osscar.prune(loaded.model, calibration, sparsity=0.5)
    >>> result.parameters_after < result.parameters_before
    True
    """
    start = time.perf_counter()
    targets = Targets(sparsity, heads, neurons, channels, residual, groups or {}, round_to, skip)
    name, chosen_backend = _resolve_backend(backend, backend_options or {})
    statistics = _batch_norm_mode(batch_norm)
    check_usable(model)
    check_finite_weights(model)
    inputs = as_inputs(model, calibration)
    batch_size = inputs.batch_size if batch_size is None else batch_size
    _check_numbers(batch_size, damp, seed)
    work = copied(model).to(resolve_device(device)).eval()
    with without_cache(work), torch.no_grad():
        prepare(work)
        if targets.reach(UnitKind.HEADS):
            expose_attention(work)
        example = inputs.example(work)
        traced = graph.trace(work, example)
        _check_runs(work, example)
        to_prune, keep = _allocate(work, traced, targets)
        batches = inputs.batches(work, batch_size)
        stages = find_stages(work, to_prune, example, traced.operators)
        plan, layers = _prune_groups(
            work, stages, keep, batches, _Solve(chosen_backend, certify, damp)
        )
        before = count_parameters(work)
        with finer_precision(work):
            proof = shrink_proved(work, plan, inputs.proofs(work, seed))
        renewed = _renew_statistics(work, model, proof.plan, batches, statistics)
        if isinstance(work, PreTrainedModel):
            checkpoint.adopt_config(work)
    note_calibration(work, calibration)
    settings = {
        **{"sparsity": sparsity, "heads": _text(heads), "neurons": _text(neurons)},
        **{"channels": _text(channels), "residual": _text(residual)},
        **{"groups": {k: str(v) for k, v in (groups or {}).items()}, "round_to": round_to},
        **{"skip": list(skip)},
        **{"backend": name, "backend_options": dict(backend_options or {})},
        **{"certify": certify, "damp": damp, "batch_norm": statistics.value},
        **inputs.settings,
        "seed": seed,
    }
    return PruningResult(
        model=work,
        plan=proof.plan,
        layers=layers,
        parameters_before=before,
        parameters_after=count_parameters(work),
        equivalence_error=proof.error,
        batch_norms=renewed,
        seconds=time.perf_counter() - start,
        settings=settings,
    )


def _check_runs(model: nn.Module, example: Mapping[str, Any]) -> None:
    """Run the model once: tracing looks at shapes, and lets through what kernels refuse."""
    try:
        model(**example)
    except Exception as error:  # the model may be anyone's code
        forms = ", ".join(f"{n} {t.dtype} {tuple(t.shape)}" for n, t in example.items())
        raise CalibrationError(
            f"{type(model).__name__} fails on the calibration data ({forms}): "
            f"{type(error).__name__}: {error}; give data of the form and type that it reads"
        ) from error


def _allocate(
    model: nn.Module, traced: graph.DependencyGraph, targets: Targets
) -> tuple[list[CouplingGroup], dict[str, int]]:
    """Return the groups to prune, in the order in which they are first read, and what stays."""
    groups = freeze_unreadable(model, traced.groups)
    keep = allocate(groups, targets, residual_groups(traced))
    chosen = [group for group in groups if group.name in keep]
    return sorted(chosen, key=lambda group: group.consumers[0].order), keep


@dataclass(frozen=True)
class _Solve:
    """How each layer's problem is posed and solved."""

    backend: solvers.Backend
    certify: bool
    damp: float


def _prune_groups(
    model: nn.Module,
    stages: Sequence[Stage],
    keep: Mapping[str, int],
    batches: Sequence[dict[str, Any]],
    solve: _Solve,
) -> tuple[PruningPlan, tuple[LayerReport, ...]]:
    """Mask and refit group after group; `model` keeps its shape."""
    stream = start_stream(model, stages, batches)
    plans: list[GroupPlan] = []
    reports: list[LayerReport] = []
    with progress_stage("pruning", total=len(keep)) as bar:
        for index, stage in enumerate(stages):
            for group in stage.groups:
                bar.describe(f"pruning {group.name}")
                consumers = linear_maps(model, group)
                calls = stream.arguments(index)
                plan, report = _prune_group(stage, group, consumers, calls, keep[group.name], solve)
                plans.append(plan)
                reports.append(report)
                bar.advance()
            if index + 1 < len(stages):
                stream.advance(index, stage.module)
    return PruningPlan(tuple(plans)), tuple(reports)


def _prune_group(
    stage: Stage,
    group: CouplingGroup,
    consumers: tuple[LinearMap, ...],
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    keep: int,
    solve: _Solve,
) -> tuple[GroupPlan, LayerReport]:
    """Measure, solve, and write the refitted weights of one group."""
    start = time.perf_counter()
    accumulators = [GramAccumulator(consumer) for consumer in consumers]
    with observe(accumulators) as run:
        for args, kwargs in calls:
            run(stage.module, *args, **kwargs)
    problem = pose(accumulators, keep, group.name, solve.damp)
    measured = time.perf_counter()
    solution = _solved(problem, solve)
    for consumer, W in zip(consumers, solution.weights, strict=True):
        consumer.write_weight(W)
    plan = GroupPlan.of(group, tuple(solution.support.tolist()))
    has_bound = math.isfinite(solution.lower_bound)
    return plan, LayerReport(
        name=group.name,
        kind=str(group.kind),
        units=group.units,
        kept=keep,
        loss=solution.loss,
        relative_loss=solution.relative_loss,
        lower_bound=solution.lower_bound if has_bound else None,
        gap=solution.gap if has_bound else None,
        bound_from=solution.bound_from,
        proved_optimal=has_bound and solution.gap <= solution.gap_tolerance * (1 + _ROUNDING),
        status=solution.status.name,
        dead=len(problem.dead),
        iterations=solution.iterations,
        measure_seconds=measured - start,
        solve_seconds=time.perf_counter() - measured,
    )


def _solved(problem: solvers.SubsetProblem, solve: _Solve) -> solvers.Solution:
    """Return the backend's answer, with a bound if asked for."""
    if not solve.certify:
        return solvers.solve(problem, solve.backend)
    exact = solve.backend.kind is solvers.Kind.EXACT or problem.units > EXACT_UNITS
    solution = solvers.solve(problem, solve.backend, bound=exact)
    if not exact:
        solution = _closely_bounded(solution)
    solution.verify()
    return solution


def _closely_bounded(solution: solvers.Solution) -> solvers.Solution:
    """Take the bound of branch and bound, and leave the choice as the backend made it."""
    start = tuple(solution.support.tolist())
    search = BranchAndBound(start=start, time_limit=EXACT_SECONDS)
    proof = solvers.solve(solution.problem, search)
    if proof.lower_bound <= solution.lower_bound:
        return solution
    return dataclasses.replace(
        solution,
        lower_bound=proof.lower_bound,
        bound_from=proof.bound_from,
        certificate=proof.certificate,
    )


def _renew_statistics(
    model: nn.Module,
    dense: nn.Module,
    plan: PruningPlan,
    batches: Sequence[dict[str, Any]],
    mode: BatchNormMode,
) -> int:
    """Renew batch-norm statistics where there are any; `dense` stays where and as it is."""
    if not batch_norms(model):
        return 0
    beside = copied(dense).to(next(model.parameters()).device).eval()
    return renew_statistics(model, beside, plan, batches, mode)


def _batch_norm_mode(name: str) -> BatchNormMode:
    try:
        return BatchNormMode(name)
    except ValueError:
        raise OptionError(
            f"batch_norm is {name!r}; give one of {', '.join(BatchNormMode)}"
        ) from None


def _resolve_backend(
    backend: str | solvers.Backend, options: Mapping[str, Any]
) -> tuple[str, solvers.Backend]:
    if isinstance(backend, str):
        return backend, solvers.make_backend(backend, **options)
    if options:
        raise OptionError("backend_options go with a name; this backend object has its own")
    return type(backend).__name__, backend


def _check_numbers(batch_size: int, damp: float, seed: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch size is {batch_size}; give at least 1")
    if not math.isfinite(damp) or damp < 0:
        raise OptionError(f"damp is {damp}; it must be finite and not negative")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed is {seed}; give a whole number from 0 to 2^63 - 1")


def _text(keep: Keep | None) -> str | None:
    return None if keep is None else str(keep)
