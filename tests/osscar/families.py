"""Tiny random models of every language family, and data for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from osscar.models.names import DEMO_CALIBRATION, DEMO_DIRECTORY, DEMO_HELD_OUT

CALIBRATION, HELD_OUT = DEMO_CALIBRATION, DEMO_HELD_OUT

VOCABULARY = 97

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6, n_inner=40, n_positions=64
    ),
    "llama-mha": lambda: LlamaConfig(**_LLAMA_LIKE, num_key_value_heads=6),
    "llama-gqa": lambda: LlamaConfig(**_LLAMA_LIKE, num_key_value_heads=3, attention_bias=True),
    "llama-mqa": lambda: LlamaConfig(**_LLAMA_LIKE, num_key_value_heads=1),
    "mistral": lambda: MistralConfig(**_LLAMA_LIKE, num_key_value_heads=3),
    "qwen2": lambda: Qwen2Config(**_LLAMA_LIKE, num_key_value_heads=3, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_LLAMA_LIKE, num_key_value_heads=3, head_dim=8),
}
"""Configurations by name; 40 neurons, and 6 heads, or 3 groups of 2."""


def gated() -> DeepseekV3Config:
    """Return the configuration of a family that keeps its gates in float32."""
    return DeepseekV3Config(
        **_LLAMA_LIKE,
        num_key_value_heads=6,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


def tiny(family: str, *, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """Build a tiny random model whose weights are large enough to matter."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.num_hidden_layers = layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = kinds[:layers]
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.eval()


def tokens(samples: int = 8, seqlen: int = 24, seed: int = 1) -> Tensor:
    """Random token windows, (samples, seqlen)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, seqlen), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a model, in float64."""
    return model(input_ids=ids).logits.double()


def framing_tokenizer() -> PreTrainedTokenizerBase:
    """Return the demo's tokenizer, if it put ``<s>`` before each text and ``</s>`` after it."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIRECTORY)
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    frame = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer
