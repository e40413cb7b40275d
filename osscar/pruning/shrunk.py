"""A model that was pruned at its dense shape becomes smaller: its modules, or its program."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from osscar.base.timing import Stage, timed
from osscar.checkpoint.hf_config import adopt_config
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest
from osscar.shrinking.equivalence import finer_precision
from osscar.shrinking.plan import Form, PruningPlan
from osscar.shrinking.program.shrink_program import shrink_program
from osscar.shrinking.shrink import Proof, shrink
from osscar.walk.batch_norm import DenseStatistics, renew_statistics


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A smaller model.

    Parameters
    ----------
    model
        The model.
    proof
        That it computes what the masked one did.
    batch_norms
        How many batch-norm layers have new statistics.
    """

    model: nn.Module
    proof: Proof
    batch_norms: int


def shrunk(
    prepared: Prepared,
    plan: PruningPlan,
    request: PruningRequest,
    form: Form,
    statistics: DenseStatistics,
) -> Shrunk:
    """Shrink a model whose refitted weights are committed, and prove it.

    Parameters
    ----------
    prepared
        The model; its modules are changed in place.
    plan
        What leaves.
    request
        What is asked for.
    form
        What becomes smaller.
    statistics
        Of the batch-norm layers of the dense model.

    Raises
    ------
    EquivalenceError
        If the smaller model computes something else.
    """
    return (_program if form is Form.GRAPH else _modules)(prepared, plan, request, statistics)


def _modules(
    prepared: Prepared, plan: PruningPlan, request: PruningRequest, dense: DenseStatistics
) -> Shrunk:
    work = prepared.model
    with timed(Stage.PROOF), finer_precision(work, prepared.example):
        proof = shrink(work, plan, prepared.inputs.proofs(work, request.seed))
    with timed(Stage.PRUNED):
        renewed = renew_statistics(
            work, proof.plan, prepared.batches(), request.batch_norm, dense, prepared.ranks
        )
    if isinstance(work, PreTrainedModel):
        adopt_config(work)
    return Shrunk(work, proof, renewed)


def _program(
    prepared: Prepared, plan: PruningPlan, request: PruningRequest, dense: DenseStatistics
) -> Shrunk:
    """Shrink the model's exported program.

    A program has no batch-norm layers that could be asked for their inputs; the model, in which
    nothing reads the removed units any more, computes the same.
    """
    work, nothing = prepared.model, PruningPlan(())
    with timed(Stage.PRUNED):
        renewed = renew_statistics(
            work, nothing, prepared.batches(), request.batch_norm, dense, prepared.ranks
        )
    prepared.untouched.put_back(work)
    with timed(Stage.PROOF):
        made = shrink_program(
            work, plan, prepared.inputs.proofs(work, request.seed), prepared.example
        )
    return Shrunk(made.model, made.proof, renewed)


def put_back(prepared: Prepared, model: nn.Module, plan: PruningPlan) -> None:
    """Take away what forward passes have written; a program writes nothing."""
    if plan.form is Form.MODULE:
        numbers = {(number.module, number.attribute) for number in plan.integers}
        prepared.untouched.put_back(model, numbers)
