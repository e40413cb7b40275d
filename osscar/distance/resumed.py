"""A forward pass in which modules that end before changed weights are read return what they did.

The dense model runs once while it is noted when modules end, and when each parameter is first read.
With a few weights changed, modules that end before the first that is read are not run again, and
what code does between them is.  The results are those of the whole pass, bit by bit; a model whose
passes write anything on its modules is not resumed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from osscar.network.hooks import hooks, other_forwards
from osscar.network.model_state import version_of
from osscar.network.modules import fresh, identity_of

HELD_BYTES = 128 << 20
"""Most memory of what modules have returned; what does not fit is computed again."""

_PLAIN = (Tensor, int, float, str, type(None))


class Recording(TorchFunctionMode):
    """When modules end and parameters are first read in a pass, and what modules return."""

    def __init__(self, model: nn.Module, most_bytes: int = HELD_BYTES) -> None:
        super().__init__()
        self._model, self._most = model, most_bytes
        self._ended: list[str] = []
        self._first_read: dict[Any, int] = {}
        """How many modules have ended by then."""
        self._returned: dict[str, Any] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the pass that runs in this block."""

        def end(name: str, *_: Any) -> None:
            self._ended.append(name)

        with hooks(self._model, after=end), self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for one in pytree.tree_leaves((args, kwargs)):
            if isinstance(one, nn.Parameter):
                self._first_read.setdefault(identity_of(one), len(self._ended))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def resumed(self, changed: Iterable[Tensor]) -> Iterator[None]:
        """Let the same pass run in this block with changed values of some parameters."""
        first = min(self._first_read.get(identity_of(one), 0) for one in changed)
        calls = Counter(self._ended)
        once = {name for name in self._ended[:first] if calls[name] == 1}
        outer = {name for name in once if once.isdisjoint(_around(name))}
        self._returned = {name: x for name, x in self._returned.items() if name in outer}
        modules = {name: self._model.get_submodule(name) for name in outer}
        with other_forwards((one, self._known(name, one.forward)) for name, one in modules.items()):
            yield

    def _known(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward pass that is the dense one when it is first called."""
        calls = itertools.count()

        def known(*args: Any, **kwargs: Any) -> Any:
            if next(calls):  # which changed values may lead to
                return forward(*args, **kwargs)
            if name in self._returned:
                return fresh(self._returned[name])
            given = _tensors((args, kwargs))
            before = [version_of(one) for one in given]
            result = forward(*args, **kwargs)
            plain = all(isinstance(one, _PLAIN) for one in pytree.tree_leaves(result))
            size = sum(one.nbytes for one in _tensors((result, self._returned)))
            unwritten = before == [version_of(one) for one in given]
            if plain and unwritten and size <= self._most:
                self._returned[name] = fresh(result)
            return result

        return known


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around one."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _tensors(held: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(held) if isinstance(one, Tensor)]
