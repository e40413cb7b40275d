"""Models of every form that a recovery takes, with their data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import graph
import osscar
from graph.tracing.preserve import without_cache
from osscar.data.batches import as_inputs
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import mixture
from tests.osscar.networks import images, small_net
from tests.osscar.programs import CASES, kept_at_random, made
from tests.osscar.recovery.perturbed import perturbed


class Mixed(nn.Module):
    """Parameters that are whole or complex, buffers of every kind, dropout, a frozen layer.

    What it derives from a parameter it keeps, as attention of LeViT does; it counts its passes.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.wave = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.order = nn.Parameter(torch.randperm(8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.rand(8, dtype=torch.float64) / 3)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.drop, self.kept = nn.Dropout(0.5), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if not self.kept:
            self.kept["bias"] = self.bias[self.order]
        y = self.drop(torch.tanh(self.frozen(self.enter(x)))) + self.kept["bias"]
        y = torch.fft.ifft(torch.fft.fft(y) * self.wave).real * self.scale.to(y.dtype)
        return self.leave(y)


class Graphs(nn.Module):
    """Reads the nodes and edges of one graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        y = torch.relu(self.enter(nodes))
        return self.leave(torch.zeros_like(y).index_add(0, edges[1], y[edges[0]]))


def graphs() -> osscar.SampleList:
    draw = torch.Generator().manual_seed(0)
    sizes = (4, 7, 3, 5, 6, 4, 8, 5)
    nodes = [torch.randn(size, 5, generator=draw) for size in sizes]
    edges = [torch.randint(size, (2, 9), generator=draw) for size in sizes]
    both = zip(nodes, edges, strict=True)
    return osscar.SampleList("graphs", [{"nodes": n, "edges": e} for n, e in both])


def windows() -> Tensor:
    return tokens(8, 12)


def _pruned(**asked: Any) -> Callable[[nn.Module, Any], nn.Module]:
    return lambda dense, data: osscar.prune(dense, data, device="cpu", **asked).model


def _program(dense: nn.Module, data: Any) -> nn.Module:
    inputs = as_inputs(dense, data)
    example = inputs.example()
    with without_cache(dense):
        plan = kept_at_random(graph.trace(dense, example).prunable)
    return osscar.shrink_program(dense, plan, inputs.proofs(0), example).model


def _noisy(dense: nn.Module, data: Any) -> nn.Module:
    return perturbed(dense)


def _training(model: nn.Module) -> nn.Module:
    """Give every second module the mode of training."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    return model


@dataclass(frozen=True)
class Form:
    """A dense model, its data, and what makes a smaller one of both."""

    dense: Callable[[], nn.Module]
    data: Callable[[], Any]
    smaller: Callable[[nn.Module, Any], nn.Module] = _noisy
    asked: dict[str, Any] = field(default_factory=dict)

    def made(self) -> tuple[nn.Module, nn.Module, Any]:
        """Return the smaller model, the dense one and the data."""
        dense, data = self.dense(), self.data()
        return self.smaller(copy.deepcopy(dense), data), dense, data


ADAPTED = "bfloat16 with adapters"

FORMS = {
    "tied embeddings": Form(lambda: tiny("qwen2", layers=1), windows),
    "per-layer shapes": Form(
        lambda: tiny("llama-gqa"),
        windows,
        _pruned(groups={"model.layers.0.mlp.neurons": 12}, backend="magnitude"),
    ),
    "a program in bfloat16": Form(
        lambda: made(CASES["gated"][0]).bfloat16(), lambda: torch.randn(24, 8), _program
    ),
    "experts one by one": Form(lambda: mixture("qwen2-moe", kernel="eager"), windows),
    "batch norm": Form(small_net, images, _pruned(channels=0.5, backend="magnitude")),
    ADAPTED: Form(lambda: tiny("llama-gqa", layers=1).bfloat16(), windows, asked={"lora": 2}),
    "mixed": Form(lambda: _training(Mixed()), lambda: torch.randn(24, 4)),
    "graphs": Form(Graphs, graphs),
}
