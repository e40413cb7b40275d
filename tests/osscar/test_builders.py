"""Saving and loading models that no automatic class of language models knows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import CheckpointError, EquivalenceError
from osscar.checkpoint.builders import LibraryOrigin
from osscar.checkpoint.directory import save
from osscar.checkpoint.manifest import MANIFEST_FILE
from osscar.proof.equivalence import proof_outputs
from osscar.proof.lineage import lineage_of
from tests.coverage.measure import half_of, shrink_by_half
from tests.zoo import transformers_case

IMAGES = [(torch.randn(2, 3, 32, 32),), (torch.randn(1, 3, 48, 48),)]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = LibraryOrigin("torchvision", "resnet18", {"num_classes": 10}).build().eval()
    shrink_by_half(model, IMAGES)
    return model


@pytest.mark.sampled(1)
@pytest.mark.parametrize("inputs", [None, IMAGES[0]], ids=["tensors", "outputs"])
def test_a_model_of_torchvision_is_built_again_by_name(
    resnet: nn.Module, inputs: tuple[Tensor, ...] | None, tmp_path: Path
) -> None:
    assert not save(resnet, tmp_path / "small", example_inputs=inputs).stock
    again = osscar.load(tmp_path / "small")
    for a, b in zip(proof_outputs(again, IMAGES), proof_outputs(resnet, IMAGES), strict=True):
        assert torch.equal(a, b)
    shrink_by_half(again, IMAGES)  # a model that was read can be pruned and saved again
    save(again, tmp_path / "small", overwrite=True)
    assert osscar.load(tmp_path / "small").conv1.out_channels == 16


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"library": "pickle"}, "not known here"),
        ({"name": "resnet9000"}, "resnet9000"),
        ({"options": {"weights": "IMAGENET1K_V1"}}, "weights"),
        ({"options": {"norm_layer": ["os", "system"]}}, "norm_layer"),
        ({"options": {"num_classes": -1}}, "is not a checkpoint that can be read"),
        ({"options": {"groups": 0}}, "is not a checkpoint that can be read"),
        ({"options": {"no_such_option": 1}}, "no_such_option"),
    ],
    ids=str,
)
def test_an_origin_that_makes_no_sense_is_refused(
    resnet: nn.Module, change: dict[str, object], match: str, tmp_path: Path
) -> None:
    save(resnet, tmp_path / "small")
    file = tmp_path / "small" / MANIFEST_FILE
    data = json.loads(file.read_text())
    data["lineage"]["origin"].update(change)
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=match):
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
    inputs = [(torch.randn(3, 4),)]
    model = Own().eval()
    shrink_by_half(model, inputs)
    save(model, tmp_path / "small", example_inputs=inputs[0])
    with pytest.raises(CheckpointError, match=r"\(dense=\)"):
        osscar.load(tmp_path / "small")
    dense = Own()
    again = osscar.load(tmp_path / "small", dense=dense)
    assert torch.equal(*proof_outputs(again, inputs), *proof_outputs(model, inputs))
    assert dense.enter.out_features == 12
    assert not lineage_of(dense).plans


class SoundForCausalLM(Own):
    """A model that is named as transformers names its own, and reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=3)


def test_a_name_does_not_make_a_language_model(tmp_path: Path) -> None:
    inputs = [(torch.randn(3, 4),)]
    model = SoundForCausalLM().eval()
    shrink_by_half(model, inputs)
    save(model, tmp_path / "small", example_inputs=inputs[0])
    again = osscar.load(tmp_path / "small", dense=SoundForCausalLM())
    assert torch.equal(*proof_outputs(again, inputs), *proof_outputs(model, inputs))


def test_what_was_written_wrongly_is_noticed_without_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Own().eval()
    write = osscar.checkpoint.directory.write_tensors

    def spoil(file: Path, tensors: dict[str, torch.Tensor], *others: Any) -> Any:
        bias = tensors["leave.bias"] + 1.0
        return write(file, {**tensors, "leave.bias": bias}, *others)

    monkeypatch.setattr(osscar.checkpoint.directory, "write_tensors", spoil)
    with pytest.raises(EquivalenceError, match=r"leave\.bias"):
        save(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["bert", "bloom", "distilbert", "t5", "falcon-grouped", "vit"])
def test_neurons_alone_leave_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    case = transformers_case(family)
    model, inputs = case.build(), case.make_inputs()
    neurons = [g for g in graph.trace(model, inputs[0]).prunable if g.kind == "neurons"]
    osscar.shrink(model, half_of(neurons), inputs)
    written = save(model, tmp_path / "small", example_inputs=inputs[0])
    assert written.stock == (family != "bloom")  # whose FFN is always four times the stream
    again = osscar.load(tmp_path / "small")
    for a, b in zip(proof_outputs(again, inputs), proof_outputs(model, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
