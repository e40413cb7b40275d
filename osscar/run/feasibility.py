"""What can follow: each group that is to lose units loses some on trial, before any is solved.

Whether the code around a group works without some of its units is a matter of structure, which
neither weights nor the choice of units change.  One small trial of all groups together says so for
most models; where it fails, halves of them are tried, so that what cannot follow is skipped by
name.  Of groups that share a budget, every other one of a form is tried with the fewest units that
budgets could choose; where code does not take so few, the fewest that it takes are looked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from graph import CouplingGroup
from osscar.allocation.limits import allowances
from osscar.allocation.task import PruningTask, SkippedGroup
from osscar.base.errors import AdapterError, RequestError, warn
from osscar.base.printable import listed, pluralize
from osscar.base.timing import progress_bar
from osscar.network.model_state import model_state
from osscar.network.modules import own_methods
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from osscar.proof.structural import DensePrograms
from osscar.request import PruningRequest
from osscar.shrinking.shrink import Feasibility, form_of, rehearse
from osscar.shrinking.shrink_program import ProgramTrial
from osscar.shrinking.slice import is_list

_MOST_TOLD = 8


@dataclass(frozen=True)
class Feasible:
    """The form in which a model is shrunk, the groups that are skipped, and the fewest of others.

    They are fields of a task.
    """

    form: Form
    skipped: tuple[SkippedGroup, ...]
    narrowest: Mapping[str, int]


def feasible_groups(task: PruningTask) -> Feasible:
    """Return the form in which a model is shrunk, and which groups can follow, down to what width.

    Halving skips as few groups as it can; of several forms the first with the fewest is taken.  If
    none can follow, it is an AdapterError.
    """
    prepared, request, keep, asked = task.prepared, task.request, task.provisional, task.groups
    going = [group for group in asked if keep.get(group.name, group.units) < group.units]
    # Of kinds that are traced, nobody has asked for what is frozen.
    reasons = {one.name: one.frozen[0].reason for one in asked if one.kind.routed and one.frozen}
    tried = len(going) + len(reasons)
    routed = [group for group in going if group.kind.routed]
    reasons |= _tried_routed(task, routed)
    inside = _in_members(prepared, [group for group in routed if group.name not in reasons])
    traced = [group for group in going if not group.kind.routed and group.name not in inside]
    form, narrowest = Form.EAGER, dict[str, int]()
    takes_few = _takes_few(task, traced)
    if not takes_few:
        form, trial = _tried_traced(task, traced)
        reasons |= trial.reasons
        if takes_few is not None and form is Form.EAGER:
            narrowest = _narrowest(task, [g for g in traced if g.name not in trial.reasons])
    left = _skipped(asked, reasons)
    if len(left) == tried > 0:
        raise AdapterError(_refusal(left, request))
    # Of modules nobody expects to lose what only programs can.
    refused = tuple(g for g in left if form is Form.EXPORTED or g.name not in prepared.in_programs)
    methods = own_methods(prepared.model) if request.form == "auto" else ()
    if left and methods and form is Form.EAGER:
        warn(
            f"{type(prepared.model).__name__} keeps its modules, for the sake of "
            f"{_called(methods)}; {in_words(left)}. These may be pruned in form 'exported' "
            "(`--set form=exported`), which loses the methods"
        )
    elif refused:
        warn(f"{in_words(refused)}; the report and result.skipped say why")
    if narrowest:
        least = [f"{name!r} {units}" for name, units in narrowest.items()]
        warn(
            "code does something else with fewer units, so that a budget leaves at least: "
            f"{listed(least, _MOST_TOLD, '; ')}"
        )
    return Feasible(form, (*left, *_skipped(prepared.groups, inside)), narrowest)


def refused_widths(task: PruningTask, keep: Mapping[str, int]) -> tuple[SkippedGroup, ...]:
    """Return the groups whose code does not take the widths that were chosen for them.

    What is proved here of modules is not proved again when units are chosen.  In a program sizes
    follow by construction; routed groups are masked.
    """
    groups = [group for group in task.shared if keep.get(group.name, group.units) < group.units]
    others = [g for g in task.groups if g.name in keep and g not in groups]
    if task.form is not Form.EAGER or not groups or any(g.kind.routed for g in others):
        return ()
    with _trying(task, Form.EAGER) as trial:
        trial.grown(_arbitrary(others, keep), _arbitrary(groups, keep))
    return _skipped(groups, trial.reasons)


def tell_lost(model: nn.Module, request: PruningRequest) -> None:
    """Say what a class loses that becomes a program, where nobody has asked for one."""
    methods = own_methods(model)
    if methods and request.form == "auto":
        warn(
            f"the smaller model is an exported program without {_called(methods)} of "
            f"{type(model).__name__}, since some groups can be pruned only in a program; to skip "
            "these groups and keep the methods, use form eager (`--set form=eager`)"
        )


def _called(methods: Sequence[str]) -> str:
    return listed([f"{name}()" for name in methods])


def _skipped(
    groups: Sequence[CouplingGroup], reasons: Mapping[str, str]
) -> tuple[SkippedGroup, ...]:
    """Return those of some groups that there is a reason to skip, by name."""
    return tuple(
        SkippedGroup(group.name, str(group.kind), group.units, reasons[group.name])
        for group in groups
        if group.name in reasons
    )


def _tried_routed(task: PruningTask, groups: Sequence[CouplingGroup]) -> dict[str, str]:
    """Return why routed groups cannot go, by name; no program says where else tokens go."""
    prepared = task.prepared
    for kind in {group.kind for group in groups}:
        if not prepared.ranks.alone or is_on_disk(prepared.model):
            raise RequestError(
                f"{kind} can be removed only by one process and in memory; run without torchrun, "
                "and omit max_memory (`--max-memory`)"
            )
    model, inputs = prepared.model, prepared.inputs.proofs(task.request.seed)
    attempt = partial(rehearse, model, inputs=inputs[:1], programs=DensePrograms((), "routed"))
    trial = Feasibility(model, attempt)
    if groups:
        with progress_bar("trying what can follow"), model_state(model):
            trial.grown([], _arbitrary(groups, task.provisional))
    return trial.reasons


def _in_members(prepared: Prepared, going: Sequence[CouplingGroup]) -> dict[str, str]:
    """Return the groups that lie in modules of a list of which some leave, with a reason."""
    lists = [slot.module for group in going for slot in group.slots if is_list(slot)]
    return {
        group.name: f"its expert of {name!r} may leave"
        for group in prepared.groups
        for name in lists
        if group.prunable and all(slot.tensor.startswith(f"{name}.") for slot in group.slots)
    }


def _few(task: PruningTask) -> dict[str, int]:
    """Return the fewest units that budgets can choose for every other group of a form, first of it.

    The rest keeps about half: widths that divide all units hide numbers in the code.
    """
    keep, least, before = dict(task.provisional), task.least, Counter[object]()
    for group in task.shared if task.request.has_budget else ():
        if before[form_of(group)] % 2 == 0:
            keep[group.name] = least[group.name]
        before[form_of(group)] += 1
    return keep


def _takes_few(task: PruningTask, groups: Sequence[CouplingGroup]) -> bool | None:
    """Whether modules go with as few units as budgets can choose; None where none are tried."""
    prepared, few = task.prepared, _few(task)
    if (
        not groups
        or few == task.provisional
        or Form.EAGER not in _forms_to_try(prepared.model, task.request)
    ):
        return None
    if not prepared.programs.programs or any(g.name in prepared.in_programs for g in groups):
        return None
    with _trying(task, Form.EAGER) as trial:
        return trial.failure(_arbitrary(groups, few)) is None


def _narrowest(task: PruningTask, groups: Sequence[CouplingGroup]) -> dict[str, int]:
    """Return the fewest units that the code of some groups takes, all of which go with about half.

    Where it does not take those that budgets can choose, one group of the form is tried with more.
    """
    found = dict[str, int]()
    with _trying(task, Form.EAGER) as trial:
        trial.grown([], _arbitrary(groups, _few(task)))
        for form in {form_of(group): None for group in groups if group.name in trial.reasons}:
            alike = [group for group in groups if form_of(group) == form]
            first, fewest = alike[0], task.provisional[alike[0].name]
            options = task.options[first.name]
            width = int(options[0])
            while (width := int(options[options >= min(2 * width, fewest)][0])) < fewest:
                if trial.failure(_arbitrary([first], {first.name: width})) is None:
                    fewest = width
            found |= {group.name: fewest for group in alike}
    return found


def _tried_traced(task: PruningTask, groups: Sequence[CouplingGroup]) -> tuple[Form, Feasibility]:
    """Return the form of the model, and the trial that knows which groups cannot follow in it."""
    prepared = task.prepared
    forms = _forms_to_try(prepared.model, task.request)
    if not groups:
        return forms[0], Feasibility(prepared.model, lambda plan: None)
    plans = _arbitrary(groups, task.provisional)
    # Groups of repeated blocks mostly fail alike, so that they are halved last.
    plans.sort(key=lambda plan: re.sub(r"\d+", "", plan.name))
    in_modules = [plan for plan in plans if plan.name not in prepared.in_programs]
    possible = {Form.EAGER: in_modules, Form.EXPORTED: plans}
    together: dict[Form, Exception | None] = {}
    trials: dict[Form, Feasibility] = {}

    def look_into(form: Form) -> None:
        with _trying(task, form) as trials[form]:
            others = (plan.name for plan in plans if plan not in possible[form])
            trials[form].reasons |= {name: prepared.in_programs[name] for name in others}
            if together[form] is not None:
                trials[form].grown([], possible[form], together[form])

    for form in forms:  # whose failures are only looked into where no form does for all groups
        with _trying(task, form) as trial:
            together[form] = trial.failure(possible[form]) if possible[form] else None
        if together[form] is None and len(possible[form]) == len(plans):
            return form, trial
        if form is Form.EAGER and Form.EXPORTED in forms and own_methods(prepared.model):
            look_into(form)
            if _suffices(task, trials[form].reasons):
                return form, trials[form]
    for form in forms:
        if form not in trials:
            look_into(form)
    form = min(trials, key=lambda form: len(trials[form].reasons))
    return form, trials[form]


def _suffices(task: PruningTask, reasons: Mapping[str, str]) -> bool:
    """Whether modules can follow all that is asked for, without the groups that cannot."""
    without = replace(task, form=Form.EAGER, skipped=_skipped(task.groups, reasons))
    cannot = [group for group in task.groups if group.name in reasons]
    named = any(task.keep.get(group.name, group.units) < group.units for group in cannot)
    if named or (task.request.has_budget and not (without.shared or without.streams)):
        return False
    if not task.request.budgets:
        return True
    least = {**without.keep, **without.least}
    return all(one.holds(least) for one in allowances(without))


FORMS: dict[str, tuple[Form, ...]] = {
    "auto": (Form.EAGER, Form.EXPORTED),
    "eager": (Form.EAGER,),
    "exported": (Form.EXPORTED,),
}
"""What is tried, in this order."""


def _forms_to_try(model: nn.Module, request: PruningRequest) -> tuple[Form, ...]:
    """Return the forms to try; a program cannot generate, be timed, or lose experts."""
    choice = request.form
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    stays = generates or bool(request.timing) or request.routed
    return FORMS["eager" if choice == "auto" and stays else choice]


def includes_program_only_groups(model: nn.Module, request: PruningRequest) -> bool:
    """Whether groups count that only programs can lose: not by default of transformers' classes."""
    asked = request.form == "exported"
    plain = not isinstance(model, PreTrainedModel)
    return Form.EXPORTED in _forms_to_try(model, request) and (asked or plain)


