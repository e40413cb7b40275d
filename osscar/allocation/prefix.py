"""Passes of a model in which one layer has changed, that begin at the block of this layer.

What comes before the layer is as it was in the dense model.  Blocks there put out once more what
they did then, in place of being run: half of a pass on average.  Blocks are the outermost members
of lists and sequences of modules, such as the layers of a transformer; the model's own code calls
them, whatever else it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from osscar.base.memory import let_shortage_pass
from osscar.network.hooks import hooks, other_forwards
from osscar.network.modules import fresh


class Prefix:
    """What the blocks of a model put out in one pass, up to so many bytes."""

    def __init__(self, model: nn.Module, room: int) -> None:
        self._model, self._room = model, room
        self._blocks = {name: model.get_submodule(name) for name in blocks(model)}
        self._outputs: dict[str, Any] = {}
        """Of those that were called once, in the order in which they ended."""
        self._ended: dict[str, set[str]] = {}
        """By block, which others had ended when it began."""
        self._sound: set[frozenset[str]] = set()
        """Blocks that can be skipped together."""

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what blocks put out while the block runs."""
        ended: set[str] = set()

        def before(name: str, *_: Any) -> None:
            if name in self._ended:
                self._outputs.pop(name, None)
            self._ended.setdefault(name, {*ended})

        def after(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            leaves = pytree.tree_leaves(result)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            size = sum(tensor.nbytes for tensor in tensors)
            if name not in ended and len(tensors) == len(leaves) and size <= self._room:
                self._room -= size
                self._outputs[name] = fresh(result)
            ended.add(name)

        with hooks(self._model, self._blocks, before, after):
            yield

    def check(self, run: Callable[[], Any], expected: Any, first: Prefix | None = None) -> None:
        """Try passes that begin behind some blocks: only those that put out the same are made.

        Others are not, to the bit, where blocks write to their inputs, or leave something for one
        another elsewhere.  The first of several batches is tried behind every block; one that
        follows the `first`, with as many blocks skipped as can be.
        """
        begins = {self._kept(ended) for ended in self._ended.values()} - {frozenset()}
        if first is None:
            self._sound = {skipped for skipped in begins if self._same(run, skipped, expected)}
            return
        self._sound = begins & first._sound
        most = max(self._sound, key=len, default=frozenset())
        if not self._same(run, most, expected):
            self._sound = set()

    def _kept(self, ended: Collection[str]) -> frozenset[str]:
        return frozenset(name for name in ended if name in self._outputs)

    def _same(self, run: Callable[[], Any], skipped: Collection[str], expected: Any) -> bool:
        try:
            with self._without(skipped):
                found = pytree.tree_leaves(run())
        except Exception as error:  # of the user's code, which misses what a block would have left
            let_shortage_pass(error)
            return False
        return all(map(torch.equal, found, pytree.tree_leaves(expected)))

    def skipped(self, changed: Collection[nn.Parameter]) -> AbstractContextManager[None]:
        """Skip, while the block runs, the blocks that end before any of these parameters is read.

        Where something else than a block owns one of them, nobody knows, and all blocks run.
        """
        owned = {name: {*map(id, self._blocks[name].parameters())} for name in self._ended}
        holders = [[name for name in owned if id(one) in owned[name]] for one in changed]
        if not holders or not all(holders) or {*map(id, changed)} & self._outside():
            return self._without(())
        before = [self._ended[name] for names in holders for name in names]
        skipped = self._kept(set.intersection(*before))
        return self._without(skipped if skipped in self._sound else ())

    def _outside(self) -> set[int]:
        """Return the parameters that modules outside of all blocks own, by `id`."""
        named = self._model.named_parameters(remove_duplicate=False)
        inside = tuple(f"{name}." for name in self._blocks)
        return {id(one) for name, one in named if not name.startswith(inside)}

    def _without(self, names: Collection[str]) -> AbstractContextManager[None]:
        def again(output: Any) -> Callable[..., Any]:
            return lambda *_, **__: fresh(output)

        return other_forwards(
            (self._blocks[name], again(output))
            for name, output in self._outputs.items()
            if name in names
        )


def blocks(model: nn.Module) -> list[str]:
    """Return the outermost members of lists and sequences of modules."""
    found: list[str] = []
    for name, _ in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        member = isinstance(parent, nn.ModuleList | nn.Sequential) and name
        if member and not (found and name.startswith(f"{found[-1]}.")):
            found.append(name)
    return found
