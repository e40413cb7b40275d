"""Prune a model that reads images at several sparsities, and score every result.

For example, with a file of weights and one of images at hand:

    python benchmarks/vision.py benchmarks/resnet20.py:build \
        --weights resnet20-cifar10.safetensors --calibration cifar10-subset.npz:train \
        --images cifar10-subset.npz:test --json out.json

For each sparsity and backend, with and without the residual channels, prints the parameters and
FLOPs that are left and the summed relative loss; and, for batch-norm statistics left as they were
and estimated again, top-1 where there are labels, agreement with the dense model, and the
divergence from it.  The first rows are the dense model, also with statistics estimated again.
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
from osscar.batch_norm import reestimate
from osscar.footprint import count_flops, count_parameters
from osscar.image_evaluation import score_images
from osscar.images import ImageSet, load_images
from osscar.inputs import as_inputs
from osscar.vision import VisionModel, load_vision_model

BACKENDS = ("magnitude", "multistage", "local_search")


def main() -> None:
    arguments = parse_arguments()
    loaded = load_vision_model(arguments.model, weights=arguments.weights, device=arguments.device)
    calibration = loaded.calibration(
        arguments.calibration, samples=arguments.samples, seqlen=None, seed=arguments.seed
    )
    images = load_images(arguments.images, loaded.preprocessing)
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--score", type=int, help="score only so many images, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sparsities", type=float, nargs="+", default=(0.3, 0.5, 0.7))
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs share."""

    loaded: VisionModel
    calibration: ImageSet
    images: ImageSet
    arguments: argparse.Namespace

    def dense_rows(self) -> list[dict[str, Any]]:
        return self._scored({"backend": "dense"}, self.loaded.model)

    def pruned_rows(self, sparsity: float, residual: bool, backend: str) -> list[dict[str, Any]]:
        result = osscar.prune(
            self.loaded.model,
            self.calibration,
            sparsity=sparsity,
            residual=1 - sparsity if residual else None,
            backend=backend,
            batch_norm=False,
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
        layers = [dataclasses.asdict(layer) for layer in result.layers]
        return self._scored(run, result.model, layers)

    def _scored(
        self, run: dict[str, Any], model: nn.Module, layers: Any = None
    ) -> list[dict[str, Any]]:
        """Score a model with the statistics that it has, and with new ones."""
        inputs = as_inputs(model, self.calibration)
        again = copy.deepcopy(model)
        estimated = reestimate(again, inputs.batches(again, inputs.batch_size))
        models = [model, again] if estimated else [model]
        dense = self.loaded.model
        qualities = score_images(models, self.images, dense=dense, classes=self.loaded.classes)
        example = {name: tensor[:1] for name, tensor in self.loaded.example.items()}
        size = {"parameters": count_parameters(model), "flops": count_flops(model, example)}
        rows = [
            {**run, "batch_norm": bool(new), **size, **dataclasses.asdict(quality)}
            for new, quality in enumerate(qualities)
        ]
        for row in rows:
            print_row(row)
        rows[0]["layers"] = layers
        return rows


def print_row(row: dict[str, Any]) -> None:
    numbers = {key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()}
    print(*(f"{key} {value}" for key, value in numbers.items()), sep="   ", flush=True)


if __name__ == "__main__":
    main()
