"""How a model reads data: what its signature and its config tell, asked once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osscar.base.errors import DataError, ModelError
from osscar.base.inputs import safe_repr
from osscar.data.samples import LABELS
from osscar.network.modules import (
    check_usable,
    context_length,
    example_length,
    token_embeddings,
)

Batch: TypeAlias = dict[str, Tensor]
"""Keyword arguments of a model's forward pass."""

TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"

_WRAPPED = ("_orig_mod", "module")
"""Where `torch.compile`, DataParallel and averaging wrappers keep the model that they wrap."""

_ANYTHING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Reader:
    """A model as one that reads data: what these have to be called, where, and of which form."""

    name: str
    """Of its class."""
    takes: tuple[str, ...]
    """All arguments that its forward pass has names for, in order."""
    needs: tuple[str, ...]
    """Those of them that it cannot do without."""
    place: tuple[torch.device, torch.dtype | None]
    """Where its weights are, and the number format of fractions; None leaves them."""
    vocabulary: int = 0
    """How many tokens it knows, if it takes them as transformers' models do."""
    context: int | None = None
    """The most tokens at once, where its config tells."""
    example_length: int = 16
    """Tokens of an example."""
    causal: bool = False
    """Whether it is a causal language model, which reads tokens and predicts the next."""
    pads: bool = False
    """Whether it is of transformers, where masks mean padding."""
    padding_token: int | None = None
    """Its number, where the config tells."""
    image_token: int | None = None
    """The token that stands for a part of an image."""
    decoder: Callable[[Tensor], Batch] | None = None
    """Makes of labels what the decoder reads, of an encoder with one."""

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Ask a model; refuse one whose forward pass does not tell what it takes (ModelError)."""
        check_usable(model)
        parameters = inspect.signature(model.forward).parameters.values()
        wrapped = [name for name in _WRAPPED if isinstance(getattr(model, name, None), nn.Module)]
        named = [one for one in parameters if one.kind not in _ANYTHING]
        if wrapped and not named:
            raise ModelError(
                f"{type(model).__name__} wraps a model; give the wrapped one "
                f"(model.{wrapped[0]}), and wrap the result"
            )
        takes, table = tuple(one.name for one in named), token_embeddings(model)
        config, pads = getattr(model, "config", None), isinstance(model, PreTrainedModel)
        return cls(
            name=type(model).__name__,
            takes=takes,
            needs=tuple(one.name for one in named if one.default is one.empty),
            place=_place_of(model),
            vocabulary=0 if table is None or (takes and TOKENS not in takes) else table.shape[0],
            context=context_length(model),
            example_length=example_length(model),
            causal=isinstance(model, PreTrainedModel)
            and model.can_generate()
            and not model.config.is_encoder_decoder
            and model.main_input_name == TOKENS,
            pads=pads,
            padding_token=getattr(config, "pad_token_id", None),
            image_token=getattr(config, "image_token_id", None),
            decoder=_decoder_of(model) if pads and DECODER_TOKENS in takes else None,
        )

    def on(self, model: nn.Module) -> Self:
        """Return this for a copy on a device and in a number format of its own."""
        return replace(self, place=_place_of(model))

    def placed(self, batch: Mapping[str, Tensor]) -> Batch:
        """Return tensors on the model's device, and in its number format if they have fractions."""
        return _placed(batch, *self.place)

    def check(self, names: Collection[str]) -> None:
        """Refuse data under names that the model does not take, or that lack what it needs."""
        if not {*self.needs} <= {*names} <= {*self.takes}:
            raise DataError(
                f"{self.name}.forward takes {', '.join(self.takes)}, and the data are called "
                f"{', '.join(names) or 'nothing'}; name them after the arguments that read them"
            )

    def decoder_beside(self, names: Collection[str]) -> Callable[[Tensor], Batch] | None:
        """Return `decoder` where inputs of these names have nothing for the decoder."""
        return None if any(name.startswith("decoder_") for name in names) else self.decoder

    def check_windows(self, windows: Tensor) -> None:
        """Refuse windows of a wrong form, too long, or with tokens that the model lacks."""
        if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
            wrong = "windows must be int64 (samples, seqlen) and not empty, not "
            wrong += f"{windows.dtype} of {tuple(windows.shape)}"
        elif self.context is not None and windows.shape[1] > self.context:
            wrong = f"windows have {windows.shape[1]} tokens and the model takes {self.context}; "
            wrong += "give a smaller window length (seqlen, `--seqlen`)"
        elif int(windows.min()) < 0 or int(windows.max()) >= self.vocabulary:
            wrong = f"tokens run from {int(windows.min())} to {int(windows.max())} and the model "
            wrong += f"knows 0 to {self.vocabulary - 1}; use the tokenizer that belongs to it"
        else:
            return
        raise DataError(f"calibration {wrong}")

    def named(self, args: Sequence[Tensor]) -> Batch:
        """Return positional arguments under the names that the forward pass gives them."""
        if not len(self.needs) <= len(args) <= len(self.takes):
            raise DataError(
                f"{self.name}.forward names the arguments {', '.join(self.takes) or 'nothing'}, "
                f"and there are {len(args)} tensors; give a mapping of names to tensors"
            )
        return dict(zip(self.takes, args, strict=False))

    def by_name(self, given: Any) -> Batch | None:
        """Return a tensor, or a tuple or mapping of them, by argument; None of anything else."""
        if isinstance(given, Mapping) and all(isinstance(t, Tensor) for t in given.values()):
            takes = [name for name in self.takes if name in given]
            return {name: given[name] for name in dict.fromkeys([*takes, *given])}
        args = (given,) if isinstance(given, Tensor) else given
        if isinstance(args, tuple) and all(isinstance(t, Tensor) for t in args):
            return self.named(args)
        return None

    def example(self, given: Any) -> Batch:
        """Return example inputs, a tensor or a tuple or mapping of tensors, by argument."""
        args = tuple(given) if isinstance(given, list) else given
        named = self.by_name(args) if isinstance(args, Tensor) or args else None
        if named is None:
            raise DataError(
                f"{safe_repr(given)} ({type(given).__name__}) are not example inputs; give a "
                "tensor, a tuple of tensors, or a mapping of their names to tensors"
            )
        return named


def to_model(batch: Mapping[str, Tensor], model: nn.Module) -> Batch:
    """Return tensors on a model's device, and in its number format if they have fractions."""
    return _placed(batch, *_place_of(model))


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    first = next(model.parameters())
    return first.device, first.dtype if first.is_floating_point() else None


def _placed(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> Batch:
    return {
        name: one.to(device, dtype if one.is_floating_point() else None)
        for name, one in batch.items()
    }


def _decoder_of(model: Any) -> Callable[[Tensor], Batch] | None:
    """Return what a model, or the code around it, makes of labels for its decoder to read."""
    config, own = model.config, getattr(model, "prepare_decoder_input_ids_from_labels", None)
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if not config.is_encoder_decoder:
        return None
    if own is not None:
        return lambda labels: {DECODER_TOKENS: own(labels=labels)}
    if shift is None:
        return lambda labels: {LABELS: labels}
    return lambda labels: {
        DECODER_TOKENS: shift(labels, config.pad_token_id, config.decoder_start_token_id)
    }
