"""Clocks: they time operators at the shapes that widths give them, and whole models."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import Timer
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from graph import DependencyGraph, Operator, Size
from osscar.allocation.costs import empty, traced_alike
from osscar.allocation.serving import filled_cache, token_step, token_step_traced
from osscar.allocation.task import PruningTask
from osscar.base.devices import this_device
from osscar.base.errors import ModelError, optional
from osscar.base.printable import pluralize
from osscar.base.timing import busy_clock
from osscar.data.reader import Batch
from osscar.network.hooks import computable_mixtures
from osscar.network.modules import device_of, forward, number_format, tensors_in
from osscar.network.onnx_runtime import bound, program_of, session_of, to_onnx

OperatorCall = tuple[Operator, Callable[[Size], int]]
"""An operator, and what returns the values of its sizes."""

_ON_CARD = 10
"""Calls of an operator in a row."""


@dataclass(frozen=True, eq=False)
class Clock(ABC):
    """Times operators and whole models, as and where the smaller model is to be fast."""

    model: nn.Module
    traced: DependencyGraph
    """The operators of what is timed, with the shapes that they have there."""
    described: str
    """What is timed, where, and with how many threads."""

    @cached_property
    def dense(self) -> Timer:
        """What runs the dense model once."""
        return self.timer(self.model)

    @abstractmethod
    def timer(self, model: nn.Module) -> Timer:
        """Return what runs a model once."""

    @abstractmethod
    def ready(self, calls: Sequence[OperatorCall]) -> list[Callable[[], float]]:
        """Return for each call of an operator what runs it once, and returns its seconds.

        That is NaN, or it raises, where the operator cannot be called at these sizes.  Tensors lie
        elsewhere each time.
        """


# ---- in torch ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class InTorch(Clock):
    """Calls operators on random tensors, and models, on the device of the dense one.

    `run` returns what runs a model once, and `channels_last` is whether the inputs of models are
    so; weights say so themselves.
    """

    run: Callable[[nn.Module], Callable[[], Any]]
    channels_last: bool = False

    def timer(self, model: nn.Module) -> Timer:
        """Return what runs a model once."""
        return Timer(self.run(model), timer=busy_clock)

    def ready(self, calls: Sequence[OperatorCall]) -> list[Callable[[], float]]:
        """Return for each call of an operator what runs it."""
        return [partial(self._seconds, *call) for call in calls]

    def _seconds(self, operator: Operator, size: Callable[[Size], int]) -> float:
        given = operator.arguments_at(size, self._tensor)
        # The work of one call hides on a card behind that of giving it.
        number = 1 if self._random.device.type == "cpu" else _ON_CARD
        began = busy_clock()
        for _ in range(number):
            operator.function(**given)
        return (busy_clock() - began) / number

    @cached_property
    def _random(self) -> Tensor:
        device = device_of(self.model)
        generator = torch.Generator(device).manual_seed(0)
        return torch.rand(1 << 16, generator=generator, device=device)

    @cached_property
    def _last(self) -> bool:
        return self.channels_last or any(is_channels_last(one) for one in self.model.parameters())

    def _tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:  # indices, and masks that hide nothing
            return torch.full(shape, dtype is torch.bool, dtype=dtype, device=self._random.device)
        number = math.prod(shape)
        copies = -(-number // len(self._random))
        made = self._random.to(dtype).repeat(copies)[:number].view(shape)
        last = self._last and len(shape) == 4
        return made.contiguous(memory_format=torch.channels_last) if last else made


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of images, or of filters, are their last dimension in memory."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


# ---- in ONNX Runtime ---------------------------------------------------------------------


_AT_ONCE = 128
"""Operators that are exported together."""


@dataclass(frozen=True, eq=False)
class InOnnxRuntime(Clock):
    """Runs operators on random tensors, and models, in sessions on the processor.

    To export one operator takes as long as to export many at once, for the exporter reads its
    library each time.  So they are exported together, and each is cut out with what it reads.
    """

    batch: Batch
    threads: int

    def timer(self, model: nn.Module) -> Timer:
        """Return what runs a model once; a ModelError if it cannot be exported."""
        with TemporaryDirectory() as directory, computable_mixtures(model):
            path = Path(directory) / "model.onnx"
            to_onnx(program_of(model, (), self.batch), input_names=[*self.batch]).save(path)
            session = session_of(path, self.threads)
        inputs = {name: tensor.cpu().numpy() for name, tensor in self.batch.items()}
        return Timer(bound(session, inputs), timer=busy_clock)

    def ready(self, calls: Sequence[OperatorCall]) -> list[Callable[[], float]]:
        """Return for each call of an operator what runs it in a session of its own."""
        pieces = (calls[i : i + _AT_ONCE] for i in range(0, len(calls), _AT_ONCE))
        models = [model for piece in pieces for model in operator_models(piece)]
        return [partial(self._seconds, model) for model in models]

    def _seconds(self, model: OperatorModel | None) -> float:
        if model is None:
            return math.nan
        inputs = {name: random_like(one) for name, one in model.inputs.items()}
        session = session_of(model.with_weights(inputs), self.threads)
        run = bound(session, inputs)
        run()  # what a session allocates stays for all that comes after, as in a model
        began = busy_clock()
        run()
        return busy_clock() - began


# ---- models of one operator --------------------------------------------------------------


def random_like(tensor: Tensor) -> NDArray[Any]:
    """Return numbers for a tensor without any: zeros of indices, and masks that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    if tensor.dtype.is_floating_point:
        return torch.rand(tensor.shape, dtype=tensor.dtype, generator=generator).numpy()
    return torch.full(tensor.shape, tensor.dtype is torch.bool, dtype=tensor.dtype).numpy()


