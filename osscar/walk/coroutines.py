"""Forward passes that stop inside a module and go on later, one coroutine a batch.

A pass is suspended in the middle of the model's own code, whatever that code is.  Two things of it
must not be seen by the passes that run meanwhile: what torch keeps for the whole thread (gradient
mode, autocast, modes that intercept operators), and what modules write on themselves while they
run.  Both are taken off when a pass is suspended and put back when it goes on.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from graph.tracing.patches import ModeDepths, enter_again
from osscar.network.model_state import PassState
from osscar.walk.targets import Keeper

_CUDA, _MKLDNN = torch.backends.cuda, torch.backends.mkldnn
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *(
        (partial(getattr(torch, f"{get}_autocast_{what}"), device), partial(put, device))
        for device in ("cpu", "cuda")
        for get, what, put in (
            ("is", "enabled", torch.set_autocast_enabled),
            ("get", "dtype", torch.set_autocast_dtype),
        )
    ),
    # Which kernels operators may take.
    *(
        (getattr(_CUDA, f"{name}_sdp_enabled"), getattr(_CUDA, f"enable_{name}_sdp"))
        for name in ("flash", "mem_efficient", "math", "cudnn")
    ),
    (partial(getattr, _MKLDNN, "enabled"), partial(setattr, _MKLDNN, "enabled")),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
)
"""What torch keeps for the whole thread: how to read and to set it."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """A pass has reached a module that is watched."""

    module: str
    x: Any
    """What it is called with: a tensor, or what is `osscar.routing.routed.Routed`."""
    output: Tensor | None
    """What it returns; None where nobody asks."""
    stream: Tensor | None
    """What will be added to that; None where nobody asks, or knows."""


class Coroutine(greenlet):
    """The pass of one batch, a `dense` one through the weights of the model as it came."""

    def __init__(
        self, index: int, dense: bool, run: Callable[[], object], scratch: PassState, keeper: Keeper
    ) -> None:
        super().__init__(run)
        self.gr_context = contextvars.copy_context()
        self.index, self.dense, self.keeper = index, dense, keeper
        self.arrived: Arrival | None = None
        self.reached = -1
        """The watched call at which it stands, counted from 0."""
        self._scratch = scratch
        self._resume: Callable[[], None] = lambda: None
        self._ending = False

    def advance(self) -> Arrival | None:
        """Run on to the next watched module; None if the pass has come to its end."""
        self.arrived = self._switch(self.switch)
        self.reached += 1
        return self.arrived

    def suspend(self, arrival: Arrival) -> None:
        """Stop the pass; to be called by a hook of a module that it runs."""
        if self._ending:  # the model's code caught what ended it
            raise GreenletExit
        assert self.parent is not None
        self.parent.switch(arrival)

    def end(self) -> None:
        """Leave the context managers of the pass, and free what it holds."""
        self._ending = True
        self.arrived = None
        if self:  # it has begun, and not ended
            self._switch(lambda: self.throw(GreenletExit))

    def _switch(self, switch: Callable[[], Any]) -> Any:
        self.parent = getcurrent()
        around = Surroundings()
        self._resume()
        self._resume = lambda: None  # so that nothing of it is held any more
        try:
            found = switch()
        finally:
            if not self.dead:
                self._resume = self._leave(around)
            around.restore()
        return None if self.dead else found

    def _leave(self, around: Surroundings) -> Callable[[], None]:
        """Undo what the suspended pass has changed; return what does it again, for it to go on."""
        own, written, modes = Surroundings(), self._scratch.take(), around.modes.leave_others()
        guard = ExitStack()
        if own.inference != around.inference:
            guard.enter_context(torch.inference_mode(around.inference))

        def resume() -> None:
            guard.close()
            enter_again(modes)
            self._scratch.put(written)
            own.restore()

        return resume


def running() -> Coroutine | None:
    """Return the coroutine whose pass is running, if any."""
    current = getcurrent()
    return current if isinstance(current, Coroutine) else None


class Surroundings:
    """What torch keeps for the whole thread, as it is when this is made."""

    def __init__(self) -> None:
        self._values = [read() for read, _ in _SWITCHES]
        self.inference = torch.is_inference_mode_enabled()
        self.modes = ModeDepths.now()

    def restore(self) -> None:
        """Set it again, but for inference mode, which has only guards."""
        for (_, put), value in zip(_SWITCHES, self._values, strict=True):
            put(value)
