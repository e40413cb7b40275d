"""Programs of `torch.export` in ONNX Runtime, on the processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from graph.errors import GraphError
from graph.tracing.export import run_export
from osscar.base.errors import ModelError, first_line, optional
from osscar.base.memory import attempt


def program_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sizes: Mapping[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """Export a model as `run_export` does; a ModelError says that it cannot be followed."""
    try:
        return run_export(model, args, kwargs, sizes)
    except GraphError as error:
        raise ModelError(f"torch.export cannot follow the model: {first_line(error)}") from error


def to_onnx(program: torch.export.ExportedProgram, **names: Any) -> torch.onnx.ONNXProgram:
    """Write a program as ONNX; a ModelError says which operator has no counterpart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about itself
            written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"torch.onnx cannot write the model: {first_line(cause)}") from error
    assert written is not None
    return written


def session_of(model: Path | bytes, threads: int = 0) -> Any:
    """Return a session of so many threads, by default ONNX Runtime's own choice."""
    runtime = optional("onnxruntime", "onnx", "ONNX Runtime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, too
    options.intra_op_num_threads = threads
    with attempt() as tried:  # its exceptions have no class in common
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    raise refused(tried.error) from tried.error


def bound(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
    """Return what runs a session on the inputs that it has of these, and copies no outputs."""
    binding = session.io_binding()
    for one in session.get_inputs():
        binding.bind_cpu_input(one.name, inputs[one.name])
    for one in session.get_outputs():
        binding.bind_output(one.name)
    return lambda: session.run_with_iobinding(binding)


def refused(error: Exception) -> ModelError:
    """Say that ONNX Runtime does not run a model."""
    return ModelError(f"ONNX Runtime does not run what was written: {first_line(error):.300}")
