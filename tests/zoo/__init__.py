"""The models that tests trace, shrink and cover: random weights that all matter, and two inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.graph.blocks import BLOCKS
from tests.graph.topologies import PRUNABLE, randomized
from tests.zoo import shrunken
from tests.zoo.case import Inputs, Made


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode with random weights that all matter.

    inputs: Make two, of another batch and another length or resolution where the model allows.
    groups: The prunable groups with their units, where these are stated.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Inputs], Callable[[], Inputs]]
    groups: Mapping[str, int]

    def make_inputs(self) -> list[Inputs]:
        """Return both inputs."""
        return [make() for make in self.inputs]


# ---- small networks ----------------------------------------------------------------------


def _small(
    name: str, kind: type[nn.Module], example: tuple[Tensor, ...], groups: Mapping[str, int]
) -> Case:
    def other() -> Inputs:
        return tuple(torch.randn(5, *one.shape[1:]) for one in example)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomized(kind())

    return Case(name, build, (lambda: example, other), groups)


SMALL = {name: _small(name, *case) for name, case in {**PRUNABLE, **BLOCKS}.items()}
"""Networks of a few layers, one for each way in which axes hang together, and each operator."""


# ---- transformers ------------------------------------------------------------------------


def _text_and_image() -> list[Inputs]:
    return [
        {"input_ids": torch.randint(3, 90, (n, 7)), "pixel_values": torch.randn(n, 3, 32, 32)}
        for n in (2, 3)
    ]


def _speech() -> list[Inputs]:
    return [
        {
            "input_features": torch.randn(batch, 8, 32),
            "decoder_input_ids": torch.randint(3, 90, (batch, length)),
        }
        for batch, length in ((2, 7), (3, 11))
    ]


def _sound() -> list[Inputs]:
    return [{"input_values": torch.randn(*size)} for size in ((2, 400), (3, 600))]


_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-multi-query": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "falcon-grouped": (
        "FalconForCausalLM",
        {"multi_query": False, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "t5": ("T5ForConditionalGeneration", {"decoder_start_token_id": 1}),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 4,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"num_mel_bins": 8, "max_source_positions": 16, "forced_eos_token_id": None},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "vocab_size": 64}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    ),
    "clip": ("CLIPModel", {}),
    "swin": (
        "SwinForImageClassification",
        {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
    ),
    "detr": (
        "DetrForObjectDetection",
        {"use_timm_backbone": False, "backbone": None, "num_queries": 5}
        | {
            "backbone_config": hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 24],
                depths=[1, 1, 1, 1],
                out_features=["stage4"],
            )
        },
    ),
}
"""Classes and fields of configurations that are not those of `shrunken.make`."""

_INPUTS = {"whisper": _speech, "wav2vec2": _sound, "clip": _text_and_image}

FAMILIES = (
    *("llama", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon"),
    *("mixtral", "bert", "bart", "vit", "convnext", *_VARIANTS),
)
"""Families of transformers, as the package calls them, and variants."""

_HEADS = {"model.layers.*.self_attn.heads": 2, "model.layers.*.mlp.neurons": 80}
_GPT = {"transformer.h.*.attn.heads": 4, "transformer.h.*.mlp.neurons": 256}
_ENCODER = {"model.encoder.layers.*.self_attn.heads": 4, "model.encoder.layers.*.neurons": 80}
_DECODER = {
    "model.decoder.layers.*.self_attn.heads": 4,
    "model.decoder.layers.*.encoder_attn.heads": 4,
    "model.decoder.layers.*.neurons": 80,
}
# The position bias of the first block of T5 is shared by all, and so are the heads.
_GROUPS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("llama", "qwen3", "gemma2", "phi3"), _HEADS),
    "llama-multi-query": {**_HEADS, "model.layers.*.self_attn.heads": 4},
    "opt": {"model.decoder.layers.*.self_attn.heads": 4, "model.decoder.layers.*.neurons": 80},
    **dict.fromkeys(("gpt2", "gptj"), _GPT),
    "gpt_neox": {"gpt_neox.layers.*.attention.heads": 4, "gpt_neox.layers.*.mlp.neurons": 80},
    **{
        name: {
            "transformer.h.*.self_attention.heads": heads,
            "transformer.h.*.mlp.neurons": 256,
        }
        for name, heads in (("falcon", 4), ("falcon-grouped", 2))
    },
    "mixtral": {"model.layers.*.self_attn.heads": 2, "model.layers.*.mlp.experts.neurons": 80},
    "bert": {"bert.encoder.layer.*.attention.self.heads": 4, "bert.encoder.layer.*.neurons": 80},
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.heads": 4,
        "encoder.block.*.layer.1.DenseReluDense.neurons": 80,
        "decoder.block.0.layer.0.SelfAttention.heads": 4,
        "decoder.block.0.layer.1.EncDecAttention.heads": 4,
        "decoder.block.*.layer.2.DenseReluDense.neurons": 80,
    },
    "bart": {**_ENCODER, **_DECODER},
    "whisper": {"model.encoder.conv1.channels": 64, **_ENCODER, **_DECODER},
    "clip": {
        f"{tower}_model.encoder.layers.*.{part}": units
        for tower in ("vision", "text")
        for part, units in (("self_attn.heads", 4), ("mlp.neurons", 80))
    },
    "vit": {"vit.layers.*.attention.heads": 4, "vit.layers.*.mlp.neurons": 80},
    "swin": {
        f"swin.encoder.layers.{stage}.blocks.*.{part}": units * (1 + stage)
        for stage in (0, 1)
        for part, units in (("attention.heads", 2), ("mlp.neurons", 64))
    },
}
"""The prunable groups of a family; a star stands for both of two layers."""

TRACED = tuple(_GROUPS)
"""Those whose groups are stated."""


def transformers_case(name: str, attention: str | None = None, **fields: Any) -> Case:
    """Return a tiny model of transformers, of `FAMILIES`, with four heads and two layers.

    attention: Implementation of attention; by default the family's.
    fields: Of its configuration.
    """
    kind, own = _VARIANTS.get(name) or (shrunken.families()[name], {})
    own = own | fields | ({} if attention is None else {"attn_implementation": attention})

    @cache
    def made() -> Made:
        return shrunken.built(getattr(hf, kind), own, _INPUTS.get(name))

    groups = {
        group: units
        for groups, units in _GROUPS.get(name, {}).items()
        for group in dict.fromkeys(groups.replace("*", number) for number in "01")
    }
    inputs = tuple(lambda index=index: dict(made().inputs[index]) for index in (0, 1))
    return Case(name, lambda: copy.deepcopy(made().model), inputs, groups)
