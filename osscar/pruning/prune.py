"""Pruning in one shot: allocate; measure, solve and refit group by group; shrink and prove.

This is Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) over coupling groups: each group
is measured on the stream that everything pruned before it has shaped.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

from torch import nn
from transformers import PreTrainedModel

import solvers
from graph import CouplingGroup, UnitKind
from osscar.capture.opened import Opened, opened
from osscar.capture.walk import Site, walk
from osscar.checkpoint.hf_config import adopt_config
from osscar.core.devices import resolve_device
from osscar.core.modules import count_parameters
from osscar.core.progress import stage
from osscar.pruning.batch_norm import dense_statistics, renew_statistics
from osscar.pruning.budget import allocate
from osscar.pruning.certify import certified
from osscar.pruning.request import PruningRequest
from osscar.pruning.result import LayerReport, PruningResult
from osscar.shrinking.equivalence import finer_precision
from osscar.shrinking.lineage import note_calibration
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink_proved

P = ParamSpec("P")


def _asked_by_keywords(
    request: Callable[P, PruningRequest],
) -> Callable[
    [Callable[[nn.Module, Any, PruningRequest], PruningResult]],
    Callable[Concatenate[nn.Module, Any, P], PruningResult],
]:
    """Let a function that takes a request take the fields of one instead, as keywords."""

    def decorate(
        run: Callable[[nn.Module, Any, PruningRequest], PruningResult],
    ) -> Callable[Concatenate[nn.Module, Any, P], PruningResult]:
        @functools.wraps(run)
        def by_keywords(
            model: nn.Module, calibration: Any, /, *args: P.args, **fields: P.kwargs
        ) -> PruningResult:
            return run(model, calibration, request(*args, **fields))

        model, calibration, *_ = inspect.signature(run).parameters.values()
        fields = [
            field.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for field in inspect.signature(request).parameters.values()
        ]
        shown = inspect.Signature([model, calibration, *fields])
        by_keywords.__signature__ = shown  # type: ignore[attr-defined]
        return by_keywords

    return decorate


def prune_as_asked(model: nn.Module, calibration: Any, request: PruningRequest) -> PruningResult:
    """Prune a model in one shot; the model that comes in is not changed.

    Parameters
    ----------
    model
        A language model that takes ``input_ids``, or any model whose inputs are tensors.
    calibration
        Token windows, (samples, seqlen) int64, or a `CalibrationSet`; an `ImageSet`; or tensors
        whose first dimension is the sample: one, a tuple, or a mapping by argument name.
    request
        What is asked for.  `osscar.prune` takes its fields as keywords: `PruningRequest` describes
        them.

    Returns
    -------
    PruningResult
        The smaller model, and a report for each layer.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model.
    NonFiniteError
        If weights or activations are not finite.
    CalibrationError
        If the model cannot read the calibration data, or its batches do not run alike.
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
    with opened(
        model,
        calibration,
        device=resolve_device(request.device),
        batch_size=request.batch_size,
        heads=request.reach(UnitKind.HEADS),
    ) as ready:
        work = ready.model
        keep = allocate(ready.groups, request, ready.residual)
        statistics = dense_statistics(work, ready.batches(), request.batch_norm)
        chosen = [group for group in ready.groups if group.name in keep]
        plan, layers = _prune_groups(ready, chosen, keep, request)
        before = count_parameters(work)
        with finer_precision(work):
            proof = shrink_proved(work, plan, ready.inputs.proofs(work, request.seed))
        renewed = renew_statistics(
            work, proof.plan, ready.batches(), request.batch_norm, statistics
        )
        if isinstance(work, PreTrainedModel):
            adopt_config(work)
    note_calibration(work, calibration)
    return PruningResult(
        model=work,
        plan=proof.plan,
        layers=layers,
        parameters_before=before,
        parameters_after=count_parameters(work),
        equivalence_error=proof.error,
        batch_norms=renewed,
        seconds=time.perf_counter() - start,
        request=request,
        calibration=ready.inputs.settings,
    )


prune = _asked_by_keywords(PruningRequest)(prune_as_asked)


def _prune_groups(
    ready: Opened,
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
    request: PruningRequest,
) -> tuple[PruningPlan, tuple[LayerReport, ...]]:
    """Solve and refit each group where the walk stops; the model keeps its shape."""
    plans: list[GroupPlan] = []
    reports: list[LayerReport] = []
    with stage("pruning", total=len(groups)) as bar:
        began = time.perf_counter()
        for site in walk(ready, groups):
            bar.describe(f"pruning {site.group.name}")
            plan, report = _prune_group(site, keep[site.group.name], request, began)
            plans.append(plan)
            reports.append(report)
            bar.advance()
            began = time.perf_counter()
    return PruningPlan(tuple(plans)), tuple(reports)


def _prune_group(
    site: Site, keep: int, request: PruningRequest, began: float
) -> tuple[GroupPlan, LayerReport]:
    """Solve one group, and commit the refitted weights."""
    group, backend = site.group, request.chosen_backend()
    problem = site.problem(keep, request.damp)
    measured = time.perf_counter()
    if request.certify:
        solution, verification = certified(problem, backend)
    else:
        solution, verification = solvers.solve(problem, backend), None
    site.commit(solution.weights)
    plan = GroupPlan.of(group, tuple(solution.support.tolist()))
    report = LayerReport.of(
        group,
        problem,
        solution.record(verification),
        measure_seconds=measured - began,
        solve_seconds=time.perf_counter() - measured,
    )
    return plan, report
