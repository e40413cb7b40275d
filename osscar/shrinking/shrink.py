"""Shrink and prove in one step, all or nothing; where that fails, say which groups are to blame."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from graph.tracing.export import failing_module
from osscar.base.errors import EquivalenceError, ModelError, OptionError, OsscarError, first_line
from osscar.base.inputs import shown
from osscar.base.memory import let_shortage_pass
from osscar.network.model_state import restored
from osscar.network.modules import evaluating
from osscar.shrinking.equivalence import (
    Inputs,
    proof_outputs,
    prove_equal,
)
from osscar.shrinking.fold import fold
from osscar.shrinking.follow import prepare
from osscar.shrinking.integers import IntegerSearch
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.mask import masked
from osscar.shrinking.plan import GroupPlan, PruningPlan, check_plan
from osscar.shrinking.slice import slice_units
from osscar.shrinking.structure import remember_structure
from osscar.shrinking.training import failure_in_training


@dataclass(frozen=True)
class Proof:
    """A model was shrunk, and this is how far it is from the masked one.

    Parameters
    ----------
    plan
        What was removed, with the numbers of modules that had to be found.
    error
        Largest difference between outputs, relative to the largest output.
    """

    plan: PruningPlan
    error: float


def shrink(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Sequence[Inputs],
    *,
    tolerance: float | None = None,
) -> Proof:
    """Remove units from a model, in place, and prove that nothing else has changed.

    Parameters
    ----------
    model
        Changed in place; as it was before if anything fails.
    plan
        What stays.
    inputs
        On which the shrunk model is compared with the masked one, best of more than one size: each
        a tuple of positional arguments or a dict of keyword arguments.
    tolerance
        Largest difference allowed, relative to the largest output; by default that of the number
        format.

    Raises
    ------
    ModelError
        If the plan does not fit the model, or the model cannot run on the inputs.
    OptionError
        If plan, inputs or tolerance are none.
    EquivalenceError
        If the outputs differ; `AdapterError` if a module cannot follow.
    """
    check_plan(plan)
    check_inputs(inputs)
    check_tolerance(tolerance)
    with evaluating(model), restored(model, on_error=True):
        remember_structure(model, inputs[0])
        proof = _Attempt(model, plan, inputs, tolerance)
        try:
            return proof.run()
        except EquivalenceError as error:
            guilty = _Guilty(model, inputs[:1], tolerance).among(plan)
            raise type(error)(f"{error}; nothing was written. {guilty}") from error


def rehearse(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Sequence[Inputs],
    *,
    tolerance: float | None = None,
    training: bool = False,
) -> str:
    """Shrink a model in evaluation mode and prove it, as `shrink` does, and put everything back.

    Parameters
    ----------
    model, plan, inputs, tolerance
        As `shrink` takes them.
    training
        Whether to run it in training, too, as far as shapes tell.

    Returns
    -------
    str
        How the smaller model fails in training; nothing if it does not, or was not run.

    Raises
    ------
    ModelError, EquivalenceError
        As `shrink`, without looking for the groups that are to blame.
    """
    with restored(model):
        _Attempt(model, plan, inputs, tolerance).run()
        return failure_in_training(model, inputs[0]) if training else ""


def check_inputs(inputs: Sequence[Inputs]) -> None:
    """Refuse anything but a list of inputs of a forward pass."""
    are_inputs = isinstance(inputs, list | tuple) and all(
        isinstance(one, tuple | Mapping) for one in inputs
    )
    if not inputs or not are_inputs:
        raise OptionError(
            f"the inputs of the proof are {shown(inputs)}; give a list of tuples of positional "
            "arguments, or of dicts of keyword arguments, at least one"
        )


def check_tolerance(tolerance: float | None) -> None:
    """Refuse what is no share of the largest output."""
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 <= tolerance < math.inf):
        raise OptionError(f"tolerance is {shown(tolerance)}; give a number from 0, or None")


class _Attempt:
    """One shrinking of a model in evaluation mode, which is prepared for it and then as before."""

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        inputs: Sequence[Inputs],
        tolerance: float | None,
    ) -> None:
        self.model, self.plan, self.inputs, self.tolerance = model, plan, inputs, tolerance
        fold_named(model, plan, inputs)
        with masked(model, plan):  # as it came: whatever is done to it must not change this
            self.keeping, self.expected = _expected(model, inputs)
        prepare(model)
        prove_equal(self.expected, self.expected)  # that there is something to compare

    def run(self) -> Proof:
        """Shrink and prove; if that fails, the model is as it was when this was made."""
        with restored(self.model, on_error=True):
            slice_units(self.model, self.plan)
            error, found = IntegerSearch(self.model, self.plan, self._check).run()
            plan = replace(self.plan, integers=self.plan.integers + found)
            note(self.model, plans=(*lineage_of(self.model).plans[:-1], plan))
            return Proof(plan, error)

    def _check(self) -> float:
        found = proof_outputs(self.model, self.inputs, keeping=self.keeping)
        return prove_equal(self.expected, found, tolerance=self.tolerance)


def fold_named(model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs]) -> None:
    """Fold the normalized weights that a plan cuts as plain ones, and prove that nothing changes.

    Raises
    ------
    EquivalenceError
        If something does.
    """
    folded = fold(model, plan.tensors)
    if folded:
        found = outputs_before(model, inputs)
        for one in folded:
            one.undo()
        names = ("the model", "the model with plain weights where they were normalized")
        try:
            prove_equal(outputs_before(model, inputs), found, names=names)
        except EquivalenceError as error:
            raise EquivalenceError(
                f"{error}: code of its own reads {folded[0].tensor!r}; leave what cuts it out, or "
                "prune the model with plain weights (remove_parametrizations of torch)"
            ) from error
        fold(model, plan.tensors)


def outputs_before(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return what a model puts out before anything is done to it.

    Raises
    ------
    ModelError
        If it cannot run on the inputs, naming the module that failed.
    """
    try:
        return proof_outputs(model, inputs)
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        name = failing_module(error.__traceback__, model)
        raise ModelError(
            f"module {name or 'the model'!r} ({type(model.get_submodule(name)).__name__}) fails on "
            f"the inputs of the proof, before anything is removed: {first_line(error):.300}"
        ) from error


