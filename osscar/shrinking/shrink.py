"""Shrink and prove in one step, all or nothing; where that fails, say which groups are to blame."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from graph import CouplingGroup
from graph.tracing.preserve import forget_cached, forget_derived, preserved
from osscar.base.errors import AdapterError, EquivalenceError, ModelError, first_line, warn
from osscar.base.printable import listed
from osscar.network.model_state import ModelState
from osscar.network.modules import copied, evaluating, graphics_cards, named_tensors, number_format
from osscar.offload.on_disk import OnDisk
from osscar.proof.equivalence import (
    Inputs,
    by_name,
    distance_from_masked,
    finer_precision,
    outputs_before,
    prove_equal,
)
from osscar.proof.lineage import lineage_of, note, remember_structure
from osscar.proof.plan import Certificate, Form, GroupPlan, Integer, PruningPlan, Structure
from osscar.proof.structural import DensePrograms, StructureError, Unproved, dense_programs
from osscar.shrinking.fold import fold, is_foldable
from osscar.shrinking.integers import IntegerSearch, kind_of
from osscar.shrinking.slice import adapted, nearby, slice_units


@dataclass(frozen=True)
class Proof:
    """What was proved and compared when a model was shrunk.

    Parameters
    ----------
    plan
        What was removed, with the numbers of modules that had to be found.
    certificate
        What was proved, and what was compared.
    """

    plan: PruningPlan
    certificate: Certificate


def shrink(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Sequence[Inputs],
    *,
    programs: DensePrograms | None = None,
) -> Proof:
    """Remove units from a model, in place, and prove that nothing else has changed.

    The program of the smaller model is compared with that of the dense one without these units, and
    its outputs with those of the masked model, in the next finer number format if the model runs in
    it.

    Parameters
    ----------
    model
        Changed in place; as it was before if anything fails.
    plan
        What stays.
    inputs
        On which the shrunk model is compared with the masked one, best of more than one size: each
        a tuple of positional arguments or a dict of keyword arguments.  The dense model is exported
        with the first of them.
    programs
        Of the dense model; by default it is exported.

    Returns
    -------
    Proof
        Its certificate says whether programs could be compared.

    Raises
    ------
    ModelError
        If the plan does not fit the model, or the model cannot run on the inputs.
    EquivalenceError
        If the programs or the outputs differ; `AdapterError` if a module cannot follow.
    """
    with (
        evaluating(model),
        torch.random.fork_rng(graphics_cards(model)),
        preserved(model, on_error=True),
    ):
        remember_structure(model, inputs[0])
        if programs is None:
            fold_named(model, plan, inputs)
            programs = dense_programs(model, by_name(model, inputs[0]))
        try:
            proof = _proved(model, plan, inputs, programs)
        except EquivalenceError as error:
            said = set(error.by_module) if isinstance(error, StructureError) else set[str]()
            near = [repr(one.name) for one in plan.groups if said & set(nearby(model, one))]
            them = f"; prune without those of {listed(near, 8)} whose width that code uses"
            raise type(error)(
                f"{error}; nothing was written{f'{them} (skip, `--skip`)' if near else ''}"
            ) from error
        structure = proof.certificate.structure
        if structure is not None and structure.untried:
            sizes = " or ".join(structure.untried)
            warn(
                f"nothing is proved for {sizes}, where the model's code does something else; "
                "compare outputs there before you rely on them"
            )
        return proof


def rehearse(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], programs: DensePrograms
) -> None:
    """Shrink a model in evaluation mode and prove it, as `shrink` does, and put everything back."""
    with preserved(model):
        _proved(model, plan, inputs, programs)


def prove(model: nn.Module, dense: nn.Module, example: Inputs | Tensor) -> Structure:
    """Prove again that the code of a pruned model equals that of the dense one without units.

    Programs of both are compared; weights are not, which may have been refitted or trained since.

    Parameters
    ----------
    model
        As `osscar.prune` returned it, or `osscar.load`, whose modules were shrunk.
    dense
        The model that it was pruned from; it is not changed.
    example
        Inputs that both take, two samples or more: a tensor, a tuple, or a mapping by argument.

    Returns
    -------
    Structure
        What is equal, and for which sizes of inputs.

    Raises
    ------
    ModelError
        If nothing was removed from the modules of the model, or programs cannot be compared.
    StructureError
        If the code computes something else.
    """
    plans = lineage_of(model).plans
    if not plans or any(plan.form is not Form.EAGER for plan in plans):
        raise ModelError(
            "there is no record of units removed from the modules of this model; give one that "
            "osscar.prune or osscar.load returned (an exported program needs no proof)"
        )
    work, example = copied(dense), (example,) if isinstance(example, Tensor) else example
    with torch.random.fork_rng(graphics_cards(model)), evaluating(model, work), torch.no_grad():
        for number, plan in enumerate(plans, 1):
            fold(work, plan.tensors)
            programs = dense_programs(work, by_name(work, example))
            slice_units(work, plan)
            made = model if number == len(plans) else work
            try:
                structure = programs.prove(made, plan)
            except Unproved as reason:
                raise ModelError(f"the programs cannot be compared: {reason}") from reason
    return structure


def _proved(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], programs: DensePrograms
) -> Proof:
    """Shrink a model and prove it; if that fails, it is as it was."""
    untouched, own = ModelState(model), number_format(model)
    with untouched.watching(), finer_precision(model, inputs[0]):
        distance = distance_from_masked(model, plan, inputs, keeping=True)
        finer = number_format(model) != own
    with preserved(model, on_error=True):
        before = dict(named_tensors(model))
        untouched.put_back()
        for name, buffer in model.named_buffers():  # which adapters may change in place
            before[name] = buffer if isinstance(buffer, OnDisk) else buffer.clone()
        slice_units(model, plan)
        forget_cached(model)
        found: tuple[Integer, ...] = ()
        try:
            with untouched.watching(), finer_precision(model) if finer else nullcontext():
                match, found = IntegerSearch(model, plan, partial(distance, model)).run()
        except EquivalenceError as error:
            if not isinstance(error, AdapterError):  # the programs say in which line of code
                with suppress(Unproved):
                    untouched.put_back()
                    programs.prove(model, plan)
            raise
        finally:  # what passes keep for the next would be another program
            untouched.put_back(kept={(number.module, number.attribute) for number in found})
        forget_derived(model)  # what modules had computed of the tensors before they were cut
        plan = replace(plan, integers=plan.integers + found)
        try:
            anew = adapted(model, plan)
            structure, unproved = programs.prove(model, plan, before, anew=anew), ""
        except Unproved as reason:
            structure, unproved = None, str(reason)
        certificate = Certificate(match.error, match.ties, structure, unproved)
        known = lineage_of(model)
        certificates = (*known.certificates, certificate)
        note(model, plans=(*known.plans[:-1], plan), certificates=certificates)
        return Proof(plan, certificate)


# ---- the masked model --------------------------------------------------------------------


def fold_named(model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs]) -> None:
    """Fold the normalized weights that a plan cuts, and prove that nothing changes."""
    before = outputs_before(model, inputs) if any(map(is_foldable, model.modules())) else []
    folded = fold(model, plan.tensors)
    if folded:
        names = ("the model", "the model with plain weights where they were normalized")
        try:
            prove_equal(before, outputs_before(model, inputs), names=names)
        except EquivalenceError as error:
            raise EquivalenceError(
                f"{error}: code of the model uses {next(iter(folded))!r}; do not prune the groups "
                "that cut it, or make its weights plain ones (remove_parametrizations of torch)"
            ) from error


# ---- which groups can go -----------------------------------------------------------------


def form_of(group: GroupPlan | CouplingGroup) -> Hashable:
    """Return what groups of repeated blocks have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "", group.name), str(group.kind), group.units


