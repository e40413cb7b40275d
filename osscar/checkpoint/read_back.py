"""Whether a new process reads a checkpoint, as its card says, as the model that was written.

Numbers that code has cached, in modules or beside them, are not in a checkpoint, and whoever ran
the dense model cannot see that they are missing.  A process that never ran it can.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graph
from osscar.base.errors import CheckpointError, EquivalenceError, OsscarError, warn
from osscar.base.memory import attempt
from osscar.checkpoint.builders import builder_of, cast
from osscar.checkpoint.reading import load
from osscar.checkpoint.streamed import read_streamed
from osscar.checkpoint.validation import vocabulary_of
from osscar.network.model_state import model_state
from osscar.network.modules import (
    copied,
    device_of,
    evaluating,
    example_length,
    number_format,
    sha256_of,
)
from osscar.offload.on_disk import values_of, weight_cache
from osscar.offload.places import WeightCache
from osscar.proof.equivalence import Inputs, by_name, proof_outputs, prove_equal, runs, to_device
from osscar.proof.lineage import Drawn, Sample, lineage_of, structure_of, with_zeros
from osscar.proof.program import ProgramModule
from osscar.shrinking.slice import adapter_of
from solvers.own_code import importable, imported

_TASK, _CODE, _ANSWER, _SAID = "task", "code", "answer", "said"
"""Names of files between the two processes."""


@dataclass(frozen=True)
class Reading:
    """One way in which a checkpoint is read, in float32.

    kind: The class of transformers that reads it; None for `osscar.load`.
    dense: For code of a user's own, the dense model with any weights.
    ceiling: How much memory may be taken; None for what is read whole.
    """

    kind: str | None = None
    dense: nn.Module | None = None
    ceiling: int | None = None

    def model(self, directory: Path, device: torch.device) -> nn.Module:
        """Read it."""
        if self.ceiling is not None:
            return read_streamed(directory, WeightCache(self.ceiling, device), torch.float32)
        if self.kind is not None:
            kind = getattr(transformers, self.kind)
            options = {"dtype": torch.float32, "trust_remote_code": True}
            read: nn.Module = kind.from_pretrained(directory, **options).eval()
        else:
            read = load(directory, dtype=torch.float32, dense=self.dense)
        return read.to(device)


@dataclass(frozen=True)
class Task:
    """What a process is to do: read a checkpoint in each way, and run it on inputs.

    formats: The tensors whose digests are asked for, and in which number format.
    """

    directory: Path
    readings: tuple[Reading, ...]
    device: torch.device
    inputs: tuple[Inputs, ...]
    formats: Mapping[str, torch.dtype]

    def answers(self) -> tuple[Answer, ...]:
        """Read and run it in each way (CheckpointError)."""
        return tuple(map(self._answer, self.readings))

    def _answer(self, reading: Reading) -> Answer:
        with attempt() as tried:  # the model may be anyone's code, and so may what reads it
            model = reading.model(self.directory, self.device)
            found = digests(model, self.formats)
            with evaluating(model):
                inputs = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), self.inputs)
                outputs = proof_outputs(model, inputs) if inputs else []
            return Answer(tuple(outputs), found)
        raise CheckpointError(
            "the checkpoint that was written cannot be read and run, and was not kept: "
            f"{_said(tried.error)}"
        ) from tried.error


@dataclass(frozen=True)
class Answer:
    """What was read returns, and the digests of its tensors by name."""

    outputs: tuple[Tensor, ...]
    digests: Mapping[str, str]


def digests(model: nn.Module, formats: Mapping[str, torch.dtype]) -> dict[str, str]:
    """Return the digests of a model's tensors by name, each in a number format."""
    state = model.state_dict() if formats else {}
    known = {n: values_of(state[n]).to(kind) for n, kind in formats.items() if n in state}
    return {name: sha256_of([("", values)]) for name, values in known.items()}


def _said(error: BaseException) -> str:
    """Return what an error says, with its class unless we have raised it."""
    return str(error) if isinstance(error, OsscarError) else f"{type(error).__name__}: {error}"


# ---- this side ---------------------------------------------------------------------------


class Elsewhere(Exception):
    """Why no other process can do it."""


