"""What every method is given, and what it returns."""

from __future__ import annotations

import enum
import functools
import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osscar
from benchmarks.quality import Setting
from osscar.data.batches import as_inputs
from osscar.data.images import ImageSet
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops

IMAGES_AT_ONCE, WINDOWS_AT_ONCE = 64, 4


@dataclass(frozen=True)
class Case:
    """One model to be made smaller.

    Parameters
    ----------
    model
        The dense one, which stays as it is.
    data
        Calibrates: an `ImageSet` with labels, or a `CalibrationSet`.
    setting
        What is removed, and how this toolkit is asked for it.
    size
        What equal shares in whole units come to, as fields of a request: ``flops``, a share, or
        ``params``, a count.  No method may keep more.
    seed
        Of the data, and of whatever a method draws.
    options
        Of the command line.
    counting
        Processor seconds of each count of what is left, which no method is charged with.
    """

    model: nn.Module
    data: Any
    setting: Setting
    size: Mapping[str, Any]
    seed: int
    options: Any
    counting: list[float] = field(default_factory=list)

    @functools.cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The calibration data as arguments of the model."""
        at_once = IMAGES_AT_ONCE if self.labels is not None else WINDOWS_AT_ONCE
        return list(as_inputs(self.model, self.data).batches(self.model, at_once))

    @property
    def labels(self) -> Tensor | None:
        """Classes of the images, (samples,) int64; None for text."""
        return self.data.labels if isinstance(self.data, ImageSet) else None

    def used(self, model: nn.Module) -> int:
        """Return what is limited of a model: parameters, or operations on one sample."""
        if "params" in self.size:
            return count_parameters(model)
        sample = {name: tensor[:1] for name, tensor in self.batches[0].items()}
        began = time.process_time()
        found = count_flops(model, sample)
        self.counting.append(time.process_time() - began)
        return found

    @functools.cached_property
    def allowed(self) -> float:
        """What of it may stay."""
        if "params" in self.size:
            return float(self.size["params"])
        return float(self.size["flops"]) * self.used(self.model)


class Form(enum.Enum):
    """How a smaller model is written, and read again, as its own documentation has it.

    That of Torch-Pruning is a pickle, which may run any code: only give this benchmark a directory
    that it has written itself.
    """

    OSSCAR = "weights and plan"
    PRETRAINED = "transformers"
    PICKLE = "pickle"

    def write(self, smaller: Smaller, directory: Path) -> None:
        """Write a model into a directory that is not there yet."""
        model: Any = smaller.model
        if self is Form.OSSCAR:
            smaller.result.save(directory, dtype=torch.float32)
        elif self is Form.PRETRAINED:
            model.save_pretrained(directory)
        else:
            directory.mkdir()
            torch.save(model, directory / "model.pth")

    def read(self, directory: Path, dense: Any) -> nn.Module:
        """Read a model, given the one that it was made of."""
        if self is Form.OSSCAR:
            return osscar.load(directory, dense=dense)
        if self is Form.PRETRAINED:
            return type(dense).from_pretrained(directory).eval()  # type: ignore[no-any-return]
        return torch.load(directory / "model.pth", weights_only=False)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Smaller:
    """What a method made of a model.

    Parameters
    ----------
    model
        The smaller one.
    form
        In which its own documentation writes it.
    result
        Of a run of this toolkit; None of a peer.
    """

    model: nn.Module
    form: Form = Form.PICKLE
    result: Any = None

    @property
    def proved(self) -> str:
        """What is proved: the program is equal, or outputs are; empty if nothing is."""
        if self.result is None:
            return ""
        return "program" if self.result.certificate.structure is not None else "outputs"


# ---- decoders ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Half:
    """Attention or the feed-forward part of a decoder block: what reads the stream, and adds to it.

    Parameters
    ----------
    norm
        Name of the normalization in its block.
    readers
        Read the normalized stream.
    writer
        Adds to the stream.
    """

    norm: str
    readers: tuple[nn.Linear, ...]
    writer: nn.Linear


@dataclass(frozen=True)
class Decoder:
    """The parts of an OPT or a Llama that methods for decoders name.

    Parameters
    ----------
    stack
        Holds the blocks as `layers`.
    last
        Name of the last normalization in the stack.
    embeddings
        Write the first of the stream.
    head
        Reads the last of it.
    blocks
        Attention and feed-forward part of each.
    """

    stack: Any
    last: str
    embeddings: tuple[nn.Embedding, ...]
    head: nn.Linear
    blocks: tuple[tuple[Half, Half], ...]

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """Find them."""
        if hasattr(model.model, "decoder"):
            stack = model.model.decoder
            blocks = [
                (
                    Half("self_attn_layer_norm", _qkv(b.self_attn), b.self_attn.out_proj),
                    Half("final_layer_norm", (b.fc1,), b.fc2),
                )
                for b in stack.layers
            ]
            embeddings = (stack.embed_tokens, stack.embed_positions)
            return cls(stack, "final_layer_norm", embeddings, model.lm_head, tuple(blocks))
        stack = model.model
        blocks = [
            (
                Half("input_layernorm", _qkv(b.self_attn), b.self_attn.o_proj),
                Half("post_attention_layernorm", (b.mlp.gate_proj, b.mlp.up_proj), b.mlp.down_proj),
            )
            for b in stack.layers
        ]
        return cls(stack, "norm", (stack.embed_tokens,), model.lm_head, tuple(blocks))


def _qkv(attention: Any) -> tuple[nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def first_line(error: BaseException) -> str:
    """Return an exception in one line."""
    words = inspect.cleandoc(str(error)).splitlines() or [""]
    return f"{type(error).__name__}: {words[0]:.200}"
