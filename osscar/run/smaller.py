"""The smaller model at the end of a run: its modules or its program, shrunk and proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.allocation.task import PruningTask
from osscar.base.errors import EquivalenceError, ModelError, warn
from osscar.base.printable import listed
from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.data.batches import Batch, to_model
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form, PruningPlan
from osscar.run.feasibility import tell_lost
from osscar.shrinking.shrink import Proof, rehearse, shrink
from osscar.shrinking.shrink_program import shrink_program
from osscar.walk.batch_norm import DenseStatistics, renew_statistics

_COMPARED = 3
"""So many sizes of samples of which no program tells are named, and their outputs compared."""


def shrunk(
    task: PruningTask, plan: PruningPlan, dense: DenseStatistics | None
) -> tuple[nn.Module, Proof, int]:
    """Return the smaller model, its proof, and how many batch norms have new statistics."""
    prepared, request = task.prepared, task.request
    work = prepared.model
    inputs = prepared.inputs.proofs(work, request.seed)

    def renew(plan: PruningPlan) -> int:
        with timed(Stage.PRUNED):
            return renew_statistics(work, plan, prepared.batches(), dense, prepared.ranks)

    # A budget may take nothing of what only the program can lose; one of bytes counted the program.
    optional = request.form == "auto" and request.size is None
    if task.form is Form.EXPORTED and not (optional and _goes_in_modules(prepared, plan, inputs)):
        # A program has no batch norms to observe; the model computes the same without the units.
        batch_norms = renew(PruningPlan(()))
        prepared.untouched.put_back(work)
        with timed(Stage.PROOF):
            made = shrink_program(work, plan, inputs, prepared.example)
        tell_lost(work, request)
        return made.model, made.proof, batch_norms
    with timed(Stage.PROOF):
        others = _unproved_sizes(prepared)
        some = [to_model(one, work) for one in list(others.values())[:_COMPARED]]
        proof = shrink(work, plan, [*inputs, *some], programs=prepared.programs)
        structure = proof.certificate.structure
        if structure is not None and others:
            warn(
                f"the proof holds for {'; or '.join(structure.sizes)}, and samples of the data "
                f"have {listed([*others], _COMPARED, '; ')}, for which nothing is proved; give two "
                "of these to osscar.prove(result.model, model, inputs)"
            )
    batch_norms = renew(proof.plan)
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return work, proof, batch_norms


def _unproved_sizes(prepared: Prepared) -> dict[str, Mapping[str, Tensor]]:
    """Return samples of the data whose sizes no dense program takes, by these sizes in words."""
    given = prepared.inputs
    others = dict[str, Mapping[str, Tensor]]()
    for one in given.apart or (given.tensors,):
        sample = one if given.alone else {name: x[:2][[0, -1]] for name, x in one.items()}
        if not any(it.traced.standalone.takes(sample) for it in prepared.programs.programs):
            others[", ".join(f"{n} {tuple(x.shape[1:])}" for n, x in sample.items())] = sample
    return others


def _goes_in_modules(prepared: Prepared, plan: PruningPlan, inputs: Sequence[Batch]) -> bool:
    """Whether modules can lose what a plan removes, if not all that they might have lost."""
    if any(group.name in prepared.in_programs for group in plan.groups):
        return False
    with timed(Stage.TRIAL), suppress(EquivalenceError, ModelError):
        rehearse(prepared.model, plan, inputs[:1], prepared.programs)
        return True
    return False
