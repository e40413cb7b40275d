"""Time and memory of choosing experts, at the size that calibration has.

    python -m benchmarks.routing --keep 64
    python -m benchmarks.routing --keep 64 --normalized

Logits and outputs are random.  The time is CPU time of `local_search`, less that of the problem.

Takes a minute.
"""

from __future__ import annotations

import argparse
import time

import torch

import solvers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--normalized", action="store_true", help="weights sum to one")
    given = parser.parse_args()
    rule = solvers.RoutingRule(given.top_k, solvers.RouterScores.SOFTMAX, given.normalized)
    problem = posed(rule, given.experts, given.tokens, given.keep)
    size = solvers.ExpertProblem.memory(rule, given.experts, given.keep, given.tokens)
    start = time.process_time()
    found = solvers.solve_experts(problem, "local_search")
    print(
        f"{rule}\nkeep {given.keep} of {given.experts}, {given.tokens} tokens: {size / 1e9:.2f} GB,"
        f" {time.process_time() - start:.1f} CPU s, {found.iterations} exchanges,"
        f" {found.status.name}, relative loss {found.relative_loss:.4f}"
    )


def posed(
    rule: solvers.RoutingRule, experts: int, tokens: int, keep: int, width: int = 16
) -> solvers.ExpertProblem:
    """Return a random problem whose target is what the mixture gives with all experts."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for count in torch.arange(tokens).split(1024):
        draw = torch.randn(len(count), experts, width + 1, generator=generator, dtype=torch.float64)
        logits, outputs = draw[:, :, 0].contiguous(), draw[:, :, 1:]
        chosen, weights = rule.route(logits)
        target = (weights[:, :, None] * outputs[torch.arange(len(count))[:, None], chosen]).sum(1)
        order = solvers.expert_candidates(rule, logits, keep)
        picked = outputs.gather(1, order[:, :, None].expand(-1, -1, width))
        blocks.append(solvers.RoutedTokens.from_outputs(logits, picked, target))
    return solvers.ExpertProblem(rule, tuple(blocks), keep)


if __name__ == "__main__":
    main()
