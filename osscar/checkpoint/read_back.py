"""Whether a new process reads a checkpoint, as its card says, as the model that was written.

Numbers that code has cached, in modules or beside them, are not in a checkpoint, and whoever ran
the dense model cannot see that they are missing.  A process that never ran it can.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from osscar.base.printable import listed
from osscar.checkpoint.builders import builder_of, cast
from osscar.checkpoint.left_behind import Left, left_behind
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
class Task:
    """What a process is to do: read a checkpoint in float32 as its card says, and compare it.

    kind: The class of transformers that reads it, beside `osscar.load`; None if that alone does.
    dense: For code of a user's own, the dense model with any weights.
    ceiling: How much memory may be taken; None for what is read whole.
    ran: Whether passes may have left in the dense model what one that is built anew does not have.
    """

    directory: Path
    kind: str | None
    dense: nn.Module | None
    ceiling: int | None
    device: torch.device
    ran: bool
    expected: Expected

    def check(self) -> None:
        """Read, run and compare it in each way (CheckpointError, EquivalenceError)."""
        with attempt() as tried:  # the model may be anyone's code, and so may what reads it
            found = [self.expected.found_in(model, self.device) for model in self._models()]
        if tried.failed:
            raise CheckpointError(
                "the checkpoint that was written cannot be read and run, and was not kept: "
                f"{_said(tried.error)}"
            ) from tried.error
        for outputs, digests in found:
            self.expected.compare(outputs, digests)
        if self.ran and self.dense is not None and self.expected.inputs:
            self._check_new(self.dense, self.expected.inputs)

    def _check_new(self, dense: nn.Module, inputs: tuple[Inputs, ...]) -> None:
        """Compare what is read with a dense model in which no pass has left anything."""
        given = pytree.tree_map_only(Tensor, lambda x: x.to(device_of(dense)), inputs)
        left = left_behind(dense, given)
        differing = [one for one in left if self._differs(dense, [one])]
        if differing or (left and self._differs(dense, left)):
            raise EquivalenceError(
                f"a pass before the pruning has left {listed(list(map(str, differing or left)))}, "
                "and a new dense model, which has not run, comes to other outputs; prune one that "
                "has not run"
            )

    def _differs(self, dense: nn.Module, left: Sequence[Left]) -> bool:
        new = copied(dense)
        for one in left:
            one.remove(new)
        with attempt() as tried:  # the code may be anyone's
            model = load(self.directory, dtype=torch.float32, dense=new).to(self.device)
            self.expected.compare(*self.expected.found_in(model, self.device))
        return tried.failed

    def _models(self) -> Iterator[nn.Module]:
        dtype = torch.float32
        if self.ceiling is not None:
            yield read_streamed(self.directory, WeightCache(self.ceiling, self.device), dtype)
            return
        if self.kind is not None:
            read = getattr(transformers, self.kind).from_pretrained
            yield read(self.directory, dtype=dtype, trust_remote_code=True).eval().to(self.device)
        yield load(self.directory, dtype=dtype, dense=self.dense).to(self.device)


def _said(error: BaseException) -> str:
    """Return what an error says, with its class unless we have raised it."""
    return str(error) if isinstance(error, OsscarError) else f"{type(error).__name__}: {error}"


# ---- this side ---------------------------------------------------------------------------


class Elsewhere(Exception):
    """Why no other process can do it."""


def new_python(folder: Path) -> int:
    """Let a new Python do the task in a folder; return its status."""
    # What is no string there, Python does not search.
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path if isinstance(p, str))
    # transformers copies the code of a checkpoint there before it runs it.
    modules = str(folder / "modules")
    with (folder / _SAID).open("wb") as said:
        return subprocess.run(
            # The working folder is not searched first.
            [sys.executable, "-P", "-c", f"from {__name__} import work; work({str(folder)!r})"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": modules},
            check=False,
        ).returncode


def elsewhere(task: Task, model: nn.Module) -> None:
    """Let a new process do a task for a model (`Task.check`).

    Raises `Elsewhere` if the process cannot build the model or the inputs.
    """
    code = list(_code_of(model, task.dense))
    with tempfile.TemporaryDirectory(prefix="osscar-") as name:
        folder = Path(name)
        # The model may be anyone's code.
        with attempt() as tried, (folder / _TASK).open("wb") as file:
            torch.save(task, file)
        if tried.failed:
            raise Elsewhere(_said(tried.error)) from tried.error
        (folder / _CODE).write_bytes(pickle.dumps((torch.get_num_threads(), code)))
        status = new_python(folder)
        try:
            failure = pickle.loads((folder / _ANSWER).read_bytes())
        except FileNotFoundError as error:
            said = (folder / _SAID).read_text(errors="replace").strip().splitlines()
            raise CheckpointError(
                "the checkpoint that was written was not kept: the process that read it back "
                f"ended with status {status}{': ' if said else ''}{' '.join(said[-1:]):.300}"
            ) from error
    if failure is not None:
        raise failure


def _code_of(model: nn.Module, dense: nn.Module | None) -> Iterator[tuple[str, str | None]]:
    """Yield the modules of Python that whoever reads a checkpoint imports, with their files."""
    own = [] if dense is None else list(dense.modules())
    adapters = (adapter_of(module) for module in (*own, *model.modules()))
    found: list[Any] = [*map(type, own), *(one for one in adapters if one is not None)]
    if isinstance(model, ProgramModule):
        found += (rule.function for rule in graph.PROGRAM_RULES.values())
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
    """Do the task in a folder, and write the error beside it, or None."""
    place, failure = Path(folder), None
    try:
        threads, code = pickle.loads((place / _CODE).read_bytes())
        torch.set_num_threads(threads)
        with attempt() as tried:  # anyone's code
            for name, file in code:
                _import(name, file)
            task = torch.load(place / _TASK, weights_only=False)
        if tried.failed:
            raise Elsewhere(_said(tried.error)) from tried.error
        task.check()
    except (OsscarError, Elsewhere) as error:
        failure = error.with_traceback(None)
        failure.__cause__ = failure.__context__ = None
    (place / _ANSWER).write_bytes(pickle.dumps(failure))


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
    digests: Of its tensors by name, where no inputs are sure to reach all of them.
    sample: What the checkpoint keeps.
    """

    inputs: tuple[Inputs, ...]
    outputs: tuple[Tensor, ...]
    digests: Mapping[str, str]
    sample: Sample | None

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Inputs | None) -> Expected:
        """Run a model."""
        if number_format(model) != torch.float32:
            model = cast(copied(model), torch.float32)
        inputs = () if example_inputs is None else (example_inputs,)
        with model_state(model):
            sample, outputs = _sample_of(model, example_inputs), list[Tensor]()
            if sample is not None:
                drawn = to_device(sample.drawn(), model)
                outputs = proof_outputs(model, [drawn])
                sample, inputs = sample.with_outputs(outputs), (drawn, *inputs)
            if example_inputs is not None:
                outputs += proof_outputs(model, [example_inputs])
        whole = vocabulary_of(model) is None and example_inputs is None
        return cls(inputs, tuple(outputs), _digests(model) if whole else {}, sample)

    def found_in(
        self, model: nn.Module, device: torch.device
    ) -> tuple[list[Tensor], Mapping[str, str]]:
        """Return the outputs and digests of what was read back."""
        with evaluating(model):
            inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), self.inputs)
            outputs = proof_outputs(model, inputs) if inputs else []
        return outputs, _digests(model) if self.digests else {}

    def compare(self, outputs: Sequence[Tensor], digests: Mapping[str, str]) -> None:
        """Compare it with what was read back."""
        for name, digest in self.digests.items():
            if digests.get(name) != digest:
                raise EquivalenceError(f"{name!r} was not read back as it was written")
        if self.outputs:
            again = (a.to(b.device) for a, b in zip(outputs, self.outputs, strict=True))
            names = ("the model", "the model that was read back")
            prove_equal(self.outputs, again, names=names)


