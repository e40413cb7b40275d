"""Writing a shrunk model and reading it back; nothing is pickled, and no half-written directory.

Where the family's config can express the new shapes, the directory is a stock transformers
checkpoint.  Elsewhere it holds what builds the dense model (see `osscar.checkpoint.builders`), the
small weights, and the plans that turn the one into the shape of the other.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from osscar.checkpoint.builders import (
    DESCRIPTION_ERRORS,
    Origin,
    TransformersOrigin,
    origin_of,
    read_origin,
)
from osscar.checkpoint.hf_config import adopt_config, stock_config
from osscar.core.errors import CheckpointError, EquivalenceError, OutputError
from osscar.core.modules import context_length, copied, evaluating
from osscar.shrinking.equivalence import Inputs, proof_outputs, prove_equal
from osscar.shrinking.plan import PLAN_FILE, PruningPlan
from osscar.shrinking.slice import HISTORY, shrink

__all__ = ["SavedCheckpoint", "adopt_config", "check_output", "load", "save", "stock_config"]

PLAN_FORMAT = "osscar-plan/1"


@dataclass(frozen=True)
class SavedCheckpoint:
    """What was written.

    Parameters
    ----------
    path
        The directory.
    stock
        Whether plain ``from_pretrained`` reads it; else `osscar.load` does.
    bytes
        Size of the weights on disk.
    """

    path: Path
    stock: bool
    bytes: int


def check_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
) -> Path:
    """Return the output directory as a path, if it may be written.

    Parameters
    ----------
    directory
        Where a checkpoint is to go.
    overwrite
        Whether a checkpoint that is there may be replaced.
    inputs
        Files and directories that the run needs; names that are no paths do no harm.

    Raises
    ------
    OutputError
        If it is a file or cannot be looked at; if it is not empty and `overwrite` is not set, or
        holds no checkpoint; if it is or contains the current directory or one of the inputs.
    """
    try:
        path = Path(directory).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a directory")
        occupied = path.is_dir() and any(path.iterdir())
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write to {str(directory)!r}: {reason}") from error
    for need in (Path.cwd(), *_existing(inputs)):
        if path == need or path in need.parents:
            raise OutputError(f"{path} would replace {need}, which is in use; give another")
    if occupied and not overwrite:
        raise OutputError(f"{path} is not empty; give another directory, or --overwrite")
    if occupied and not any((path / name).is_file() for name in ("config.json", PLAN_FILE)):
        raise OutputError(f"{path} holds something other than a checkpoint; give another directory")
    return path


def _existing(inputs: Sequence[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Yield those names that can be paths; whoever reads the others will say what is wrong."""
    for name in inputs:
        with suppress(OSError, RuntimeError):
            if name is not None:
                yield Path(name).expanduser().resolve()


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    example_inputs: Inputs | None = None,
) -> SavedCheckpoint:
    """Write a shrunk model, read it back, compare, and only then put it in its place.

    Parameters
    ----------
    model
        A model that `osscar.prune` or `osscar.shrink` made smaller, or that `load` read.
    directory
        Where to.
    tokenizer
        Saved beside the weights if given.
    report
        Written as ``osscar_report.json``.
    dtype
        Number format of the weights on disk; by default that of the model.
    overwrite
        Replace a directory that is not empty; it stays whole if anything fails.
    example_inputs
        On which what was read back is compared with the model.  Language models need none; others
        are compared tensor by tensor without them.

    Raises
    ------
    OutputError
        If the directory is in use, or the disk refuses.
    EquivalenceError
        If what was read back does not compute what the model computes.
    """
    path = check_output(directory, overwrite=overwrite)
    plans: tuple[PruningPlan, ...] = getattr(model, HISTORY, ())
    if dtype is not None and dtype != _dtype(model):
        model = copied(model).to(dtype)
    config = stock_config(model, plans) if isinstance(model, PreTrainedModel) else None
    with _beside(path) as partial:
        if config is not None:
            assert isinstance(model, PreTrainedModel)
            _save_stock(model, config, partial)
        else:
            _save_planned(model, plans, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if report is not None:
            _write_json(partial / "osscar_report.json", report)
        _prove_readable(model, partial, example_inputs)
        written = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return SavedCheckpoint(path, config is not None, written)


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    dense: nn.Module | None = None,
) -> nn.Module:
    """Read a model that `save` wrote, stock or not, on the CPU and in evaluation mode.

    Parameters
    ----------
    directory
        Where from.
    dtype
        By default that of the file.
    dense
        For a model of your own: the dense model with any weights.  A copy of it is shrunk and
        filled, since a checkpoint holds no code.

    Raises
    ------
    CheckpointError
        If the directory does not hold such a model.
    """
    path = Path(directory).expanduser()
    try:
        if not (path / PLAN_FILE).is_file():
            return TransformersOrigin.of_directory(path).read_stock(path, dtype)
        described, plans = read_plan_file(path / PLAN_FILE)
        model = _dense(read_origin(described, path), dense, path)
        for plan in plans:
            shrink(model, plan)
    except DESCRIPTION_ERRORS as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error
    try:
        safetensors.torch.load_model(model, path / "model.safetensors")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the weights in {path} do not fit its plan: {error}") from error
    if dtype is not None:
        model = model.to(dtype)
    return model.eval()


