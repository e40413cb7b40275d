"""Passes over the same samples through a model that differs in one place.

What a block puts out before the place that differs is what it put out in the dense pass: it is
recorded there, and not computed again.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import fresh
from osscar.preparation.routing import reads

_SHARE = 16
"""A block holds at most one in so many of the consumers, so that few outputs are kept."""

_PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
"""What cannot change unseen."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What the blocks of a model put out in one pass, in the order in which their calls ended.

    `before` says how many of them had ended when a consumer was first called.  At most so many
    bytes are kept, those of the first calls.
    """

    most_bytes: int
    ended: list[tuple[str, Any]] = field(default_factory=list, repr=False)
    before: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def recording(self, model: nn.Module, consumers: Collection[str]) -> Iterator[None]:
        """Record the pass that is made in the block.

        Blocks that write to what they are given, or on themselves, are left out from there on: they
        do more than put something out.
        """
        if not self.most_bytes:  # parameters that lie on disk would be read to see them unchanged
            yield
            return
        left, found, writing = self.most_bytes, [], set[str]()

        def called(name: str, *_: Any) -> None:
            self.before.setdefault(name, len(self.ended))

        def began(name: str, module: nn.Module, *call: Any) -> None:
            found.append(_held(module, call))

        def ended(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal left
            call = (args, kwargs)
            if not (_is_plain((call, output)) and _is_same(found.pop(), _held(module, call))):
                writing.add(name)
            left -= sum(tensor.nbytes for tensor in _tensors(output))
            if left >= 0 and name not in writing:
                self.ended.append((name, fresh(output)))

        with (
            reads(model, consumers, before=called),
            hooks(model, _blocks(model, consumers), before=began, after=ended),
        ):
            yield

    @contextmanager
    def replayed(self, model: nn.Module, changed: Collection[str]) -> Iterator[None]:
        """Let blocks put out what was recorded, up to the first call of what has changed."""
        called = (self.before[name] for name in changed if name in self.before)
        first = min(called, default=len(self.ended))
        outputs: dict[str, deque[Any]] = defaultdict(deque)
        for name, output in self.ended[:first]:
            outputs[name].append(output)
        modules = {name: model.get_submodule(name) for name in outputs}
        with other_forwards(
            [(one, _putting_out(outputs[name], one.forward)) for name, one in modules.items()]
        ):
            yield


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _held(module: nn.Module, call: Any) -> list[tuple[Any, int]]:
    """Return what a block is given and what its modules hold, and how often each was written to.

    Nobody counts that of tensors of inference mode.
    """
    holds = [vars(part) for part in module.modules()]
    return [
        (leaf, leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0)
        for leaf in pytree.tree_leaves((call, holds))
    ]


def _is_same(before: Sequence[tuple[Any, int]], after: Sequence[tuple[Any, int]]) -> bool:
    """Whether these are the very same things, and none was written to."""
    return len(before) == len(after) and all(
        x is y and version == now for (x, version), (y, now) in zip(before, after, strict=True)
    )


def _is_plain(values: Any) -> bool:
    """Whether these are tensors and constants, and no objects with a state of their own."""
    return all(leaf is None or isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(values))


def _putting_out(outputs: deque[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass that puts out what was recorded, as long as there is any."""

    def put_out(*args: Any, **kwargs: Any) -> Any:
        return fresh(outputs.popleft()) if outputs else forward(*args, **kwargs)

    return put_out


def _blocks(model: nn.Module, consumers: Collection[str]) -> list[str]:
    """Return the largest modules that hold few consumers each, none of them inside another.

    One that several of them share, or that has several names, is none: others call it, too.
    """
    most = max(1, len(consumers) // _SHARE)
    found: list[str] = []

    def descend(name: str, module: nn.Module) -> None:
        inside = f"{name}." if name else ""
        held = sum(one == name or one.startswith(inside) for one in consumers)
        if name and held <= most:
            found.append(name)
            return
        for child, part in module.named_children():
            descend(f"{inside}{child}", part)

    descend("", model)
    holders = Counter(part for name in found for part in model.get_submodule(name).modules())
    return [name for name in found if holders[model.get_submodule(name)] == 1]
