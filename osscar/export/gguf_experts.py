"""Mixtures of experts in GGUF: their sizes, and their tensors in the parts that llama.cpp takes.

llama.cpp has one number of experts for all layers, and keeps the gates of all experts in one tensor
and what they multiply in another, where transformers has both in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

_FUSED = "experts.gate_up_proj"


def mixtures(model: Any) -> list[Any]:
    """Return the experts of each layer that is a mixture."""
    found = (getattr(layer.mlp, "experts", None) for layer in model.model.layers)
    return [experts for experts in found if experts is not None]


def why_no_mixture(model: Any, architecture: str, normalized: bool) -> str | None:
    """Say what about mixtures is not in an architecture of llama.cpp; None if nothing."""
    counts = [len(experts.down_proj) for experts in mixtures(model)]
    layers = len(model.model.layers)
    if len(counts) < layers:
        return f"{layers - len(counts)} of its {layers} layers are no mixtures"
    if len(set(counts)) > 1:
        return f"its layers have {counts} experts, and {architecture!r} has one number for all"
    if getattr(model.config, "norm_topk_prob", True) is not normalized:
        does = "divides" if normalized else "does not divide"
        return f"{architecture!r} {does} the weights of a token's experts by their sum"
    if getattr(model.config, "clip_qkv", None) is not None:
        return "it clips queries, keys and values (clip_qkv)"
    norms = [getattr(layer.self_attn, "k_norm", None) for layer in model.model.layers]
    wide = {len(norm.weight) for norm in norms if norm is not None}
    if architecture == "olmoe" and wide != {model.config.hidden_size}:
        return (
            f"its keys are normalized over {', '.join(map(str, sorted(wide)))} features, and "
            f"'olmoe' takes these to be as many as the hidden size, {model.config.hidden_size}"
        )
    return None


def mixture_sizes(model: Any) -> dict[str, int]:
    """Return what a file says of mixtures, by key without the architecture."""
    experts, block = mixtures(model)[0], model.model.layers[0].mlp
    sizes = {
        "expert_count": len(experts.down_proj),
        "expert_used_count": model.config.num_experts_per_tok,
        "expert_feed_forward_length": experts.down_proj.shape[2],
    }
    if hasattr(block, "shared_expert"):
        sizes["expert_shared_feed_forward_length"] = block.shared_expert.down_proj.in_features
    return sizes


def in_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor of a model, that of gates and what they multiply as two."""
    if not name.endswith(_FUSED):
        yield (f"{name}.weight" if name.endswith("experts.down_proj") else name), tensor
        return
    for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
        yield name.replace(_FUSED, f"experts.{part}_proj.weight"), half


def pad_experts(experts: Any, block: int) -> int:
    """Add neurons of zeros to each expert, up to whole blocks; return how many."""
    count = -int(experts.down_proj.shape[2]) % block
    gates = pad(experts.gate_up_proj.unflatten(1, (2, -1)), (0, 0, 0, count)).flatten(1, 2)
    experts.gate_up_proj = nn.Parameter(gates)
    experts.down_proj = nn.Parameter(pad(experts.down_proj, (0, count)))
    return count * len(experts.down_proj)
