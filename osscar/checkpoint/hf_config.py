"""Configs: those of a family that say a shrunk model's shapes, and those that list them.

Where no stock config can, ``config.json`` names `modeling_pruned` in ``auto_map``, and lists every
shape that is not that of the config (``osscar_shapes``); transformers then reads the checkpoint
with that one small file of code beside it, and refuses the directory without it: ``config.json``
does not name the family, whose layers would all be built in one width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from graph.groups import UnitKind
from osscar.checkpoint import modeling_pruned
from osscar.proof.lineage import lineage_of, note
from osscar.proof.plan import PruningPlan, combined_groups
from osscar.shrinking.slice import counts

_HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
"""What configs call the number of query heads and of key-value heads."""

_WIDTH_FIELDS = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "d_ff"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "shared_intermediate_size"),
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "expert_ffn_hidden_size",
)
"""What configs call the number of FFN neurons, and of those of each expert and of shared ones."""

SHAPES = "osscar_shapes"
CODE = "auto_map"
"""What `any_shape_config` adds to the config of a dense model."""

_PER_LAYER = "per_layer_config"
"""What transformers has since 5.14 for layers that differ, in families that build them so."""


DESCRIPTION_ERRORS = (
    *(OSError, ValueError, TypeError, AttributeError, StrictDataclassError, SafetensorError),
    *(ArithmeticError, LookupError, AssertionError, ImportError, RuntimeError, MemoryError),
)
"""What libraries raise when a description of a model makes no sense to them."""


def built(kind: Any, config: Any) -> nn.Module | None:
    """Build a model without memory for its weights; None if the library does not."""
    try:
        with torch.device("meta"):
            model: nn.Module = kind(copy.deepcopy(config))
    except DESCRIPTION_ERRORS:
        return None
    return model


def is_any_shape(config: Any) -> bool:
    """Tell whether a config holds a table of shapes, for `modeling_pruned`."""
    return SHAPES in getattr(config, "__dict__", ())


def dense_config(config: Any) -> Any:
    """Return the family's own config of the dense model, in which no shapes are listed."""
    if is_any_shape(config):
        config = copy.deepcopy(config)
        _forget_shapes(config)
    return config


def _forget_shapes(config: Any) -> None:
    """Make a config, in place, that of the dense model."""
    config.__class__ = architecture(type(config))
    for name in (SHAPES, CODE):
        vars(config).pop(name, None)


def architecture(kind: Any) -> Any:
    """Return the class of transformers that a class of `modeling_pruned` is made of, or itself."""
    own = getattr(kind, "original", None)
    return own if isinstance(own, type) and issubclass(kind, own) else kind


def class_of(kind: Any, config: Any) -> Any:
    """Return what builds a model in the shapes that its config says: no code from a directory."""
    own = architecture(kind)
    return getattr(modeling_pruned, own.__name__) if is_any_shape(config) else own


def stock_config(model: PreTrainedModel, plans: Sequence[PruningPlan]) -> Any:
    """Return a config from which transformers builds a model of these shapes (tested), or None."""
    dense = dense_config(model.config)
    changes = _config_changes(dense, plans)
    if changes is None:
        return None
    try:
        config = type(dense).from_dict({**dense.to_dict(), **changes})
    except DESCRIPTION_ERRORS:
        return None  # the family says itself that it cannot express these sizes
    candidate = built(architecture(type(model)), config)
    if candidate is None or candidate.state_dict().keys() != model.state_dict().keys():
        return None
    return None if _tensors(candidate, model) else config


