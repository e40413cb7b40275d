"""Checkpoints of random weights in the shapes of known models, written some tensors at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from osscar.models.names import DEMO_DIRECTORY

TOGETHER = 8
"""Tensors that are in memory at once, and in one file."""


def _opt(width: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * width,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "word_embed_proj_dim": width,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **others,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-30b": _opt(7168, 48, 56),
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}


def write_model(path: Path, shape: Mapping[str, Any], dtype: str) -> int:
    """Write a model of random weights, some tensors at a time; return how many these are."""
    config = AutoConfig.for_model(**shape, dtype=dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    config.architectures = [type(model).__name__]
    path.mkdir(parents=True)
    config.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, path / file)
    parameters, shards = list(model.named_parameters()), dict[str, str]()
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(parameters), TOGETHER):
        values = {
            name: _values(name, parameter, generator)
            for name, parameter in parameters[start : start + TOGETHER]
        }
        shard = f"model-{start:05}.safetensors"
        save_file(values, path / shard, {"format": "pt"})
        shards |= dict.fromkeys(values, shard)
    index = {"metadata": {}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(p.numel() for _, p in parameters)


def _values(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return values of the usual sizes: ones for norms, zeros for biases, and noise."""
    if parameter.ndim > 1:
        values = torch.randn(parameter.shape, generator=generator) * 0.02
    else:
        values = torch.full(parameter.shape, 1.0 if name.endswith("norm.weight") else 0.0)
    return values.to(parameter.dtype)
