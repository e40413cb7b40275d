"""What a smaller model knows of the dense one, by which its checkpoint is tried when it is saved.

A checkpoint of code of one's own holds no code: who reads it builds the dense model, of which a
copy is shrunk and filled.  Whether that works is known when it is written, if the structure of the
dense model is still there: its modules with all that they hold but the values of parameters.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError
from osscar.network.modules import copied, device_of
from osscar.offload.on_disk import is_on_disk
from osscar.proof.equivalence import Inputs
from osscar.proof.lineage import lineage_of

_STRUCTURE = "osscar_structure"
"""The attribute of a model that holds its `_DenseStructure`."""


@dataclass(frozen=True, eq=False)
class _DenseStructure:
    """A dense model without the values of its parameters.

    `model` is as its user would build it, with parameters on 'meta', and `device` is where these
    were; `inputs` are the form of some that it takes, on 'meta', None where nobody has told.
    """

    model: nn.Module
    device: torch.device
    inputs: Inputs | None = None

    def built(self) -> nn.Module:
        """Return the model on its device, every parameter zero."""
        return _with_zeros(self.model, self.device)

    def drawn(self) -> Inputs | None:
        """Return inputs of their form on the CPU: noise, and zeros where they are no fractions."""
        generator = torch.Generator().manual_seed(0)

        def draw(form: Tensor) -> Tensor:
            if form.is_floating_point():
                return torch.randn(form.shape, generator=generator).to(form.dtype)
            return torch.zeros(form.shape, dtype=form.dtype)

        return pytree.tree_map_only(Tensor, draw, self.inputs)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> _DenseStructure:
        return self  # nobody changes it


def remember_structure(model: nn.Module, inputs: Inputs | None = None) -> None:
    """Note the structure of a dense model, which is about to be changed.

    A model from which units were removed already is left with what is known of it; so is one that
    cannot be copied, and one on disk, whose library builds it. Of `inputs` the form is kept, and no
    value.
    """
    known = structure_of(model)
    is_dense = not lineage_of(model).plans and any(True for _ in model.parameters())
    if known is None and is_dense and not is_on_disk(model):
        with suppress(ModelError):
            known = _DenseStructure(_with_zeros(model, torch.device("meta")), device_of(model))
    if known is not None:
        if known.inputs is None and inputs is not None:
            form = partial(torch.empty_like, device="meta")
            forms = pytree.tree_map_only(Tensor, form, inputs)
            known = dataclasses.replace(known, inputs=forms)
        setattr(model, _STRUCTURE, known)


def structure_of(model: nn.Module) -> _DenseStructure | None:
    """Return what is known of the dense model that a model was made of."""
    found = getattr(model, _STRUCTURE, None)
    return found if isinstance(found, _DenseStructure) else None


def without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model, every parameter zero."""
    return _with_zeros(model, device_of(model))


def hand_on_structure(model: nn.Module, made: nn.Module) -> None:
    """Let a model that was made of another one know what is known of that one's dense model."""
    known = structure_of(model)
    if known is not None:
        setattr(made, _STRUCTURE, known)


def _with_zeros(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model with parameters of zeros on a device; tied ones stay tied."""
    zeros = {
        id(parameter): nn.Parameter(
            torch.zeros_like(parameter, device=device), parameter.requires_grad
        )
        for parameter in model.parameters()
    }
    return copied(model, zeros)
