"""Whether a model runs in training, as far as the shapes of what it computes tell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.tracing.export import in_mode
from graph.tracing.preserve import preserved
from graph.training import decides_by_training, same_draws
from osscar.base.memory import let_shortage_pass
from osscar.network.fake import on_shapes
from osscar.network.kernels import computable_mixtures
from osscar.offload.on_disk import OnDisk
from osscar.shrinking.equivalence import Inputs, call, explained


def failure_in_training(model: nn.Module, inputs: Inputs) -> str:
    """Say how a model fails in training; nothing if it does not.

    Its own modules are in training, and layers of torch in evaluation. Nothing is computed, so that
    code which changes weights or keeps averages changes none.
    """
    with (
        preserved(model),
        in_mode(model, training=True),
        computable_mixtures(model),
        same_draws(),
        torch.no_grad(),
        on_shapes() as fake,
    ):
        try:
            call(model, pytree.tree_map_only(Tensor, fake.from_tensor, inputs))
        except Exception as error:  # the model may be anyone's code
            let_shortage_pass(error)
            return str(explained(error, model))
    return ""


def could_fail_in_training(model: nn.Module, inputs: Inputs) -> bool:
    """Whether there is code for training that runs now, and can be tried once more.

    Models that are read from disk cannot: they are those of families whose code is known.
    """
    on_disk = any(isinstance(parameter, OnDisk) for parameter in model.parameters())
    return not on_disk and decides_by_training(model) and not failure_in_training(model, inputs)
