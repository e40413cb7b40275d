"""How much memory `osscar prune` takes for a language model of random weights, from outside.

The model is written to disk tensor by tensor, so that making it takes little memory; the command
runs in a child process, whose greatest resident size the system tells (`ru_maxrss`).

    python benchmarks/streaming.py qwen2-0.5b --layers 24 -- --max-memory 5GB --neurons 0.7
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from osscar.models.language import DEMO_DIRECTORY

_FORMATS = {"float32": "F32", "bfloat16": "BF16"}


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
        "vocab_size": 50272,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Measured:
    """What one command took.

    Parameters
    ----------
    peak
        Greatest resident size, in bytes.
    seconds, cpu_seconds
        Wall time, and that of the processor.
    status
        With which it ended.
    """

    peak: int
    seconds: float
    cpu_seconds: float
    status: int


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


def measured(command: Sequence[str]) -> Measured:
    """Run a command, and say what it took."""
    began = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    return Measured(
        usage.ru_maxrss * 1024,
        time.perf_counter() - began,
        usage.ru_utime + usage.ru_stime,
        os.waitstatus_to_exitcode(status),
    )


def main() -> None:
    """Write a model, prune it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="float32", choices=_FORMATS)
    parser.add_argument("--directory", type=Path, help="where models are kept; else temporary")
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    given = parser.parse_args(own.split())
    with tempfile.TemporaryDirectory(dir=given.directory) as scratch:
        place = given.directory or Path(scratch)
        model = place / f"{given.shape}-{given.layers or 'all'}-{given.dtype}"
        if not model.exists():
            layers = {} if given.layers is None else {"num_hidden_layers": given.layers}
            write_model(model, {**SHAPES[given.shape], **layers}, given.dtype)
        out = Path(scratch) / "pruned"
        command = [sys.executable, "-m", "osscar", "prune", str(model), "--out", str(out)]
        found = measured([*command, *options.split()])
        size = (model / "model.safetensors").stat().st_size
        print(
            f"{model.name} {options}: status {found.status}, "
            f"weights {size / 1e9:.2f} GB, peak {found.peak / 1e9:.2f} GB, "
            f"{found.cpu_seconds:.0f} CPU seconds, {found.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