class Feasibility:
    """Finds groups that can go together.

    `attempt` shrinks and proves a model, and puts it back; it raises where that fails.  Groups near
    the modules that are to blame are left out first, and what is not clear then is found by
    halving.
    """

    def __init__(self, model: nn.Module, attempt: Callable[[PruningPlan], object]) -> None:
        self.model, self.attempt = model, attempt
        self.reasons: dict[str, str] = {}
        """Why groups cannot go, by name."""
        self.of_forms: dict[Hashable, str] = {}
        """Why not, by what groups of repeated blocks have in common."""

    def grown(
        self,
        going: Sequence[GroupPlan],
        more: Sequence[GroupPlan],
        failure: Exception | None = None,
    ) -> list[GroupPlan]:
        """Return groups that can go together: some that can already, with as many more as can."""
        failure = failure or self.failure([*going, *more])
        if failure is None:
            return [*going, *more]
        if len(more) == 1:
            self.reasons[more[0].name] = self._reason(more[0], going, failure)
            return list(going)
        blamed = self._blamed(failure, more)
        if blamed:
            self.reasons |= blamed
            others = [plan for plan in more if plan.name not in blamed]
            return self.grown(going, others) if others else list(going)
        middle = len(more) // 2
        grown = self.grown(going, more[:middle])
        all_went = len(grown) == len(going) + middle
        return self.grown(grown, more[middle:], failure if all_went else None)

    def _reason(self, plan: GroupPlan, going: Sequence[GroupPlan], failure: Exception) -> str:
        """Return why a group cannot go: the same for layers of the same form, and best of it alone.

        Other groups may be what a failure tells of whose numbers follow later.
        """
        form = form_of(plan)
        if form not in self.of_forms:
            alone = self.failure([plan]) if going else None
            self.of_forms[form] = self._in_words(alone or failure)
        return self.of_forms[form]

    def _in_words(self, failure: Exception) -> str:
        """Say what fails, without numbers of a trial."""
        if isinstance(failure, StructureError) and failure.by_module:
            name, said = next(iter(failure.by_module.items()))
            return f"{kind_of(self.model.get_submodule(name)).__name__} {said}"
        said = first_line(failure)
        differ = not isinstance(failure, AdapterError)
        return re.sub(r" (by|at) \d.*", "", said) if differ else said

    def _blamed(self, failure: Exception, more: Sequence[GroupPlan]) -> dict[str, str]:
        """Return what modules of groups do, by group, where no other group is near these."""
        if not isinstance(failure, StructureError):
            return {}
        near = {plan.name: set(nearby(self.model, plan)) for plan in more}
        found: dict[str, str] = {}
        for module, reason in failure.by_module.items():
            those = [name for name in near if module in near[name]]
            if len(those) == 1:
                kind = kind_of(self.model.get_submodule(module))
                found.setdefault(those[0], f"{kind.__name__} {reason}")
        return found

    def failure(self, plans: Sequence[GroupPlan]) -> Exception | None:
        """Return how groups fail together, or None if they can go."""
        try:
            self.attempt(PruningPlan(tuple(plans)))
        except (EquivalenceError, ModelError) as error:
            # Without the frames that raised it, which hold on to the shrunk model.
            return error.with_traceback(None)
        return None
