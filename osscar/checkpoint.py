"""Writing a shrunk model and reading it back; nothing is pickled, and no half-written directory.

Where the family's config can express the new shapes, the directory is a stock transformers
checkpoint.  Elsewhere it holds the dense config, the small weights, and the plans that turn the one
into the shape of the other.
"""

from __future__ import annotations

import copy
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
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from graph.groups import Kind
from osscar.errors import CheckpointError, OutputError
from osscar.plan import PLAN_FILE, PruningPlan
from osscar.slicing import HISTORY, context_length, outputs, prove_equal, shrink

PLAN_FORMAT = "osscar-plan/1"

_HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
"""What configs call the number of query heads and of key-value heads."""

_WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""What configs call the number of FFN neurons."""


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
    if occupied and not (path / "config.json").is_file():
        raise OutputError(f"{path} holds something other than a checkpoint; give another directory")
    return path


def _existing(inputs: Sequence[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Yield those names that can be paths; whoever reads the others will say what is wrong."""
    for name in inputs:
        with suppress(OSError, RuntimeError):
            if name is not None:
                yield Path(name).expanduser().resolve()


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    report: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> SavedCheckpoint:
    """Write a shrunk model, read it back, compare, and only then put it in its place.

    Parameters
    ----------
    model
        A model that `osscar.prune` returned, or `load` read.
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

    Raises
    ------
    OutputError
        If the directory is in use, or the disk refuses.
    EquivalenceError
        If what was read back does not compute what the model computes.
    """
    path = check_output(directory, overwrite=overwrite)
    plans: tuple[PruningPlan, ...] = getattr(model, HISTORY, ())
    if dtype is not None and dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    config = stock_config(model, plans)
    with _beside(path) as partial:
        if config is not None:
            _save_stock(model, config, partial)
        else:
            _save_planned(model, plans, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if report is not None:
            _write_json(partial / "osscar_report.json", report)
        _prove_readable(model, partial)
        written = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    return SavedCheckpoint(path, config is not None, written)


def load(directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Read a model that `save` wrote, stock or not, on the CPU and in evaluation mode.

    Parameters
    ----------
    directory
        Where from.
    dtype
        By default that of the file.

    Raises
    ------
    CheckpointError
        If the directory does not hold such a model.
    """
    path = Path(directory).expanduser()
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; it is not a checkpoint")
    try:
        if not (path / PLAN_FILE).is_file():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", use_safetensors=True, local_files_only=True
            )
            return model.eval()
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model = _build_planned(config, _read_plans(path / PLAN_FILE))
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error
    try:
        safetensors.torch.load_model(model, path / "model.safetensors")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the weights in {path} do not fit its plan: {error}") from error
    return model.to(dtype).eval() if dtype is not None else model.eval()


def stock_config(model: PreTrainedModel, plans: Sequence[PruningPlan]) -> Any:
    """Return a config from which transformers builds a model of these shapes, or None.

    A candidate is written from the plans and then tested: it has to pass the family's own
    validation, and the model built from it must have every tensor of the shrunk one in its shape.
    """
    changes = _config_changes(model.config, plans)
    if changes is None:
        return None
    try:
        config = type(model.config).from_dict({**model.config.to_dict(), **changes})
        with torch.device("meta"):
            candidate = type(model)(copy.deepcopy(config))
    except (StrictDataclassError, ValueError, TypeError, RuntimeError):
        return None  # the family says itself that it cannot express these sizes
    return config if _shapes(candidate) == _shapes(model) else None


def adopt_config(model: PreTrainedModel) -> None:
    """Give a shrunk model the config of its new shapes, where the family has one.

    Its own ``save_pretrained`` then writes a stock checkpoint, and the plans so far are history
    that nobody needs.
    """
    plans = getattr(model, HISTORY, ())
    changes = _config_changes(model.config, plans)
    if changes is None or stock_config(model, plans) is None:
        return
    # In place: every module holds a reference to the one config.
    for name, value in changes.items():
        setattr(model.config, name, value)
    setattr(model, HISTORY, ())


def _config_changes(config: Any, plans: Sequence[PruningPlan]) -> dict[str, Any] | None:
    """Return the new values of config fields, or None if layers differ."""
    changes: dict[str, Any] = {}
    for plan in plans:
        for kind in {group.kind for group in plan.groups}:
            sizes = {(g.units, len(g.kept)) for g in plan.groups if g.kind is kind}
            if len(sizes) > 1:
                return None
            (units, kept) = sizes.pop()
            fields = _HEAD_FIELDS if kind is Kind.HEADS else _WIDTH_FIELDS
            for name in fields:
                old = changes.get(name, getattr(config, name, None))
                # One key-value head that all query heads share is never cut.
                if isinstance(old, int) and not (name == "num_key_value_heads" and old == 1):
                    changes[name] = old * kept // units
            if kind is Kind.HEADS:
                head_dim = getattr(config, "head_dim", None)
                changes["head_dim"] = head_dim or config.hidden_size // config.num_attention_heads
            elif getattr(config, "n_inner", 0) is None:
                changes["n_inner"] = kept  # GPT-2 derives its width where none is given
    return changes


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _save_stock(model: PreTrainedModel, config: Any, path: Path) -> None:
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    original = model.config
    model.config = config
    try:
        model.save_pretrained(path)
    finally:
        model.config = original


def _save_planned(model: PreTrainedModel, plans: Sequence[PruningPlan], path: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    safetensors.torch.save_model(model, str(path / "model.safetensors"), {"format": "pt"})
    _write_json(
        path / PLAN_FILE, {"format": PLAN_FORMAT, "plans": [plan.to_json() for plan in plans]}
    )


def _read_plans(file: Path) -> tuple[PruningPlan, ...]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != PLAN_FORMAT:
            raise CheckpointError(f"{file} has format {data['format']!r}, expected {PLAN_FORMAT!r}")
        return tuple(PruningPlan.from_json(plan) for plan in data["plans"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a pruning plan: {error!r}") from error


def _build_planned(config: Any, plans: Sequence[PruningPlan]) -> PreTrainedModel:
    """Build the dense model without filling its weights, and shrink it."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()
    for plan in plans:
        shrink(model, plan)
    return model


def _prove_readable(model: PreTrainedModel, path: Path) -> None:
    """Read a written checkpoint back, and compare what it computes."""
    try:
        again = load(path, dtype=torch.float32).to(model.device)
    except (RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"the checkpoint that was written cannot be read: {error}") from error
    # In float32: whether the weights are the same is the question, not how they are rounded.
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    length = min(16, context_length(model) or 16)
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    inputs = {"input_ids": ids}
    training = model.training
    try:
        prove_equal([outputs(model.eval(), inputs)], [outputs(again, inputs)])
    finally:
        model.train(training)


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
