"""What one walk through a model costs beside one dense forward pass on the same batches.

    python benchmarks/walk.py smollm2-135m resnet50 t5-small --calibration wikitext2-valid.txt
    python benchmarks/walk.py t5-small --kinds neurons

For each model: seconds of a dense forward pass over all batches; seconds of a walk in which every
group is measured and its own weights are committed again, apart from those that Gram matrices take;
the ratio of the two; how many times the batches set out; and the largest Gram share.  With
``--prune KEEP`` also the seconds of `osscar.prune(neurons=KEEP)`, or of ``channels``, less the
solver's, over those of the dense pass.  Passes and walks alternate, and medians are shown.

All attention layers of T5 share their relative position biases, and so their heads: three groups
that are read in six calls each, for which the batches set out again.

ResNet-50 and T5-small have random weights, images of noise and random tokens: only shapes matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import osscar
from osscar.base.timing import Stage, profiled
from osscar.models.names import DEMO_CALIBRATION
from osscar.preparation.prepare import Prepared, prepare
from osscar.walk.walk import walk


def main() -> None:
    arguments = parse_arguments()
    for name in arguments.models:
        torch.manual_seed(0)
        model, calibration, kind = MODELS[name](arguments)
        with prepare(model, calibration, heads=kind == "neurons") as prepared:
            groups = [
                g
                for g in prepared.groups
                if g.prunable and g.name not in prepared.residual and g.kind in arguments.kinds
            ]
            rows = [measure(prepared, groups) for _ in range(arguments.repetitions)]
        dense, walked, gram = (
            statistics.median(column) for column in list(zip(*rows, strict=True))[:3]
        )
        line = (
            f"{name}: dense pass {dense:.2f} s, walk {walked:.2f} s without Gram matrices "
            f"({gram:.2f} s), ratio {walked / dense:.2f}, {rows[0][3]} pass(es), "
            f"{len(groups)} groups"
        )
        if arguments.prune is not None:
            result = osscar.prune(model, calibration, **{kind: arguments.prune})
            rest = result.seconds - result.solve_seconds
            line += (
                f"; prune {result.seconds:.1f} s, {result.solve_seconds:.1f} s of them in solvers, "
                f"rest over dense pass {rest / dense:.2f}"
            )
        print(line, flush=True)


def measure(prepared: Prepared, groups: list[Any]) -> tuple[float, float, float, int]:
    """Return seconds of a dense pass, of a walk, of its Gram matrices, and its passes."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in prepared.batches():
            prepared.model(**batch)
    dense = time.perf_counter() - start
    with profiled() as profile:
        start = time.perf_counter()
        way = walk(prepared, groups)
        for step in way:
            step.commit([consumer.read_weight() for consumer in step.consumers])
        walked = time.perf_counter() - start
    gram = profile.seconds[Stage.GRAM]
    return dense, walked - gram, gram, way.passes


def smollm2(arguments: argparse.Namespace) -> tuple[nn.Module, Any, str]:
    loaded = osscar.load_model("smollm2-135m")
    windows = osscar.load_calibration(
        arguments.calibration, loaded.tokenizer, samples=arguments.samples, seqlen=512
    )
    return loaded.model, windows, "neurons"


def resnet50(arguments: argparse.Namespace) -> tuple[nn.Module, Any, str]:
    from torchvision.models import resnet50 as build

    return build().eval(), torch.randn(arguments.images, 3, 224, 224), "channels"


def t5_small(arguments: argparse.Namespace) -> tuple[nn.Module, Any, str]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(config.vocab_size, (arguments.samples, 256))
    labels = torch.randint(config.vocab_size, (arguments.samples, 128))
    return model, {"input_ids": tokens, "decoder_input_ids": labels}, "neurons"


MODELS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Any, str]]] = {
    "smollm2-135m": smollm2,
    "resnet50": resnet50,
    "t5-small": t5_small,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--calibration", default=DEMO_CALIBRATION, help="text for SmolLM2")
    parser.add_argument("--kinds", nargs="+", default=["heads", "neurons", "channels"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prune", help="what to keep of the neurons, or of the channels")
    return parser.parse_args()


if __name__ == "__main__":
    main()
