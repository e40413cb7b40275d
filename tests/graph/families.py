"""Tiny random language models whose attention has as many heads as a test asks for."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_VOCABULARY = 50
_IDS = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_positions": 64}
_OPT = {**_SIZES, "ffn_dim": 44, "word_embed_proj_dim": 32, "max_position_embeddings": 64}


def build(
    family: str, heads: int = 4, key_heads: int = 4, implementation: str = "sdpa", **options: Any
) -> torch.nn.Module:
    """Return a random model in eval mode whose weights, biases included, are far from zero."""
    config: Any
    if family == "gpt2":
        config = hf.GPT2Config(**_IDS, **_GPT2, n_head=heads)
    elif family == "opt":
        config = hf.OPTConfig(**_IDS, **_OPT, num_attention_heads=heads)
    else:
        counts = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
        config = hf.LlamaConfig(**_IDS, **_SIZES, **counts, intermediate_size=44, **options)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model  # type: ignore[no-any-return]


def token_inputs(batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, _VOCABULARY, (batch, length), generator=generator)}
