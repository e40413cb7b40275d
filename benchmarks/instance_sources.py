"""Build the library of instances: the sources that the package ships, and the index.

    python -m benchmarks.instance_sources --language --mixture DIR --resnet WEIGHTS --images NPZ

Sources are of the demo and SmolLM2-135M, of the ResNet-20 of `benchmarks.resnet20` on images of
CIFAR-10, and of a mixture of `benchmarks.train_mixture`; windows are of the layers that are built
with them.  Each instance starts with what `local_search` finds: `benchmarks.instances` looks for
better values.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import osscar
from benchmarks.resnet20 import MEAN, STD, ResNet20
from osscar.base.files import cache_directory, file_digest, write_text
from osscar.data.prose import Split, builtin_text
from osscar.data.text import encode
from osscar.network.double import InDouble
from osscar.study.library import (
    DIRECTORY,
    FORMAT,
    INDEX,
    Best,
    Library,
    LibraryInstance,
    Source,
    library,
    posed,
)
from osscar.study.problems import model_problems
from solvers import Consumer, SubsetProblem, solve
from solvers.closed_forms.windows import borderline_window, window_problem
from solvers.storage import read, write

CASES = ((0.25, 0.01), (0.5, 0.01), (0.75, 0.01), (0.5, 0.1))
"""Shares of units removed, and dampings."""

TINY = 1e-9
"""The damping with which Gram matrices are taken from the package's own walk."""

TOKENS = {"demo": 32, "smollm2-135m": 16}
"""Windows of 512 tokens of the built-in calibration text, by model."""

SHIPPED = (
    "demo-heads",
    "demo-mlp",
    "resnet20-c16",
    "resnet20-c32",
    "resnet20-c64",
    "resnet20-stem",
)
"""Sources that are small enough to ship; of the others, windows are instances."""

HELD = cache_directory() / "instances"
"""Where sources that are not shipped lie."""

BITS = 15
"""Of the magnitude of what a layer reads: 2^14 products of two stay below 2^44."""

AT_ONCE = 4
"""Windows of tokens that a model reads in one call."""

MAPS = {
    "demo-heads": (
        "demo",
        ["model.decoder.layers.1.self_attn.out_proj"],
        8,
        "the heads of layer 1",
    ),
    "demo-mlp": ("demo", ["model.decoder.layers.1.fc2"], 640, "the neurons of layer 1"),
    **{
        f"smollm2-l{i}-mlp": (
            "smollm2-135m",
            [f"model.layers.{i}.mlp.down_proj"],
            1536,
            f"the neurons of layer {i}",
        )
        for i in (0, 15, 29)
    },
}
"""Model, linear maps, units, and what these are."""