def _digests(model: nn.Module) -> dict[str, str]:
    """Return the digests of a model's tensors by name, of fractions in float32."""
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    values = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    return {name: sha256_of([("", values_of(one))]) for name, one in values.items()}


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


def read_back(model: nn.Module, path: Path, kind: str | None, expected: Expected) -> bool:
    """Compare a model with what is read as its card says; tell whether a new process read it.

    `kind` is the class of transformers on the card.
    """
    cache, kind = weight_cache(model), kind if hasattr(transformers, str(kind)) else None
    dense = _dense_of(model) if cache is None and builder_of(model) is None else None
    ceiling = None if cache is None else cache.ceiling
    ran = not lineage_of(model).source  # else whoever reads it has the code that builds it
    task = Task(path, kind, dense, ceiling, device_of(model), ran, expected)
    try:
        try:
            elsewhere(task, model)
            return True
        except Elsewhere as reason:
            warn(
                "the checkpoint was checked only in this process, which may have cached numbers: "
                f"{reason}; define the model in a module, and import it"
            )
            task.check()
            return False
    except EquivalenceError as error:
        raise EquivalenceError(f"the checkpoint was not kept: {error}") from error


def _dense_of(model: nn.Module) -> nn.Module:
    """Build the dense model of code of somebody's own, with any weights."""
    known = structure_of(model)
    if known is not None:
        return with_zeros(known, torch.device("cpu"))
    if lineage_of(model).plans:
        raise CheckpointError(
            f"the dense model of this {type(model).__name__} is not known any more, and without it "
            "the checkpoint cannot be checked; prune the model anew, or load it with "
            "osscar.load(directory, dense=model)"
        )
    return with_zeros(model, torch.device("cpu"))
