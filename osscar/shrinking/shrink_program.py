"""Shrink the exported program of a model, and prove it as a shrunk model is proved."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from graph.extents import TracedProgram
from graph.tracing.preserve import preserved
from osscar.base.errors import AdapterError, EquivalenceError, OptionError, first_line
from osscar.base.inputs import safe_repr
from osscar.base.json_files import MOST_NUMBERS
from osscar.base.memory import attempt
from osscar.network.model_state import model_state
from osscar.network.modules import evaluating
from osscar.proof.equivalence import Inputs, by_name, distance_from_masked, in_format_of, runs
from osscar.proof.lineage import hand_on, lineage_of, note, remember_structure
from osscar.proof.plan import (
    Certificate,
    Form,
    PruningPlan,
    TracedInput,
)
from osscar.proof.program import ProgramModule, shrunk_graph, smaller, trace_dense, traced_as_open
from osscar.proof.structural import by_construction
from osscar.shrinking.fold import fold
from osscar.shrinking.shrink import Proof, fold_named
from osscar.shrinking.slice import slice_units


@dataclass(frozen=True, eq=False)
class ShrunkProgram:
    """A smaller program and its proof.

    Parameters
    ----------
    model
        The program, as a module in evaluation mode.
    proof
        What was removed, with the form of the inputs that the model was traced with, and how far
        its outputs are from those of the masked model.
    """

    model: ProgramModule
    proof: Proof


def shrink_program(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], example: Mapping[str, Tensor]
) -> ShrunkProgram:
    """Make a smaller model of a model's exported program, and prove that nothing else has changed.

    It works where the code of modules cannot follow: whatever sizes that code computes are numbers
    in the program, and these follow their axes.  It is right by construction; its
    outputs are compared with those of the masked model, in the model's number format.

    Parameters
    ----------
    model
        As it was afterwards; the program shares no tensor with it.
    plan
        What stays.
    inputs
        On which both are compared, best of more than one size.
    example
        What the model is traced with: keyword arguments of its forward pass, tensors of two samples
        or more.

    Raises
    ------
    ModelError
        If the plan does not fit the model, or the model cannot run on the inputs.
    OptionError
        If the example is no dict of tensors, each of two samples or more.
    EquivalenceError
        If the outputs differ; `AdapterError` if there is no such program, or something in it cannot
        follow.
    """
    tensors = isinstance(example, Mapping) and all(
        isinstance(value, Tensor) and value.dim() and len(value) > 1 for value in example.values()
    )
    if not tensors or not example:
        raise OptionError(
            f"the example is {safe_repr(example)}; give a dict of tensors by argument name, "
            "each with two samples or more"
        )
    with model_state(model) as untouched, preserved(model):
        remember_structure(model, inputs[0])
        fold_named(model, plan, inputs)
        trial = ProgramTrial(model, example, inputs)
        try:
            program, proof = trial.proved(plan)
        except EquivalenceError as failure:
            raise type(failure)(
                f"{failure}; leave groups out (skip, `--skip`, or a plan without them), or "
                "shrink the modules (form eager, `--set form=eager`), where @osscar.adapter "
                "teaches one to follow"
            ) from failure
        plan = dataclasses.replace(plan, traced=trial.traced())
        made = _noted(program, model, plan)
        certificates = (*lineage_of(model).certificates, proof.certificate)
        note(made, certificates=certificates)
    untouched.put_back(made)
    return ShrunkProgram(made, dataclasses.replace(proof, plan=plan))


def dense_program(
    model: nn.Module, inputs: Sequence[Inputs], example: Mapping[str, Tensor]
) -> nn.Module:
    """Return the program that `shrink_program` makes smaller, on the model's own tensors."""
    with evaluating(model), preserved(model):
        return ProgramTrial(model, example, inputs).program.standalone.module


def replayed(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Carry out a plan again, on modules or on the exported program; proved it was before."""
    if plan.form is Form.EAGER:
        slice_units(model, plan)
        return model
    remember_structure(model)
    fold(model, plan.tensors)
    example = in_format_of({given.name: given.example() for given in plan.traced}, model)
    varies = {given.name: given.varies for given in plan.traced}
    with evaluating(model):
        program = smaller(shrunk_graph(trace_dense(model, example, varies), plan))
    return _noted(program, model, plan)


def _noted(program: ProgramModule, model: nn.Module, plan: PruningPlan) -> ProgramModule:
    """Let a program know what is known of the model that it was made of."""
    hand_on(model, program)
    note(program, plans=(*lineage_of(model).plans, plan))
    if isinstance(model, PreTrainedModel):
        program.built_by = type(model), copy.deepcopy(model.config)
    return program


class ProgramTrial:
    """The program of a model, and what it is proved on, for one plan after another."""

    def __init__(
        self, model: nn.Module, example: Mapping[str, Tensor], inputs: Sequence[Inputs]
    ) -> None:
        if sum(x.numel() for x in example.values()) > MOST_NUMBERS:  # which no reader draws
            raise AdapterError(f"a model is traced with at most {MOST_NUMBERS:,} numbers")
        self.model = model
        self.example = in_format_of(example, model)
        self.inputs = [in_format_of(one, model) for one in inputs]
        self.left_open, self.program = traced_as_open(self._traced, self.example)

    def traced(self) -> tuple[TracedInput, ...]:
        """Return the form of the inputs that the model was traced with."""
        return tuple(
            TracedInput.of(name, x, (dim for dim in self.left_open[name] if dim < x.dim()))
            for name, x in self.example.items()
        )

    def _traced(self, left_open: Mapping[str, range]) -> TracedProgram:
        """Trace the model; the program has to take the inputs of the proof."""
        program = trace_dense(self.model, self.example, left_open)
        dense, named = program.standalone, [by_name(self.model, one) for one in self.inputs]
        if not all(dense.takes(one) and runs(dense.module, one) for one in named):
            raise AdapterError(
                "the exported program does not take the inputs of the proof, but only those of the "
                "sizes of the example"
            )
        return program

    def proved(self, plan: PruningPlan) -> tuple[ProgramModule, Proof]:
        """Return the smaller program, and how far it is from the masked model."""
        shrunk = shrunk_graph(self.program, plan)
        structure = by_construction(shrunk)
        made = smaller(shrunk)
        expected = distance_from_masked(self.model, plan, self.inputs, keeping=False)
        with attempt(EquivalenceError) as tried:  # whatever an operator or a guard raises
            match = expected(made)
            return made, Proof(plan, Certificate(match.error, match.ties, structure))
        raise AdapterError(
            f"the exported program fails on the inputs of the proof: {first_line(tried.error)}"
        ) from tried.error
