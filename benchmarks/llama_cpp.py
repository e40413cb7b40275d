"""Run a model in llama.cpp, dense and with layers of different widths: the same, and faster.

    python -m benchmarks.llama_cpp smollm2-135m --calibration FILE --text FILE

Neurons thin out from the first layer to the last, from 0.9 to 0.5, and the last third of the layers
loses a head, so that no two layers need have one shape.  Both models are written as GGUF.
transformers and llama.cpp score the same windows of the text, each token from all before it, in
float32, and continue the text greedily.  Speed is measured in llama.cpp in float16, the models
taking turns.  Needs `gguf` and `xllamacpp`.

Takes minutes, once llama.cpp is built.
"""

from __future__ import annotations

import argparse
import json
import math
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

NEW_TOKENS, TURNS = 64, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="to score")
    given = parser.parse_args()
    loaded = osscar.load_model(given.model, device="cpu")
    tokenizer, length = loaded.tokenizer, given.seqlen
    calibration = osscar.load_calibration(given.calibration, tokenizer, samples=32, seqlen=length)
    result = osscar.prune(loaded.model, calibration, groups=widths(loaded.model), device="cpu")
    tokens = tokenizer(read_text(given.text), add_special_tokens=False).input_ids
    windows = [tokens[start * length : (start + 1) * length] for start in range(given.windows)]
    engines, rows = {}, {}
    with tempfile.TemporaryDirectory() as place:
        for name, model in (("dense", loaded.model), ("pruned", result.model)):
            directory = Path(place) / name
            osscar.save(model, directory, tokenizer=tokenizer, dtype=torch.float32)
            exact = Engine(osscar.export_gguf(directory, dtype="f32").path, length, exact=True)
            rows[name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "perplexity in transformers": perplexity(model, windows),
                "in llama.cpp": exact.perplexity(windows),
                "the same greedy tokens": same_tokens(model, exact, windows[0][: length // 2]),
            }
            del exact
            half = osscar.export_gguf(directory, dtype="f16").path
            engines[name] = Engine(half, length, exact=False)
        for name, speeds in measure_speed(engines, windows[0]).items():
            print(name, {**rows[name], **speeds})


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


@torch.no_grad()
def perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Score each token of each window but the first, in transformers."""
    losses = []
    for window in windows:
        ids = torch.tensor([window])
        found = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += found.gather(-1, ids[0, 1:, None]).flatten().neg().tolist()
    return math.exp(statistics.fmean(losses))


def same_tokens(model: Any, engine: Engine, start: Sequence[int]) -> int:
    """Return how many tokens transformers and llama.cpp agree on before they first differ."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([start])
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(start) :]
    asked = {"n_predict": NEW_TOKENS, "return_tokens": True, "ignore_eos": True}
    pairs = zip(own.tolist(), engine.complete(start, **asked)["tokens"], strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS)


class Engine:
    """A model of llama.cpp behind its own server, in this process.

    An exact one keeps keys and values in float32, and computes attention in float32.
    """

    def __init__(self, file: Path, seqlen: int, *, exact: bool) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx = seqlen + 2 * NEW_TOKENS
        options.verbosity = 0
        options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
        if exact:
            kinds = xllamacpp.llama_flash_attn_type
            options.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(options)

    def complete(self, prompt: Sequence[int], **options: Any) -> Any:
        content = {"prompt": list(prompt), "temperature": 0, "cache_prompt": True, **options}
        request = urllib.request.Request(
            f"{self.server.listening_address}/completion",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def perplexity(self, windows: Sequence[Sequence[int]]) -> float:
        """Score each token of each window but the first."""
        losses = [
            -self.log_probability(window[:end], window[end])
            for window in windows
            for end in range(1, len(window))
        ]
        return math.exp(statistics.fmean(losses))

    def log_probability(self, prefix: Sequence[int], token: int) -> float:
        """Return that of a token, which is forced: the server tells it of what it chooses."""
        found = self.complete(prefix, n_predict=1, n_probs=1, logit_bias=[[token, 1e6]])
        if "completion_probabilities" in found:
            chosen = found["completion_probabilities"][0]
            if chosen["id"] != token:
                raise RuntimeError(f"llama.cpp chose {chosen['id']}, not {token}")
            return float(chosen["logprob"])
        # Part of a character is not shown until it is whole: ask for all tokens, forcing another.
        shown = self.complete([0], n_predict=1, return_tokens=True, grammar='root ::= "a"')
        bias = [[shown["tokens"][0], 1e6]]
        every = self.complete(prefix, n_predict=1, n_probs=2**20, logit_bias=bias)
        listed = every["completion_probabilities"][0]["top_logprobs"]
        return next(float(other["logprob"]) for other in listed if other["id"] == token)


def measure_speed(engines: dict[str, Engine], window: Sequence[int]) -> dict[str, dict[str, float]]:
    """Return tokens a second, medians of several runs in which the models take turns."""
    options = {"n_predict": NEW_TOKENS, "ignore_eos": True, "cache_prompt": False}
    found: dict[str, list[Any]] = {name: [] for name in engines}
    for turn in range(TURNS + 1):
        for name, engine in engines.items():
            timings = engine.complete(window, **options)["timings"]
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
