"""What passes have left in modules of a model, and a new model would not have.

Code keeps numbers that it has computed, such as the root of a width.  No value says where it comes
from; but if it is gone, a pass computes it again, and comes to the same.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.memory import attempt
from osscar.network.model_state import CONTAINERS, attributes_of, model_state, store_of
from osscar.network.modules import own_classes
from osscar.proof.equivalence import Inputs, proof_outputs


@dataclass(frozen=True, eq=False)
class Left:
    """An attribute, of all modules of a class, that passes have set: its values by their names."""

    attribute: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        name, value = next(iter(self.values.items()))
        return f"{self.attribute} = {value!r:.60} in {f'module {name!r}' if name else 'the model'}"

    def remove(self, model: nn.Module) -> None:
        """Take it out of the modules of a model: containers are empty then, all else is None."""
        for name, value in self.values.items():
            empty = copy.copy(value) if isinstance(value, CONTAINERS) else None
            if empty is not None:
                empty.clear()
            store_of(model.get_submodule(name), self.attribute)[self.attribute] = empty

    def is_there(self, model: nn.Module) -> bool:
        """Whether the modules of a model have all the values again."""
        modules = ((model.get_submodule(name), value) for name, value in self.values.items())
        return all(
            _same(store_of(module, self.attribute).get(self.attribute), value)
            for module, value in modules
        )


def left_behind(model: nn.Module, inputs: Sequence[Inputs]) -> list[Left]:
    """Return what passes have left in the modules of a model, which is as it was afterwards."""
    known: dict[tuple[type, str], dict[str, Any]] = {}
    for name, module in model.named_modules():
        if own := own_classes(module):
            written = _written(own)
            for attribute, value in attributes_of(module).items():
                kept = bool(value) if isinstance(value, CONTAINERS) else value is not None
                if kept and (isinstance(value, CONTAINERS) or attribute in written):
                    known.setdefault((type(module), attribute), {})[name] = value
    found = (Left(attribute, values) for (_, attribute), values in known.items())
    return [one for one in found if _comes_back(one, model, inputs)]


def _comes_back(left: Left, model: nn.Module, inputs: Sequence[Inputs]) -> bool:
    with attempt(), model_state(model) as state:  # the model may be anyone's code
        state.written |= {(name, left.attribute) for name in left.values}
        left.remove(model)
        proof_outputs(model, inputs)
        return left.is_there(model)
    return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _written(kinds: Sequence[type]) -> set[str]:
    """Return the attributes that methods of classes assign, or name in a text, as for `setattr`."""
    codes = (_code_of(one) for kind in kinds for n, one in vars(kind).items() if n != "__init__")
    steps = (step for code in codes if code is not None for step in dis.get_instructions(code))
    return {str(step.argval) for step in steps if step.opname in ("STORE_ATTR", "LOAD_CONST")}


def _code_of(member: Any) -> CodeType | None:
    """Return the code of a method, also of one that is a property or is wrapped."""
    for inner in ("fget", "func", "__func__", "__wrapped__"):
        member = getattr(member, inner, member)
    return getattr(member, "__code__", None)