def adopt_config(model: PreTrainedModel) -> None:
    """Give a model the stock config of its new shapes, if there is one, and forget its plans."""
    plans = lineage_of(model).plans
    changes = _config_changes(dense_config(model.config), plans)
    if changes is None or stock_config(model, plans) is None:
        return
    # In place: every module holds a reference to the one config.
    if is_any_shape(model.config):
        _forget_shapes(model.config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    adopted = model.config.to_dict()
    for module in model.modules():
        own: Any = dense_config(getattr(module, "config", None))
        if type(own) is type(model.config) and own.to_dict() == adopted:
            module.config = model.config  # of which some got a copy while it was not true yet
    note(model, plans=(), listed=0)


def _config_changes(config: Any, plans: Sequence[PruningPlan]) -> dict[str, Any] | None:
    """Return the new values of config fields, or None if layers that were alike no longer are."""
    kept: dict[tuple[UnitKind, int], int] = {}
    groups, changes = combined_groups(plans), dict[str, Any]()
    for group in groups:
        if kept.setdefault((group.kind, group.units), len(group.kept)) != len(group.kept):
            return None
    shares = {Fraction(of, units) for (kind, units), of in kept.items() if kind is UnitKind.HEADS}
    widths = {units: of for (kind, units), of in kept.items() if kind is UnitKind.NEURONS}
    others = [group for group in groups if group.kind not in (UnitKind.HEADS, UnitKind.NEURONS)]
    if len(shares) > 1 or not all(group.kind.routed for group in others):
        return None
    fields = config.to_dict()
    if shares and _PER_LAYER in fields:  # whose layers have head fields of their own
        return None
    for group in others[:1]:
        changes |= counts(fields, group)
    for name in _WIDTH_FIELDS:
        old = fields.get(name)
        if isinstance(old, list):  # a width for each layer
            changes[name] = [widths.get(width, width) for width in old]
        elif old in widths:
            changes[name] = widths[old]
    if len(widths) == 1 and fields.get("n_inner", 0) is None:
        (changes["n_inner"],) = widths.values()  # GPT-2 derives its width where none is given
    for share in shares:
        heads, hidden = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
        if not isinstance(heads, int) or not isinstance(hidden, int):
            return None
        for name in _HEAD_FIELDS:
            old = getattr(config, name, None)
            # One key-value head that all query heads share is never cut.
            if isinstance(old, int) and not (name == "num_key_value_heads" and old == 1):
                changes[name] = int(old * share)
        # Where it is a property, the family derives it, and no config can express fewer heads.
        if not isinstance(getattr(type(config), "head_dim", None), property):
            changes["head_dim"] = getattr(config, "head_dim", None) or hidden // heads
    return changes


# ---- any shape ---------------------------------------------------------------------------

MODELLING_FILE = Path(modeling_pruned.__file__)
"""What is written beside the weights: a module of this package, as it stands."""


def any_shape_config(model: PreTrainedModel) -> Any:
    """Return a config from which `modeling_pruned` builds a model of these shapes, or None."""
    config = copy.deepcopy(dense_config(model.config))
    if CODE in vars(config) or _PER_LAYER in config.to_dict():
        return None
    kind = architecture(type(model))
    dense = built(kind, config)
    if dense is None or dense.state_dict().keys() != model.state_dict().keys():
        return None
    shapes: dict[str, Any] = {"tensors": _tensors(dense, model), "numbers": {}}
    try:
        modeling_pruned.resize(dense, shapes)
        shapes["numbers"] = _numbers(dense, model)
        modeling_pruned.resize(dense, {"tensors": {}, "numbers": shapes["numbers"]})
        config.__class__ = getattr(modeling_pruned, type(config).__name__)
    except DESCRIPTION_ERRORS:
        return None
    if _tensors(dense, model) or _numbers(dense, model):
        return None
    setattr(config, SHAPES, shapes)
    setattr(config, CODE, dict(_auto_map(kind, dense.config)))
    return config


def _auto_map(kind: Any, config: Any) -> Iterator[tuple[str, str]]:
    """Yield the automatic classes that know an architecture and its config, with the class."""
    yield "AutoConfig", f"{MODELLING_FILE.stem}.{type(config).__name__}"
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("Auto") or mapping is None or type(config) not in mapping:
            continue
        found = mapping[type(config)]
        found = found if isinstance(found, tuple) else (found,)
        own = found[0] if name == "AutoModel" else kind
        if own in found:
            yield name, f"{MODELLING_FILE.stem}.{own.__name__}"


# ---- the table of shapes -----------------------------------------------------------------


def _tensors(dense: nn.Module, model: nn.Module) -> dict[str, list[int]]:
    new = model.state_dict(keep_vars=True)
    old = dense.state_dict(keep_vars=True)
    return {name: list(new[name].shape) for name in new if new[name].shape != old[name].shape}


_PLAIN = (bool, int, float, str, type(None))


def _numbers(dense: nn.Module, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Return the plain values that differ, by module (ValueError if anything else does)."""
    found: dict[str, dict[str, Any]] = {}
    pairs = zip(dense.named_modules(), model.named_modules(), strict=True)
    for (name, old), (other, new) in pairs:
        like = name == other and _kind(new) is _kind(old) and _constants(new) == _constants(old)
        if not like:
            raise ValueError(name)
        found[name] = dict(_differences(vars(old), vars(new)))
        config = vars(new).get("config") or model.config
        if config is not model.config:  # of its own
            changed = dict(_differences(vars(old.config), vars(config)))
            found[name] |= {"config": changed} if changed else {}
    return {name: numbers for name, numbers in found.items() if numbers}


def _kind(module: nn.Module) -> type:
    """Return a module's class; torch makes one for each module with a parametrization."""
    kind = type(module)
    own: type = architecture(kind.__bases__[0] if is_parametrized(module) else kind)
    return own


def _constants(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what no file holds."""
    own = module._non_persistent_buffers_set
    return {n: t.shape for n, t in module.named_buffers(recurse=False) if n in own}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, before in old.items():
        after = new.get(name, before)
        if _is_plain(before) and _is_plain(after) and name != "training" and before != after:
            yield name, after


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(member, _PLAIN) for member in value)
    return isinstance(value, _PLAIN)
