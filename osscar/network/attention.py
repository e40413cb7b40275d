"""Attention modules of torch that work with any number of heads.

The originals derive the width of a head from the width of the stream (``C // num_heads``).  Each
class here replaces the forward pass of one of them; the module keeps its parameters, and its class
stays a subclass of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osscar.base.errors import ModelError


class AnyHeads:
    """Mixed into a module's class: its forward pass takes the number of heads from the module."""

    def adopt(self) -> None:
        """Add what the new forward pass needs, while nothing is sliced yet."""


class _MultiheadAttention(AnyHeads, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`, whose heads need not span the embedding."""

    def adopt(self) -> None:
        """Keep torch from taking a fused path that assumes full width."""
        if is_extended(self):
            raise ModelError(
                "a MultiheadAttention with add_bias_kv or add_zero_attn cannot lose heads; "
                "leave its heads out of what is pruned"
            )
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the original does, with the same arguments and results."""
        single = query.dim() == 2
        inputs = [t.unsqueeze(0) if single else t for t in (query, key, value)]
        if not single and not self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        packed, bias = self.in_proj_weight, self.in_proj_bias
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            torch.unflatten(F.linear(t, w, b), -1, (-1, self.head_dim)).transpose(1, 2)
            for t, w, b in zip(inputs, weights, biases, strict=True)
        )
        mask = _joint_mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = (scores if mask is None else scores + mask).softmax(-1)
            attention = F.dropout(attention, self.dropout, self.training)
            mixed = attention @ v
        else:
            dropped = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        shown = attention.mean(1) if average_attn_weights else attention
        return output, shown.squeeze(0) if single else shown


def _joint_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Add up both masks as numbers that broadcast to (batch, heads, queries, keys)."""
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = _as_numbers(attn_mask, q)
        mask = mask.view(q.shape[0], -1, *mask.shape[-2:]) if mask.dim() == 3 else mask
    if padding is not None:
        hidden = _as_numbers(padding, q).view(q.shape[0], 1, 1, -1)
        mask = hidden if mask is None else mask + hidden
    return mask


def _as_numbers(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


class _PaddingEncoder(AnyHeads, nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`, which packs padded sequences no longer.

    The original leaves zeros at padded positions wherever it takes its packed path, and so does
    this: what reads them, such as a mean over positions, finds what it found before.
    """

    packs: bool
    """Whether the original would pack."""

    def adopt(self) -> None:
        """Remember whether it packs, and pack no longer."""
        self.packs = bool(getattr(self, "use_nested_tensor", False))
        self.use_nested_tensor = False

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode as the original does, with the same arguments and results."""
        padding = src_key_padding_mask
        if padding is None or mask is not None or not self._packs(src, padding):
            return super().forward(src, mask, padding, is_causal)
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=padding, is_causal=bool(is_causal))
        output = output.masked_fill(padding.bool().unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _packs(self, src: Tensor, padding: Tensor) -> bool:
        """Whether the original, with all its heads, takes its packed path for these inputs."""
        layer = self.layers[0]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
        return (
            self.packs
            and torch.backends.mha.get_fastpath_enabled()
            and not (layer.training or learning or torch.compiler.is_compiling())
            and src.dim() == 3
            and not torch.is_autocast_enabled()
            and torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not())
        )


_REWRITTEN: Mapping[type[nn.Module], type[AnyHeads]] = {
    nn.MultiheadAttention: _MultiheadAttention,
    nn.TransformerEncoder: _PaddingEncoder,
}
"""What is mixed in when heads leave, or something else of a module's weights."""


def rewrite(module: nn.Module) -> None:
    """Change the class of a module, in place, if it is among those that need another one."""
    mixin = _mixin(module)
    if mixin is not None:
        module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]  # can be hashed
        assert isinstance(module, AnyHeads)
        module.adopt()


def _mixin(module: nn.Module) -> type[AnyHeads] | None:
    """Return what is mixed into a module's class, if that is listed, or inherits its forward."""
    kind = type(module)
    for base, mixin in _REWRITTEN.items():
        if isinstance(module, base):
            return mixin if kind.forward is base.forward else None
    return None


@functools.cache
def _mixed(mixin: type[AnyHeads], original: type[nn.Module]) -> type[nn.Module]:
    """Return one class for each original, so that modules of one class stay of one class."""
    name = f"AnyHeads{original.__name__}"
    return type(name, (mixin, original), {"__doc__": mixin.__doc__})


def is_extended(module: object) -> bool:
    """Whether attention of torch adds keys of its own, for which there is no other forward pass."""
    return isinstance(module, nn.MultiheadAttention) and (
        module.bias_k is not None or module.add_zero_attn
    )


def expose_attention(model: nn.Module) -> None:
    """Let fused attention call its output layer as a module, which can be observed then."""
    for name in exposed(model):
        rewrite(model.get_submodule(name))


def exposed(model: nn.Module) -> list[str]:
    """Return the names of the modules that `expose_attention` changes."""
    return [
        name
        for name, module in model.named_modules()
        if _mixin(module) and not is_extended(module)  # which keeps all heads
    ]
