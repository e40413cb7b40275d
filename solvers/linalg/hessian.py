"""H as it is held, whole or as a lower half, and what is asked of it either way.

A layer of a large model is posed as a half (`solvers.linalg.symmetric`), for which half of the
memory is enough; what users hand over stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solvers.linalg.symmetric import Symmetric
from solvers.linalg.values import asymmetry, is_plain

Hessian: TypeAlias = Tensor | Symmetric
"""A symmetric matrix, (p, p)."""


def whole(H: Hessian) -> Tensor:
    """Return the matrix, (p, p): itself, or a new one that is made of its half."""
    return H if isinstance(H, Tensor) else H.dense()


def half(H: Hessian, rows: Tensor | None = None) -> Symmetric:
    """Return a copy of the lower half, or of that of some rows and columns, sorted."""
    if isinstance(H, Tensor):
        return Symmetric.of(H, rows)
    return H.copy() if rows is None else H.part(rows)


def entries(H: Hessian, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a copy of the entries in some rows and columns, (r, c)."""
    return H[rows[:, None], columns] if isinstance(H, Tensor) else H.entries(rows, columns)


def rows_of(H: Hessian, rows: Tensor) -> Tensor:
    """Return a copy of some rows, (r, p)."""
    return H[rows] if isinstance(H, Tensor) else H.rows(rows)


def product(H: Hessian, B: Tensor) -> Tensor:
    """Return ``H B``, (p, m)."""
    return H @ B if isinstance(H, Tensor) else H.product(B)


def add_to_diagonal(H: Hessian, values: Tensor) -> None:
    """Add (p,) numbers to the diagonal, in place."""
    if isinstance(H, Tensor):
        H.diagonal().add_(values)
    else:
        H.add_diagonal(values)


def divided(H: Hessian, number: float) -> Hessian:
    """Return the matrix divided by a number."""
    if isinstance(H, Tensor):
        return H / number
    return Symmetric([panel / number for panel in pieces(H)])


def moved(H: Hessian, device: torch.device | str) -> Hessian:
    """Return the matrix on a device; itself, if it is there."""
    if isinstance(H, Tensor):
        return H.to(device)
    panels = [panel.to(device) for panel in pieces(H)]
    same = all(new is old for new, old in zip(panels, pieces(H), strict=True))
    return H if same else Symmetric(panels)


def pieces(H: Hessian) -> Iterator[Tensor]:
    """Yield the tensors that hold it, from the top to the bottom."""
    yield from (H,) if isinstance(H, Tensor) else (panel for _, panel in H.spans())


def coupled(H: Hessian) -> Tensor:
    """Return which rows have entries beside the diagonal, (p,) bool."""
    if isinstance(H, Tensor):
        return H.count_nonzero(1) > 1
    found = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    for start, panel in H.spans():
        beside, stop = panel != 0, start + len(panel)
        beside.diagonal(start).fill_(False)
        found[start:stop] |= beside.any(1)
        found[:start] |= beside[:, :start].any(0)
    return found


def skew(H: Hessian) -> float:
    """Return by how much entries and their transposed ones differ, relative to the diagonal."""
    if isinstance(H, Tensor):
        return asymmetry(H)
    return max(asymmetry(panel[:, start:]) for start, panel in H.spans())


def why_not_plain(value: Any, *, may_be_half: bool = True) -> str | None:
    """Say what is wrong with something that should be a matrix as it is held; None if nothing is.

    Its methods are to be those of the class, and its tensors plain: whatever else there is could
    answer as it likes.
    """
    if type(value) is not Symmetric or not may_be_half:
        return None if is_plain(value) else f"no plain tensor, but a {type(value).__name__}"
    panels = vars(value).get("_panels")
    if set(vars(value)) != {"_panels"} or type(panels) is not list or not panels:
        return "half a matrix with something else in it"
    stop = 0
    for panel in panels:
        if not is_plain(panel) or panel.ndim != 2 or not len(panel):
            return "half a matrix of something else than plain panels"
        stop += len(panel)
        if panel.shape[1] != stop or panel.dtype != panels[0].dtype:
            return f"half a matrix with a panel {tuple(panel.shape)} whose last row is {stop - 1}"
        if panel.device != panels[0].device:
            return f"half a matrix on {panel.device} and on {panels[0].device}"
    return None