WINDOWS = (
    *(("smollm2-l15-mlp", n, 0.5, 0.01) for n in (24, 32, 40, 48, 56, 64)),
    *(("smollm2-l15-mlp", 40, removed, 0.01) for removed in (0.25, 0.75)),
    *(("smollm2-l0-mlp", n, 0.5, 0.01) for n in (40, 64)),
    *(("smollm2-l29-mlp", n, 0.5, 0.01) for n in (40, 64)),
    ("demo-mlp", 40, 0.5, 0.01),
    *(("mixture-mlp", n, 0.5, 0.01) for n in (16, 32)),
)
"""Layer, units of the window, share of the layer's units removed, damping."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("resnet", "images", "mixture"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--language", action="store_true", help="the demo and SmolLM2-135M")
    options = parser.parse_args()
    torch.set_num_threads(1)
    build(options)


def build(options: argparse.Namespace) -> None:
    """Write sources and their instances; those of weights that are not given stay as they are."""
    sources: dict[str, Source] = {}
    instances: dict[str, LibraryInstance] = {}
    HELD.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Path] = {}
    for name, words, units, tensors in gram_sources(options):
        whole[name] = (DIRECTORY if name in SHIPPED else HELD) / f"{name}.safetensors"
        write(whole[name], {"format": FORMAT}, tensors)
        print(name, flush=True)
        if name not in SHIPPED:
            continue
        sources[name] = described(words, units, whole[name])
        for removed, damp in CASES:
            keep = units - round(removed * units)
            label = f"{name}-k{keep}" + (f"-d{damp:g}" if damp != CASES[0][1] else "")
            instances[label] = started(posed(whole[name], label, keep, damp), name, damp)
    for layer, n, removed, damp in WINDOWS:
        if layer not in whole:
            continue
        layer_units = len(read(whole[layer])[1]["0.rows"])
        problem = posed(whole[layer], layer, layer_units - round(removed * layer_units), damp)
        support = solve(problem).support
        window = reduced(window_problem(problem, support, borderline_window(problem, support, n)))
        name = f"{layer}-window{n}" + (f"-r{removed:g}" if removed != 0.5 else "")
        path = DIRECTORY / f"{name}.safetensors"
        dataclasses.replace(window, name=name).save(path)
        words = (
            f"the {n} units of {layer} closest to changing sides with {removed:.0%} of it removed, "
            f"damping {damp:g} included"
        )
        sources[name] = described(words, n, path)
        label = f"{name}-k{window.keep}"
        instances[label] = started(dataclasses.replace(window, name=label), name, damp)
        print(name, window.keep, flush=True)
    # Read at the end: another process may be looking for better values of others.
    known = library() if INDEX.exists() else Library("osscar-instances/1", {}, {})
    save(
        dataclasses.replace(
            known,
            sources={**known.sources, **sources},
            instances={**known.instances, **instances},
        )
    )


def described(words: str, units: int, path: Path) -> Source:
    _, tensors = read(path)
    weights = [tensor for key, tensor in tensors.items() if key.endswith(".W0")]
    return Source(
        words=words,
        units=units,
        rows=sum(len(W) for W in weights),
        outputs=sum(W.shape[1] for W in weights),
        consumers=len(weights),
        sha256=file_digest(path),
    )


def started(problem: SubsetProblem, source: str, damp: float) -> LibraryInstance:
    """Return an instance with what the default backend finds."""
    found = solve(problem)
    best = Best(
        support=tuple(found.support.tolist()),
        loss=found.relative_loss,
        found_by=found.backend,
        found_in=round(found.seconds, 3),
    )
    return LibraryInstance(source=source, keep=problem.keep, damp=damp, best=best)


def gram_sources(
    options: argparse.Namespace,
) -> Iterator[tuple[str, str, int, dict[str, torch.Tensor]]]:
    """Yield names, words, units and tensors."""
    if options.resnet is not None:
        yield from of_resnet(options.resnet, options.images)
    if options.mixture is not None:
        yield from of_mixture(options.mixture)
    if options.language:
        for model, windows in TOKENS.items():
            yield from of_language(model, windows)


def of_language(name: str, windows: int) -> Iterator[tuple]:
    """Yield what one pass over the built-in text gives, for all maps of a model."""
    loaded = osscar.load_model(name, dtype="float32", device="cpu")
    model = loaded.model
    ids = encode(loaded.tokenizer, builtin_text(Split.CALIBRATION))[: windows * 512]
    tokens = ids.view(windows, 512)
    mine = {key: one for key, one in MAPS.items() if one[0] == name}
    modules = sorted({module for one in mine.values() for module in one[1]})
    maps = [model.get_submodule(module) for module in modules]
    weights = {module: weight_of(one) for module, one in zip(modules, maps, strict=True)}
    read_of = dict(zip(modules, inputs_of(model.double(), maps, tokens), strict=True))
    for key, (_, names, units, words) in mine.items():
        tensors = gram_tensors([read_of[m] for m in names], [weights[m] for m in names], units)
        yield key, f"{words} of {name}", units, tensors


def gram_tensors(X: Sequence[Tensor], weights: Sequence[Tensor], units: int) -> dict[str, Tensor]:
    """Return the tensors of a source of linear maps whose outputs are added up.

    X: What each reads, (positions, inputs) float64.
    weights: Of each, (inputs, outputs) float32.
    """
    H, W = exact_gram(torch.cat(list(X), 1)), torch.cat(list(weights))
    return {"0.H": H, "0.W0": W, "0.rows": torch.arange(len(W)).view(units, -1)}


def weight_of(linear: Any) -> Tensor:
    """Return a linear map's weights, (inputs, outputs) float32, as a copy."""
    weight: Tensor = linear.weight
    return weight.detach().T.float().clone(memory_format=torch.contiguous_format)


class _Reached(Exception):
    """The last map has been reached: what comes after it need not be computed."""


