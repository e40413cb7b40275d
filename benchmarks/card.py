"""What pruning a language model should take on a graphics card: an estimate from counts.

    python -m benchmarks.card llama-2-7b --samples 128 --seqlen 2048

Nothing is run but one forward pass of shapes alone, in which torch counts products.  Half of the
heads and half of the neurons leave, with default settings, in bfloat16.  What a stage takes is the
sum of its operations at the rates below, of the bytes that it moves, and of the kernels that it
starts; work of the host (loading, tracing) is not counted.

Takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measuring import markdown
from benchmarks.random_models import SHAPES
from osscar.base.timing import Stage
from osscar.network.operations import count_flops
from osscar.offload.on_disk import pass_bytes, suspended_bytes
from osscar.walk.regularization import DAMPS

HELD = 8
"""One in so many samples is held out."""

KERNELS = 15
"""Of a removal (tests/osscar/test_devices.py)."""

READ_PASSES = 14
"""Times that weights on disk are read, besides the walk and twice for each held-out sample."""


@dataclass(frozen=True)
class Card:
    """A card, at half of what its data sheet says.

    Operations a second are in units of 1e12, as are bytes a second of its memory and of a disk; a
    start of a kernel takes 5 microseconds.
    """

    name: str
    gigabytes: float
    bf16: float
    fp32: float
    fp64: float
    bandwidth: float
    disk: float = 2e-3
    launch: float = 5e-6


CARDS = (
    Card("H100 SXM", 80, bf16=495, fp32=33, fp64=33, bandwidth=1.7),
    Card("RTX 4090", 24, bf16=83, fp32=41, fp64=0.65, bandwidth=0.5),
)


@dataclass(frozen=True)
class Work:
    """What a stage does: operations by number format, bytes moved, kernels started; in 1e12."""

    bf16: float = 0.0
    fp32: float = 0.0
    fp64: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0

    def seconds(self, card: Card) -> float:
        """Return how long it takes on a card."""
        operations = self.bf16 / card.bf16 + self.fp32 / card.fp32 + self.fp64 / card.fp64
        return operations + self.moved / card.bandwidth + 1e12 * self.kernels * card.launch


@dataclass(frozen=True)
class Counted:
    """What pruning a model does by stage, and the bytes of what it holds."""

    stages: Mapping[Stage, Work]
    weights: int
    smaller: int
    """What is left of the weights."""
    batches: int
    """What all batches hold while they are suspended in both streams."""
    matrices: int
    """The problem of the layer that needs most (docs/streaming.md)."""
    forward: int
    """Any forward pass."""
    held: int
    """Samples that are held out."""

    def memory(self) -> dict[str, int]:
        """Return the bytes that there are at once, by part of the run."""
        return {
            "walk and solver": 2 * self.weights + self.batches + self.matrices,
            "trial and proof": 4 * self.weights + self.forward,
            "weights on disk": self.batches + self.matrices + self.forward,
        }


def counted(name: str, samples: int, seqlen: int) -> Counted:
    """Count what it takes to prune a model of a shape, calibrated on so many windows."""
    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    parameters = sum(p.numel() for p in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    with torch.no_grad():
        ids = torch.zeros(1, seqlen, dtype=torch.int64, device="meta")
        mask = torch.zeros(1, 1, seqlen, seqlen, device="meta")  # else its values are asked for
        forward = count_flops(model, {"input_ids": ids, "attention_mask": mask}) / 1e12
    head = 2 * table * seqlen / 1e12
    kept = (forward - head) / 2 + head
    layers = [
        (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(("o_proj", "down_proj"))
    ]
    held, n = max(1, samples // HELD), samples * seqlen
    outputs = sum(2 * n * p * m for p, m in layers) / 1e12
    grams = sum(n * p * p + 2 * n * p * m for p, m in layers) / 1e12
    carried = sum(n / 512 * 24 * (p * p / 2 + p * m) for p, m in layers) / 1e12
    damping = sum(
        len(DAMPS) * ((p / 2) ** 3 / 3 + 8 * 128 * (p / 2) ** 2) + 4 * 128 * p * p
        for p, m in layers
    )
    solver = sum(3.8 * p**3 + 4 * p * p * m for p, m in layers)
    double = 256 / seqlen * (forward + kept)
    weights, smaller = 2 * parameters, parameters + 2 * table
    width = config.hidden_size
    p, m = max(layers)
    return Counted(
        {
            Stage.TRIAL: Work(fp64=double, moved=10 * weights / 1e12),
            Stage.DENSE: Work(bf16=held * forward),
            Stage.WALK: Work(bf16=2 * samples * (forward - head), fp32=2 * outputs),
            Stage.GRAM: Work(fp32=grams, moved=carried),
            Stage.DAMPING: Work(fp64=damping / 1e12),
            Stage.SOLVER: Work(
                fp64=solver / 1e12,
                kernels=KERNELS * len(layers) / 2 * config.intermediate_size / 2 / 1e12,
            ),
            Stage.PROOF: Work(fp64=double, moved=10 * weights / 1e12),
            Stage.PRUNED: Work(bf16=held * kept),
        },
        weights,
        smaller,
        batches=2 * suspended_bytes(n, width, p, 2),
        matrices=int(8 * (p * p + 1.5 * (p / 2) ** 2 + 4 * p * m + 3 * 1024 * p)),
        forward=pass_bytes(model, seqlen),
        held=held,
    )


def tables(name: str, samples: int, seqlen: int) -> list[str]:
    """Return tables in Markdown: counts and seconds by stage, and memory by part of the run."""
    found = counted(name, samples, seqlen)
    head = ["stage", "bfloat16", "float32", "float64", "TB moved", *(f"{c.name}, s" for c in CARDS)]
    rows = [head]
    for stage, work in found.stages.items():
        numbers = (work.bf16, work.fp32, work.fp64, work.moved)
        times = (work.seconds(card) for card in CARDS)
        rows.append([str(stage), *(f"{x:,.1f}" if x else "" for x in numbers), *map(_short, times)])
    sums = [sum(work.seconds(card) for work in found.stages.values()) for card in CARDS]
    rows.append(["all", "", "", "", "", *map(_short, sums)])
    read = found.weights * (READ_PASSES + 2 * found.held + 1) / 1e12
    reading = [_short(read / card.disk) for card in CARDS]
    rows.append(["weights on disk: reading them", "", "", "", f"{read:,.1f}", *reading])
    memory = [["part", "GB", *(c.name for c in CARDS)]]
    for part, size in found.memory().items():
        fit = ("fits" if size <= card.gigabytes * 1e9 else "no" for card in CARDS)
        memory.append([part, f"{size / 1e9:.1f}", *fit])
    parts = {
        "weights": found.weights,
        "what is left of them": found.smaller,
        "what batches hold": found.batches,
        "matrices of one layer": found.matrices,
    }
    line = "; ".join(f"{part} {size / 1e9:.1f} GB" for part, size in parts.items())
    return [*markdown(rows, 0), "", *markdown(memory, 0), "", f"Of these: {line}."]


def _short(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds < 10 else f"{seconds:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    given = parser.parse_args()
    print(*tables(given.shape, given.samples, given.seqlen), sep="\n")


if __name__ == "__main__":
    main()
