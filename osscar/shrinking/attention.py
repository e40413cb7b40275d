"""Attention modules of torch, torchvision and transformers that work with any number of heads.

The originals derive the width of a head from the width of the stream (``C // num_heads``).  Each
class here replaces the forward pass of one of them; the module keeps its parameters, and its class
stays a subclass of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph.groups import UnitKind
from osscar.base.errors import ModelError
from osscar.shrinking.plan import GroupPlan


class AnyHeads:
    """Mixed into a module's class: its forward pass takes the number of heads from the module."""

    @staticmethod
    def wanted(module: nn.Module) -> bool:
        """Whether a module of the original class needs the new forward pass."""
        return True

    def adopt(self) -> None:
        """Add what the new forward pass needs, while nothing is sliced yet."""

    @property
    def stock(self) -> bool:
        """Whether the original class would still compute the same."""
        return False


class _MultiheadAttention(AnyHeads):
    """`torch.nn.MultiheadAttention`, whose heads need not span the embedding."""

    bias_k: Tensor | None
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    out_proj: nn.Linear
    batch_first: bool
    num_heads: int
    head_dim: int
    dropout: float
    training: bool
    _qkv_same_embed_dim: bool

    def adopt(self) -> None:
        """Keep torch from taking a fused path that assumes full width."""
        if _is_extended(self):
            raise ModelError(
                "a MultiheadAttention with add_bias_kv or add_zero_attn cannot lose heads; "
                "leave its heads out of what is pruned"
            )
        self._qkv_same_embed_dim = False

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        packed, bias = self.in_proj_weight, self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if packed is not None:
            return packed.chunk(3), biases
        return (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight), biases

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
        weights, biases = self._projections()
        q, k, v = (
            torch.unflatten(F.linear(t, w, b), -1, (-1, self.head_dim)).transpose(1, 2)
            for t, w, b in zip(inputs, weights, biases, strict=True)
        )
        mask = _joint_mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(attention, self.dropout, self.training) @ v
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


class _PaddingEncoder(AnyHeads):
    """`torch.nn.TransformerEncoder`, which packs padded sequences no longer.

    The original leaves zeros at padded positions wherever it takes its packed path, and so does
    this: what reads them, such as a mean over positions, finds what it found before.
    """

    layers: nn.ModuleList
    norm: nn.Module | None
    use_nested_tensor: bool
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
            # Resolved to the original class, which comes later in the method resolution order.
            found: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)  # type: ignore[misc]
            return found
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


class _WindowAttention(AnyHeads):
    """Torchvision's shifted-window attention of Swin, first and second version."""

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    get_relative_position_bias: Callable[[], Tensor]
    attention_dropout: float
    dropout: float
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows of a feature map, (batch, height, width, features)."""
        _, height, width, _ = x.shape
        (rows, columns), shift = self.window_size, list(self.shift_size)
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        # A window that covers the map is not shifted.
        shift = [
            0 if w >= s else by for w, s, by in zip(self.window_size, padded, shift, strict=True)
        ]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = _to_windows(x, rows, columns)
        x = self._attend(x, _seams(x, padded, self.window_size, shift) if any(shift) else None)
        x = _from_windows(x, rows, columns, padded)
        if any(shift):
            x = torch.roll(x, (shift[0], shift[1]), (1, 2))
        return x[:, :height, :width, :].contiguous()

    def _attend(self, x: Tensor, seams: Tensor | None) -> Tensor:
        """Attend within each window, (batch, windows, positions, features)."""
        qkv = F.linear(x, self.qkv.weight, self._bias())
        head_dim = self.qkv.weight.shape[0] // (3 * self.num_heads)
        parts = torch.unflatten(qkv, -1, (3, self.num_heads, head_dim))
        q, k, v = parts.permute(3, 0, 1, 4, 2, 5)
        logit_scale = getattr(self, "logit_scale", None)
        if logit_scale is None:
            scores = q * head_dim**-0.5 @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.get_relative_position_bias()
        if seams is not None:
            scores = scores + seams
        attention = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        mixed = (attention @ v).transpose(2, 3).flatten(3)
        return F.dropout(self.proj(mixed), self.dropout, self.training)

    def _bias(self) -> Tensor | None:
        """Return the bias of queries, keys and values; the second version has none for keys."""
        bias = self.qkv.bias
        if bias is None or not hasattr(self, "logit_scale"):
            return bias
        query, key, value = bias.chunk(3)
        return torch.cat((query, torch.zeros_like(key), value))


def _to_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Cut (batch, height, width, features) into (batch, windows, positions, features)."""
    x = torch.unflatten(torch.unflatten(x, 2, (-1, columns)), 1, (-1, rows))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _from_windows(x: Tensor, rows: int, columns: int, size: torch.Size) -> Tensor:
    x = torch.unflatten(x, 2, (rows, columns))
    x = torch.unflatten(x, 1, (size[0] // rows, size[1] // columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _seams(x: Tensor, size: torch.Size, window: list[int], shift: list[int]) -> Tensor:
    """Return -100 between positions that only the shift has brought into one window."""
    side = []
    for length, w, by in zip(size, window, shift, strict=True):
        position = torch.arange(length, device=x.device)
        side.append((position >= length - w).int() + (position >= length - by).int() * (by > 0))
    regions = 3 * side[0][:, None] + side[1][None, :]
    labels = _to_windows(regions[None, :, :, None], *window).squeeze(-1)
    apart = labels.unsqueeze(2) != labels.unsqueeze(3)
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0).unsqueeze(2)


class _RelativePositionAttention(AnyHeads):
    """Torchvision's relative attention of MaxViT."""

    to_qkv: nn.Linear
    merge: nn.Linear
    n_heads: int
    head_dim: int
    scale_factor: float
    get_relative_positional_bias: Callable[[], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each partition, (batch, partitions, positions, features)."""
        q, k, v = (
            torch.unflatten(part, -1, (-1, self.head_dim)).transpose(2, 3)
            for part in self.to_qkv(x).chunk(3, -1)
        )
        scores = q @ (k * self.scale_factor).transpose(-2, -1)
        attention = (scores + self.get_relative_positional_bias()).softmax(-1)
        return self.merge((attention @ v).transpose(2, 3).flatten(3))  # type: ignore[no-any-return]


_SWIN = "torchvision.models.swin_transformer.ShiftedWindowAttention"
_REWRITTEN: Mapping[str, type[AnyHeads]] = {
    "torch.nn.modules.activation.MultiheadAttention": _MultiheadAttention,
    "torch.nn.modules.transformer.TransformerEncoder": _PaddingEncoder,
    _SWIN: _WindowAttention,
    f"{_SWIN}V2": _WindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": _RelativePositionAttention,
}
"""Replaced when heads leave, or something else of their weights, by the full name of the class."""


def rewritten(module: nn.Module, classes: Mapping[str, type[AnyHeads]]) -> None:
    """Change the class of a module, in place, if it is among those that need another one."""
    mixin = _mixin(module, classes)
    if mixin is not None:
        module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]  # can be hashed
        assert isinstance(module, AnyHeads)
        module.adopt()


def changed(model: nn.Module, classes: Mapping[str, type[AnyHeads]]) -> list[str]:
    """Return the names of the modules that `rewritten` changes."""
    return [name for name, module in model.named_modules() if _mixin(module, classes)]


def _mixin(module: nn.Module, classes: Mapping[str, type[AnyHeads]]) -> type[AnyHeads] | None:
    """Return what is mixed into a module's class, if that is listed, or inherits its forward."""
    kind: Any = type(module)
    for base in kind.__mro__:
        found = classes.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found if kind.forward is base.forward and found.wanted(module) else None
    return None


@functools.cache
def _mixed(mixin: type[AnyHeads], original: type[nn.Module]) -> type[nn.Module]:
    """Return one class for each original, so that modules of one class stay of one class."""
    name = f"AnyHeads{original.__name__}"
    return type(name, (mixin, original), {"__doc__": mixin.__doc__})


def _is_extended(module: object) -> bool:
    """Whether attention of torch adds keys of its own, for which there is no other forward pass."""
    return isinstance(module, nn.MultiheadAttention) and (
        module.bias_k is not None or module.add_zero_attn
    )


def expose_attention(model: nn.Module) -> None:
    """Let fused attention call its output layer as a module, which can be observed then."""
    for name in exposed(model):
        rewritten(model.get_submodule(name), _REWRITTEN)


def exposed(model: nn.Module) -> list[str]:
    """Return the names of the modules that `expose_attention` changes."""
    names = changed(model, _REWRITTEN)
    return [name for name in names if not _is_extended(model.get_submodule(name))]  # keep all heads


def rewrite_cut(module: nn.Module, group: GroupPlan) -> None:
    """Change the class of an attention, in place, whose own weights a group has cut.

    Whatever it has lost: the originals take the widths of heads from that of the stream, and some
    insist on the one that they were built with.
    """
    if group.kind is UnitKind.HEADS or not _is_extended(module):
        rewritten(module, _REWRITTEN)


def leave_nested_tensors(model: nn.Module, group: GroupPlan) -> None:
    """Keep torch's encoders around attention that loses something from packing padded sequences.

    Only the fused path of full width reads what they pack.
    """
    for name in {slot.module for slot in group.slots}:
        within = group.kind is UnitKind.HEADS
        while name:
            within = within or isinstance(model.get_submodule(name), nn.MultiheadAttention)
            name = name.rpartition(".")[0]
            around = model.get_submodule(name)
            if isinstance(around, nn.TransformerEncoder) and within:
                rewritten(around, _REWRITTEN)
