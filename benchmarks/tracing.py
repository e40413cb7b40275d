"""Time and memory from a model to its coupling groups.

    python benchmarks/tracing.py

Every row is a process of its own: wall seconds of `torch.export`, processor seconds of what this
project adds (propagation and grouping, best of three), and the peak resident size above that before
the model was built.  The last rows show how they grow with depth.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from graph.dependency import DependencyGraph
from graph.grouping import build_groups
from graph.propagate import propagate
from graph.rules import DEFAULT
from graph.tracing.export import export_model

ROWS = ("opt-30b", "resnet50", "layers-12", "layers-24", "layers-48", "layers-96")
REPEAT = 3


def opt(layers: int, hidden: int, heads: int) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OPTConfig(
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=hidden,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model, {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}


def resnet50() -> tuple[nn.Module, Any]:
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    return model, (torch.zeros(2, 3, 224, 224),)


def build(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    if name == "opt-30b":
        return lambda: opt(48, 7168, 56)
    if name == "resnet50":
        return resnet50
    return lambda: opt(int(name.partition("-")[2]), 512, 8)


def peak() -> float:
    """Return the peak resident size of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, Any]:
    small, inputs = opt(1, 64, 2)
    export_model(small, inputs)  # what torch imports and compiles once
    before = peak()
    model, inputs = build(name)()
    started = time.perf_counter()
    program = export_model(model, inputs)
    exported = time.perf_counter()
    grouping = math.inf
    for _ in range(REPEAT):
        start = time.process_time()
        propagation = propagate(program, DEFAULT)
        groups = build_groups(propagation, program.tensors)
        grouping = min(grouping, time.process_time() - start)
    found = DependencyGraph(groups, propagation.operators)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operators": len(found.operators),
        "groups": len(found.prunable),
        "export": exported - started,
        "grouping": grouping,
        "mib": peak() - before,
    }


def main() -> None:
    if len(sys.argv) > 1:
        json.dump(measure(sys.argv[1]), sys.stdout)
        return
    print("| model | parameters | operators | prunable groups | export s | groups s | MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ROWS:
        command = [sys.executable, __file__, name]
        row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(
            f"| {row['model']} | {row['parameters']:,} | {row['operators']} | {row['groups']} | "
            f"{row['export']:.1f} | {row['grouping']:.3f} | {row['mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
