"""What Torch-Pruning makes of the same model: half of the channels, the output layer left out."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage.case import Inputs, Made
from benchmarks.coverage.row import by_name


@dataclass(frozen=True)
class Peer:
    """What came of it.

    parameters_after: How many are left, if it runs and puts out the shapes it did.
    failure: What went wrong, in a few words.
    seconds: CPU time.
    """

    parameters_after: int | None = None
    failure: str = ""
    seconds: float = 0.0


def outcome(made: Made) -> Peer:
    """Let Torch-Pruning remove half of the channels of a model, in place."""
    pruning = importlib.import_module("torch_pruning")
    model = made.model
    before = sum(p.numel() for p in model.parameters())
    try:
        example = _example(model, made.inputs[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes, last = _output_layers(model, example)
            pruner = pruning.pruner.BasePruner(
                model,
                example,
                importance=pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=0.5,
                ignored_layers=last,
                output_transform=_tensors,
            )
            pruner.step()
            found = _shapes(model, example)
    except MemoryError:
        raise
    except Exception as error:  # whatever another tool raises is what is asked for
        text = " ".join(str(error).split())
        return Peer(failure=f"{type(error).__name__}: {text:.160}")
    if found != shapes:
        return Peer(failure="it puts out other shapes")
    after = sum(p.numel() for p in model.parameters())
    return Peer(after) if after < before else Peer(failure="it removes nothing")


def _example(model: nn.Module, inputs: Inputs) -> dict[str, object]:
    """Return inputs by name; caches are turned off, as they are for OSSCAR."""
    named: dict[str, object] = dict(by_name(model, inputs))
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]
    return named


def _shapes(model: nn.Module, example: dict[str, object]) -> list[torch.Size]:
    with torch.no_grad():
        return [t.shape for t in _tensors(model(**example))]


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _output_layers(
    model: nn.Module, example: dict[str, object]
) -> tuple[list[torch.Size], list[nn.Module]]:
    """Return the shapes of the outputs, and the layers that compute them: those, or the last."""
    results: list[tuple[nn.Module, object]] = []
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    hooks = [
        layer.register_forward_hook(lambda module, _, result: results.append((module, result)))
        for layer in layers
    ]
    try:
        with torch.no_grad():
            outputs = _tensors(model(**example))
    finally:
        for hook in hooks:
            hook.remove()
    own = {id(output) for output in outputs}
    last = [module for module, result in results if id(result) in own]
    wide = [m for m, _ in results if m.weight.dim() > 1]
    return [output.shape for output in outputs], last or wide[-1:]
