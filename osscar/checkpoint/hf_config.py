"""Configs: those of a family that say a shrunk model's shapes, and those that list them.

Where no stock config can, ``config.json`` names `modeling_pruned` in ``auto_map``, and lists every
shape that is not that of the config (``osscar_shapes``); transformers then reads the checkpoint
with that one small file of code beside it.  Where the family's own layers, each built from a config
of its own, have these shapes, it also says so in the way that transformers has for that
(``per_layer_config``), which other readers may follow without any of our code.
"""

from __future__ import annotations

import copy
import re
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
from osscar.shrinking.attention import AnyHeads
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.plan import GroupPlan, PruningPlan

_HEAD_FIELDS = ("num_attention_heads", "num_key_value_heads")
"""What configs call the number of query heads and of key-value heads."""

_WIDTH_FIELDS = (
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
_LENIENT = "allow_global_per_layer_attribute_access"
CODE = "auto_map"
"""What `any_shape_config` adds to the config of a dense model."""


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


def _shapes_of(model: nn.Module) -> dict[str, torch.Size]:
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
    for name in (SHAPES, WIDTHS, _LENIENT, CODE):
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
    expressed = candidate is not None and _shapes_of(candidate) == _shapes_of(model)
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
    for name in _HEAD_FIELDS:
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
    for name in _WIDTH_FIELDS:
        old = changes.get(name, getattr(config, name, None))
        if old in widths:
            changes[name] = widths[old]
    if len(widths) == 1 and getattr(config, "n_inner", 0) is None:
        (changes["n_inner"],) = widths.values()  # GPT-2 derives its width where none is given
    return True


# ---- any shape ---------------------------------------------------------------------------

MODELLING_FILE = Path(modeling_pruned.__file__)
"""What is written beside the weights: a module of this package, as it stands."""


def any_shape_config(model: PreTrainedModel, plans: Sequence[PruningPlan]) -> Any:
    """Return a config from which `modeling_pruned` builds a model of these shapes, or None.

    None is returned where the model runs code that transformers does not have, where something
    other than shapes and numbers differs, or where its config already tells layers apart.
    """
    config = copy.deepcopy(model.config)
    if CODE in vars(config) or WIDTHS in config.to_dict():
        return None
    dense = built(type(model), config)
    if dense is None or dense.state_dict().keys() != model.state_dict().keys():
        return None
    shapes: dict[str, Any] = {"tensors": _tensors(dense, model), "numbers": {}}
    try:
        modeling_pruned.resize(dense, shapes)
        shapes["numbers"] = _numbers(dense, model)
        modeling_pruned.resize(dense, {"tensors": {}, "numbers": shapes["numbers"]})
    except DESCRIPTION_ERRORS:
        return None
    if _tensors(dense, model) or _numbers(dense, model):
        return None
    setattr(config, SHAPES, shapes)
    setattr(config, CODE, dict(_auto_map(model)))
    telling = _with_head_width(config)
    widths = _widths(model, telling, plans)
    if widths:
        _tell_layers(telling, widths)
    found = telling if widths else config
    # As pairs, which a search for the field that is replaced everywhere does not find.
    fields = sorted(found.to_dict().items())
    counts = [[name, value] for name, value in fields if _is_count(name, value)]
    getattr(found, SHAPES)["counts"] = counts
    return found


def _is_count(name: str, value: Any) -> bool:
    """Tell whether a field has to be as it is for the shapes to be those of the model."""
    if isinstance(value, bool):
        return False
    return name == WIDTHS or (isinstance(value, int | list) and bool(COUNTS.search(name)))


def read_any_shape(path: Path, name: str) -> nn.Module:
    """Read a directory as transformers does with its remote code, which is a module of ours."""
    model: nn.Module = getattr(modeling_pruned, name).from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def _auto_map(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield the automatic classes that know the architecture, and `AutoModel`, with the class."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("Auto") or mapping is None or type(model.config) not in mapping:
            continue
        found = mapping[type(model.config)]
        found = found if isinstance(found, tuple) else (found,)
        own = type(model) if type(model) in found else None
        kind = found[0] if name == "AutoModel" else own
        if kind is not None:
            yield name, f"{MODELLING_FILE.stem}.{kind.__name__}"


# ---- the table of shapes -----------------------------------------------------------------


def _tensors(dense: nn.Module, model: nn.Module) -> dict[str, list[int]]:
    new = model.state_dict(keep_vars=True)
    old = dense.state_dict(keep_vars=True)
    return {name: list(new[name].shape) for name in new if new[name].shape != old[name].shape}


_PLAIN = (bool, int, float, str, type(None))


def _numbers(dense: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the numbers that differ, by module; refuse whatever else does with a ValueError."""
    found: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for name, old in dense.named_modules():
        new = modules.pop(name, None)
        if _kind(new) is not _kind(old) or _constants(new) != _constants(old):
            raise ValueError(name)
        own = dict(_differences(vars(old), vars(new)))
        own_config = _own_config(old, new, model)
        found[name] = {**own, **({"config": own_config} if own_config else {})}
    if modules:
        raise ValueError(next(iter(modules)))
    return {name: numbers for name, numbers in found.items() if numbers}


def _kind(module: nn.Module | None) -> type:
    """Return a module's class; torch makes one for each module with a parametrization."""
    kind = type(module)
    parametrized = isinstance(module, nn.Module) and is_parametrized(module)
    return kind.__bases__[0] if parametrized else kind


def _constants(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what no file holds."""
    names = module._non_persistent_buffers_set
    buffers = module._buffers
    return {n: t.shape for n in names if (t := buffers[n]) is not None}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, before in old.items():
        after = new.get(name, before)
        if _is_plain(before) and _is_plain(after) and name != "training" and before != after:
            if not _is_size(before) or not _is_size(after):
                raise ValueError(name)
            yield name, after


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(member, _PLAIN) for member in value)
    return isinstance(value, _PLAIN)


def _is_size(value: Any) -> bool:
    members = value if isinstance(value, list | tuple) else (value,)
    return all(type(member) is int for member in members)


def _own_config(old: Any, new: Any, model: Any) -> dict[str, Any]:
    """Return what differs in a config that a module has for itself."""
    config = vars(new).get("config")
    if config is None or config is model.config:
        return {}
    return dict(_differences(vars(old.config), vars(config)))


# ---- per_layer_config --------------------------------------------------------------------


def _with_head_width(config: Any) -> Any:
    """Let a config name the width of a head, where it is derived from their number otherwise."""
    config = copy.deepcopy(config)
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    known = isinstance(getattr(type(config), "head_dim", None), property)
    known = known or getattr(config, "head_dim", None) is not None
    if not known and isinstance(heads, int) and isinstance(hidden, int):
        config.head_dim = hidden // heads
    return config


def _widths(
    model: PreTrainedModel, config: Any, plans: Sequence[PruningPlan]
) -> dict[str, dict[str, int]]:
    """Return ``per_layer_config``: by layer, those fields of the config that differ there.

    Empty where a layer that is built from it has other shapes, as in families that derive the
    width of a head from the number of heads.
    """
    stack = _layers(model)
    if stack is None:
        return {}
    name, layers = stack
    widths: dict[int, dict[str, int]] = {}
    for group in (group for plan in plans for group in plan.groups):
        index = _layer_of(group, name)
        if index is None:
            return {}
        own = widths.setdefault(index, {})
        own.update(_narrower(config, group, own))
    for index, old in enumerate(layers):
        new = _layer(type(old), config, widths.get(index, {}), index)
        if new is None or _shapes_of(new) != _shapes_of(old):
            return {}
    return {str(index): own for index, own in sorted(widths.items()) if own}


def _tell_layers(config: Any, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Write the widths into a config, in a way that its own validation lets through.

    That of LLaMA, as of transformers 5.24, reads the number of heads, which the config then does
    not name any more, unless it is told that readers may see that of the dense model.
    """
    setattr(config, WIDTHS, widths)
    validate = getattr(config, "validate", lambda: None)
    try:
        validate()
    except RuntimeError:
        setattr(config, _LENIENT, True)


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Return the one list of all layers, and its name; None if there are several."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return found[0] if len(found) == 1 else None


def _layer_of(group: GroupPlan, stack: str) -> int | None:
    """Return the one layer that a group lies in."""
    pattern = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    found = [pattern.match(slot.tensor) for slot in group.slots]
    indices = {None if match is None else int(match[1]) for match in found}
    return indices.pop() if len(indices) == 1 else None


def _narrower(config: Any, group: GroupPlan, own: Mapping[str, int]) -> dict[str, int]:
    """Return the fields of a layer's config that count the units of a group."""
    changes: dict[str, int] = {}
    fields = _HEAD_FIELDS if group.kind is UnitKind.HEADS else _WIDTH_FIELDS
    for field in fields:
        name = config.attribute_map.get(field, field)
        old = own.get(name, getattr(config, name, None))
        if type(old) is not int or (field == "num_key_value_heads" and old == 1):
            continue  # one key head that all query heads share is never cut
        if group.kind is UnitKind.HEADS or old == group.units:
            changes[name] = group.scaled(old)
    return changes


def _layer(kind: Any, config: Any, own: Mapping[str, int], index: int) -> nn.Module | None:
    """Build one layer from a config of its own."""
    config = copy.deepcopy(config)
    for name, value in own.items():
        setattr(config, name, value)
    return built(kind, config, layer_idx=index)
