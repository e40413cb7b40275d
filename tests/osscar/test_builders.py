"""Saving and loading models that no automatic class of language models knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import CheckpointError, FileError
from osscar.checkpoint.builders import LibraryOrigin
from osscar.checkpoint.directory import save
from osscar.checkpoint.files import MANIFEST_FILE
from osscar.proof.equivalence import proof_outputs
from osscar.proof.lineage import lineage_of
from tests.coverage.measure import half_of, shrink_by_half
from tests.zoo import transformers_case

IMAGES = [(torch.randn(2, 3, 32, 32),)]


def assert_alike(model: nn.Module, other: nn.Module, inputs: Any) -> None:
    for a, b in zip(proof_outputs(model, inputs), proof_outputs(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_model_of_torchvision_is_built_again_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = LibraryOrigin("torchvision", "squeezenet1_1", {"num_classes": 10}).build().eval()
    shrink_by_half(model, IMAGES)
    assert not save(model, tmp_path / "small", example_inputs=IMAGES[0]).stock
    assert_alike(osscar.load(tmp_path / "small"), model, IMAGES)
    file = tmp_path / "small" / MANIFEST_FILE
    written = file.read_text()
    for options in ({"norm_layer": ["os", "system"]}, {"no_such_option": 1}):
        data = json.loads(written)
        data["lineage"]["origin"]["options"] = options
        file.write_text(json.dumps(data))
        with pytest.raises(FileError, match=next(iter(options))):
            osscar.load(tmp_path / "small")


class Own(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 12)
        self.norm = nn.BatchNorm1d(12)
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.norm(self.enter(x))))


def test_a_model_of_ones_own_is_read_into_a_dense_one(tmp_path: Path) -> None:
    inputs, model, dense = [(torch.randn(3, 4),)], Own().eval(), Own()
    shrink_by_half(model, inputs)
    save(model, tmp_path / "small", example_inputs=inputs[0])
    with pytest.raises(CheckpointError, match=r"dense, `--dense module:function`"):
        osscar.load(tmp_path / "small")
    again = osscar.load(tmp_path / "small", dense=dense)
    assert_alike(again, model, inputs)
    assert dense.enter.out_features == 12
    assert not lineage_of(dense).plans


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["bloom", "bert", "t5", "vit"])
def test_neurons_alone_leave_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    case = transformers_case(family)
    model, inputs = case.build(), case.make_inputs()[:1]
    neurons = [g for g in graph.trace(model, inputs[0]).prunable if g.kind == "neurons"]
    osscar.slice_units(model, half_of(neurons))
    written = save(model, tmp_path / "small", example_inputs=inputs[0])
    assert written.stock == (family != "bloom")  # whose FFN is always four times the stream
    assert_alike(osscar.load(tmp_path / "small"), model, inputs)
