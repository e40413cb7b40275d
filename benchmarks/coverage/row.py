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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graph
from graph import CouplingGroup, DependencyGraph
from osscar.allocation.task import PruningTask
from osscar.base.errors import OsscarError, first_line
from osscar.data.reader import Reader
from osscar.preparation.prepare import Prepared, prepare
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from osscar.request import PruningRequest
from osscar.run.chain import shrunk
from osscar.run.feasibility import feasible_groups
from tests.osscar.programs import without_units
from tests.zoo.case import Inputs, Made

ALLOWED = {"float64": 1e-4, "float32": 1e-3}
"""Largest difference in the comparison, as a share of the largest output; models round to float32
inside even where they run in float64."""

BOUNDARY = ("input of the model", "output of the model")

LEAST_EFFECT = 1e-4
"""Of masking, as a share of the largest output."""

MOST_REASONS = 3

Row = dict[str, Any]
"""What was found, by the columns of docs/coverage.csv.

``outcome`` is ``whole``, where half of every prunable group left; ``some_left``, where groups kept
their units; ``nothing``, where none may be pruned; ``failed``; or ``not_traced``.  ``program`` says
whether the programs of the smaller and of the dense model were proved equal, or outputs only
compared; ``difference`` is the largest one that this file finds, in that precision.  ``missing``
says why groups stay and what is not known."""


def measured(made: Made) -> Row:
    """Shrink a model by half, prove it, compare it, and say what was found."""
    start, model = time.process_time(), made.model
    row: Row = {
        "class": made.variant,
        "outcome": "not_traced",
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": 0,
        "prunable": 0,
        "prunable_share": "0.0000",
    }
    told: list[str] = []
    why: list[str] = []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            with prepare(model, by_name(model, made.inputs[0])) as prepared:
                row |= {"outcome": "nothing", **counts(prepared)}
                why = reasons(prepared)
                failure = halved(row, told, prepared, made, start)
        if failure:
            row["outcome"] = "failed"
            told.insert(0, failure)
    except (OsscarError, graph.GraphError) as error:
        row["outcome"] = "not_traced" if row["outcome"] == "not_traced" else "failed"
        told.insert(0, f"{type(error).__name__}: {first_line(error):.400}")
    row.setdefault("seconds", f"{time.process_time() - start:.1f}")
    return {**row, "missing": " ".join("; ".join([*told, *why]).split())}


def by_name(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs under the names of a model's arguments."""
    return dict(inputs) if isinstance(inputs, dict) else Reader.of(model).named(inputs)


def counts(prepared: Prepared) -> Row:
    """Return how many groups there are, and which share of the parameters they own."""
    shapes = {name: parameter.shape for name, parameter in prepared.model.named_parameters()}
    total = sum(math.prod(shape) for shape in shapes.values())
    prunable = prepared.traced.prunable
    return {
        "groups": len(prepared.traced.groups),
        "prunable": len(prunable),
        "prunable_share": f"{owned(prunable, shapes) / max(1, total):.4f}",
    }


def halved(row: Row, told: list[str], prepared: Prepared, made: Made, start: float) -> str:
    """Add to a row what came of removing half of every prunable group, and say what failed."""
    whole = prepared.groups
    prepared = dataclasses.replace(prepared, groups=prepared.traced.groups)
    halves = {g.name: math.ceil(g.units / 2) for g in prepared.groups if g.prunable and g.units > 1}
    if not halves:
        return ""
    request = PruningRequest(groups=halves, device="cpu", batch_norm="keep")
    task = PruningTask(prepared, request)
    task = dataclasses.replace(task, **vars(feasible_groups(task)))
    left = {group.name for group in task.skipped}
    plan = half_of(g for g in prepared.traced.prunable if g.name not in left)
    dense = copy.deepcopy(prepared.model)
    began = time.process_time()
    smaller, proof, _ = shrunk(task, plan, None)
    now, certificate = time.process_time(), proof.certificate
    row |= {
        "outcome": "some_left" if left else "whole",
        "parameters_after": sum(p.numel() for p in smaller.parameters()),
        "form": str(task.form),
        "program": "compared" if certificate.structure is None else "proved",
        "seconds": f"{now - start:.1f}",
        "shrink_seconds": f"{now - began:.1f}",
    }
    if certificate.structure is None:
        told.append(f"compared, not proved: {certificate.unproved}")
    # A program may keep the sizes it was traced with, but for the number of samples.
    fresh = _fresh(by_name(made.model, made.inputs[0 if task.form is Form.EXPORTED else 1]))
    failure = compared(row, told, (made.model, dense, smaller), plan, fresh)
    if task.skipped:
        told.append(f"skipped: {_times(f'{group.reason:.300}' for group in task.skipped)}")
    names = {group.name for group in prepared.traced.prunable}
    refused = [group.frozen[0].reason for group in whole if group.frozen and group.name in names]
    told += [f"not refitted by osscar.prune: {_times(refused)}"] if refused else []
    return failure


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


def compared(
    row: Row,
    told: list[str],
    models: Sequence[nn.Module],
    plan: PruningPlan,
    inputs: Mapping[str, Tensor],
) -> str:
    """Compare the smaller model with the masked one on inputs that nothing has seen.

    The models are the one that came, the same prepared, whose tensors are those of the plan, and
    the smaller one.  Return what failed.
    """
    model, dense, small = models
    four = (model, dense, without_units(dense, plan), small)
    try:
        precision = "float64"
        came, before, masked, after = (_put_out(one, inputs, torch.float64) for one in four)
    except (RuntimeError, TypeError):  # code, kernels or programs that know float32 alone
        precision = "float32"
        came, before, masked, after = (_put_out(one, inputs, torch.float32) for one in four)
    difference = max(_apart(masked, after), _apart(came, before))
    row |= {"difference": f"{difference:.1e}", "precision": precision}
    if _apart(before, masked) < LEAST_EFFECT:
        told.append("masking moves the outputs too little for the comparison to tell")
    if not difference <= ALLOWED[precision]:
        return f"the smaller model is {difference:.1e} away from the masked one"
    return ""


def _put_out(model: nn.Module, inputs: Mapping[str, Tensor], kind: torch.dtype) -> list[Tensor]:
    model = copy.deepcopy(model).to(kind).eval()
    cast = {n: t.to(kind) if t.is_floating_point() else t for n, t in inputs.items()}
    has_cache = "use_cache" in inspect.signature(model.forward).parameters
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**cast, **({"use_cache": False} if has_cache else {})))
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


def reasons(prepared: Prepared) -> list[str]:
    """Say what froze groups apart from inputs and outputs, and which parts no operator reads."""
    dependencies: DependencyGraph = prepared.traced
    causes = []
    for freeze in (group.frozen[0] for group in dependencies.groups if group.frozen):
        if not freeze.reason.endswith(BOUNDARY):
            operator = f" (`{freeze.operator}`)" if freeze.operator else ""
            causes.append(f"{freeze.reason}{operator}")
    read = {tensor for operator in dependencies.operators for tensor in operator.tensors}
    names = (name for name, _ in prepared.model.named_parameters())
    unread = dict.fromkeys(name.partition(".")[0] for name in names if name not in read)
    idle = f"not run in evaluation mode: {', '.join(unread)}"
    return [*([_times(causes)] if causes else []), *([idle] if unread else [])]


def _times(causes: Iterable[str]) -> str:
    most = Counter(causes).most_common()
    told = [f"{count} x {reason}" for reason, count in most[:MOST_REASONS]]
    rest = sum(count for _, count in most[MOST_REASONS:])
    return "; ".join([*told, *([f"{rest} more"] if rest else [])])
