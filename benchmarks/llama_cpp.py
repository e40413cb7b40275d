"""How fast llama.cpp runs a model, dense and with layers of different widths.

    python -m benchmarks.llama_cpp smollm2-135m --calibration FILE --text FILE

Neurons thin out from the first layer to the last, from 0.9 to 0.5, and the last third of the layers
loses a head, so that no two layers need have one shape.  Both models are written as GGUF, in
float16, and take turns.  (That llama.cpp computes what transformers does is a test.)  Needs `gguf`
and `xllamacpp`.

Takes minutes, once llama.cpp is built.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp

import osscar
from osscar.data.text import read_text
from osscar.network.modules import count_parameters

NEW_TOKENS, TURNS = 64, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    given = parser.parse_args()
    loaded = osscar.load_model(given.model, device="cpu")
    tokenizer, length = loaded.tokenizer, given.seqlen
    calibration = osscar.load_calibration(given.calibration, tokenizer, samples=32, seqlen=length)
    result = osscar.prune(loaded.model, calibration, groups=widths(loaded.model), device="cpu")
    prompt = tokenizer(read_text(given.text), add_special_tokens=False).input_ids[:length]
    models, engines = {"dense": loaded.model, "pruned": result.model}, {}
    with tempfile.TemporaryDirectory() as place:
        for name, model in models.items():
            directory = Path(place) / name
            osscar.save(model, directory, tokenizer=tokenizer, dtype=torch.float32)
            engines[name] = Engine(osscar.export_gguf(directory, dtype="f16").path, length)
        for name, speeds in measure_speed(engines, prompt).items():
            print(name, {"parameters": count_parameters(models[name]), **speeds})


def widths(model: Any) -> dict[str, int]:
    """Return how many neurons and heads each layer keeps, by group."""
    config = model.config
    count, heads = config.num_hidden_layers, config.num_key_value_heads
    groups = {}
    for layer in range(count):
        kept = (0.9 - 0.4 * layer / (count - 1)) * config.intermediate_size
        groups[f"model.layers.{layer}.mlp.neurons"] = round(kept / 32) * 32
        if heads > 1 and layer >= count - count // 3:
            groups[f"model.layers.{layer}.self_attn.heads"] = heads - 1
    return groups


class Engine:
    """A model of llama.cpp behind its own server, in this process."""

    def __init__(self, file: Path, seqlen: int) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx = seqlen + 2 * NEW_TOKENS
        options.verbosity = 0
        options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
        self.server = xllamacpp.Server(options)

    def timings(self, prompt: Sequence[int]) -> Any:
        """Complete a prompt, and return what llama.cpp says of its speed."""
        content = {"prompt": list(prompt), "temperature": 0, "n_predict": NEW_TOKENS}
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion",
            json.dumps({**content, "ignore_eos": True, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["timings"]


def measure_speed(engines: dict[str, Engine], prompt: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return tokens a second, medians of several runs in which the models take turns."""
    found: dict[str, list[Any]] = {name: [] for name in engines}
    for turn in range(TURNS + 1):
        for name, engine in engines.items():
            timings = engine.timings(prompt)
            if turn:  # the first one warms up
                found[name].append(timings)
    return {
        name: {
            f"{part}, tokens/s": statistics.median(t[f"{key}_per_second"] for t in turns)
            for part, key in (("prefill", "prompt"), ("decode", "predicted"))
        }
        for name, turns in found.items()
    }


if __name__ == "__main__":
    main()
