"""The first forward pass of a model that was read: whether it computes what it should."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from osscar.base.errors import CheckpointError, ModelError
from osscar.network.modules import context_length, device_of
from osscar.network.predictions import named_logits
from osscar.offload.on_disk import is_on_disk
from osscar.proof.equivalence import call
from osscar.proof.lineage import lineage_of, strays_from


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a causal language model of transformers knows; None of others."""
    named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not (named and isinstance(model, PreTrainedModel)):
        return None
    size = getattr(model.config, "vocab_size", None)
    return size if isinstance(size, int) else None


def check_sample(model: nn.Module, source: str) -> None:
    """Refuse a model that does not return what its checkpoint, called `source`, has recorded."""
    sample = lineage_of(model).sample
    strays = None if sample is None else strays_from(sample, model)
    if strays is not None:
        raise CheckpointError(
            f"the outputs of {source} differ from those of the model that was saved: {strays}; "
            "build the dense model with the code that it was pruned with, or download the "
            "checkpoint again"
        )


def check_causal(model: nn.Module, source: str) -> None:
    """Refuse a model that reads ahead, whose next tokens are no predictions."""
    if is_on_disk(model):
        return
    length = min(2, context_length(model) or 2)
    windows = torch.zeros(3, length, dtype=torch.int64, device=device_of(model))
    windows[2, -1] = 1  # after two that are equal
    logits = named_logits(call(model, {"input_ids": windows}))
    if logits is None or logits.shape[1] < 2:
        return
    first, again, second = logits.float()
    same = torch.finfo(next(model.parameters()).dtype).eps ** 0.5 * float(first[0].abs().max())
    changed, noise = (float((first[0] - other[0]).abs().max()) for other in (second, again))
    if changed > same >= noise:
        raise ModelError(
            f"{source} is a bidirectional {type(model).__name__}: its outputs depend on later "
            f"tokens, so that it does not predict the next one; {OTHERS}"
        )


OTHERS = (
    "build it with its own class, in code that returns (model, example inputs), and name that as "
    "file.py:function; or give it to osscar.prune or osscar.recover in Python"
)
"""What to do with what is no causal language model."""
