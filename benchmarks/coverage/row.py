"""One architecture: traced, half of every prunable group removed, proved, and compared anew."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graph
from benchmarks.coverage.case import Inputs, Made
from graph import CouplingGroup, DependencyGraph
from osscar.base.errors import OsscarError, first_line
from osscar.data.batches import named_inputs
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from osscar.request import PruningRequest
from osscar.run.feasibility import SkippedGroup, feasible_groups
from osscar.run.shrunk import shrunk
from tests.osscar.programs import without_units

ALLOWED = {"float64": 1e-4, "float32": 1e-3}
"""Largest difference in the comparison, as a share of the largest output; models round to float32
inside even where they run in float64."""

BOUNDARY = ("input of the model", "output of the model")


@dataclass(frozen=True)
class Row:
    """What was found.

    variant: Which of its family the model is.
    parameters, parameters_after: Before and after; the latter None if nothing was removed.
    traced: Whether `graph.trace` could follow it.
    groups, prunable: How many coupling groups there are, and how many may be pruned.
    share: Of the parameters, those that belong to a prunable group.
    form: What became smaller: ``eager`` or ``exported``.
    left: Why prunable groups keep their units, with how many.
    unrefitted: Why `osscar.prune`, which refits, leaves prunable groups alone, with how many.
    frozen: Why groups may not be pruned, with how many, apart from inputs and outputs of the model.
    unread: Parts of the model whose parameters no operator reads in evaluation mode.
    proof: Error of the comparison of outputs.
    proved: How many operators are equal in the programs of the smaller and of the dense model; None
        if these could not be compared, and `unproved` says why.
    sizes: For inputs of which sizes that holds.
    shrink_seconds: CPU time of shrinking and proving alone.
    compared: Largest difference to the masked model that this file computes for itself.
    precision: The number format in which.
    effect: How far masking has moved the outputs: else the comparison would say nothing.
    seconds: CPU time of tracing, trying, shrinking and proving.
    failure: What went wrong; empty if nothing did.
    """

    variant: str = ""
    parameters: int = 0
    parameters_after: int | None = None
    traced: bool = False
    groups: int = 0
    prunable: int = 0
    share: float = 0.0
    form: str = ""
    left: Mapping[str, int] = field(default_factory=dict)
    unrefitted: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, int] = field(default_factory=dict)
    unread: Sequence[str] = field(default_factory=list)
    proof: float | None = None
    proved: int | None = None
    unproved: str = ""
    sizes: Sequence[str] = field(default_factory=list)
    shrink_seconds: float = 0.0
    compared: float | None = None
    precision: str = ""
    effect: float | None = None
    seconds: float = 0.0
    failure: str = ""


def measured(made: Made) -> Row:
    """Shrink a model by half, prove it, compare it, and say what was found."""
    start = time.process_time()
    model = made.model
    row = Row(made.variant, sum(p.numel() for p in model.parameters()))
    try:
        example = by_name(model, made.inputs[0])
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            with prepare(model, example) as prepared:
                row = _traced(row, prepared)
                row = _shrunk(row, prepared, made, start)
    except (OsscarError, graph.GraphError) as error:
        row = dataclasses.replace(row, failure=f"{type(error).__name__}: {first_line(error):.400}")
    return dataclasses.replace(row, seconds=row.seconds or time.process_time() - start)


def by_name(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs under the names of a model's arguments."""
    return dict(inputs) if isinstance(inputs, dict) else named_inputs(model, inputs)


def _traced(row: Row, prepared: Prepared) -> Row:
    """Add what the dependency graph tells."""
    dependencies = prepared.traced
    prunable = dependencies.prunable
    shapes = {name: parameter.shape for name, parameter in prepared.model.named_parameters()}
    refused = [g for g in prepared.groups if g.frozen and g.name in {p.name for p in prunable}]
    return dataclasses.replace(
        row,
        traced=True,
        groups=len(dependencies.groups),
        prunable=len(prunable),
        share=owned(prunable, shapes) / max(1, row.parameters),
        frozen=_frozen(dependencies),
        unread=_unread(dependencies, shapes),
        unrefitted=dict(Counter(group.frozen[0].reason for group in refused)),
    )


def _shrunk(row: Row, prepared: Prepared, made: Made, start: float) -> Row:
    """Add what came of removing half of every prunable group."""
    prepared = dataclasses.replace(prepared, groups=prepared.traced.groups)
    halves = {g.name: math.ceil(g.units / 2) for g in prepared.groups if g.prunable and g.units > 1}
    if not halves:
        return row
    request = PruningRequest(groups=halves, device="cpu", batch_norm="keep")
    form, skipped = feasible_groups(prepared, request)
    left = {group.name for group in skipped}
    plan = half_of(g for g in prepared.traced.prunable if g.name not in left)
    row = dataclasses.replace(row, form=str(form), left=_counted(skipped))
    dense = copy.deepcopy(prepared.model)
    began = time.process_time()
    smaller, proof, _ = shrunk(prepared, plan, request, form, ())
    certificate = proof.certificate
    row = dataclasses.replace(
        row,
        parameters_after=sum(p.numel() for p in smaller.parameters()),
        proof=certificate.error,
        proved=None if certificate.structure is None else certificate.structure.operators,
        unproved=certificate.unproved,
        sizes=() if certificate.structure is None else certificate.structure.sizes,
        shrink_seconds=time.process_time() - began,
        seconds=time.process_time() - start,
    )
    # A program may keep the sizes it was traced with, but for the number of samples.
    which = made.inputs[0 if form is Form.EXPORTED else 1]
    return _compared(row, made.model, dense, smaller, plan, which)


