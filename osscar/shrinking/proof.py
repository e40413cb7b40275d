"""What a smaller model is proved against, in whichever form it is: the masked model's outputs.

Masking zeroes what reads the removed units, and the model keeps its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graph.tracing.export import failing_module
from osscar.base.errors import EquivalenceError, ModelError, OptionError, OsscarError, first_line
from osscar.base.inputs import shown
from osscar.base.memory import let_shortage_pass
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Filled, Place
from osscar.shrinking.equivalence import Inputs, proof_outputs, prove_equal
from osscar.shrinking.fold import fold
from osscar.shrinking.plan import PruningPlan, check_plan


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


def check_request(plan: object, inputs: Sequence[Inputs], tolerance: float | None) -> None:
    """Refuse what no model can be shrunk by, or proved on."""
    check_plan(plan)
    are_inputs = isinstance(inputs, list | tuple) and all(
        isinstance(one, tuple | Mapping) for one in inputs
    )
    if not inputs or not are_inputs:
        raise OptionError(
            f"the inputs of the proof are {shown(inputs)}; give a list of tuples of positional "
            "arguments, or of dicts of keyword arguments, at least one"
        )
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 <= tolerance < math.inf):
        raise OptionError(f"tolerance is {shown(tolerance)}; give a number from 0, or None")


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards."""
    before: list[tuple[Tensor, Tensor, int, Tensor]] = []
    on_disk: list[tuple[OnDisk, Place]] = []
    try:
        for group in plan.groups:
            for slot in group.consumers:
                path, _, attribute = slot.tensor.rpartition(".")
                weight = getattr(model.get_submodule(path), attribute)
                index = torch.tensor(slot.indices(group.gone), device=weight.device)
                if isinstance(weight, OnDisk):
                    on_disk.append((weight, weight.place))
                    weight.place = weight.place.then(Filled(slot.dim, index))
                    continue
                weight = weight.detach()
                before.append((weight, index, slot.dim, weight.index_select(slot.dim, index)))
                weight.index_fill_(slot.dim, index, 0.0)
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
        for one in folded:
            one.undo()
        names = ("the model", "the model with plain weights where they were normalized")
        try:
            prove_equal(_outputs_before(model, inputs), found, names=names)
        except EquivalenceError as error:
            raise EquivalenceError(
                f"{error}: code of its own reads {folded[0].tensor!r}; leave what cuts it out, or "
                "prune the model with plain weights (remove_parametrizations of torch)"
            ) from error
        fold(model, plan.tensors)
