"""Run a model in llama.cpp, dense and with layers of different widths: the same, and faster.

The directory that was saved is also read by `osscar.load`, and by transformers with remote code in
a process that cannot import this toolkit.

For example:

    python benchmarks/llama_cpp.py smollm2-135m --calibration wikitext2-valid.txt \
        --text wikitext2-raw-test.txt --json out.json

Neurons thin out from the first layer to the last, and the last third of the layers loses heads,
so that no two layers need have one shape; with `--sparsity` a budget chooses the widths.  Both
models are written as GGUF; transformers and llama.cpp score the same windows of the text, each
token from all before it, and continue the text greedily.  Speed is measured in llama.cpp, on files
of the number format of `--speed-dtype`, the models taking turns.  Needs `gguf` and `xllamacpp`.

Takes minutes, once llama.cpp is built.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp

import osscar
from osscar.data.text import read_text


def main() -> None:
    arguments = parse_arguments()
    loaded = osscar.load_model(arguments.model, device="cpu")
    calibration = osscar.load_calibration(
        arguments.calibration, loaded.tokenizer, samples=32, seqlen=arguments.seqlen
    )
    asked = {"groups": widths(loaded.model, arguments)}
    if arguments.sparsity is not None:
        asked = {"sparsity": arguments.sparsity}
    result = osscar.prune(
        loaded.model, calibration, **asked, backend=arguments.backend, device="cpu"
    )
    tokens = loaded.tokenizer(read_text(arguments.text), add_special_tokens=False).input_ids
    windows = [
        tokens[start : start + arguments.seqlen]
        for start in range(0, arguments.windows * arguments.seqlen, arguments.seqlen)
    ]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        engines = {}
        for name, model in (("dense", loaded.model), ("pruned", result.model)):
            directory = osscar.save(
                model, Path(place) / name, tokenizer=loaded.tokenizer, dtype=torch.float32
            ).path
            file = osscar.export_gguf(directory, dtype="f32")
            exact = Engine(file.path, arguments, exact=True)
            start = windows[0][: arguments.seqlen // 2]
            rows[name] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "architecture": file.architecture,
                "transformers_perplexity": perplexity(model, windows),
                "remote_code_perplexity": perplexity_elsewhere(directory, windows),
                "osscar_load_perplexity": perplexity(osscar.load(directory), windows),
                "llama_cpp_perplexity": exact.perplexity(windows),
                "same_greedy_tokens": same_tokens(model, exact, start, arguments.new_tokens),
                "f32_bytes": file.bytes,
            }
            del exact
            file = osscar.export_gguf(directory, dtype=arguments.speed_dtype)
            rows[name]["speed_bytes"] = file.bytes
            engines[name] = Engine(file.path, arguments, exact=False)
        for name, speeds in measure_speed(engines, windows, arguments).items():
            rows[name].update(speeds)
    for name, row in rows.items():
        print(name, json.dumps(row))
    if arguments.json:
        content = {"arguments": vars(arguments), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration")
    parser.add_argument("--text", required=True)
    parser.add_argument("--sparsity", type=float, help="let a budget choose the widths instead")
    parser.add_argument("--first", type=float, default=0.9, help="neurons kept in the first layer")
    parser.add_argument("--last", type=float, default=0.5, help="and in the last one")
    parser.add_argument("--backend", default="local_search")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="to score")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--speed-dtype", default="f16")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def widths(model: Any, arguments: argparse.Namespace) -> dict[str, int]:
    """Return how many neurons and heads each layer keeps, by group."""
    count, neurons = model.config.num_hidden_layers, model.config.intermediate_size
    heads = model.config.num_key_value_heads
    groups = {}
    for layer in range(count):
        share = layer / (count - 1)
        kept = arguments.first * (1 - share) + arguments.last * share
        groups[f"model.layers.{layer}.mlp.neurons"] = round(kept * neurons / 32) * 32
        if heads > 1 and layer >= count - count // 3:
            groups[f"model.layers.{layer}.self_attn.heads"] = heads - 1
    return groups


# ---- quality -----------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Score each token of each window but the first, in transformers."""
    losses = []
    for window in windows:
        ids = torch.tensor([window])
        found = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += found.gather(-1, ids[0, 1:, None]).flatten().neg().tolist()
    return math.exp(statistics.fmean(losses))


_ELSEWHERE = """
import json, math, statistics, sys
sys.modules.update(dict.fromkeys(("osscar", "solvers", "graph")))
import torch
from transformers import AutoModelForCausalLM
directory, windows = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
losses = []
with torch.no_grad():
    for window in windows:
        ids = torch.tensor([window])
        found = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += found.gather(-1, ids[0, 1:, None]).flatten().neg().tolist()
print(math.exp(statistics.fmean(losses)))
"""


def perplexity_elsewhere(directory: Path, windows: Sequence[Sequence[int]]) -> float:
    """Score as `perplexity` does, where only transformers is at hand."""
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE],
        input=json.dumps([str(directory), windows]),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def same_tokens(model: Any, engine: Engine, start: Sequence[int], count: int) -> int:
    """Return how many tokens transformers and llama.cpp agree on before they first differ."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([start])
    own = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(start) :]
    other = engine.complete(start, n_predict=count, return_tokens=True, ignore_eos=True)["tokens"]
    pairs = zip(own.tolist(), other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), count)


class Engine:
    """A model of llama.cpp behind its own server, in this process.

    Parameters
    ----------
    file
        A GGUF file.
    arguments
        Of the command line.
    exact
        Keep keys and values in float32, and compute attention in float32.
    """

    def __init__(self, file: Path, arguments: argparse.Namespace, *, exact: bool) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx = arguments.seqlen + 2 * arguments.new_tokens
        options.verbosity = 0
        options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = arguments.threads
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
        every = self.complete(prefix, n_predict=1, n_probs=2**20, logit_bias=[[self.shown, 1e6]])
        listed = every["completion_probabilities"][0]["top_logprobs"]
        return next(float(other["logprob"]) for other in listed if other["id"] == token)

    @property
    def shown(self) -> int:
        """A token that is a whole character."""
        chosen = self.complete([0], n_predict=1, return_tokens=True, grammar='root ::= "a"')
        return int(chosen["tokens"][0])


# ---- speed -------------------------------------------------------------------------------


def measure_speed(
    engines: dict[str, Engine], windows: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return tokens a second, medians of several runs in which the models take turns."""
    options = {"n_predict": arguments.new_tokens, "ignore_eos": True, "cache_prompt": False}
    found: dict[str, list[Any]] = {name: [] for name in engines}
    for run in range(arguments.repetitions + 1):
        for name, engine in engines.items():
            timings = engine.complete(windows[0], **options)["timings"]
            if run:  # the first one warms up
                found[name].append(timings)
    return {
        name: {
            f"{part}_tokens_per_second": statistics.median(t[f"{key}_per_second"] for t in runs)
            for part, key in (("prefill", "prompt"), ("decode", "predicted"))
        }
        for name, runs in found.items()
    }


if __name__ == "__main__":
    main()