@contextmanager
def _trying(task: PruningTask, form: Form) -> Iterator[Feasibility]:
    """Let groups be tried in one form; the model is as it was afterwards."""
    model = task.prepared.model
    with progress_bar("trying what can follow"), model_state(model):
        yield Feasibility(model, _rehearsal(task, form))


def _rehearsal(task: PruningTask, form: Form) -> Callable[[PruningPlan], object]:
    """Return what shrinks a model on trial and proves it; the model is then as it was."""
    prepared, model = task.prepared, task.prepared.model
    inputs = prepared.inputs.proofs(task.request.seed)
    if form is Form.EAGER:
        programs = prepared.programs
        return lambda plan: rehearse(model, plan, inputs[:1], programs)
    try:
        return ProgramTrial(model, prepared.example, inputs).proved
    except AdapterError as error:
        failure = error.with_traceback(None)

        def fail(plan: PruningPlan) -> None:
            raise failure

        return fail


def _arbitrary(groups: Sequence[CouplingGroup], keep: Mapping[str, int]) -> list[GroupPlan]:
    """Plan to keep drawn units of each group, so that no two groups agree by design."""
    generator = torch.Generator().manual_seed(0)

    def drawn(group: CouplingGroup) -> Iterator[int]:
        parts = group.step if group.kind.routed else 1
        size = group.units // parts
        for part in range(parts):
            units = torch.randperm(size, generator=generator)[: keep[group.name] // parts]
            yield from (units.sort().values + part * size).tolist()

    return [GroupPlan.of(group, tuple(drawn(group))) for group in groups]


# ---- in words ----------------------------------------------------------------------------


def in_words(skipped: Sequence[SkippedGroup]) -> str:
    """Say which groups are skipped."""
    names = listed([repr(group.name) for group in skipped], _MOST_TOLD, "; ")
    return f"skipped, with all their units: {names}"


def _refusal(left: Sequence[SkippedGroup], request: PruningRequest) -> str:
    """Say why nothing is pruned, and what to do."""
    reasons = listed([f"{group.name!r}: {group.reason}" for group in left], _MOST_TOLD, "; ")
    program = "; or prune the exported program (form exported, `--set form=exported`)"
    return (
        f"nothing was pruned, and nothing was written: none of {pluralize(len(left), 'group')} can "
        f"be pruned: {reasons}; let the code take these sizes from its weights, write -1 for them, "
        f"or register an adapter (@osscar.adapter){program * (request.form == 'eager')}"
    )
