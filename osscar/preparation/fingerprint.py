"""The fingerprint of a dense model and its data, by which a run that goes on knows both.

The code of a model is not all in its file: what it does may lie in a helper, a constant, a default,
a hook.  What it returns on given inputs tells, to the bit, where the same device rounds alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pydantic import with_config
from torch import nn

from osscar.base.devices import this_device
from osscar.base.json_files import STRICT
from osscar.data.batches import ModelInputs
from osscar.network.model_state import model_state
from osscar.network.modules import device_of, named_tensors, sha256_of
from osscar.offload.on_disk import room_for_pass
from osscar.preparation.failures import failures_named
from osscar.proof.equivalence import proof_outputs, rounding
from osscar.proof.lineage import lineage_of
from osscar.proof.sample import Output
from solvers.own_code import source_digests


@with_config(STRICT)
@dataclass(frozen=True)
class DenseOutputs:
    """What a dense model returns on its first calibration sample, and on its example inputs."""

    device: dict[str, str]
    """What it ran on, as `osscar.base.devices.this_device` tells it."""
    sha256: str
    outputs: tuple[Output, ...]
    rounding: float
    """How far another device may be off, relative to the size of each."""

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInputs) -> DenseOutputs:
        """Run a model, which is left as it was."""
        sample = inputs.first(model)
        with (
            model_state(model),
            failures_named(model, sample, inputs.source),
            room_for_pass(model, max(x.numel() for x in sample.values())),
        ):
            found = proof_outputs(model, [sample, inputs.example(model)])
        return cls(
            this_device(device_of(model)),
            sha256_of((str(index), one) for index, one in enumerate(found)),
            tuple(map(Output.of, found)),
            rounding(found),
        )

    def differs(self, before: DenseOutputs) -> bool:
        """Whether another model return what was there before.

        To the bit where the same processor computed both, in as many threads; elsewhere, and on
        graphics cards, which add up in any order, but for rounding.
        """
        if self.sha256 == before.sha256:
            return False
        on_card = not self.device["threads"]
        if not on_card and self.device == before.device:
            return True
        if len(self.outputs) != len(before.outputs) or not self.outputs:
            return True
        apart = max(map(Output.distance, self.outputs, before.outputs))
        return apart > self.rounding


def own_code(*code: Any) -> dict[str, str]:
    """Return the digests of files of a user's own code, of a backend, a model or a function."""
    found: dict[str, set[str]] = {}
    for one in code:
        for name, digest in source_digests(one).items():
            found.setdefault(f"the content of {name}", set()).add(digest[:16])
    return {name: " ".join(sorted(digests)) for name, digests in found.items()}


@with_config(STRICT)
@dataclass(frozen=True)
class Fingerprint:
    """What something is made of, so that it goes on only with the same: digests, and outputs."""

    code: Mapping[str, str]
    """Files of the user's own that the model was built by."""
    weights: str
    calibration: str
    outputs: DenseOutputs

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInputs) -> Fingerprint:
        """Read a dense model, which is left as it was, and its data; run it on few samples."""
        batches = enumerate(inputs.batches(model, inputs.batch_size))
        data = ((f"{i}.{name}", x) for i, batch in batches for name, x in batch.items())
        # Of these a divergence is measured.
        labelled = torch.tensor([-1] if inputs.predictions is None else [1, *inputs.predictions])
        return cls(
            own_code(lineage_of(model).source),
            sha256_of(named_tensors(model)),
            sha256_of(chain([("labelled", labelled)], data)),
            DenseOutputs.of(model, inputs),
        )

    def difference(self, before: Fingerprint) -> str | None:
        """Say in what it differs from an earlier one, or None."""
        for name, _ in sorted(self.code.items() ^ before.code.items()):
            return f"{name} has changed"
        if self.weights != before.weights:
            return "the model's weights differ"
        if self.calibration != before.calibration:
            return "the calibration data differ"
        if self.outputs.differs(before.outputs):
            return "the dense model returns other values on the same inputs: its code has changed"
        return None
