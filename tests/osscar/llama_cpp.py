"""llama.cpp itself, as the wheel `xllamacpp` brings it: what it computes from a file."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class Engine:
    """A model of llama.cpp in exact arithmetic: float32 keys and values, attention written out."""

    def __init__(self, file: Path, *, context: int = 128) -> None:
        library = pytest.importorskip("xllamacpp")
        options = library.CommonParams()
        options.model.path = str(file)
        options.n_ctx = context
        options.warmup = False
        options.verbosity = 0
        options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = library.ggml_type.GGML_TYPE_F32
        self.server = library.Server(options)
        # A server that is ended before its loop has begun never ends: wait until it answers there.
        self._ask("/completion", prompt=[0], n_predict=1)

    def _ask(self, path: str, **content: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens after some others."""
        options = {"n_predict": count, "temperature": 0, "return_tokens": True}
        found: list[int] = self._ask("/completion", prompt=list(ids), **options)["tokens"]
        return found

    def log_probabilities(self, ids: Sequence[int], vocabulary: int, shown: int) -> Tensor:
        """Of every next token, (vocabulary,); `shown` is any token that is a whole character."""
        options = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[shown, 1e6]]}
        answer = self._ask("/completion", prompt=list(ids), **options)
        found = torch.full((vocabulary,), float("nan"), dtype=torch.float64)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def tokenize(self, text: str, *, begins: bool = True) -> list[int]:
        """The tokens of a text, in which special tokens may stand."""
        options = {"add_special": begins, "parse_special": True}
        found: list[int] = self._ask("/tokenize", content=text, **options)["tokens"]
        return found
