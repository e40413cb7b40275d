"""The pipeline: trace, allocate; measure, solve and refit group by group; shrink and prove.

This is Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) over coupling groups: each group
is measured on the stream that everything pruned before it has shaped.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import graph
import solvers
from graph.groups import CouplingGroup
from osscar import checkpoint
from osscar.calibration import CalibrationSet
from osscar.checkpoint import SavedCheckpoint
from osscar.errors import CalibrationError, OptionError
from osscar.footprint import count_parameters
from osscar.linear_maps import LinearMap, linear_maps
from osscar.models import check_finite_weights, resolve_device
from osscar.plan import GroupPlan, PruningPlan
from osscar.progress import stage as progress_stage
from osscar.slicing import context_length, finer_precision, outputs, prove_equal, shrink
from osscar.stages import Stage, find_stages, start_stream
from osscar.statistics import GramAccumulator, observe
from osscar.targets import Keep, Targets, allocate


@dataclass(frozen=True)
class LayerReport:
    """What happened to one coupling group.

    Parameters
    ----------
    name, kind, units, kept
        The group, and how many of its units stayed.
    loss
        Mean squared change of what its consumers compute, with the proximal term, after the refit.
    relative_loss
        The same as a share of the loss of removing everything.
    lower_bound, gap, bound_from
        As in `solvers.Solution`; None without a bound.
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
        """Write the smaller model; see `osscar.checkpoint.save`."""
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
    calibration: CalibrationSet | Tensor,
    *,
    sparsity: float | None = None,
    heads: Keep | None = None,
    neurons: Keep | None = None,
    groups: Mapping[str, Keep] | None = None,
    round_to: int = 1,
    backend: str | solvers.Backend = "local_search",
    backend_options: Mapping[str, Any] | None = None,
    certify: bool = False,
    damp: float = 0.01,
    device: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
) -> PruningResult:
    """Prune a model in one shot; the model that comes in is not changed.

    Parameters
    ----------
    model
        A language model that takes ``input_ids``.
    calibration
        Token windows, (samples, seqlen) int64, or a `CalibrationSet`.
    sparsity
        Share of the heads and neurons to remove.
    heads, neurons
        What to keep of each kind instead: a fraction such as ``"2/3"``, or a count.
    groups
        What to keep of single groups, by name.
    round_to
        Kept widths are rounded to a multiple of this.
    backend, backend_options
        A registered name with its options, or a backend object.
    certify
        Add a lower bound to every layer's solution, so that its gap is known, and verify each
        solution from its problem alone; takes several times as long as the search.
    damp
        Weight of the proximal term, relative to the mean of the Gram matrix's diagonal.
    device
        ``auto``, ``cpu`` or ``cuda``: where the model runs and the solver computes.
    batch_size
        Windows that run through the model at once.
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
    ModelError
        If a consumer cannot be refitted.
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
    windows = calibration if isinstance(calibration, Tensor) else calibration.tokens
    targets = Targets(sparsity, heads, neurons, groups or {}, round_to)
    name, chosen_backend = _resolve_backend(backend, backend_options or {})
    check_finite_weights(model)
    _check_windows(model, windows)
    _check_numbers(batch_size, damp, seed)
    work = copy.deepcopy(model).to(resolve_device(device)).eval()
    with _without_cache(work), torch.no_grad():
        length = min(16, context_length(work) or 16)
        example = torch.zeros(2, length, dtype=torch.int64, device=_device(work))
        all_groups = graph.trace(work, {"input_ids": example}).groups
        keep = allocate(all_groups, targets)
        to_prune = [group for group in all_groups if group.name in keep]
        rows = min(batch_size, len(windows))
        batches = [{"input_ids": ids.to(_device(work))} for ids in torch.split(windows, rows)]
        solve = _Solve(chosen_backend, certify, damp)
        plan, layers = _prune_groups(work, to_prune, keep, batches, solve)
        before = count_parameters(work)
        error = _shrink_and_prove(work, plan, windows.shape[1], seed)
        if isinstance(work, PreTrainedModel):
            checkpoint.adopt_config(work)
    settings = {
        **{"sparsity": sparsity, "heads": _text(heads), "neurons": _text(neurons)},
        **{"groups": {k: str(v) for k, v in (groups or {}).items()}, "round_to": round_to},
        **{"backend": name, "backend_options": dict(backend_options or {})},
        **{"certify": certify, "damp": damp},
        **{"samples": windows.shape[0], "seqlen": windows.shape[1], "seed": seed},
    }
    return PruningResult(
        model=work,
        plan=plan,
        layers=layers,
        parameters_before=before,
        parameters_after=count_parameters(work),
        equivalence_error=error,
        seconds=time.perf_counter() - start,
        settings=settings,
    )


@dataclass(frozen=True)
class _Solve:
    """How each layer's problem is posed and solved."""

    backend: solvers.Backend
    certify: bool
    damp: float