@dataclass(frozen=True, eq=False)
class OperatorModel:
    """A model of one operator: an `onnx.ModelProto`, all of whose tensors are inputs.

    `inputs` are what it reads, without numbers, by name, in the order of the operator's; `weights`
    are the names of those that are weights of a model.
    """

    graph: Any = field(repr=False)
    inputs: Mapping[str, Tensor]
    weights: frozenset[str]

    def with_weights(self, values: Mapping[str, NDArray[Any]]) -> bytes:
        """Return the model with its weights in it, as a file holds it."""
        onnx = optional("onnx", "onnx", "ONNX")
        made = onnx.ModelProto()
        made.CopyFrom(self.graph)
        weights = self.weights & {one.name for one in made.graph.input}
        kept = [one for one in made.graph.input if one.name not in weights]
        del made.graph.input[:]
        made.graph.input.extend(kept)
        made.graph.initializer.extend(
            onnx.numpy_helper.from_array(values[name], name) for name in sorted(weights)
        )
        written: bytes = made.SerializeToString()
        return written


def operator_models(calls: Sequence[OperatorCall]) -> list[OperatorModel | None]:
    """Export operators together, and return the model of each; None of one that cannot be.

    Those that are exported with one that cannot be are exported again, by halves.
    """
    try:
        return [*_together(calls)]
    except ModelError:
        if len(calls) == 1:
            return [None]
        half = len(calls) // 2
        return operator_models(calls[:half]) + operator_models(calls[half:])


