"""A model that was pruned at its dense shape becomes smaller: its modules, or its program."""

from __future__ import annotations

from contextlib import suppress

from torch import nn
from transformers import PreTrainedModel

from osscar.base.errors import EquivalenceError, ModelError
from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.preparation.prepare import Prepared
from osscar.proof.plan import Form, PruningPlan
from osscar.request import PruningRequest
from osscar.shrinking.shrink import Proof, rehearse, shrink
from osscar.shrinking.shrink_program import shrink_program
from osscar.walk.batch_norm import DenseStatistics, renew_statistics


def shrunk(
    prepared: Prepared,
    plan: PruningPlan,
    request: PruningRequest,
    form: Form,
    dense: DenseStatistics,
) -> tuple[nn.Module, Proof, int]:
    """Shrink a model whose refitted weights are committed, its modules in place, and prove it.

    Returned is besides how many batch-norm layers have new statistics; `dense` are those of the
    dense model.  A program has no batch-norm layers that could be asked for their inputs; the
    model, in which nothing reads the removed units any more, computes the same.

    Raises
    ------
    EquivalenceError
        If the smaller model computes something else.
    """
    work, seed = prepared.model, request.seed

    def renewed(plan: PruningPlan) -> int:
        with timed(Stage.PRUNED):
            return renew_statistics(
                work, plan, prepared.batches(), request.batch_norm, dense, prepared.ranks
            )

    if form is Form.EXPORTED and _goes_in_modules(prepared, plan, request):
        form = Form.EAGER
    if form is Form.EXPORTED:
        batch_norms = renewed(PruningPlan(()))
    prepared.untouched.put_back(work)
    if form is Form.EXPORTED:
        with timed(Stage.PROOF):
            made = shrink_program(work, plan, prepared.inputs.proofs(work, seed), prepared.example)
        return made.model, made.proof, batch_norms
    with timed(Stage.PROOF):
        inputs = prepared.inputs.proofs(work, seed)
        proof = shrink(work, plan, inputs, programs=prepared.programs)
    batch_norms = renewed(proof.plan)
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return work, proof, batch_norms


def _goes_in_modules(prepared: Prepared, plan: PruningPlan, request: PruningRequest) -> bool:
    """Whether modules can lose what a plan removes, if not all that they might have lost.

    A budget may take nothing of what only the program can lose.  One of bytes has counted those of
    the program.
    """
    only = any(group.name in prepared.in_programs for group in plan.groups)
    if request.form != "auto" or request.size is not None or only:
        return False
    inputs = prepared.inputs.proofs(prepared.model, request.seed)
    with timed(Stage.TRIAL), suppress(EquivalenceError, ModelError):
        prepared.untouched.put_back()
        rehearse(prepared.model, plan, inputs[:1], prepared.programs)
        return True
    return False


def put_back(prepared: Prepared, model: nn.Module, plan: PruningPlan) -> None:
    """Take away what forward passes have written; a program writes nothing."""
    if plan.form is Form.EAGER:
        numbers = {(number.module, number.attribute) for number in plan.integers}
        prepared.untouched.put_back(model, numbers)