def half_of(groups: Iterable[CouplingGroup]) -> PruningPlan:
    """Plan to remove half of the units of each group, every second one."""
    return PruningPlan(
        tuple(
            GroupPlan.of(group, tuple(range(group.units % 2 == 0, group.units, 2)))
            for group in groups
            if group.units > 1
        )
    )


# ---- the comparison, which knows nothing of the proof ------------------------------------


def _compared(
    row: Row, model: nn.Module, dense: nn.Module, small: nn.Module, plan: PruningPlan, like: Inputs
) -> Row:
    """Compare the smaller model with the masked one on inputs that nothing has seen.

    row: What is known.
    model: As it came.
    dense: The same, prepared; its tensors are those of the plan.
    small: Smaller.
    plan: What stays.
    like: Inputs of the form to use.
    """
    fresh = _fresh(by_name(model, like))
    finer = True
    try:
        came, before, masked, after = _all_four(model, dense, small, plan, fresh, torch.float64)
    except (RuntimeError, TypeError):  # code, kernels or programs that know float32 alone
        finer = False
        came, before, masked, after = _all_four(model, dense, small, plan, fresh, torch.float32)
    precision = "float64" if finer else "float32"
    compared = max(_apart(masked, after), _apart(came, before))
    wrong = not compared <= ALLOWED[precision]
    failure = f"the smaller model is {compared:.1e} away from the masked one" if wrong else ""
    return dataclasses.replace(
        row,
        compared=compared,
        precision=precision,
        effect=_apart(before, masked),
        failure=failure or _in_training(row.form, model, small, fresh),
    )


def _in_training(form: str, model: nn.Module, small: nn.Module, inputs: Inputs) -> str:
    """Say how the smaller model fails in training, if the model as it came does not.

    A program is one of evaluation.
    """
    failures = []
    for one in (model, small) if form == Form.EAGER else ():
        one = copy.deepcopy(one).float().train()
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                one(**inputs)
            failures.append("")
        except Exception as error:  # the model may be anyone's code
            failures.append(f"it fails in training: {first_line(error):.150}")
    return failures[-1] if failures and not failures[0] else ""


def _all_four(
    model: nn.Module,
    dense: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    inputs: Mapping[str, Tensor],
    kind: torch.dtype,
) -> tuple[list[Tensor], ...]:
    """Return what the model, its prepared form, that without units, and the smaller one put out."""
    return tuple(
        _put_out(one, inputs, kind) for one in (model, dense, without_units(dense, plan), small)
    )


def _put_out(model: nn.Module, inputs: Mapping[str, Tensor], kind: torch.dtype) -> list[Tensor]:
    model = copy.deepcopy(model).to(kind).eval()
    cast = {n: t.to(kind) if t.is_floating_point() else t for n, t in inputs.items()}
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if has_cache else {}
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**cast, **options))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _fresh(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return other random inputs of the same form, with one sample more."""
    draw = torch.Generator().manual_seed(77)
    found = {}
    for name, tensor in inputs.items():
        shape = (len(tensor) + 1, *tensor.shape[1:])
        if tensor.is_floating_point():
            found[name] = torch.randn(shape, generator=draw)
        else:
            places = torch.randint(tensor.numel(), shape, generator=draw)
            found[name] = tensor.flatten()[places]
    return found


def _apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference of any output, relative to its largest value."""
    if [a.shape for a in ones] != [b.shape for b in others]:
        return math.inf
    worst = 0.0
    for a, b in zip(ones, others, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf
        if finite.any():
            a, b = a[finite], b[finite]
            worst = max(worst, float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return worst


# ---- in numbers and words ----------------------------------------------------------------


def owned(groups: Iterable[CouplingGroup], shapes: Mapping[str, torch.Size]) -> int:
    """Count the parameters that some unit of a prunable group owns."""
    taken: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    places = {(s.tensor, s.dim, s.offset, s.units * s.width) for g in groups for s in g.slots}
    for tensor, dim, _, width in places:
        taken[tensor][dim] += width
    return sum(
        math.prod(shape) - math.prod(n - taken[name][dim] for dim, n in enumerate(shape))
        for name, shape in shapes.items()
    )


def _counted(left: Iterable[SkippedGroup]) -> dict[str, int]:
    return dict(Counter(f"{group.reason:.300}" for group in left))


def _unread(dependencies: DependencyGraph, names: Iterable[str]) -> list[str]:
    read = {tensor for operator in dependencies.operators for tensor in operator.tensors}
    return list(dict.fromkeys(name.partition(".")[0] for name in names if name not in read))


def _frozen(dependencies: DependencyGraph) -> dict[str, int]:
    """Count the frozen groups by what froze them, and the operator that did."""
    found: Counter[str] = Counter()
    for group in dependencies.groups:
        freeze = next(iter(group.frozen), None)
        if freeze is not None and not freeze.reason.endswith(BOUNDARY):
            operator = f" (`{freeze.operator}`)" if freeze.operator else ""
            found[f"{freeze.reason}{operator}"] += 1
    return dict(found)