class _Operators(nn.Module):
    """Calls operators on tensors of their own, and returns the first tensor of each."""

    def __init__(self, calls: Sequence[tuple[Callable[..., Any], Mapping[str, Any]]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        left, found = iter(tensors), list[Tensor]()
        for function, arguments in self.calls:
            # Of some the operator writes to what it reads, which a graph's inputs cannot be.
            given = pytree.tree_map_only(Tensor, lambda _: next(left).clone(), arguments)
            found.append(tensors_in(function(**given))[0])
        return found


def _together(calls: Sequence[OperatorCall]) -> Iterator[OperatorModel]:
    onnx = optional("onnx", "onnx", "ONNX")
    given = [(one.function, one.arguments_at(size, empty)) for one, size in calls]
    reads = [tensors_in(arguments) for _, arguments in given]
    every = tuple(itertools.chain(*reads))
    whole = to_onnx(program_of(_Operators(given), every, {})).model_proto
    makers = {name: i for i, node in enumerate(whole.graph.node) for name in node.output}
    constants = {one.name: one for one in whole.graph.initializer}
    left = iter(whole.graph.input)
    for (operator, _), some, output in zip(calls, reads, whole.graph.output, strict=True):
        own = {one.name: one for one in itertools.islice(left, len(some))}
        nodes, names, queue = set[int](), set[str](), [output.name]
        while queue:
            names.add(name := queue.pop())
            if name in makers and makers[name] not in nodes:
                nodes.add(makers[name])
                queue.extend(whole.graph.node[makers[name]].input)
        part = onnx.helper.make_graph(
            [whole.graph.node[i] for i in sorted(nodes)],
            operator.name,
            [one for name, one in own.items() if name in names],
            [output],
            [constants[name] for name in constants.keys() & names],
        )
        model = onnx.helper.make_model(
            part,
            ir_version=whole.ir_version,
            opset_imports=whole.opset_import,
            functions=whole.functions,
        )
        weights = (name for name, one in zip(own, operator.reads, strict=True) if one.tensor)
        yield OperatorModel(model, dict(zip(own, some, strict=True)), frozenset(weights))


# ---- the clock of a request --------------------------------------------------------------


def clock_of(task: PruningTask) -> Clock:
    """Return the clock that a request asks for, before any unit leaves.

    A `RequestError` is raised where the model cannot be traced as it is timed.
    """
    return _CLOCKS[task.request.timed_in, task.request.timed](task)


def _passes(task: PruningTask) -> InTorch:
    model, batch = task.prepared.model, task.prepared.batches()[0]
    return InTorch(
        model,
        _traced(task, batch),
        f"a pass over {_shapes(batch)} in {_dtype(model)} by torch ({_device(device_of(model))})",
        lambda model: partial(forward, model, batch),
        any(is_channels_last(one) for one in batch.values()),
    )


def _tokens(task: PruningTask) -> InTorch:
    model, sample, request = task.prepared.model, task.prepared.sample, task.request
    assert request.context is not None
    before, rows = request.context - 1, model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = torch.arange(request.batch, device=device_of(model))[:, None] % rows
    batch = {"input_ids": tokens}

    def filled(model: nn.Module) -> DynamicCache:
        return filled_cache(model, sample, before, request.batch)

    with token_step_traced(model, filled(model)):
        traced = _traced(task, batch, f"one token after {before}")
    return InTorch(
        model,
        traced,
        f"one token of {pluralize(request.batch, 'sequence')} with {request.context:,} positions "
        f"in the key/value cache, in {_dtype(model)} by torch ({_device(device_of(model))})",
        lambda model: token_step(model, filled(model), batch),
    )


def _passes_in_onnx_runtime(task: PruningTask) -> InOnnxRuntime:
    model, batch = task.prepared.model, task.prepared.batches()[0]
    version = optional("onnxruntime", "onnx", "ONNX Runtime").__version__
    return InOnnxRuntime(
        model,
        _traced(task, batch),
        f"a pass over {_shapes(batch)} in {_dtype(model)} by ONNX Runtime {version} "
        f"({_device(torch.device('cpu'))})",
        batch,
        torch.get_num_threads(),
    )


_CLOCKS: Mapping[tuple[str, str], Callable[[PruningTask], Clock]] = {
    ("torch", "prefill"): _passes,
    ("torch", "decode"): _tokens,
    ("onnxruntime", "prefill"): _passes_in_onnx_runtime,
}
"""By the fields `timed_in` and `timed`."""


def _traced(task: PruningTask, batch: Batch, what: str = "a pass") -> DependencyGraph:
    refused, advice = "operators cannot be timed", f"give {task.request.instead_of_time('flops')}"
    return traced_alike(task.prepared, task.counted, batch, refused, advice, what)


# ---- in words ----------------------------------------------------------------------------


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in batch.items())


def _dtype(model: nn.Module) -> str:
    return str(number_format(model)).removeprefix("torch.")


def _device(device: torch.device) -> str:
    here = this_device(device)
    threads = here["threads"] and f", {pluralize(int(here['threads']), 'thread')}"
    return f"{here['device']}{threads}"
