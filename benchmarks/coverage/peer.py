"""What Torch-Pruning makes of the same model: half of the channels, the output layer left out."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.coverage.row import by_name
from tests.zoo.case import Made


def outcome(made: Made) -> dict[str, Any]:
    """Let Torch-Pruning remove half of the channels of a model, in place.

    Return how many parameters are left, if it runs and puts out the shapes it did; or what failed.
    """
    pruning = importlib.import_module("torch_pruning")
    model = made.model
    before = sum(p.numel() for p in model.parameters())
    try:
        example: dict[str, Any] = by_name(model, made.inputs[0])
        if hasattr(getattr(model, "config", None), "use_cache"):  # as it is for OSSCAR
            model.config.use_cache = False  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes, last = _output_layers(model, example)
            pruning.pruner.BasePruner(
                model,
                example,
                importance=pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=0.5,
                ignored_layers=last,
                output_transform=_tensors,
            ).step()
            with torch.no_grad():
                found = [t.shape for t in _tensors(model(**example))]
    except MemoryError:
        raise
    except Exception as error:  # whatever another tool raises is what is asked for
        return _failed(f"{type(error).__name__}: {error}")
    if found != shapes:
        return _failed("it puts out other shapes")
    after = sum(p.numel() for p in model.parameters())
    return {"torch_pruning_after": after} if after < before else _failed("it removes nothing")


def _failed(why: str) -> dict[str, Any]:
    return {"torch_pruning_failure": " ".join(why.split())[:150]}


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _output_layers(
    model: nn.Module, example: dict[str, Any]
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
