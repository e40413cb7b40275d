"""Whole experts of a small mixture: each backend, with and without the refit, beside neurons.

    python -m benchmarks.train_mixture MIXTURE
    python -m benchmarks.experts MIXTURE

Calibrated and scored on the parts of the built-in text that are for that, neither of which the
mixture was trained on.  Divergence is that of the predicted tokens from the dense model's, in nats
a token; *layers* is the mean relative loss of the mixtures, before and after the refit.  Speed is
that of prefill, relative to the dense model's.  A model that loses neurons of all its experts in
the place of whole ones has as many parameters.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osscar
from osscar.data.prose import Split, builtin_text
from osscar.data.text import encode
from osscar.evaluation.quality import score
from osscar.evaluation.speed import measure_speed

BACKENDS = ("random", "frequency", "reap", "greedy", "local_search", "enumerate")
NO_REFIT = 1e9
"""What damping leaves dense weights as they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixture", type=Path)
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    given = parser.parse_args()
    loaded = osscar.load_model(str(given.mixture))
    dense, tokenizer = loaded.model, loaded.tokenizer
    data = osscar.load_calibration(
        None, tokenizer, samples=given.samples, seqlen=given.seqlen, seed=0
    )
    text = builtin_text(Split.HELD_OUT)
    scored = osscar.TextSet.of(tokenizer, text)
    windows = encode(tokenizer, text)
    windows = windows[: len(windows) // given.seqlen * given.seqlen].view(-1, given.seqlen)
    print(f"dense: perplexity {score([dense], scored)[0].perplexity:.2f}, {len(windows)} windows")
    print("| kept | what leaves | refit | parameters | perplexity | divergence | layers | speed |")
    print("| ---: | --- | --- | ---: | ---: | ---: | --- | ---: |")
    for keep in given.keep:
        for backend, refit, result in results(dense, data, keep):
            layers = [layer.relative_loss for layer in result.layers]
            refitted = [layer.refitted_loss for layer in result.layers]
            told = f"{statistics.mean(layers):.3f}"
            if refit and None not in refitted:
                told += f", {statistics.mean(refitted):.3f}"
            first, own = measure_speed([dense, result.model], windows[0], repetitions=15)
            cells = (
                f"{keep:g}",
                backend,
                "yes" if refit else "no",
                f"{result.parameters_after:,}",
                f"{score([result.model], scored)[0].perplexity:.2f}",
                f"{divergence(dense, result.model, windows):.4f}",
                told,
                f"{own.prefill_tokens_per_second / first.prefill_tokens_per_second:.2f}x",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def results(dense: nn.Module, data: Any, keep: float) -> Iterator[tuple[str, bool, Any]]:
    """Yield what left, whether the rest was refitted, and the result."""
    parameters = 0
    for backend in BACKENDS:
        for damp in (NO_REFIT, None):
            asked = {} if damp is None else {"damp": damp}
            result = osscar.prune(dense, data, experts=keep, backend=backend, **asked)
            parameters = result.parameters_after
            yield backend, damp is None, result
    yield "neurons", True, osscar.prune(dense, data, params=parameters, heads=1.0)


@torch.no_grad()
def divergence(dense: nn.Module, smaller: nn.Module, windows: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of predictions, in nats a token."""
    total, count = 0.0, 0
    for some in torch.split(windows, 8):
        ours, theirs = (
            model(input_ids=some).logits.double().log_softmax(-1) for model in (smaller, dense)
        )
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += some.numel()
    return total / count


if __name__ == "__main__":
    main()
