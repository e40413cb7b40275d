"""The first forward pass of a model that was read: the first thing that computes decides.

A config may hold any number in any field, and most of them nobody reads before the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from osscar.base.errors import CheckpointError, ModelError, NonFiniteError, first_line
from osscar.base.memory import attempt
from osscar.network.model_state import model_state
from osscar.network.modules import context_length, device_of, number_format
from osscar.network.predictions import named_logits
from osscar.offload.on_disk import is_on_disk
from osscar.proof.equivalence import call, in_format_of, proof_outputs
from osscar.proof.lineage import lineage_of
from osscar.proof.sample import tolerance


def vocabulary_of(model: nn.Module) -> int | None:
    """Return how many tokens a causal language model of transformers knows; None of others."""
    named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not (named and isinstance(model, PreTrainedModel)):
        return None
    size = getattr(model.config, "vocab_size", None)
    return size if isinstance(size, int) else None


def check_runs(model: nn.Module, source: str) -> None:
    """Let a language model read a few tokens, and refuse one that cannot.

    `source` says in words where it comes from.
    """
    with attempt() as tried:  # whatever the model's code makes of a number that is none
        logits = _logits_of_two(model)
    if tried.failed:
        raise CheckpointError(
            f"{source} can be read, and its first forward pass fails: "
            f"{first_line(tried.error):.300}; a number in its config.json is one that no such "
            "model has: get it anew"
        ) from tried.error
    if logits is not None and bool(logits.isnan().any()):
        raise NonFiniteError(
            f"{source} can be read, and its first forward pass gives NaN in {logits.dtype}: a "
            "number in its config.json, or its weights, are damaged; get it anew, or try float32"
        )


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return inputs on a model's device, with fractions in the number format of its weights."""
    device = device_of(model)
    found = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)
    return in_format_of(found, model)


def check_sample(model: nn.Module, source: str) -> None:
    """Refuse a model in evaluation mode that does not put out what its checkpoint has recorded.

    `source` says in words where it comes from; the lineage of the model has the record.
    """
    sample = lineage_of(model).sample
    if sample is None or not sample.outputs:
        return
    remedy = "build the dense model by the code that it was pruned with, or get the checkpoint anew"
    with attempt() as tried, model_state(model):  # the model may be anyone's code
        found = proof_outputs(model, [to_device(sample.drawn(), model)])
    if tried.failed:
        raise CheckpointError(
            f"{source} can be read, and fails on the input on which it ran when it was saved: "
            f"{first_line(tried.error):.300}; {remedy}"
        ) from tried.error
    distance = sample.distance(found)
    if not distance <= tolerance(number_format(model)):
        far = f"are {distance:.2g} of their size off" if isfinite(distance) else "have other shapes"
        raise CheckpointError(
            f"{source} computes something else than the model that was saved: its outputs on the "
            f"recorded input {far}; {remedy}"
        )


def check_causal(model: nn.Module, source: str) -> None:
    """Refuse a model that reads ahead, whose next tokens are no predictions.

    It takes ``input_ids`` and returns logits.
    """
    logits = _logits_of_two(model)
    if logits is None or logits.shape[1] < 2:
        return
    first, second, again = logits.float()
    same = torch.finfo(next(model.parameters()).dtype).eps ** 0.5 * float(first[0].abs().max())
    changed, noise = (float((first[0] - other[0]).abs().max()) for other in (second, again))
    if changed > same >= noise:
        raise ModelError(
            f"{source} is a bidirectional {type(model).__name__}: its outputs depend on later "
            f"tokens, so that it does not predict the next one; {OTHERS}"
        )


OTHERS = (
    "models of other sorts are pruned from Python: build it with its own class, and give it to "
    "osscar.prune with inputs for it"
)
"""What to do with what is no causal language model."""


def _logits_of_two(model: nn.Module) -> Tensor | None:
    """Return the logits, (3, tokens, vocabulary), of windows of two tokens; None if there are none.

    The second differs from the first in the last token, and the third does not differ.  A model
    whose weights stay on disk is not tried: a pass takes as long as reading them all.
    """
    if is_on_disk(model):
        return None
    length = min(2, context_length(model) or 2)
    windows = torch.zeros(3, length, dtype=torch.int64, device=device_of(model))
    windows[1, -1] = 1
    return named_logits(call(model, {"input_ids": windows}))