class NewPython:
    """A new Python, which loads torch while the checkpoint is written, and waits for its task."""

    def __init__(self, folder: Path) -> None:
        start = f"from {__name__} import work; input(); work({str(folder)!r})"
        # What is no string there, Python does not search.
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path if isinstance(p, str))
        # transformers copies the code of a checkpoint there before it runs it.
        modules = str(folder / "modules")
        with (folder / _SAID).open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", start],  # the working folder is not searched first
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": modules},
            )

    def run(self) -> int:
        """Let it go to work, wait for it, and return its status."""
        with contextlib.suppress(BrokenPipeError):  # its status says why
            self._process.communicate(b"\n")
        return self._process.wait()

    def end(self) -> None:
        """End it, if it is not at its end."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def fresh_process() -> Iterator[Callable[[Task, nn.Module], tuple[Answer, ...]]]:
    """Start a process; yield what has it do one task, once, for a model (`Task.answers`).

    That raises `Elsewhere` if the process cannot build the model or the inputs.
    """
    with tempfile.TemporaryDirectory(prefix="osscar-") as name:
        folder = Path(name)
        process = NewPython(folder)

        def do(task: Task, model: nn.Module) -> tuple[Answer, ...]:
            code = list(_code_of(model, [reading.dense for reading in task.readings]))
            # The model may be anyone's code.
            with attempt() as tried, (folder / _TASK).open("wb") as file:
                torch.save(task, file)
            if tried.failed:
                raise Elsewhere(_said(tried.error)) from tried.error
            (folder / _CODE).write_bytes(pickle.dumps((torch.get_num_threads(), code)))
            status = process.run()
            try:
                found = torch.load(folder / _ANSWER, weights_only=False)
            except FileNotFoundError as error:
                said = (folder / _SAID).read_text(errors="replace").strip().splitlines()
                raise CheckpointError(
                    "the checkpoint that was written was not kept: the process that read it back "
                    f"ended with status {status}{': ' if said else ''}{' '.join(said[-1:]):.300}"
                ) from error
            if isinstance(found, BaseException):
                raise found
            return tuple(found)

        try:
            yield do
        finally:
            process.end()


def _code_of(
    model: nn.Module, dense: Sequence[nn.Module | None]
) -> Iterator[tuple[str, str | None]]:
    """Yield the modules of Python that whoever reads a checkpoint imports, with their files."""
    own = [module for one in dense if one is not None for module in one.modules()]
    adapters = (adapter_of(module) for module in (*own, *model.modules()))
    found: list[Any] = [*map(type, own), *(one for one in adapters if one is not None)]
    if isinstance(model, ProgramModule):
        found += graph.PROGRAM_RULES.values()
    for one in found:
        script = one.__module__ == "__main__"
        if script or ("<locals>" in one.__qualname__ and isinstance(one, type)):
            where = "a script or notebook" if script else "a function"
            raise Elsewhere(f"{one.__qualname__} is defined in {where}")
    for name in dict.fromkeys(one.__module__ for one in found):
        if name.partition(".")[0] not in ("graph", "osscar", "torch"):
            yield name, getattr(sys.modules.get(name), "__file__", None)


# ---- the other side ----------------------------------------------------------------------


def work(folder: str) -> None:
    """Do the task in a folder, and write the answer, or the error, beside it."""
    place = Path(folder)
    found: tuple[Answer, ...] | Exception
    try:
        threads, code = pickle.loads((place / _CODE).read_bytes())
        torch.set_num_threads(threads)
        with attempt() as tried:  # anyone's code
            for name, file in code:
                _import(name, file)
            task = torch.load(place / _TASK, weights_only=False)
        if tried.failed:
            raise Elsewhere(_said(tried.error)) from tried.error
        found = task.answers()
    except (OsscarError, Elsewhere) as error:
        found = error.with_traceback(None)
        found.__cause__ = found.__context__ = None
    torch.save(found, place / _ANSWER)


def _import(name: str, file: str | None) -> None:
    """Import a module of Python by its name, or as what `file.py:function` was imported."""
    if file is None or find_spec(name) is not None:
        __import__(name)
        return
    sys.path.append(str(Path(file).parent))
    with importable(f"{file}:"):
        imported(f"{file}:", CheckpointError)


# ---- what is expected --------------------------------------------------------------------


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
