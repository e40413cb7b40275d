"""Tiny random models of further architectures: encoders, encoder-decoders, experts, vision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

Built = tuple[torch.nn.Module, dict[str, torch.Tensor]]

_VOCABULARY = 50
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_TEXT = {"vocab_size": _VOCABULARY, **_WIDE, **_IDS}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_FALCON = {**_TEXT, "intermediate_size": 128}
_SEQUENCE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    **_IDS,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def _tokens(length: int = 7) -> torch.Tensor:
    return torch.randint(3, _VOCABULARY, (2, length))


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens()}


def _translation() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": _tokens(5)}


def _clip() -> hf.CLIPConfig:
    text = {**_TEXT, "max_position_embeddings": 16}
    return hf.CLIPConfig(
        text_config=text,
        vision_config={**_WIDE, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )


Row = tuple[type, Callable[[], Any], Callable[[], dict[str, torch.Tensor]], list[str], list[str]]

_CAUSAL = hf.AutoModelForCausalLM
ARCHITECTURES: dict[str, Row] = {
    "gemma2": (
        _CAUSAL,
        lambda: hf.Gemma2Config(**_GROUPED, head_dim=8),
        _text,
        ["eager"],
        ["model.layers.0.self_attn.heads:2", "model.layers.0.mlp.neurons:44"],
    ),
    "phi3": (
        _CAUSAL,
        lambda: hf.Phi3Config(**_GROUPED),
        _text,
        ["sdpa"],
        ["model.layers.0.self_attn.heads:2", "model.layers.0.mlp.neurons:44"],
    ),
    "gpt-neox": (
        _CAUSAL,
        lambda: hf.GPTNeoXConfig(**_TEXT),
        _text,
        ["sdpa"],
        ["gpt_neox.layers.0.attention.heads:4", "gpt_neox.layers.0.mlp.neurons:44"],
    ),
    "gptj": (
        _CAUSAL,
        lambda: hf.GPTJConfig(
            vocab_size=_VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, **_IDS
        ),
        _text,
        ["eager"],
        ["transformer.h.0.attn.heads:4", "transformer.h.0.mlp.neurons:128"],
    ),
    "falcon-multi-query": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, multi_query=True, new_decoder_architecture=False),
        _text,
        ["sdpa", "eager"],
        ["transformer.h.0.self_attention.heads:4", "transformer.h.0.mlp.neurons:128"],
    ),
    "falcon-grouped": (
        _CAUSAL,
        lambda: hf.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
        _text,
        ["sdpa"],
        ["transformer.h.0.self_attention.heads:2", "transformer.h.0.mlp.neurons:128"],
    ),
    "mixtral": (
        _CAUSAL,
        lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
        _text,
        ["sdpa"],
        ["model.layers.0.self_attn.heads:2", "model.layers.0.mlp.experts.neurons:44"],
    ),
    "bert": (
        hf.BertForMaskedLM,
        lambda: hf.BertConfig(**_TEXT),
        _text,
        ["sdpa", "eager"],
        ["bert.encoder.layer.0.attention.self.heads:4", "bert.encoder.layer.0.neurons:44"],
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=_VOCABULARY, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4
        ),
        _translation,
        ["eager"],
        # The position bias of the first block is shared by all, and so are the heads.
        [
            "encoder.block.0.layer.0.SelfAttention.heads:4",
            "encoder.block.0.layer.1.DenseReluDense.neurons:44",
            "encoder.block.1.layer.1.DenseReluDense.neurons:44",
            "decoder.block.0.layer.0.SelfAttention.heads:4",
            "decoder.block.0.layer.1.EncDecAttention.heads:4",
            "decoder.block.0.layer.2.DenseReluDense.neurons:44",
            "decoder.block.1.layer.2.DenseReluDense.neurons:44",
        ],
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        lambda: hf.BartConfig(**_SEQUENCE, max_position_embeddings=64),
        _translation,
        ["sdpa"],
        [
            "model.encoder.layers.0.self_attn.heads:4",
            "model.encoder.layers.0.neurons:44",
            "model.decoder.layers.0.self_attn.heads:4",
            "model.decoder.layers.0.encoder_attn.heads:4",
            "model.decoder.layers.0.neurons:44",
        ],
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **{**_SEQUENCE, "num_mel_bins": 8},
            max_source_positions=16,
            max_target_positions=16,
        ),
        _speech,
        ["sdpa"],
        [
            "model.encoder.conv1.channels:32",
            "model.encoder.layers.0.self_attn.heads:4",
            "model.encoder.layers.0.neurons:44",
            "model.decoder.layers.0.self_attn.heads:4",
            "model.decoder.layers.0.encoder_attn.heads:4",
            "model.decoder.layers.0.neurons:44",
        ],
    ),
    "clip": (
        hf.CLIPModel,
        _clip,
        lambda: {**_text(), **_image()},
        ["sdpa"],
        [
            f"{tower}_model.encoder.layers.0.{part}"
            for tower in ("vision", "text")
            for part in ("self_attn.heads:4", "mlp.neurons:44")
        ],
    ),
    "vit": (
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(**_WIDE, image_size=32, patch_size=8),
        _image,
        ["sdpa"],
        ["vit.layers.0.attention.heads:4", "vit.layers.0.mlp.neurons:44"],
    ),
    "swin": (
        hf.SwinForImageClassification,
        lambda: hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4
        ),
        _image,
        ["eager"],
        [
            f"swin.encoder.layers.0.blocks.{block}.{part}"
            for block in (0, 1)
            for part in ("attention.heads:2", "mlp.neurons:64")
        ],
    ),
}
"""Model class, configuration, inputs, attention implementations, prunable groups with units."""

ARCHITECTURE_CASES = [(name, how) for name, row in ARCHITECTURES.items() for how in row[3]]


def build_architecture(name: str, implementation: str) -> Built:
    """Return a random model in eval mode, its weights far from zero, and inputs for it."""
    torch.manual_seed(0)
    kind, configure, inputs, _, _ = ARCHITECTURES[name]
    config = configure()
    config._attn_implementation = implementation
    model = kind.from_config(config) if kind is _CAUSAL else kind(config)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), inputs()
