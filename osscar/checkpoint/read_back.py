"""Whether a written checkpoint is read as the model that it is of, where that never ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from osscar.base.errors import CheckpointError, EquivalenceError, warn
from osscar.checkpoint.builders import builder_of
from osscar.checkpoint.first_pass import vocabulary_of
from osscar.checkpoint.formats import cast
from osscar.checkpoint.fresh_process import Answer, Elsewhere, Reading, Task, digests
from osscar.network.model_state import model_state
from osscar.network.modules import copied, device_of, example_length, number_format
from osscar.offload.on_disk import weight_cache
from osscar.proof.equivalence import (
    Inputs,
    by_name,
    proof_outputs,
    prove_equal,
    runs,
    to_device,
)
from osscar.proof.lineage import Drawn, Sample, lineage_of, structure_of, with_zeros


@dataclass(frozen=True)
class Expected:
    """What a model that is saved computes, in float32.

    Whether the weights are the same is the question, not how they are rounded.

    inputs: On which it runs; the first is the `sample`, if there is one.
    outputs: What it returns on all of these.
    formats, digests: Its tensors, where no inputs are sure to reach all of them.
    sample: What the checkpoint keeps.
    """

    inputs: tuple[Inputs, ...]
    outputs: tuple[torch.Tensor, ...]
    formats: Mapping[str, torch.dtype]
    digests: Mapping[str, str]
    sample: Sample | None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs | None) -> Expected:
        """Run a model."""
        if number_format(model) != torch.float32:
            model = cast(copied(model), torch.float32)
        inputs = () if example_inputs is None else (example_inputs,)
        formats, vocabulary = {}, vocabulary_of(model)
        with model_state(model):
            sample, outputs = _sample_of(model, example_inputs), list[torch.Tensor]()
            if sample is not None:
                drawn = to_device(sample.drawn(), model)
                outputs = proof_outputs(model, [drawn])
                sample, inputs = sample.with_outputs(outputs), (drawn, *inputs)
            if example_inputs is not None:
                outputs += proof_outputs(model, [example_inputs])
        if vocabulary is None and example_inputs is None:
            state = model.state_dict()
            formats = {n: t.dtype for n, t in state.items() if isinstance(t, torch.Tensor)}
        return cls(inputs, tuple(outputs), formats, digests(model, formats), sample)

    def compare(self, found: Answer) -> None:
        """Compare it with what was read back."""
        for name, digest in self.digests.items():
            if found.digests.get(name) != digest:
                raise EquivalenceError(f"{name!r} was not read back as it was written")
        if self.outputs:
            again = (a.to(b.device) for a, b in zip(found.outputs, self.outputs, strict=True))
            names = ("the model", "the model that was read back")
            prove_equal(self.outputs, again, names=names)


def _sample_of(model: nn.Module, example_inputs: Inputs | None) -> Sample | None:
    """Return the form of an input that a model takes; None if it is not known."""
    vocabulary = vocabulary_of(model)
    if vocabulary is not None:
        ids = Drawn((1, example_length(model)), "int64", 0, vocabulary - 1)
        return Sample({"input_ids": ids})
    given = None if example_inputs is None else Sample.like(by_name(model, example_inputs))
    for sample in (given, lineage_of(model).sample):
        if sample is not None and runs(model, to_device(sample.drawn(), model)):
            return sample
    return None


def read_back(
    model: nn.Module,
    path: Path,
    kind: str | None,
    expected: Expected,
    elsewhere: Callable[[Task, nn.Module], tuple[Answer, ...]],
) -> bool:
    """Compare a model with what is read as its card says; tell whether a new process read it.

    `kind` is the class of transformers on the card, and `elsewhere` what `fresh_process` yields.
    """
    readings = tuple(_readings(model, kind))
    task = Task(path, readings, device_of(model), expected.inputs, expected.formats)
    try:
        answers, fresh = elsewhere(task, model), True
    except Elsewhere as reason:
        warn(
            "the checkpoint was checked only in this process, which may have cached numbers: "
            f"{reason}; define the model in a module, and import it"
        )
        answers, fresh = task.answers(), False
    try:
        for answer in answers:
            expected.compare(answer)
    except EquivalenceError as error:
        raise EquivalenceError(f"the checkpoint was not kept: {error}") from error
    return fresh


def _readings(model: nn.Module, kind: str | None) -> Iterator[Reading]:
    """Yield the ways in which its card says that a checkpoint is read."""
    cache = weight_cache(model)
    if cache is not None:
        yield Reading(ceiling=cache.ceiling)
        return
    if hasattr(transformers, str(kind)):
        yield Reading(kind)
    yield Reading(dense=None if builder_of(model) else _dense_of(model))


def _dense_of(model: nn.Module) -> nn.Module:
    """Build the dense model of code of somebody's own, with any weights."""
    known = structure_of(model)
    if known is not None:
        return with_zeros(known.model, torch.device("cpu"))
    if lineage_of(model).plans:
        raise CheckpointError(
            f"the dense model of this {type(model).__name__} is not known any more, and without it "
            "the checkpoint cannot be checked; prune the model anew, or load it with "
            "osscar.load(directory, dense=model)"
        )
    return with_zeros(model, torch.device("cpu"))
