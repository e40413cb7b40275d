"""Whether samples can run together: a model may compute something else of one beside another."""

from __future__ import annotations

import dataclasses

from torch import nn

from osscar.data.batches import Batch, ModelInputs
from osscar.network.model_state import model_state
from osscar.proof.equivalence import computes, outputs_or_none


def together(model: nn.Module, inputs: ModelInputs) -> ModelInputs:
    """Let samples of sizes of their own run together where their shapes are equal.

    They can where the first dimension of each tensor of theirs has one entry, the sample, and the
    model returns for two of them what it does for each alone.  It is left as it was.
    """
    if not all(len(x) == 1 for one in inputs.apart for x in one.values()):
        return inputs
    joined = dataclasses.replace(inputs, together=bool(inputs.apart))
    return joined if joined.together and computes_alone(model, joined.two(model)) else inputs


def computes_alone(model: nn.Module, pair: Batch) -> bool:
    """Whether a model returns for each of two samples by itself what it does for both together."""
    with model_state(model):
        both = outputs_or_none(model, pair)
        rows = [slice(0, 1), slice(1, 2)]
        return all(
            computes(
                model,
                {name: x[row] for name, x in pair.items()},
                [x[row] if x.ndim else x for x in both],
            )
            for row in rows
        )
