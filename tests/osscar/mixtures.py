"""Tiny random mixtures of experts, of many families of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MANY: dict[str, Any] = {**_SMALL, "intermediate_size": 40, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    **_MANY,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

MIXTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (hf.MixtralConfig, {**_SMALL, "intermediate_size": 40, "num_local_experts": 4}),
    "olmoe": (hf.OlmoeConfig, {**_SMALL, "intermediate_size": 40, "num_experts": 4}),
    "qwen2-moe": (
        hf.Qwen2MoeConfig,
        {**_MANY, "num_experts": 4, "shared_expert_intermediate_size": 20},
    ),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**_MANY, "head_dim": 8, "num_experts": 4}),
    "deepseek-v2": (hf.DeepseekV2Config, {**_LATENT, "topk_method": "greedy"}),
    "deepseek-v3": (hf.DeepseekV3Config, _LATENT),
    "jamba": (
        hf.JambaConfig,
        {
            **_SMALL,
            "intermediate_size": 40,
            "num_experts": 4,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "gpt-oss": (
        hf.GptOssConfig,
        {
            **_SMALL,
            "intermediate_size": 40,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phimoe": (hf.PhimoeConfig, {**_SMALL, "intermediate_size": 40, "num_local_experts": 4}),
    "granitemoe": (
        hf.GraniteMoeConfig,
        {**_SMALL, "intermediate_size": 40, "num_local_experts": 4, "use_cache": False},
    ),
    "ernie-moe": (hf.Ernie4_5_MoeConfig, {**_MANY, "moe_num_experts": 4, "moe_k": 2}),
    "hunyuan": (
        hf.HunYuanMoEV1Config,
        {**_SMALL, "intermediate_size": 40, "num_experts": 4, "moe_topk": 2, "head_dim": 8},
    ),
    "nemotron-h": (  # whose experts have no gates
        hf.NemotronHConfig,
        {
            **_MANY,
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 20,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
        },
    ),
    "minimax": (hf.MiniMaxConfig, {**_SMALL, "intermediate_size": 40, "num_local_experts": 4}),
}
"""Classes of configurations with their values: 4 experts of 40 or 24 neurons, 2 a token."""

ROUTERS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "deepseek-v2-groups": (
        hf.DeepseekV2Config,
        {
            **_LATENT,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek-v3-groups": (
        hf.DeepseekV3Config,
        {**_LATENT, "n_routed_experts": 12, "n_group": 2, "topk_group": 1},
    ),
    "glm4-moe": (
        hf.Glm4MoeConfig,
        {
            **_MANY,
            "n_routed_experts": 6,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "head_dim": 8,
        },
    ),
    "lfm2-moe": (
        hf.Lfm2MoeConfig,
        {
            **_MANY,
            "num_experts": 6,
            "num_dense_layers": 0,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "minimax-m2": (
        hf.MiniMaxM2Config,
        {**_SMALL, "intermediate_size": 40, "num_local_experts": 6, "head_dim": 8},
    ),
    "qwen3-moe-normalized": (
        hf.Qwen3MoeConfig,
        {**_MANY, "head_dim": 8, "num_experts": 5, "norm_topk_prob": True},
    ),
}
"""More routers: groups of experts, biases of the choice, some of them arguments of the router."""


def mixture(
    family: str, *, kernel: str = "grouped_mm", seed: int = 0, **more: Any
) -> PreTrainedModel:
    """Build a tiny random mixture whose experts matter.

    Parameters
    ----------
    family
        One of `MIXTURES` or `ROUTERS`.
    kernel
        What multiplies the experts, as of ``set_experts_implementation``.
    seed
        Of the weights.
    more
        Fields of the configuration.
    """
    kind, values = {**MIXTURES, **ROUTERS}[family]
    config = kind(**{"num_experts_per_tok": 2, **values, **more})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif not bool(parameter.isfinite().all()) or not bool(parameter.any()):
                parameter.normal_(0, 0.05)
    model.set_experts_implementation(kernel)
    return model.eval()
