"""Whole experts of a small mixture: each backend, with and without the refit, beside all else.

    python -m benchmarks.train_mixture MIXTURE
    python -m benchmarks.experts MIXTURE

Calibrated and scored on the demo's own texts, neither of which the
mixture was trained on.  Divergence is that of the predicted tokens from the dense model's, in nats
a token; *layers* is the mean relative loss of the mixtures, before and after the refit.  Speed is
that of prefill, relative to the dense model's.  At the end of each share, models that have as many
parameters lose neurons of all their experts, heads as well, some experts first and the rest by a
budget, or whatever one budget of all three takes.  Where no backend is given, a share is one of all
parameters.

Takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import osscar
from osscar.data.text import encode
from osscar.evaluation.quality import score
from osscar.evaluation.speed import measure_speed
from osscar.models.names import DEMO_CALIBRATION, DEMO_HELD_OUT

BACKENDS = ("random", "frequency", "reap", "greedy", "local_search", "enumerate")
NO_REFIT = 1e9
"""What damping leaves dense weights as they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixture", type=Path)
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument(
        "--repetitions", type=int, default=15, help="of what is timed; 0 times nothing"
    )
    given = parser.parse_args()
    loaded = osscar.load_model(str(given.mixture))
    dense, tokenizer = loaded.model, loaded.tokenizer
    data = osscar.load_calibration(
        DEMO_CALIBRATION, tokenizer, samples=given.samples, seqlen=given.seqlen, seed=0
    )
    text = DEMO_HELD_OUT.read_text()
    scored = osscar.load_text([text], tokenizer)
    windows = encode(tokenizer, text)
    windows = windows[: len(windows) // given.seqlen * given.seqlen].view(-1, given.seqlen)
    print(f"dense: perplexity {score([dense], scored)[0].perplexity:.2f}, {len(windows)} windows")
    print("| kept | what leaves | refit | parameters | perplexity | divergence | layers | speed |")
    print("| ---: | --- | --- | ---: | ---: | ---: | --- | ---: |")
    for keep in given.keep:
        for what, refit, result in results(dense, data, keep, given.backends):
            cells = (
                f"{keep:g}",
                f"{what}{left(result)}",
                "yes" if refit else "no",
                f"{result.parameters_after:,}",
                f"{score([result.model], scored)[0].perplexity:.2f}",
                f"{divergence(dense, result.model, windows):.5f}",
                layers(result, refit),
                speed(dense, result.model, windows[0], given.repetitions),
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def results(
    dense: nn.Module, data: Any, keep: float, backends: Sequence[str]
) -> Iterator[tuple[str, bool, Any]]:
    """Yield what left, whether the rest was refitted, and the result."""
    parameters: float = keep
    for backend in backends:
        for damp in (NO_REFIT, None):
            asked = {} if damp is None else {"damp": damp}
            result = osscar.prune(dense, data, experts=keep, backend=backend, **asked)
            parameters = result.parameters_after
            yield backend, damp is None, result
    budgets: dict[str, dict[str, Any]] = {
        "neurons": {"heads": 1.0},
        "neurons and heads": {},
        "an eighth of the experts, neurons and heads": {"experts": 0.875},
        "one budget of experts, neurons and heads": {"experts": "auto"},
    }
    for what, asked in budgets.items():
        yield what, True, osscar.prune(dense, data, params=parameters, **asked)


def left(result: Any) -> str:
    """Say how many experts stay, where a budget has decided that."""
    if result.budget is None:
        return ""
    kept = [one.kept for one in result.layers if one.kind == "experts"]
    predicted = f"predicted {result.budget.predicted:.5f}"
    return f" ({predicted}, {f'{kept} experts stay' if kept else 'all experts stay'})"


def layers(result: Any, refit: bool) -> str:
    """Return the mean relative loss of the layers, and after the refit where that is told."""
    refitted = [layer.refitted_loss for layer in result.layers]
    told = f"{statistics.mean(layer.relative_loss for layer in result.layers):.3f}"
    return f"{told}, {statistics.mean(refitted):.3f}" if refit and None not in refitted else told


def speed(dense: nn.Module, smaller: nn.Module, window: Tensor, repetitions: int) -> str:
    """Return how many times as fast prefill is; nothing where nothing is timed."""
    if not repetitions:
        return ""
    first, own = measure_speed([dense, smaller], window, repetitions=repetitions)
    return f"{own.prefill_tokens_per_second / first.prefill_tokens_per_second:.2f}x"


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
