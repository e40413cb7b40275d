"""Packages that the extras of this one install."""

from __future__ import annotations

import importlib
from typing import Any

from osscar.base.errors import MissingDependency


def optional(module: str, extra: str, work: str, instead: str = "") -> Any:
    """Import a module of an optional package, or say which extra installs what `work` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{work} needs the package {module.partition('.')[0]!r}; install it with "
            f"`python3 -m pip install 'osscar[{extra}]'`{instead}"
        ) from error


def import_torchvision(module: str) -> Any:
    """Import a module of torchvision; MissingDependency if it is not installed."""
    return optional(f"torchvision.{module}", "vision", "a model or transform of torchvision")


def import_timm(module: str = "timm") -> Any:
    """Import timm, or a module of it; MissingDependency if it is not installed."""
    return optional(module, "timm", "a model of timm")