def _expected(model: nn.Module, inputs: Sequence[Inputs]) -> tuple[bool, list[Tensor]]:
    """Return what a model puts out, and whether that is also of a pass that keeps its state."""
    try:
        return True, proof_outputs(model, inputs, keeping=True)
    except Exception as error:  # of the user's forward: it is not the shrunk model's fault
        let_shortage_pass(error)
        return False, outputs_before(model, inputs)


_MOST_TRIALS = 64
_MOST_SECONDS = 120.0
_MOST_NAMED = 8


class _Guilty:
    """Finds the groups of a refused plan that cannot go, by halving it.

    Each trial shrinks the model, which is in evaluation mode, and restores it.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Inputs], tolerance: float | None) -> None:
        self.model, self.inputs, self.tolerance = model, inputs, tolerance
        self.trials, self.deadline = _MOST_TRIALS, time.monotonic() + _MOST_SECONDS

    def among(self, plan: PruningPlan) -> str:
        """Say which groups they are, and what to do."""
        groups = plan.groups
        names = [group.name for group in (groups if len(groups) == 1 else self._halves(groups))]
        if not names:
            return (
                "No single group is to blame, only several together: leave some of the "
                f"{len(groups)} out of what is pruned (groups= in Python, --skip on the command "
                "line)"
            )
        shown = ", ".join(map(repr, names[:_MOST_NAMED]))
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        them = "them" if len(names) > 1 else "it"
        return (
            f"What fails is {'among ' if self._spent else ''}the pruning of {shown}{more}: leave "
            f"{them} out (a plan or groups= without {them} in Python, --skip {names[0]!r} on the "
            "command line)"
        )

    @property
    def _spent(self) -> bool:
        return self.trials <= 0 or time.monotonic() > self.deadline

    def _halves(self, groups: Sequence[GroupPlan]) -> list[GroupPlan]:
        middle = len(groups) // 2
        return [*self._failing(groups[:middle]), *self._failing(groups[middle:])]

    def _failing(self, groups: Sequence[GroupPlan]) -> list[GroupPlan]:
        if self._spent:
            return list(groups)  # not cleared
        self.trials -= 1
        try:
            plan = PruningPlan(tuple(groups))
            rehearse(self.model, plan, self.inputs, tolerance=self.tolerance)
        except OsscarError:
            return list(groups) if len(groups) == 1 else self._halves(groups)
        return []