def _dense(origin: Origin | None, dense: nn.Module | None, path: Path) -> nn.Module:
    """Return a dense model to shrink: the caller's, or one built as the origin says."""
    if dense is not None:
        return copied(dense)
    if origin is None:
        raise CheckpointError(
            f"{path} holds a model of code that is not known here; build the dense model and give "
            "it: osscar.load(directory, dense=model)"
        )
    return origin.build()


def _save_stock(model: PreTrainedModel, config: Any, path: Path) -> None:
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    original = model.config
    model.config = config
    try:
        model.save_pretrained(path)
    finally:
        model.config = original


def _save_planned(model: nn.Module, plans: Sequence[PruningPlan], path: Path) -> None:
    origin = origin_of(model)
    if origin is not None:
        origin.write(model, path)
    safetensors.torch.save_model(model, str(path / "model.safetensors"), {"format": "pt"})
    description = {
        "format": PLAN_FORMAT,
        "origin": None if origin is None else origin.to_json(),
        "plans": [plan.to_json() for plan in plans],
    }
    _write_json(path / PLAN_FILE, description)


def read_plan_file(file: Path) -> tuple[Mapping[str, Any] | None, tuple[PruningPlan, ...]]:
    """Return the description of the origin, and the plans.

    Raises
    ------
    CheckpointError
        If the file is no plan.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != PLAN_FORMAT:
            raise CheckpointError(f"{file} has format {data['format']!r}, expected {PLAN_FORMAT!r}")
        plans = tuple(PruningPlan.from_json(plan) for plan in data["plans"])
        # Files of version 0.1.0 name no origin: they are all of transformers.
        return data.get("origin", {"library": TransformersOrigin.library}), plans
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a pruning plan: {error!r}") from error


def _dtype(model: nn.Module) -> torch.dtype:
    """Return the number format of a model's weights."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _prove_readable(model: nn.Module, path: Path, example_inputs: Inputs | None) -> None:
    """Read a written checkpoint back, and compare what it computes."""
    try:
        again = load(path, dtype=torch.float32) if origin_of(model) else _refilled(model, path)
    except (RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"the checkpoint that was written cannot be read: {error}") from error
    # In float32: whether the weights are the same is the question, not how they are rounded.
    if _dtype(model) != torch.float32:
        model = copied(model).float()
    device = next(model.parameters()).device
    inputs = _token_inputs(model, device) if example_inputs is None else example_inputs
    if inputs is None:
        _prove_same_tensors(model, again)
        return
    with evaluating(model):
        prove_equal(proof_outputs(model, [inputs]), proof_outputs(again.to(device), [inputs]))


def _refilled(model: nn.Module, path: Path) -> nn.Module:
    """Return a copy of a model of unknown code whose weights are those in the file."""
    again = copied(model)
    for tensor in again.state_dict().values():
        tensor.zero_()
    safetensors.torch.load_model(again, path / "model.safetensors")
    return again.float().eval()


def _token_inputs(model: nn.Module, device: torch.device) -> Inputs | None:
    """Return tokens for a causal language model; None for others."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) or vocabulary is None:
        return None
    length = min(16, context_length(model) or 16)
    return {"input_ids": torch.arange(length, device=device)[None] % vocabulary}


def _prove_same_tensors(model: nn.Module, again: nn.Module) -> None:
    read = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in read or not torch.equal(tensor.cpu(), read[name].to(tensor.dtype).cpu()):
            raise EquivalenceError(f"{name!r} was not read back as it was written")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that takes its place when the block succeeds.

    What was at `path` stays whole until then; if the block fails, nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {path.parent}: {error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap_in(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}; it was left as it was") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap_in(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
