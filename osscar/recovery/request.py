"""What a recovery is asked: one declaration, as `osscar.request` is for pruning."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Interval

from osscar.base.inputs import DistanceOption, Read, check_fields, count_from, parse_size


@dataclass(frozen=True, kw_only=True)
class RecoveryRequest:
    """The options of a recovery.

    Parameters
    ----------
    steps
        Optimizer steps.  Training stops earlier if the held-out loss rises three times in a row.
    batch_size
        Samples in an optimizer step: 4 windows of text by default, or 64 of anything else.
    micro_batch_size
        Samples in one forward pass; the gradients of all passes of a step are added up.  By default
        all samples of a step, or 1 window on a CPU that trains in float32, halved until a step fits
        into memory.
    learning_rate
        Peak learning rate of the optimizer; by default 2e-4 for text and 1e-3 for anything else.
        It is divided by ten if, after four steps or more, the held-out loss is higher than before
        the training.
    lora
        Rank of adapters that are trained instead of the weights, and merged into them at the end;
        needs peft (``pip install 'osscar[recover]'``).
    checkpointing
        Compute activations again in the backward pass, which takes less memory and a third more
        time.
    max_memory
        Memory that the process may take, such as ``8GB``; by default nine tenths of what is free.
    held_out
        Samples that are not trained on, and choose the step that is kept.  By default an eighth of
        all, at most 8 windows of text or 128 of anything else.  Copies of a
        sample stay together, so that a few more or less may be held out.
    augment
        Random change of training images: ``flip-shift``, the default, mirrors them and shifts them
        by at most an eighth of their width; ``none`` leaves them as they are.
    distance
        What is minimized: ``nats``, the divergence of scores of classes; ``relative``, the squared
        error of all outputs over their squares; or a differentiable function of (outputs, dense
        outputs, batch) that returns one number a sample, also as ``file.py:function``.  By default
        ``nats`` if an output has class scores, by the labels, its name, its values or the model,
        else ``relative``.
    other_dense
        Train towards another model than the one that the smaller was pruned from.
    mixed_precision
        Number format of matrix products: ``bf16``, or ``no`` for the format of the weights.  By
        default ``bf16`` if the processor has instructions for it.
    device
        Device to run on: ``auto``, ``cpu`` or ``cuda``.
    seed
        Random seed of the order of the samples, of the held-out samples, and of `augment`.

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
    max_memory: Annotated[str | int | None, Read(parse_size)] = None
    held_out: Annotated[int | None, count_from(1)] = None
    augment: Literal["flip-shift", "none"] | None = None
    distance: DistanceOption = None
    other_dense: bool = False
    mixed_precision: Literal["bf16", "no"] | None = None
    device: Annotated[str, Read(str)] = "auto"
    seed: Annotated[int, count_from(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data; a distance of the caller's is named."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**data, "distance": None if self.distance is None else str(self.distance)}
