"""The smaller model at the end of a run: its modules or its program, shrunk and proved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import nn
from transformers import PreTrainedModel

from osscar.allocation.task import PruningTask
from osscar.base.errors import EquivalenceError, ModelError, warn
from osscar.base.printable import listed
from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.data.batches import Batch
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form, PruningPlan, Structure
from osscar.proof.structural import DensePrograms
from osscar.run.feasibility import tell_lost
from osscar.shrinking.shrink import Proof, rehearse, shrink
from osscar.shrinking.shrink_program import shrink_program
from osscar.walk.batch_norm import DenseStatistics, renew_statistics


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
        programs = prepared.programs
        proof = shrink(work, plan, inputs, programs=programs)
        if proof.certificate.structure is not None:
            _tell_unproved_sizes(prepared, programs, proof.certificate.structure)
    batch_norms = renew(proof.plan)
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return work, proof, batch_norms


def _tell_unproved_sizes(prepared: Prepared, programs: DensePrograms, structure: Structure) -> None:
    """Say of which sizes the data are that the proof does not hold for, if some are."""
    given = prepared.inputs
    others: dict[str, None] = {}
    for sample in given.apart or (given.tensors,):
        if not given.alone:
            sample = {name: x[: 2 if len(x) > 1 else 1][[0, -1]] for name, x in sample.items()}
        if not any(one.traced.standalone.takes(sample) for one in programs.programs):
            others[", ".join(f"{n} {tuple(x.shape[1:])}" for n, x in sample.items())] = None
    if others:
        warn(
            f"the proof holds for {'; or '.join(structure.sizes)}, and samples of the data have "
            f"{listed([*others], 3, '; ')}, for which nothing is proved; give two "
            "of these to osscar.prove(result.model, model, inputs)"
        )


def _goes_in_modules(prepared: Prepared, plan: PruningPlan, inputs: Sequence[Batch]) -> bool:
    """Whether modules can lose what a plan removes, if not all that they might have lost."""
    if any(group.name in prepared.in_programs for group in plan.groups):
        return False
    with timed(Stage.TRIAL), suppress(EquivalenceError, ModelError):
        rehearse(prepared.model, plan, inputs[:1], prepared.programs)
        return True
    return False
