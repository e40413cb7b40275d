"""Attention of transformers whose scores have a bias for each head, made in code (ALiBi).

The model makes the bias of all heads it once had, from slopes that depend on how many there are
(Press, Smith and Lewis, "Train short, test long", 2022), and hands it to every layer.  Each class
here lets a layer take that of its own heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from osscar.shrinking.attention import AnyHeads


class _AlibiHeads(AnyHeads):
    """Attention that knows which of the dense model's heads it has."""

    _count = "num_heads"
    """The attribute that counts them."""

    dense_heads: int
    alibi_heads: Tensor
    """Which of the dense model's heads these are, (heads,) int64."""

    def adopt(self) -> None:
        """Add the table of heads."""
        assert isinstance(self, nn.Module)
        device = next(self.parameters()).device
        if device.type == "meta":  # weights that wait for their values, which no file has of this
            device = torch.device("cpu")
        self.dense_heads = getattr(self, self._count)
        # Not saved: whoever reads a checkpoint builds it anew and slices it as the plan says.
        self.register_buffer(
            "alibi_heads", torch.arange(self.dense_heads, device=device), persistent=False
        )

    @property
    def stock(self) -> bool:
        """Whether no head has left."""
        return len(self.alibi_heads) == self.dense_heads

    def _own(self, of_all: Tensor, dim: int) -> Tensor:
        """Return what belongs to the heads that are here."""
        return of_all.index_select(dim, self.alibi_heads)


class _BloomAttention(_AlibiHeads):
    """The attention of BLOOM."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        """Attend as the original does; `alibi` is (batch x heads of the dense model, 1, keys)."""
        own = self._own(torch.unflatten(alibi, 0, (-1, self.dense_heads)), 1).flatten(0, 1)
        # Resolved to the original class, which comes later in the method resolution order.
        return super().forward(  # type: ignore[misc]
            hidden_states, residual, alibi=own, attention_mask=attention_mask, **options
        )


class _MptAttention(_AlibiHeads):
    """The attention of MPT."""

    _count = "n_heads"

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor | None, *args: Any, **options: Any
    ) -> Any:
        """Attend as the original does; `position_bias` is (heads of the dense model, 1, keys)."""
        own = None if position_bias is None else self._own(position_bias, 0)
        return super().forward(hidden_states, own, *args, **options)  # type: ignore[misc]


class _FalconAttention(_AlibiHeads):
    """The attention of those Falcons that have ALiBi."""

    @staticmethod
    def wanted(module: nn.Module) -> bool:
        """Whether the model has ALiBi rather than rotary positions."""
        return bool(getattr(module.config, "alibi", False))

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Attend as the original does.

        `alibi` is (batch, heads of the dense model, 1, keys), and has become a part of the mask,
        (batch, heads of the dense model, queries, keys).
        """
        if alibi is not None:
            alibi = self._own(alibi, 1)
            if attention_mask is not None and attention_mask.shape[1] == self.dense_heads:
                attention_mask = self._own(attention_mask, 1)
        return super().forward(  # type: ignore[misc]
            hidden_states, alibi, attention_mask, *args, **options
        )


_MODELS = "transformers.models"
PREPARED: Mapping[str, type[AnyHeads]] = {
    f"{_MODELS}.bloom.modeling_bloom.BloomAttention": _BloomAttention,
    f"{_MODELS}.mpt.modeling_mpt.MptAttention": _MptAttention,
    f"{_MODELS}.falcon.modeling_falcon.FalconAttention": _FalconAttention,
}
"""Replaced before a model is traced, by the full name of the class."""
