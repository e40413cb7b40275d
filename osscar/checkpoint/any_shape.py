"""Checkpoints that transformers reads whatever their shapes, with one small file of code beside.

``config.json`` then names `modeling_pruned` in ``auto_map``, and lists every shape that is not that
of the config (``osscar_shapes``).  Where the family's own layers, each built from a config of its
own, have these shapes, it also says so in the way that transformers has for that
(``per_layer_config``), which other readers may follow without any of our code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from graph.groups import UnitKind
from osscar.checkpoint import modeling_pruned
from osscar.checkpoint.hf_config import (
    CODE,
    COUNTS,
    DESCRIPTION_ERRORS,
    HEAD_FIELDS,
    LENIENT,
    SHAPES,
    WIDTH_FIELDS,
    WIDTHS,
    built,
    shapes_of,
)
from osscar.shrinking.plan import GroupPlan, PruningPlan

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
    except (*DESCRIPTION_ERRORS, _Inexpressible):
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


class _Inexpressible(Exception):
    """Something differs that is neither a shape nor a number."""


def _tensors(dense: nn.Module, model: nn.Module) -> dict[str, list[int]]:
    new = model.state_dict(keep_vars=True)
    old = dense.state_dict(keep_vars=True)
    return {name: list(new[name].shape) for name in new if new[name].shape != old[name].shape}


_PLAIN = (bool, int, float, str, type(None))


def _numbers(dense: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes that differ, by module."""
    found: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for name, old in dense.named_modules():
        new = modules.pop(name, None)
        if _kind(new) is not _kind(old) or _constants(new) != _constants(old):
            raise _Inexpressible(name)
        own = dict(_differences(vars(old), vars(new)))
        own_config = _own_config(old, new, model)
        found[name] = {**own, **({"config": own_config} if own_config else {})}
    if modules:
        raise _Inexpressible(next(iter(modules)))
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
                raise _Inexpressible(name)
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
        if new is None or shapes_of(new) != shapes_of(old):
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
        setattr(config, LENIENT, True)


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
    fields = HEAD_FIELDS if group.kind is UnitKind.HEADS else WIDTH_FIELDS
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
