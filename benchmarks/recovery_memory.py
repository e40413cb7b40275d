"""The memory that `osscar.recover` tells to need, and what the process takes.

    python -m benchmarks.recovery_memory
    python -m benchmarks.recovery_memory --one '{"lora": 16}' --model random

Each row is a process of its own, as of what an allocator has kept of earlier runs a later one takes
nothing anew.  It prunes, forgets what that took, and recovers for two steps, while a thread looks
at its resident memory every millisecond.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import osscar
from osscar.base.memory import give_back, resident_memory
from osscar.recovery.recover import recover_as_asked
from osscar.recovery.request import RecoveryRequest

ROWS = (
    {},
    {"checkpointing": True},
    {"train": "pruned"},
    {"train": "norms"},
    {"lora": 16},
    {"lora": 16, "checkpointing": True},
)


class _Watch(threading.Thread):
    """Looks at the resident memory as long as it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, resident_memory())

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.most


def models(which: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a dense model, a smaller one, and windows of random tokens to recover it with."""
    if which == "demo":
        dense = osscar.load_model("demo").model
        vocabulary, length = 2048, 512
    else:
        torch.manual_seed(0)
        vocabulary, length = 16000, 256
        config = OPTConfig(
            vocab_size=vocabulary,
            hidden_size=512,
            word_embed_proj_dim=512,
            num_hidden_layers=8,
            ffn_dim=2048,
            num_attention_heads=8,
            max_position_embeddings=length,
        )
        dense = OPTForCausalLM(config).eval()
    windows = torch.randint(3, vocabulary, (16, length))
    smaller = osscar.prune(
        dense, windows[:4, :64], backend="magnitude", allocation="uniform", sparsity=0.5
    )
    return dense, smaller.model, windows


def row(which: str, asked: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that a recovery was told to need, and those that it took."""
    dense, smaller, windows = models(which)
    with torch.no_grad():
        dense(windows[:1])  # what libraries load at the first pass is no part of a recovery
    if "lora" in asked:
        import peft  # noqa: F401
    gc.collect()
    give_back()
    before, watch = resident_memory(), _Watch()
    watch.start()
    request = RecoveryRequest(steps=2, learning_rate=1e-4, held_out=2, device="cpu", **asked)
    told = recover_as_asked(smaller, dense, windows, request).memory.total
    time.sleep(0.01)
    return {"told": told, "taken": watch.end() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help="print one row as JSON: what is asked of the recovery")
    parser.add_argument("--model", choices=("demo", "random"), default="demo")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(row(given.model, json.loads(given.one))))
        return
    print("| model | asked | told, MB | taken, MB | told / taken |\n|---|---|---|---|---|")
    for which in ("demo", "random"):
        for asked in ROWS:
            here = [sys.executable, "-W", "ignore", "-m", "benchmarks.recovery_memory"]
            command = [*here, "--model", which, "--one", json.dumps(asked)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            told, taken = found["told"] / 1e6, found["taken"] / 1e6
            print(
                f"| {which} | {asked} | {told:.0f} | {taken:.0f} | {told / taken:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