def _prune_groups(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
    batches: Sequence[dict[str, Any]],
    solve: _Solve,
) -> tuple[PruningPlan, tuple[LayerReport, ...]]:
    """Mask and refit group after group; `model` keeps its shape."""
    stages = find_stages(model, groups)
    stream = start_stream(model, stages, batches)
    plans: list[GroupPlan] = []
    reports: list[LayerReport] = []
    with progress_stage("pruning", total=len(groups)) as bar:
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
    problem = solvers.SubsetProblem(
        tuple(accumulator.consumer(solve.damp) for accumulator in accumulators), keep, group.name
    )
    measured = time.perf_counter()
    solution = solvers.solve(problem, solve.backend, bound=solve.certify)
    if solve.certify:
        solution.verify()
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
        status=solution.status.name,
        dead=len(problem.dead),
        iterations=solution.iterations,
        measure_seconds=measured - start,
        solve_seconds=time.perf_counter() - measured,
    )


def _shrink_and_prove(model: nn.Module, plan: PruningPlan, seqlen: int, seed: int) -> float:
    """Shrink `model` in place; return how far its outputs are from the masked model's."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    proofs = [
        {"input_ids": torch.randint(vocabulary, shape, generator=generator).to(_device(model))}
        for shape in ((2, seqlen), (1, max(2, seqlen // 2)))
    ]
    with finer_precision(model):
        masked = [outputs(model, proof) for proof in proofs]
        shrink(model, plan)
        return prove_equal(masked, [outputs(model, proof) for proof in proofs])


def _resolve_backend(
    backend: str | solvers.Backend, options: Mapping[str, Any]
) -> tuple[str, solvers.Backend]:
    if isinstance(backend, str):
        return backend, solvers.make_backend(backend, **options)
    if options:
        raise OptionError("backend_options go with a name; this backend object has its own")
    return type(backend).__name__, backend


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Turn the key-value cache off, which calibration does not need."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before  # type: ignore[union-attr]


def _check_windows(model: nn.Module, windows: Tensor) -> None:
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise CalibrationError(
            f"calibration windows must be int64 (samples, seqlen) and not empty, not "
            f"{windows.dtype} of {tuple(windows.shape)}"
        )
    context = context_length(model)
    if context is not None and windows.shape[1] > context:
        raise CalibrationError(
            f"calibration windows have {windows.shape[1]} tokens and the model takes {context}; "
            "give a smaller window length (--seqlen)"
        )
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(windows.min()) < 0 or int(windows.max()) >= known:
        raise CalibrationError(
            f"calibration tokens run from {int(windows.min())} to {int(windows.max())} and the "
            f"model knows 0 to {known - 1}; use the tokenizer that belongs to it"
        )


def _check_numbers(batch_size: int, damp: float, seed: int) -> None:
    if batch_size < 1:
        raise OptionError(f"batch size is {batch_size}; give at least 1")
    if not math.isfinite(damp) or damp < 0:
        raise OptionError(f"damp is {damp}; it must be finite and not negative")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed is {seed}; give a whole number from 0 to 2^63 - 1")


def _text(keep: Keep | None) -> str | None:
    return None if keep is None else str(keep)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
