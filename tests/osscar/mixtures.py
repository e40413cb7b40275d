"""Tiny random mixtures of experts, of many families of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_MANY: dict[str, Any] = {**_SMALL, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    **_MANY,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_JAMBA: dict[str, Any] = {
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["attention", "moe"],
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
}
_ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_LOCAL, _FOUR, _HEADS = {"num_local_experts": 4}, {"num_experts": 4}, {"head_dim": 8}
_SHARED = {"shared_expert_intermediate_size": 20}
_OPEN = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
_HALF = {"n_group": 2, "topk_group": 1}

MIXTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (hf.MixtralConfig, {**_SMALL, **_LOCAL}),
    "olmoe": (hf.OlmoeConfig, {**_SMALL, **_FOUR}),
    "qwen2-moe": (hf.Qwen2MoeConfig, {**_MANY, **_FOUR, **_SHARED}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**_MANY, **_FOUR, **_HEADS}),
    "deepseek-v2": (hf.DeepseekV2Config, {**_LATENT, "topk_method": "greedy"}),
    "deepseek-v3": (hf.DeepseekV3Config, _LATENT),
    "jamba": (hf.JambaConfig, {**_SMALL, **_FOUR, **_JAMBA}),
    "gpt-oss": (hf.GptOssConfig, {**_SMALL, **_LOCAL, **_HEADS, **_ROPE}),
    "phimoe": (hf.PhimoeConfig, {**_SMALL, **_LOCAL}),
    "granitemoe": (hf.GraniteMoeConfig, {**_SMALL, **_LOCAL, "use_cache": False}),
    "ernie-moe": (hf.Ernie4_5_MoeConfig, {**_MANY, "moe_num_experts": 4, "moe_k": 2}),
    "hunyuan": (hf.HunYuanMoEV1Config, {**_SMALL, **_FOUR, **_HEADS, "moe_topk": 2}),
    # Whose experts have no gates.
    "nemotron-h": (hf.NemotronHConfig, {**_MANY, **_HEADS, **_NEMOTRON}),
    "minimax": (hf.MiniMaxConfig, {**_SMALL, **_LOCAL}),
}
"""Classes of configurations with their values: 4 experts of 40 or 24 neurons, 2 a token."""

_V2_GROUPS = {**_LATENT, **_OPEN, "n_routed_experts": 8, "routed_scaling_factor": 1.7}
_LFM2 = {"num_dense_layers": 0, "layer_types": ["full_attention", "full_attention"]}
_GLM4 = {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
_NORMALIZED = {"num_experts": 5, "norm_topk_prob": True}

ROUTERS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "deepseek-v2-groups": (hf.DeepseekV2Config, _V2_GROUPS),
    "deepseek-v3-groups": (hf.DeepseekV3Config, {**_LATENT, **_HALF, "n_routed_experts": 12}),
    "glm4-moe": (hf.Glm4MoeConfig, {**_MANY, **_HEADS, **_GLM4}),
    "lfm2-moe": (hf.Lfm2MoeConfig, {**_MANY, **_LFM2, "num_experts": 6}),
    "minimax-m2": (hf.MiniMaxM2Config, {**_SMALL, **_HEADS, "num_local_experts": 6}),
    "qwen3-moe-normalized": (hf.Qwen3MoeConfig, {**_MANY, **_HEADS, **_NORMALIZED}),
}
"""More routers: groups of experts, biases of the choice, some of them arguments of the router."""


def mixture(family: str, *, kernel: str = "grouped_mm", **more: Any) -> PreTrainedModel:
    """Build a tiny random mixture, one of `MIXTURES` or `ROUTERS`, whose experts matter.

    `kernel` is as of ``set_experts_implementation``; `more` are fields of the configuration.
    """
    kind, values = {**MIXTURES, **ROUTERS}[family]
    config = kind(**{**values, **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif not bool(parameter.isfinite().all()) or not bool(parameter.any()):
                parameter.normal_(0, 0.05)
    model.set_experts_implementation(kernel)
    return model.eval()
