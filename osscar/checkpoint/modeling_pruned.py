"""A model of transformers with layers of any width, as the `config.json` beside this file says.

transformers builds the architecture with all its units.  Before any weights are read, the tensors
that the config lists under `osscar_shapes` get the shapes given there, and the modules the numbers
(of heads, mostly) that go with them.  Nothing else differs: the code that runs is that of
transformers.  This file needs torch and transformers alone.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES = {nn.Linear: ("out_features", "in_features"), Conv1D: ("nx", "nf"), nn.Module: ()}
"""What layers call the dimensions of their weight."""


class PrunedConfig:
    """Mixed into a config: it is written without the family, whose layers are all of one width."""

    _auto_class = "AutoConfig"

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` says."""
        told: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        told.pop("model_type", None)
        return told


class Pruned:
    """Mixed into an architecture of transformers: builds it, and gives it the shapes."""

    original: Any
    """The architecture."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        resize(self, config.osscar_shapes)
        refuse_one_count(self, config)

    # transformers reads the file that defines a class to tell what it can choose; that is not this.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.original._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.original._can_set_experts_implementation())


def resize(model: Any, shapes: dict[str, Any]) -> None:
    """Give tensors their shapes, and modules their numbers.

    Parameters
    ----------
    model
        With all its units; changed in place.
    shapes
        ``tensors``, the shape of each tensor that differs, by its name, and ``numbers``, those
        attributes of modules that differ, by the module's name.  The model without a head calls
        its modules by shorter names.

    Raises
    ------
    KeyError, AttributeError, IndexError
        If there is no such module or tensor, or it has fewer dimensions.
    ValueError
        If a module has no such number.
    """
    own = dict(model.named_modules())
    modules: dict[str, Any] = {f"{model.base_model_prefix}.{name}": own[name] for name in own} | own
    resized: dict[int, nn.Parameter] = {}  # tied tensors stay tied
    for name, shape in shapes["tensors"].items():
        path, _, attribute = name.rpartition(".")
        module = modules[path]
        old = getattr(module, attribute)
        new = old.detach()[tuple(map(slice, shape))].clone()
        if isinstance(old, nn.Parameter):
            new = resized.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
        setattr(module, attribute, new)
        if attribute == "weight":
            sizes = next(sizes for kind, sizes in SIZES.items() if isinstance(module, kind))
            for dim, size in enumerate(sizes):
                setattr(module, size, new.shape[dim])
    for path, numbers in shapes["numbers"].items():
        module = modules[path]
        for attribute, value in numbers.items():
            if attribute == "config" and isinstance(value, dict) and attribute in vars(module):
                # of its own, which differs from the model's
                config, changed = copy.copy(module.config), value
                for field, number in changed.items():
                    vars(config)[field] = _number(config, f"{path}.config", field, number)
                module.config = config
            else:
                setattr(module, attribute, _number(module, path, attribute, value))


def refuse_one_count(model: Any, config: Any) -> None:
    """Refuse vLLM, which gives all layers the config's heads, where an attention has others."""
    if config._attn_implementation != "vllm":
        return
    attentions = [path for path, module in model.named_modules() if hasattr(module, "is_causal")]
    for name in config.osscar_shapes["tensors"]:
        if any(f".{path}." in f".{name}" for path in attentions):
            raise ValueError(
                f"{name!r} has lost heads, and vLLM gives all layers as many as config.json names; "
                "run the model by transformers, or prune neurons alone"
            )


def _number(owner: Any, path: str, name: str, value: Any) -> Any:
    """Return a number, or a row of them, for an attribute that is one already, or refuse it."""
    old, row = vars(owner).get(name), (list, tuple)  # JSON knows no tuples
    alike = isinstance(value, row) is isinstance(old, row)
    members = [*old, *value] if alike and isinstance(old, row) else [old, value]
    if not alike or any(type(member) is not int for member in members):
        raise ValueError(
            f"osscar_shapes gives {path!r} {name} = {value!r} in place of {old!r}; only whole "
            "numbers can change"
        )
    return type(old)(value)


def __getattr__(name: str) -> Any:
    """Make the class that `auto_map` in the config names: an architecture, or its config."""
    original = None if name.startswith("_") else getattr(transformers, name, None)
    own = {"__module__": __name__, "__doc__": getattr(original, "__doc__", None)}
    if isinstance(original, type) and issubclass(original, transformers.PretrainedConfig):
        bases: tuple[type, ...] = (PrunedConfig, original)
    elif isinstance(original, type) and issubclass(original, transformers.PreTrainedModel):
        bases = (Pruned, original)
        own["config_class"] = __getattr__(original.config_class.__name__)  # type: ignore[attr-defined]
    else:
        raise AttributeError(f"{name!r} is no architecture of transformers")
    return globals().setdefault(name, type(name, bases, {**own, "original": original}))
