"""What a smaller model is proved against, in whichever form it is: the masked model's outputs.

Masking zeroes what reads the removed units, and the model keeps its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
class MaskedOutputs:
    """What a model puts out without the units that a plan removes.

    `keeping` tells whether those of a pass that keeps its state are among them.
    """

    inputs: Sequence[Inputs]
    outputs: Sequence[Tensor]
    keeping: bool = False

    @classmethod
    def of(
        cls, model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], *, keeping: bool
    ) -> MaskedOutputs:
        """Run a model in evaluation mode without some units."""
        with masked(model, plan):
            try:
                return cls(inputs, proof_outputs(model, inputs, keeping=keeping), keeping)
            except Exception as error:  # of the user's forward: not the shrunk model's fault
                let_shortage_pass(error)
                return cls(inputs, _outputs_before(model, inputs))

    def distance(self, smaller: nn.Module, tolerance: float | None) -> float:
        """Return how far a smaller model is from this, relative to the largest output."""
        found = proof_outputs(smaller, self.inputs, keeping=self.keeping)
        return prove_equal(self.outputs, found, tolerance=tolerance)


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
