"""Remove several shares of the channels of each group of a CNN, and score every result.

For example, with a file of weights and one of images at hand:

    python benchmarks/vision.py benchmarks/resnet20.py:build \
        --weights resnet20-cifar10.safetensors --calibration cifar10-subset.npz:train \
        --images cifar10-subset.npz:test --json out.json

For each sparsity and backend, with and without the residual channels, prints the parameters and
FLOPs that are left and the summed relative loss; and, for batch-norm statistics kept and
corrected, top-1 where there are labels, agreement with the dense model, and the divergence from it.
The first rows are the dense model itself.  Ends with all of it as a Markdown table.

Takes hours.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

import osscar
from osscar.data.batches import as_inputs
from osscar.data.images import ImageSet
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.models.loaded import LoadedModel
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops
from osscar.proof.plan import PruningPlan
from osscar.walk.batch_norm import BatchNormMode, dense_statistics, renew_statistics

BACKENDS = ("magnitude", "multistage", "local_search")
MODES: tuple[BatchNormMode, ...] = ("keep", "correct")


def main() -> None:
    arguments = parse_arguments()
    loaded = load_model(arguments.model, weights=arguments.weights, device=arguments.device)
    calibration = loaded.calibration(
        arguments.calibration, samples=arguments.samples, seqlen=None, seed=arguments.seed
    )
    images = loaded.images(arguments.images)
    if arguments.score:
        images = images.sample(arguments.score, arguments.seed)
    bench = Bench(loaded, calibration, images, arguments)
    rows = bench.dense_rows()
    for sparsity in arguments.sparsities:
        for residual in (False, True):
            for backend in arguments.backends:
                rows += bench.pruned_rows(sparsity, residual, backend)
                if arguments.json:
                    content = {"arguments": vars(arguments), "rows": rows}
                    arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(*table(rows), sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--score", type=int, help="score only so many images, drawn at random")
    parser.add_argument("--without-labels", action="store_true", help="of other classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sparsities", type=float, nargs="+", default=(0.3, 0.5, 0.7))
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs share."""

    loaded: LoadedModel
    calibration: ImageSet
    images: ImageSet
    arguments: argparse.Namespace

    def dense_rows(self) -> list[dict[str, Any]]:
        return self._scored({"backend": "dense"}, self.loaded.model, PruningPlan(()))

    def pruned_rows(self, sparsity: float, residual: bool, backend: str) -> list[dict[str, Any]]:
        result = osscar.prune(
            self.loaded.model,
            self.calibration,
            channels=round(1 - sparsity, 3),
            target="weights",
            residual=round(1 - sparsity, 3) if residual else None,
            backend=backend,
            batch_norm="keep",
            batch_size=self.arguments.batch_size,
            device=self.arguments.device,
            seed=self.arguments.seed,
        )
        run = {
            "sparsity": sparsity,
            "residual": residual,
            "backend": backend,
            "loss": result.loss,
            "seconds": result.seconds,
            "solve_seconds": result.solve_seconds,
        }
        rows = self._scored(run, result.model, result.plan)
        rows[0]["layers"] = [dataclasses.asdict(layer) for layer in result.layers]
        return rows

    def _scored(
        self, run: dict[str, Any], model: nn.Module, plan: PruningPlan
    ) -> list[dict[str, Any]]:
        """Score a model with batch-norm statistics of all sorts."""
        dense = self.loaded.model
        batches = as_inputs(model, self.calibration).batches(model, self.arguments.batch_size)
        models = {mode: copy.deepcopy(model) for mode in MODES}
        for mode, one in models.items():
            before = dense_statistics(dense, batches, mode)
            renew_statistics(one, plan, batches, mode, before)
        images = self.images
        if self.arguments.without_labels:
            images = dataclasses.replace(images, labels=None)
        qualities = score(list(models.values()), images, dense=dense, classes=self.loaded.classes)
        example = {name: tensor[:1] for name, tensor in self.loaded.example.items()}
        size = {"parameters": count_parameters(model), "flops": count_flops(model, example)}
        rows = [
            {**run, "batch_norm": mode, **size, **dataclasses.asdict(quality)}
            for mode, quality in zip(models, qualities, strict=True)
        ]
        for row in rows:
            print_row(row)
        return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the results as a Markdown table: statistics kept / corrected."""
    labelled = rows[0]["top1"] is not None
    measures = {**({"top1": "top-1"} if labelled else {}), "agreement": "agreement", "kl": "KL"}
    heads = ["removed", "residual", "backend", "FLOPs", "parameters", "loss", *measures.values()]
    lines = [heads, ["---", "---", "---", *["---:"] * (len(heads) - 3)]]
    for start in range(0, len(rows), len(MODES)):
        old, new = rows[start : start + len(MODES)]
        share = [f"{old[size] / rows[0][size]:.2f}x" for size in ("flops", "parameters")]
        pairs = [[shown(key, row[key]) for row in (old, new)] for key in measures]
        lines.append(
            [
                f"{old['sparsity']:.0%}" if "sparsity" in old else "",
                "yes" if old.get("residual") else "",
                f"`{old['backend']}`" if "sparsity" in old else "dense",
                *share,
                f"{old['loss']:.2f}" if "loss" in old else "",
                *(" / ".join(pair) for pair in pairs),
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key == "kl" else f"{value:.1%}"


def print_row(row: dict[str, Any]) -> None:
    numbers = {key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()}
    print(*(f"{key} {value}" for key, value in numbers.items()), sep="   ", flush=True)


if __name__ == "__main__":
    main()
