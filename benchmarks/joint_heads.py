"""Pose one problem over the heads of several attention layers, to be solved as a file.

    python benchmarks/joint_heads.py smollm2-135m --calibration TEXT --first-layer 12 --heads 32 \
        --out heads32.safetensors

Attention outputs of consecutive layers are added to the same residual stream, so that the heads of
all of them read as one linear map are a subset-selection problem with as many units as one wishes,
on real activations: 12 heads of width 64 have the shape of a layer of OPT-125M, 32 that of
OPT-1.3B.

Takes a minute.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import osscar
from solvers import SubsetProblem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-layer", type=int, default=0)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    loaded = osscar.load_model(options.model)
    tokens = osscar.load_calibration(
        options.calibration,
        loaded.tokenizer,
        samples=options.samples,
        seqlen=options.seqlen,
        seed=options.seed,
    ).tokens
    config = loaded.model.config
    width = config.hidden_size // config.num_attention_heads
    count = math.ceil(options.heads / config.num_attention_heads)
    layers = range(options.first_layer, options.first_layer + count)
    readers = [loaded.model.model.layers[i].self_attn.o_proj for i in layers]
    H, W = gram(loaded.model, readers, tokens)
    rows = options.heads * width
    problem = SubsetProblem.from_gram(
        H[:rows, :rows],
        W[:rows],
        keep=options.heads,
        units=options.heads,
        name=f"{options.heads} heads of layers {layers[0]} to {layers[-1]}",
    )
    problem.save(options.out)
    print(f"{problem.name}: {options.out}")


@torch.no_grad()
def gram(
    model: torch.nn.Module, readers: list[torch.nn.Linear], tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the joint Gram matrix of what some layers read, and their weights."""
    seen: dict[torch.nn.Module, torch.Tensor] = {}
    hooks = [
        reader.register_forward_pre_hook(
            lambda module, args: seen.update({module: args[0].flatten(0, 1)})
        )
        for reader in readers
    ]
    p = sum(reader.in_features for reader in readers)
    H, samples = torch.zeros(p, p, dtype=torch.float64), 0
    for batch in tokens.split(4):
        model(input_ids=batch, use_cache=False)
        X = torch.cat([seen[reader] for reader in readers], 1).double()
        H += X.T @ X
        samples += len(X)
    for hook in hooks:
        hook.remove()
    return H / samples, torch.cat([reader.weight.T for reader in readers]).double()


if __name__ == "__main__":
    main()
