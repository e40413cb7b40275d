"""Checkpoints of random weights in the shapes of known models, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from osscar.models.names import DEMO_DIRECTORY

_FORMATS = {"float32": "F32", "bfloat16": "BF16"}


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


_QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2-0.5b": {**_QWEN, "tie_word_embeddings": True},
    "qwen2-0.6b": {**_QWEN, "tie_word_embeddings": False},
    "opt-125m": _opt(768, 12, 12),
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
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
}


def write_model(path: Path, shape: Mapping[str, Any], dtype: str) -> int:
    """Write a model of random weights, tensor by tensor; return how many these are."""
    config = AutoConfig.for_model(**shape, dtype=dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    config.architectures = [type(model).__name__]
    path.mkdir(parents=True)
    config.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, path / file)
    parameters = dict(model.named_parameters())
    _write_weights(path / "model.safetensors", parameters, dtype)
    return sum(p.numel() for p in parameters.values())


def _write_weights(file: Path, parameters: Mapping[str, torch.Tensor], dtype: str) -> None:
    size = getattr(torch, dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in parameters.items():
        after = end + parameter.numel() * size
        header[name] = {
            "dtype": _FORMATS[dtype],
            "shape": list(parameter.shape),
            "data_offsets": [end, after],
        }
        end = after
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for values in _values(parameters):
            out.write(values.to(getattr(torch, dtype)).view(torch.uint8).numpy().data)


def _values(parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield values of the usual sizes: ones for norms, zeros for biases, and noise."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            yield torch.randn(parameter.shape, generator=generator) * 0.02
        else:
            yield torch.full(parameter.shape, 1.0 if name.endswith("norm.weight") else 0.0)
