"""The masked model: what a smaller model is proved against.

Masking zeroes what reads the removed units, and the model keeps its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from graph.tracing.export import failing_module
from osscar.base.errors import ModelError, OsscarError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.kinds import room_of
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Place
from osscar.proof.equivalence import Inputs, Match, in_format_of, proof_outputs, prove_equal
from osscar.proof.plan import PruningPlan


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards.

    Units that are routed compute what they did, and no token is sent to those that are removed.
    """
    routed = [group for group in plan.groups if group.kind.routed]
    before: list[tuple[Tensor, Tensor, int, Tensor]] = []
    on_disk: list[tuple[OnDisk, Place]] = []
    try:
        for group in (group for group in plan.groups if not group.kind.routed):
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
        with ExitStack() as masks:
            for kind in dict.fromkeys(group.kind for group in routed):
                own = [group for group in routed if group.kind is kind]
                masks.enter_context(room_of(kind).masked(model, own))
            yield
    finally:
        for weight, index, dim, values in reversed(before):
            weight.index_copy_(dim, index, values)
        for parameter, place in reversed(on_disk):
            parameter.place = place


def distance_from_masked(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], *, keeping: bool
) -> Callable[[nn.Module], Match]:
    """Run a model without the units that a plan removes, and return what tells how far others are.

    With `keeping`, a pass that keeps its state is compared, too, if the model can run one.
    """
    given = [in_format_of(one, model) for one in inputs]
    with masked(model, plan):
        try:
            outputs = proof_outputs(model, given, keeping=keeping)
        except Exception as error:  # of the user's forward: not the shrunk model's fault
            let_shortage_pass(error)
            keeping, outputs = False, outputs_before(model, given)
    prove_equal(outputs, outputs)  # that there is something to compare

    def distance(smaller: nn.Module) -> Match:
        return prove_equal(outputs, proof_outputs(smaller, given, keeping=keeping))

    return distance


def outputs_before(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
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
