"""Shrink and prove in one step, all or nothing; where that fails, say which groups are to blame.

What a smaller model is proved against, in whichever form it is, are the masked model's outputs.
Masking zeroes what reads the removed units, and the model keeps its shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.groups import UnitKind
from graph.tracing.export import failing_module, in_mode
from graph.tracing.preserve import preserved
from graph.training import decides_by_training, same_draws
from osscar.base.errors import EquivalenceError, ModelError, OptionError, OsscarError, first_line
from osscar.base.inputs import safe_repr
from osscar.base.memory import let_shortage_pass
from osscar.base.printable import listed
from osscar.network.fake import on_shapes
from osscar.network.kernels import computable_mixtures
from osscar.network.model_state import restored
from osscar.network.modules import evaluating
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Place
from osscar.shrinking.equivalence import Inputs, call, explained, proof_outputs, prove_equal
from osscar.shrinking.fold import fold, unfold
from osscar.shrinking.integers import IntegerSearch
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.plan import GroupPlan, PruningPlan, check_plan
from osscar.shrinking.routers import without_experts
from osscar.shrinking.slice import slice_units
from osscar.shrinking.structure import remember_structure


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
    """Fold the weights that a plan cuts, and return what compares with the masked model."""
    fold_named(model, plan, inputs)
    return distance_from_masked(model, plan, inputs, keeping=True)


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


# ---- the masked model --------------------------------------------------------------------


def check_request(plan: object, inputs: Sequence[Inputs], tolerance: float | None) -> None:
    """Refuse what no model can be shrunk by, or proved on."""
    check_plan(plan)
    are_inputs = isinstance(inputs, list | tuple) and all(
        isinstance(one, tuple | Mapping) for one in inputs
    )
    if not inputs or not are_inputs:
        raise OptionError(
            f"the inputs of the proof are {safe_repr(inputs)}; give a list of tuples of positional "
            "arguments, or of dicts of keyword arguments, at least one"
        )
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 <= tolerance < math.inf):
        raise OptionError(f"tolerance is {safe_repr(tolerance)}; give a number from 0, or None")


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards.

    Experts that are removed compute what they did, and no token is sent to them.
    """
    experts = [group for group in plan.groups if group.kind is UnitKind.EXPERTS]
    zeroed = [group for group in plan.groups if group.kind is not UnitKind.EXPERTS]
    before: list[tuple[Tensor, Tensor, int, Tensor]] = []
    on_disk: list[tuple[OnDisk, Place]] = []
    try:
        for group in zeroed:
            for slot in group.consumers:
                path, _, attribute = slot.tensor.rpartition(".")
                weight = getattr(model.get_submodule(path), attribute)
                index = torch.tensor(slot.indices(group.gone), device=weight.device)
                if isinstance(weight, OnDisk):
                    on_disk.append((weight, weight.place))
                    weight.place = weight.place.zeroed(slot.dim, index)
                    continue
                weight = weight.detach()
                before.append((weight, index, slot.dim, weight.index_select(slot.dim, index)))
                weight.index_fill_(slot.dim, index, 0.0)
        with without_experts(model, experts):
            yield
    finally:
        for weight, index, dim, values in reversed(before):
            weight.index_copy_(dim, index, values)
        for parameter, place in reversed(on_disk):
            parameter.place = place


def distance_from_masked(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], *, keeping: bool
) -> Callable[[nn.Module, float | None], float]:
    """Run a model without the units that a plan removes, and return what tells how far others are.

    That takes a smaller model and a tolerance, as `prove_equal` does.  With `keeping`, a pass that
    keeps its state is compared, too, if the model can run one.
    """
    with masked(model, plan):
        try:
            outputs = proof_outputs(model, inputs, keeping=keeping)
        except Exception as error:  # of the user's forward: not the shrunk model's fault
            let_shortage_pass(error)
            keeping, outputs = False, _outputs_before(model, inputs)
    prove_equal(outputs, outputs)  # that there is something to compare

    def distance(smaller: nn.Module, tolerance: float | None) -> float:
        found = proof_outputs(smaller, inputs, keeping=keeping)
        return prove_equal(outputs, found, tolerance=tolerance)

    return distance


def _outputs_before(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return what a model puts out before anything is done to it."""
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


def fold_named(model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs]) -> None:
    """Fold the normalized weights that a plan cuts, and prove that nothing changes."""
    folded = fold(model, plan.tensors)
    if folded:
        found = _outputs_before(model, inputs)
        unfold(folded)
        names = ("the model", "the model with plain weights where they were normalized")
        try:
            prove_equal(_outputs_before(model, inputs), found, names=names)
        except EquivalenceError as error:
            raise EquivalenceError(
                f"{error}: code of its own reads {folded[0].tensor!r}; leave what cuts it out, or "
                "prune the model with plain weights (remove_parametrizations of torch)"
            ) from error
        fold(model, plan.tensors)


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
        f"{them} out (--skip {names[0]!r}, or a plan without {them})"
    )
