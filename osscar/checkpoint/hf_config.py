"""Configs: those of a family that say a shrunk model's shapes, and those that list them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from graph.groups import UnitKind
from osscar.shrinking.attention import AnyHeads
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.plan import GroupPlan, PruningPlan

HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
"""What configs call the number of query heads and of key-value heads."""

WIDTH_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "hidden_dim",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
"""What configs call the number of FFN neurons."""


COUNTS = re.compile(r"(^|[_.])heads?([_.]|$)|layers?$")
"""Names of fields that count heads or layers, or give the width of a head: weights of the same
shapes are cut in another way by other numbers."""

SHAPES = "osscar_shapes"
WIDTHS = "per_layer_config"
LENIENT = "allow_global_per_layer_attribute_access"
CODE = "auto_map"
"""What `osscar.checkpoint.any_shape` adds to the config of a dense model."""


DESCRIPTION_ERRORS = (
    *(OSError, ValueError, TypeError, AttributeError, StrictDataclassError, SafetensorError),
    *(ArithmeticError, LookupError, AssertionError, ImportError, RuntimeError, MemoryError),
)
"""What libraries raise when a description of a model makes no sense to them."""


def built(kind: Any, config: Any, **options: Any) -> nn.Module | None:
    """Build a model, or a layer, without memory for its weights; None if the library does not."""
    try:
        with torch.device("meta"):
            model: nn.Module = kind(copy.deepcopy(config), **options)
    except DESCRIPTION_ERRORS:
        return None
    return model


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a model's state, by name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def is_any_shape(config: Any) -> bool:
    """Tell whether a config holds a table of shapes, for `modeling_pruned`."""
    return SHAPES in getattr(config, "__dict__", ())


def dense_config(config: Any) -> Any:
    """Return the config of the dense model, in which no shapes are listed."""
    if not is_any_shape(config):
        return config
    config = copy.deepcopy(config)
    setattr(config, WIDTHS, None)  # a property since transformers 5.14, and an attribute before
    for name in (SHAPES, WIDTHS, LENIENT, CODE):
        vars(config).pop(name, None)
    return config


def stock_config(model: PreTrainedModel, plans: Sequence[PruningPlan]) -> Any:
    """Return a config from which transformers builds a model of these shapes, or None.

    A candidate is written from the plans and then tested: it has to pass the family's own
    validation, and the model built from it must have every tensor of the shrunk one in its shape.
    """
    changes = _config_changes(model.config, plans)
    if changes is None or not _is_stock(model):
        return None
    try:
        config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    except DESCRIPTION_ERRORS:
        return None  # the family says itself that it cannot express these sizes
    candidate = built(type(model), config)
    expressed = candidate is not None and shapes_of(candidate) == shapes_of(model)
    return config if expressed else None


def adopt_config(model: PreTrainedModel) -> None:
    """Give a shrunk model the config of its new shapes, where the family has one.

    Its own ``save_pretrained`` then writes a stock checkpoint, and the plans so far are history
    that nobody needs.
    """
    plans = lineage_of(model).plans
    changes = _config_changes(model.config, plans)
    if changes is None or stock_config(model, plans) is None:
        return
    # In place: every module holds a reference to the one config.
    for name, value in changes.items():
        setattr(model.config, name, value)
    adopted = model.config.to_dict()
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if type(own) is type(model.config) and own.to_dict() == adopted:
            module.config = model.config  # of which some got a copy while it was not true yet
    note(model, plans=())


def _is_stock(model: nn.Module) -> bool:
    """Whether the family's own code computes what the model does."""
    return all(module.stock for module in model.modules() if isinstance(module, AnyHeads))


def _config_changes(config: Any, plans: Sequence[PruningPlan]) -> dict[str, Any] | None:
    """Return the new values of config fields, or None if layers differ."""
    changes: dict[str, Any] = {}
    for plan in plans:
        heads = [group for group in plan.groups if group.kind is UnitKind.HEADS]
        neurons = [group for group in plan.groups if group.kind is UnitKind.NEURONS]
        if len(heads) + len(neurons) < len(plan.groups):
            return None
        shares = {Fraction(len(group.kept), group.units) for group in heads}
        if len(shares) > 1 or not _change_widths(config, neurons, changes):
            return None
        for share in shares:
            if not _change_heads(config, share, changes):
                return None
    return changes


def _change_heads(config: Any, share: Fraction, changes: dict[str, Any]) -> bool:
    """Note the new head counts; False if the config has no single count and width."""
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return False
    for name in HEAD_FIELDS:
        old = changes.get(name, getattr(config, name, None))
        # One key-value head that all query heads share is never cut.
        if isinstance(old, int) and not (name == "num_key_value_heads" and old == 1):
            changes[name] = int(old * share)
    # Where it is a property, the family derives it, and no config can express fewer heads.
    if not isinstance(getattr(type(config), "head_dim", None), property):
        changes["head_dim"] = getattr(config, "head_dim", None) or hidden // heads
    return True


def _change_widths(config: Any, neurons: Sequence[GroupPlan], changes: dict[str, Any]) -> bool:
    """Note the new widths; False if groups that were of one width no longer are."""
    widths: dict[int, int] = {}
    for group in neurons:
        if widths.setdefault(group.units, len(group.kept)) != len(group.kept):
            return False
    for name in WIDTH_FIELDS:
        old = changes.get(name, getattr(config, name, None))
        if old in widths:
            changes[name] = widths[old]
    if len(widths) == 1 and getattr(config, "n_inner", 0) is None:
        (changes["n_inner"],) = widths.values()  # GPT-2 derives its width where none is given
    return True
