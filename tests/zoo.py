"""The models that tests trace, shrink and cover: random weights that all matter, and two inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.coverage.case import Inputs, alive
from tests.graph.blocks import BLOCKS
from tests.graph.topologies import PRUNABLE, randomized


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode with random weights that all matter.

    inputs: Make two, of another batch and another length or resolution where the model allows.
    groups: The prunable groups with their units, where these are stated.
    tags: What tests choose by: ``always``, where the default suite tests it; ``cuts``, where
        slicing its tensors is all that has to be done; ``literal``, where its code holds numbers
        that no module keeps; ``stock``, where its config can express the shapes.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Inputs], Callable[[], Inputs]]
    groups: Mapping[str, int] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()

    def make_inputs(self) -> list[Inputs]:
        """Return both inputs."""
        return [make() for make in self.inputs]


# ---- small networks ----------------------------------------------------------------------

_TAGS = {
    "always": {
        *PRUNABLE,
        *("multi-query", "enable-gqa", "rms-norm", "addmm", "stack", "recurrent"),
        *("channel-shuffle", "pixel-shuffle", "messages", "fourier", "patches", "experts"),
        *("uneven-parts", "unflatten"),
    },
    "cuts": {
        *("residual", "concat", "depthwise", "tied", "called-twice", "bare-parameters", "gate"),
        *("up-and-down", "gated-halves", "glu", "stacked", "gathered"),
    },
    "literal": {"padded", "einsum", "independent-halves"},
}


def _small(
    name: str, kind: type[nn.Module], example: tuple[Tensor, ...], groups: Mapping[str, int]
) -> Case:
    def other() -> Inputs:
        return tuple(torch.randn(5, *one.shape[1:]) for one in example)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomized(kind())

    tags = frozenset(tag for tag, names in _TAGS.items() if name in names)
    return Case(name, build, (lambda: example, other), groups, tags)


SMALL = {name: _small(name, *case) for name, case in {**PRUNABLE, **BLOCKS}.items()}
"""Networks of a few layers, one for each way in which axes hang together, and each operator."""


# ---- transformers ------------------------------------------------------------------------

_VOCABULARY = 64
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
_TEXT = {"vocab_size": _VOCABULARY, "max_position_embeddings": 64, **_WIDE, **_IDS}
# Two key heads and a batch of two: equal sizes must not be confused.
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_FALCON = {key: value for key, value in _TEXT.items() if key != "intermediate_size"}
_SEQUENCE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    **_IDS,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 6,
    "decoder_start_token_id": 1,
}
_GPT2 = {"vocab_size": _VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 40, **_IDS}


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, _VOCABULARY, (batch, length))


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length)}


def _pair(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length), "decoder_input_ids": _tokens(batch, length - 2)}


def _speech(batch: int, length: int) -> Inputs:
    return {
        "input_features": torch.randn(batch, 8, 32),
        "decoder_input_ids": _tokens(batch, length),
    }


def _sound(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, length)}


def _image(batch: int, size: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _text_and_image(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length), "pixel_values": torch.randn(batch, 3, 32, 32)}


_Sizes = tuple[tuple[int, int], tuple[int, int]]
_LENGTHS: _Sizes = ((2, 7), (3, 11))
_FIXED: _Sizes = ((2, 32), (3, 32))
_FREE: _Sizes = ((2, 64), (1, 96))

_CAUSAL = hf.AutoModelForCausalLM
_FAMILIES: dict[str, tuple[Any, ...]] = {
    "llama": (_CAUSAL, lambda: hf.LlamaConfig(**_GROUPED)),
    "llama-multi-query": (_CAUSAL, lambda: hf.LlamaConfig(**{**_TEXT, "num_key_value_heads": 1})),
    "mistral": (_CAUSAL, lambda: hf.MistralConfig(**_GROUPED)),
    "qwen2": (_CAUSAL, lambda: hf.Qwen2Config(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": (_CAUSAL, lambda: hf.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma2": (_CAUSAL, lambda: hf.Gemma2Config(**_GROUPED, head_dim=8)),
    "gemma3": (_CAUSAL, lambda: hf.Gemma3TextConfig(**_GROUPED, head_dim=8)),
    "phi3": (_CAUSAL, lambda: hf.Phi3Config(**_GROUPED)),
    "opt": (
        _CAUSAL,
        lambda: hf.OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=48,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=64,
            word_embed_proj_dim=48,
            **_IDS,
        ),
    ),
    "gpt2": (_CAUSAL, lambda: hf.GPT2Config(**_GPT2, n_positions=64)),
    "gpt-neox": (_CAUSAL, lambda: hf.GPTNeoXConfig(**_TEXT)),
    "gpt-j": (_CAUSAL, lambda: hf.GPTJConfig(**_GPT2, n_positions=64, rotary_dim=4)),
    "bloom": (
        _CAUSAL,
        lambda: hf.BloomConfig(vocab_size=_VOCABULARY, hidden_size=48, n_layer=2, n_head=6, **_IDS),
    ),
    "falcon": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, multi_query=False, new_decoder_architecture=False),
    ),
    "falcon-multi-query": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, multi_query=True, new_decoder_architecture=False),
    ),
    "falcon-grouped": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    ),
    "mixtral": (_CAUSAL, lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**_TEXT)),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        lambda: hf.DistilBertConfig(
            vocab_size=_VOCABULARY,
            dim=48,
            hidden_dim=40,
            n_layers=2,
            n_heads=6,
            max_position_embeddings=64,
            pad_token_id=2,
        ),
    ),
    "deberta-v2": (
        hf.DebertaV2ForMaskedLM,
        lambda: hf.DebertaV2Config(
            **_TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=4,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
    ),
    "t5": (hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5), _pair, _LENGTHS),
    "t5-gated": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        _pair,
        _LENGTHS,
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**_SEQUENCE, max_position_embeddings=32),
        _pair,
        _LENGTHS,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **{**_SEQUENCE, "num_mel_bins": 8}, max_source_positions=16, max_target_positions=16
        ),
        _speech,
        _LENGTHS,
    ),
    "wav2vec2": (
        hf.Wav2Vec2ForCTC,
        lambda: hf.Wav2Vec2Config(
            **_TEXT,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
        ),
        _sound,
        ((2, 400), (3, 600)),
    ),
    "clip": (
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config=dict(_TEXT),
            vision_config={**_WIDE, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        ),
        _text_and_image,
        _LENGTHS,
    ),
    "vit": (
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(**_WIDE, image_size=32, patch_size=8),
        _image,
        _FIXED,
    ),
    "swin": (
        hf.SwinForImageClassification,
        lambda: hf.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        _image,
        _FIXED,
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        lambda: hf.ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], image_size=64),
        _image,
        _FREE,
    ),
    "detr": (
        hf.DetrForObjectDetection,
        lambda: hf.DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 24],
                depths=[1, 1, 1, 1],
                out_features=["stage4"],
            ),
            num_queries=5,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=40,
            decoder_ffn_dim=36,
            encoder_attention_heads=6,
            decoder_attention_heads=4,
        ),
        _image,
        _FREE,
    ),
}
"""Class, configuration, and kind and two sizes of inputs; by default text."""

_HEADS = {"model.layers.*.self_attn.heads": 2, "model.layers.*.mlp.neurons": 40}
_ENCODER = {"model.encoder.layers.*.self_attn.heads": 6, "model.encoder.layers.*.neurons": 40}
_DECODER = {
    "model.decoder.layers.*.self_attn.heads": 4,
    "model.decoder.layers.*.encoder_attn.heads": 4,
    "model.decoder.layers.*.neurons": 36,
}
# The position bias of the first block of T5 is shared by all, and so are the heads.
_GROUPS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"), _HEADS),
    "llama-multi-query": {**_HEADS, "model.layers.*.self_attn.heads": 6},
    "opt": {"model.decoder.layers.*.self_attn.heads": 6, "model.decoder.layers.*.neurons": 40},
    "gpt2": {"transformer.h.*.attn.heads": 6, "transformer.h.*.mlp.neurons": 40},
    "gpt-neox": {"gpt_neox.layers.*.attention.heads": 6, "gpt_neox.layers.*.mlp.neurons": 40},
    "gpt-j": {"transformer.h.*.attn.heads": 6, "transformer.h.*.mlp.neurons": 40},
    "falcon-multi-query": {
        "transformer.h.*.self_attention.heads": 6,
        "transformer.h.*.mlp.neurons": 192,
    },
    "falcon-grouped": {
        "transformer.h.*.self_attention.heads": 2,
        "transformer.h.*.mlp.neurons": 192,
    },
    "mixtral": {"model.layers.*.self_attn.heads": 2, "model.layers.*.mlp.experts.neurons": 40},
    "bert": {"bert.encoder.layer.*.attention.self.heads": 6, "bert.encoder.layer.*.neurons": 40},
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.heads": 6,
        "encoder.block.*.layer.1.DenseReluDense.neurons": 40,
        "decoder.block.0.layer.0.SelfAttention.heads": 6,
        "decoder.block.0.layer.1.EncDecAttention.heads": 6,
        "decoder.block.*.layer.2.DenseReluDense.neurons": 40,
    },
    "bart": {**_ENCODER, **_DECODER},
    "whisper": {"model.encoder.conv1.channels": 48, **_ENCODER, **_DECODER},
    "clip": {
        f"{tower}_model.encoder.layers.*.{part}": units
        for tower in ("vision", "text")
        for part, units in (("self_attn.heads", 6), ("mlp.neurons", 40))
    },
    "vit": {"vit.layers.*.attention.heads": 6, "vit.layers.*.mlp.neurons": 40},
    "swin": {
        f"swin.encoder.layers.{stage}.blocks.*.{part}": units * (1 + stage)
        for stage in (0, 1)
        for part, units in (("attention.heads", 2), ("mlp.neurons", 64))
    },
}
"""The prunable groups of a family; a star stands for both of two layers."""

_STOCK = {
    *("llama", "llama-multi-query", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
    *("mixtral", "t5", "t5-gated", "vit"),
}

FAMILIES = tuple(_FAMILIES)
"""The names of the covered families of transformers."""

TRACED = tuple(_GROUPS)
"""Those whose groups are stated."""


def transformers_case(name: str, attention: str | None = None, **fields: Any) -> Case:
    """Return a tiny model of transformers by name of its family.

    name: One of `FAMILIES`.
    attention: Implementation of attention; by default the family's.
    fields: Of its configuration, in place of the family's.
    """
    kind, configure, *given = _FAMILIES[name]
    inputs, (first, second) = given or (_text, _LENGTHS)

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = configure()
        vars(config).update(fields)
        if attention is not None:
            config._attn_implementation = attention
        model = kind.from_config(config) if kind is _CAUSAL else kind(config)
        alive(model)
        return model.eval()  # type: ignore[no-any-return]

    groups = {
        group: units
        for groups, units in _GROUPS.get(name, {}).items()
        for group in dict.fromkeys(groups.replace("*", number) for number in "01")
    }
    tags = frozenset({"stock"} if name in _STOCK else ())
    return Case(name, build, (lambda: inputs(*first), lambda: inputs(*second)), groups, tags)
