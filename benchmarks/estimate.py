"""How far off `osscar.estimate` is: each case is estimated and run in one process, stage by stage.

    python -m benchmarks.estimate demo resnet20 smollm2

Seconds are those of the processor, so that others on the machine matter less.  Give
OMP_NUM_THREADS=1: with more threads they are no longer those of the wall.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.resnet20 import ResNet20
from benchmarks.streaming import SHAPES, write_model
from osscar.base.memory import peak_memory
from osscar.base.timing import profiled
from osscar.data.tokens import load_calibration
from osscar.models.load import load_model
from osscar.pruning.dry_run import estimate_as_asked
from osscar.pruning.prune import prune_as_asked
from osscar.request import PruningRequest


@dataclass(frozen=True)
class Case:
    """A model, its data, and what is asked for.

    Parameters
    ----------
    make
        Returns model and data; is given a directory to write to.
    asked
        Fields of the request.
    """

    make: Callable[[Path], tuple[nn.Module, Any]]
    asked: Mapping[str, Any]


def _text(name: str | Path, samples: int, **options: Any) -> tuple[nn.Module, Any]:
    loaded = load_model(name, device="cpu", **options)
    return loaded.model, load_calibration(None, loaded.tokenizer, samples=samples, seqlen=512)


def _streamed(directory: Path) -> tuple[nn.Module, Any]:
    write_model(directory / "qwen2", {**SHAPES["qwen2-0.5b"], "num_hidden_layers": 1}, "float32")
    return _text(directory / "qwen2", 4, max_memory="5GB")


def _opt_350m(_: Path) -> tuple[nn.Module, Any]:
    """Return 2 of the 24 layers of OPT-350M with random weights, and random windows."""
    config = AutoConfig.for_model(
        "opt",
        hidden_size=1024,
        word_embed_proj_dim=512,
        ffn_dim=4096,
        num_attention_heads=16,
        num_hidden_layers=2,
        do_layer_norm_before=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, torch.randint(50_000, (4, 512), generator=torch.Generator().manual_seed(0))


def _resnet18(_: Path) -> tuple[nn.Module, Any]:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18().eval(), torch.randn(64, 3, 96, 96)


def _resnet20(_: Path) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return ResNet20().eval(), torch.randn(256, 3, 32, 32)


CASES: Mapping[str, Case] = {
    "demo": Case(lambda _: _text("demo", 32), {"heads": "2/3", "neurons": 0.7}),
    "demo-budget": Case(lambda _: _text("demo", 32), {"sparsity": 0.3}),
    "resnet20": Case(_resnet20, {"channels": 0.5}),
    "resnet20-budget": Case(_resnet20, {"sparsity": 0.4}),
    "resnet20-residual": Case(_resnet20, {"channels": 0.5, "residual": 0.75}),
    "resnet18": Case(_resnet18, {"channels": 0.5}),
    "smollm2": Case(lambda _: _text("smollm2-135m", 8), {"heads": "2/3", "neurons": 0.7}),
    "smollm2-budget": Case(lambda _: _text("smollm2-135m", 8), {"sparsity": 0.3}),
    "opt-350m": Case(_opt_350m, {"neurons": 0.7}),
    "streamed": Case(_streamed, {"neurons": 0.7, "target": "weights", "damp": 0.01}),
}


def measured(name: str) -> list[str]:
    """Estimate and run one case; return rows of a Markdown table."""
    case, clock = CASES[name], time.process_time
    with tempfile.TemporaryDirectory() as scratch:
        model, data = case.make(Path(scratch))
        request = PruningRequest(**case.asked, device="cpu")
        began = clock()
        told = estimate_as_asked(model, data, request, clock)
        telling = clock() - began
        with profiled(clock) as spent:
            began = clock()
            prune_as_asked(model, data, request)
            total = clock() - began
    real = {stage: spent.seconds.get(stage, 0.0) for stage in told.stages}
    rows = [
        f"| {name} | {stage} | {seconds:.2f} | {real[stage]:.2f} | | | |"
        for stage, seconds in told.stages.items()
    ]
    ratio, peak = told.seconds / total, peak_memory() or 1
    rows.append(
        f"| {name} | **all** | {told.seconds:.1f} | {total:.1f} | **{ratio:.2f}** | {telling:.1f} "
        f"| {told.peak_bytes / 1e9:.2f} of {peak / 1e9:.2f} ({told.peak_bytes / peak:.2f}) |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    print("| case | stage | estimated, s | real, s | ratio | dry run, s | memory, GB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for name in given.cases:
        print(*measured(name), sep="\n", flush=True)


if __name__ == "__main__":
    main()
