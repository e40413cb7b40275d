"""Tiny random language models of every supported family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

_VOCABULARY = 50


@dataclass(frozen=True)
class Attention:
    """How many query and key heads; `MHA`, `GQA` and `MQA` below."""

    heads: int
    key_heads: int


# Two key heads and a batch of two: equal sizes must not be confused.
MHA, GQA, MQA = Attention(4, 4), Attention(4, 2), Attention(4, 1)


def _grouped(config: type, **options: object) -> Callable[[Attention], object]:
    def build(attention: Attention) -> object:
        return config(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=attention.heads,
            num_key_value_heads=attention.key_heads,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **options,
        )

    return build


def _opt(attention: Attention) -> object:
    return transformers.OPTConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        ffn_dim=44,
        num_hidden_layers=2,
        num_attention_heads=attention.heads,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )


def _gpt2(attention: Attention) -> object:
    return transformers.GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=attention.heads,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )


CONFIGS: dict[str, Callable[[Attention], object]] = {
    "llama": _grouped(transformers.LlamaConfig),
    "llama-tied": _grouped(transformers.LlamaConfig, tie_word_embeddings=True),
    "llama-bias": _grouped(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral": _grouped(transformers.MistralConfig, head_dim=8),
    "qwen2": _grouped(transformers.Qwen2Config),
    "qwen3": _grouped(transformers.Qwen3Config, head_dim=10),
    "opt": _opt,
    "gpt2": _gpt2,
}

_ATTENTIONS = {"opt": (MHA,), "gpt2": (MHA,), "llama-tied": (GQA,), "llama-bias": (GQA,)}

CASES = [
    (family, attention, implementation)
    for family in CONFIGS
    for attention in _ATTENTIONS.get(family, (MHA, GQA, MQA))
    for implementation in ("sdpa", "eager")
]


def build(family: str, attention: Attention, implementation: str) -> torch.nn.Module:
    """Return a random model in eval mode whose weights, biases included, are far from zero."""
    config = CONFIGS[family](attention)
    config._attn_implementation = implementation  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def token_inputs(batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, _VOCABULARY, (batch, length), generator=generator)}
