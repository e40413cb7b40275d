"""Shrink and prove in one step, all or nothing; where that fails, say which groups are to blame."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.tracing.export import in_mode
from graph.tracing.preserve import preserved
from graph.training import decides_by_training, same_draws
from osscar.base.errors import EquivalenceError, ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.base.printable import listed
from osscar.network.fake import on_shapes
from osscar.network.kernels import computable_mixtures
from osscar.network.model_state import restored
from osscar.network.modules import evaluating
from osscar.offload.on_disk import OnDisk
from osscar.shrinking.equivalence import Inputs, call, explained
from osscar.shrinking.follow import prepare
from osscar.shrinking.integers import IntegerSearch
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.plan import GroupPlan, PruningPlan
from osscar.shrinking.proof import Proof, check_request, distance_from_masked, fold_named
from osscar.shrinking.slice import slice_units
from osscar.shrinking.structure import remember_structure


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
    check_request(plan, inputs, tolerance)
    with evaluating(model), restored(model, on_error=True):
        remember_structure(model, inputs[0])
        expected = _expected(model, plan, inputs)
        try:
            return _proved(model, plan, expected, tolerance)
        except EquivalenceError as error:
            attempt = partial(rehearse, model, inputs=inputs, tolerance=tolerance)
            found = Feasibility(attempt, _MOST_TRIALS, _MOST_SECONDS)
            found.grown([], plan.groups, error)
            raise type(error)(f"{error}; nothing was written. {_blamed(found)}") from error


def rehearse(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Sequence[Inputs],
    *,
    tolerance: float | None = None,
    training: bool = False,
) -> str:
    """Shrink a model in evaluation mode and prove it, as `shrink` does, and put everything back.

    Return how the smaller model fails in training, as far as shapes tell; nothing if it does not,
    or was not run.
    """
    with restored(model):
        _proved(model, plan, _expected(model, plan, inputs), tolerance)
        return failure_in_training(model, inputs[0]) if training else ""


_Distance: TypeAlias = Callable[[nn.Module, float | None], float]


def _expected(model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs]) -> _Distance:
    """Return what compares with the masked model, and prepare the model for losing units."""
    fold_named(model, plan, inputs)
    # Of the model as it came: whatever is done to it must not change this.
    expected = distance_from_masked(model, plan, inputs, keeping=True)
    prepare(model)
    return expected


def _proved(
    model: nn.Module, plan: PruningPlan, expected: _Distance, tolerance: float | None
) -> Proof:
    """Shrink a prepared model and prove it; if that fails, it is as it was."""
    with restored(model, on_error=True):
        slice_units(model, plan)
        check = partial(expected, model, tolerance)
        error, found = IntegerSearch(model, plan, check).run()
        plan = replace(plan, integers=plan.integers + found)
        note(model, plans=(*lineage_of(model).plans[:-1], plan))
        return Proof(plan, error)


# ---- in training -------------------------------------------------------------------------


def failure_in_training(model: nn.Module, inputs: Inputs) -> str:
    """Say how a model fails in training; nothing if it does not.

    Its own modules are in training, and layers of torch in evaluation. Nothing is computed, so that
    code which changes weights or keeps averages changes none.
    """
    with (
        preserved(model),
        in_mode(model, training=True),
        computable_mixtures(model),
        same_draws(),
        torch.no_grad(),
        on_shapes() as fake,
    ):
        try:
            call(model, pytree.tree_map_only(Tensor, fake.from_tensor, inputs))
        except Exception as error:  # the model may be anyone's code
            let_shortage_pass(error)
            return str(explained(error, model))
    return ""


def could_fail_in_training(model: nn.Module, inputs: Inputs) -> bool:
    """Whether there is code for training that runs now, and can be tried once more.

    Models that are read from disk cannot: they are those of families whose code is known.
    """
    on_disk = any(isinstance(parameter, OnDisk) for parameter in model.parameters())
    return not on_disk and decides_by_training(model) and not failure_in_training(model, inputs)


# ---- which groups can go -----------------------------------------------------------------


class Feasibility:
    """Finds, by halving, groups that can go together.

    `attempt` shrinks and proves a model, and puts it back; it raises where that fails. After so
    many trials or seconds, groups that are not cleared stay.
    """

    def __init__(
        self,
        attempt: Callable[[PruningPlan], object],
        trials: float = math.inf,
        seconds: float = math.inf,
    ) -> None:
        self.attempt = attempt
        self.trials, self.deadline = trials, time.monotonic() + seconds
        self.reasons: dict[str, str] = {}
        """Why groups cannot go, by name."""

    @property
    def spent(self) -> bool:
        """Whether no more is tried."""
        return self.trials <= 0 or time.monotonic() > self.deadline

    def grown(
        self,
        going: Sequence[GroupPlan],
        more: Sequence[GroupPlan],
        failure: Exception | None = None,
    ) -> list[GroupPlan]:
        """Return groups that can go together: some that can already, with as many more as can.

        `failure` is how all of them together fail, if that is known.
        """
        failure = failure or self.failure([*going, *more])
        if failure is None:
            return [*going, *more]
        if len(more) == 1 or self.spent:
            for plan in more:
                self.leave(plan, failure)
            return list(going)
        middle = len(more) // 2
        grown = self.grown(going, more[:middle])
        all_went = len(grown) == len(going) + middle
        return self.grown(grown, more[middle:], failure if all_went else None)

    def failure(self, plans: Sequence[GroupPlan]) -> Exception | None:
        """Return how groups fail together, or None if they can go."""
        self.trials -= 1
        try:
            self.attempt(PruningPlan(tuple(plans)))
        except (EquivalenceError, ModelError) as error:
            # Without the frames that raised it, which hold on to the shrunk model.
            return error.with_traceback(None)
        return None

    def leave(self, plan: GroupPlan, failure: Exception) -> None:
        """Note that a group cannot go."""
        self.reasons[plan.name] = first_line(failure)


_MOST_TRIALS = 64
_MOST_SECONDS = 120.0


def _blamed(found: Feasibility) -> str:
    """Say which groups of a refused plan cannot go, and what to do."""
    names = list(found.reasons)
    shown = listed([*map(repr, names)], 8)
    them = "them" if len(names) > 1 else "it"
    return (
        f"What fails is {'among ' if found.spent else ''}the pruning of {shown}: leave "
        f"{them} out (a plan or groups= without {them} in Python, --skip {names[0]!r} on the "
        "command line)"
    )