def inputs_of(model: nn.Module, maps: Sequence[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Return what each map reads of all tokens, (positions, inputs) float64."""
    seen: dict[nn.Module, list[Tensor]] = {one: [] for one in maps}

    def keep(module: nn.Module, args: Any) -> None:
        seen[module].append(args[0].flatten(0, -2))
        if all(len(found) == len(seen[module]) for found in seen.values()):
            raise _Reached

    hooks = [one.register_forward_pre_hook(keep) for one in maps]
    try:
        parts = torch.split(tokens, AT_ONCE)
        with InDouble(), torch.no_grad():
            for part in parts:
                try:
                    model(input_ids=part, use_cache=False)
                except _Reached:
                    continue
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(found) for found in seen.values()]


def exact_gram(X: Tensor) -> Tensor:
    """Return ``X'X/N`` of X rounded to 16 bits, in float32: the same bits in whatever order.

    X: (N, p) float64, of at most 2^22 positions.  Each column is rounded to multiples of the power
    of two that makes its largest magnitude a number of `BITS` bits.
    """
    largest = X.abs().amax(0)
    # Of zeros nothing is to be rounded.  frexp is exact, where a logarithm is not.
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent, BITS) - BITS
    step = torch.ldexp(torch.ones_like(largest), exponent)
    whole = torch.round(X / step)
    sums = whole.T @ whole
    return (sums * step * step[:, None] / len(X)).float()


def of_resnet(weights: Path, images: Path) -> Iterator[tuple]:
    model = ResNet20()
    model.load_state_dict(safetensors.torch.load_file(weights))
    x = torch.tensor(np.load(images)["train_images"]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    wanted = {
        "layer1.2.conv1.channels": ("resnet20-c16", "16 channels within a block of ResNet-20"),
        "layer2.2.conv1.channels": ("resnet20-c32", "32 channels within a block of ResNet-20"),
        "layer3.1.conv1.channels": ("resnet20-c64", "64 channels within a block of ResNet-20"),
        "conv1.channels": ("resnet20-stem", "16 channels that four convolutions of ResNet-20 read"),
    }
    for group, problem in model_problems(model.eval(), x, damp=TINY, wanted=wanted.__contains__):
        name, words = wanted[group.name]
        # Those of later stages also read other groups: their terms are no Gram matrices.
        consumers = [one for one in problem.consumers if one.scale is None]
        yield name, words, problem.units, walked(consumers)


def of_mixture(directory: Path) -> Iterator[tuple]:
    loaded = osscar.load_model(directory)
    data = loaded.calibration(spec=None, samples=32, seqlen=512)
    for group, problem in model_problems(
        loaded.model, data, damp=TINY, wanted="model.layers.1.mlp.experts.neurons".__eq__
    ):
        words = f"{group.kind} of layer 1 of a mixture of eight experts"
        yield "mixture-mlp", words, problem.units, walked(problem.consumers)


def walked(consumers: Sequence[Consumer]) -> dict[str, torch.Tensor]:
    """Return Gram matrices and weights in float32."""
    return {
        f"{i}.{key}": value
        for i, one in enumerate(consumers)
        for key, value in (("H", one.H.float()), ("W0", one.W0.float()), ("rows", one.rows))
    }


SLACK = 1e-9
"""Of e, so that rounding makes no loss negative."""


def reduced(problem: SubsetProblem) -> SubsetProblem:
    """Return a problem of the same choices with fewer outputs, and no loss that none can avoid.

    An orthogonal map of the outputs changes no loss, and there is one after which all but the first
    p of them have no correlation with the inputs.  What is lost with all units kept is the same for
    every support: in a window it is nearly all, and would hide what there is to choose.
    """

    def smaller(one: Consumer) -> Consumer:
        e = float((one.G * torch.linalg.solve(one.H, one.G)).sum()) * (1 + SLACK)
        p, m = one.G.shape
        basis = torch.linalg.qr(one.G.T)[0] if m > p else torch.eye(m, dtype=one.G.dtype)
        return dataclasses.replace(one, G=one.G @ basis, W0=one.W0 @ basis, e=e, scale=None)

    return dataclasses.replace(problem, consumers=tuple(map(smaller, problem.consumers)))


def save(known: Library) -> None:
    """Write the index with a line for each source and each instance, as differences are read."""
    whole = dataclasses.asdict(known)
    parts = [f'"format": {json.dumps(known.format)}']
    for key in ("sources", "instances"):
        lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in whole[key].items())
        parts.append(f'"{key}": {{\n' + ",\n".join(lines) + "\n}")
    write_text(INDEX, "{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
