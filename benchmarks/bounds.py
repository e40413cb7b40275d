"""How far from optimal the local search can be on real layers, by lower bound and by damping.

    python benchmarks/bounds.py LAYER.safetensors... --ratios 0.25 0.5 0.75 --rounds 0 8 24

A layer file holds ``H``, the undamped Gram matrix of its inputs (p, p), and ``W``, its weights
(p, m).  For each layer, share of removed units and damping it prints the relative loss of the local
search, and the gaps and seconds of one processor of

- classical: the perspective bound with the diagonal ``t / diag(inv(H))``, t as large as it may be;
- the `perspective` backend with so many rounds, recomputed from its certificate, and below which
  gap its limit says that no bound by common multipliers comes.

Takes half a minute a layer and share.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import safetensors.torch
import torch

from solvers import SubsetProblem, solve
from solvers.bounds.perspective import Perspective

ALTERNATIONS = 25


def classical(problem: SubsetProblem) -> float:
    """Perspective bound of a problem of scalar units and one consumer (not rounded safely)."""
    (consumer,), k = problem.consumers, problem.keep
    H, G = consumer.H, consumer.G
    A_diagonal = torch.cholesky_inverse(torch.linalg.cholesky(H)).diagonal()
    scale = A_diagonal.sqrt()
    D = float(torch.linalg.eigvalsh(H * scale[:, None] * scale)[0]) / A_diagonal
    z = torch.full_like(D, k / len(D))
    best = 0.0
    for _ in range(ALTERNATIONS):
        M = H + torch.diag(D * (1 / z - 1))
        V = torch.cholesky_solve(G, torch.linalg.cholesky(M))
        shifted = H @ V - D[:, None] * V
        q = (G - shifted).square().sum(1) / D
        best = max(best, consumer.e - float((V * shifted).sum()) - float(q.topk(k).values.sum()))
        z = water_level(D.sqrt() * V.norm(dim=1), k).clamp(min=1e-6)
    return best


def water_level(sizes: torch.Tensor, total: int) -> torch.Tensor:
    """Return ``min(1, sizes / tau)`` with tau where the entries sum up to `total`."""
    low, high = 0.0, float(sizes.sum())
    for _ in range(100):
        middle = (low + high) / 2
        over = float((sizes / middle).clamp(max=1).sum()) > total
        low, high = (middle, high) if over else (low, middle)
    return (sizes / high).clamp(max=1)


def together(problem: SubsetProblem, rounds: int, loss: float) -> str:
    start = time.process_time()
    claims, _ = Perspective(rounds=rounds).bound(problem)
    seconds = time.process_time() - start
    certificate = claims["certificate"]
    value = certificate.bound(problem)
    shown = f"limit {max(0.0, 1 - certificate.limit(problem) / loss):.2%}"
    return f"{rounds} rounds {1 - value / loss:.2%} ({seconds:.1f} s, {shown})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", nargs="+", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--damp", nargs="+", type=float, default=[0.01])
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, Perspective.rounds])
    options = parser.parse_args()
    for path in options.layers:
        tensors = safetensors.torch.load_file(path)
        p = len(tensors["H"])
        for damp in options.damp:
            whole = SubsetProblem.from_gram(tensors["H"], tensors["W"], keep=p, damp=damp)
            for ratio in options.ratios:
                problem = whole.with_keep(round(p * (1 - ratio)))
                best = solve(problem, "local_search")
                start = time.process_time()
                known = 1 - classical(problem) / best.loss
                cells = [f"classical {known:.2%} ({time.process_time() - start:.1f} s)"]
                cells += [together(problem, rounds, best.loss) for rounds in options.rounds]
                title = f"{path.stem} damp {damp:g} removed {ratio:.0%}"
                print(f"{title}: loss {best.relative_loss:.5f}  gaps", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main()
