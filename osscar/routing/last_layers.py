"""The last matrices of experts: of stacked ones, and of those that are a list of modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from osscar.consumers.consumer import ExpertMap, LinearMap
from osscar.consumers.layers import ROWS
from osscar.consumers.linear_maps import linear_maps
from osscar.consumers.mixtures import Mixture
from osscar.network.hooks import hooks
from osscar.shrinking.fold import is_foldable

if TYPE_CHECKING:
    from osscar.preparation.prepare import Prepared
    from osscar.routing.find import ExpertMixture


@dataclass(frozen=True, eq=False)
class ListedMixture(Mixture):
    """A mixture whose experts are a list of modules, each with a last matrix of its own.

    `parameter` is the name of the layer, in every expert, that puts out what the expert does.
    """

    @property
    def count(self) -> int:
        """How many experts there are."""
        return len(self.module)  # type: ignore[arg-type]

    def last(self, expert: int) -> nn.Linear:
        """Return the last layer of an expert."""
        found = self.module[expert].get_submodule(self.parameter)  # type: ignore[index]
        assert isinstance(found, nn.Linear)
        return found

    def holder(self, expert: int) -> str:
        """Return the name of the last layer of an expert."""
        return f"{self.name}.{expert}.{self.parameter}".removesuffix(".")

    def _inputs(self, hidden: Tensor, experts: Tensor, ones: Tensor) -> Tensor:
        """Return what each expert's last layer reads, (visits, p)."""
        X = hidden.new_zeros(len(hidden), self.last(0).in_features)
        for number, expert in enumerate(self.module.children()):
            rows = (experts[:, 0] == number).nonzero().flatten()
            if len(rows):
                seen = last_layers(expert, hidden[rows])[self.parameter]
                X[rows] = seen.to(X)
        return X


def last_layers(expert: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Return which linear layers put out what an expert does, with what each of them reads."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def look(name: str, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        seen.setdefault(name, []).append((x.detach(), y))

    linear = [
        name
        for name, inner in expert.named_modules()
        if isinstance(inner, nn.Linear) and not is_foldable(inner)  # its weight can be replaced
    ]
    with hooks(expert, linear, after=look):
        y = expert(hidden)
    return {
        name: calls[0][0]
        for name, calls in seen.items()
        if len(calls) == 1 and calls[0][1].shape == y.shape and torch.equal(calls[0][1], y)
    }


def last_matrices(prepared: Prepared, mixture: ExpertMixture) -> tuple[LinearMap, ...]:
    """Return what reads the neurons of a mixture, one matrix an expert; none if not known."""
    name, experts = mixture.experts, prepared.model.get_submodule(mixture.experts)
    if not isinstance(experts, nn.ModuleList):
        groups = (group for group in prepared.groups if not group.frozen)
        reading = (g for g in groups if any(slot.module == name for slot in g.consumers))
        found = (linear_maps(prepared.model, g, prepared.products) for g in reading)
        return next((maps for maps in found if len(maps) == mixture.group.units), ())
    if mixture.last_layer is None:
        return ()
    listed = ListedMixture(name, experts, mixture.last_layer, 1)
    layers = [listed.last(expert) for expert in range(listed.count)]
    owned = [[i] for i in range(layers[0].in_features)]
    return tuple(
        ExpertMap(name, layer, "weight", None, 1, ROWS, owned, mixture=listed, expert=expert)
        for expert, layer in enumerate(layers)
    )
