"""What a recovery is asked: one declaration, as `osscar.request` is for pruning."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Interval

from osscar.base.errors import OptionError
from osscar.base.fields import Read, check_fields, count_from
from osscar.base.inputs import parse_size


def _memory(value: Any) -> int:
    try:
        return parse_size(value)
    except OptionError as error:
        raise ValueError("give a size such as 8GB or 512MiB") from error


@dataclass(frozen=True, kw_only=True)
class RecoveryRequest:
    """What a user asks of a recovery.

    Parameters
    ----------
    steps
        Optimizer steps; stops earlier if the held-out loss rises.
    batch_size
        Samples in a step; by default 4 windows, or 64 of anything else.
    micro_batch_size
        Samples that run through both models at once; the gradients of one step are added up.  By
        default 1 window on a CPU without `mixed_precision`, and all samples of a step elsewhere.
        Samples of a list always run alone.
    learning_rate
        Learning rate at its height.  By default a few are tried for two steps each, and the one
        below the best is taken.
    lora
        Rank of adapters that are trained in place of all weights, and merged into the matrices at
        the end; needs peft (``pip install 'osscar[recover]'``).  What a model freezes stays as it
        is either way, unless it freezes everything.
    checkpointing
        Compute blocks of the model again in the backward pass, which takes a third more time and
        less memory.
    max_memory
        The most memory that the process may take, such as ``8GB``, or a number of bytes; by default
        nine tenths of what is free.  If a step takes more, micro-batches get smaller, where their
        size is not given; if that is not enough, blocks are computed again (`checkpointing`); and
        at last adapters of rank 16 are trained in the place of weights.
    held_out
        Samples that train nothing: they decide when to stop, and which step is kept.  By default an
        eighth of all, at most 8 windows, or 128 of anything else.
    augment
        How training samples are changed at random.  ``flip-shift``, the default of images, mirrors
        them and shifts them by at most an eighth of their width, their edge repeated; ``none``
        leaves them as they are.
    loss
        A function of what the smaller and the dense model put out for the same batch, which returns
        a mean over its samples; by default the divergence of their predictions where there are
        logits, and the relative squared error of all outputs elsewhere.
    mixed_precision
        Number format of matrix products in training: ``bf16``, or ``no`` for the model's own.
    device
        ``auto``, ``cpu`` or ``cuda``.
    seed
        Seed of the order of the samples, and of what `augment` draws.

    Raises
    ------
    OptionError
        If a value is out of range, or of a wrong type.
    """

    steps: Annotated[int, count_from(1)] = 64
    batch_size: Annotated[int | None, count_from(1)] = None
    micro_batch_size: Annotated[int | None, count_from(1)] = None
    learning_rate: Annotated[float | None, Interval(gt=0, le=1)] = None
    lora: Annotated[int | None, Interval(ge=1, le=4096)] = None
    checkpointing: bool = False
    max_memory: Annotated[str | int | None, Read(_memory)] = None
    held_out: Annotated[int | None, count_from(1)] = None
    augment: Literal["flip-shift", "none"] | None = None
    loss: Callable[..., Any] | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    device: Annotated[str, Read(str)] = "auto"
    seed: Annotated[int, count_from(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data; a loss of the caller's is named."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.loss is not None:
            data["loss"] = getattr(self.loss, "__qualname__", type(self.loss).__name__)
        return data
