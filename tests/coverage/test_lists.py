"""What the page is made of: models built by rule, shrunk, and compared by code of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from benchmarks.coverage import row as rows
from benchmarks.coverage import shrunken
from benchmarks.coverage.case import Made, NotBuilt, first_that_runs
from benchmarks.coverage.lists import LISTS

_IDLE = "masking moves the outputs too little"


def _row(listed: str, name: str) -> rows.Row:
    return rows.measured(LISTS[listed].make(name))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "form"),
    [("topologies.residual", "eager"), ("programs.heads", "exported"), ("blocks.experts", "eager")],
)
def test_a_network_is_shrunk_and_compared(name: str, form: str) -> None:
    found = _row("nets", name)
    known = {"outcome": "whole", "form": form, "program": "proved", "precision": "float64"}
    assert found.items() >= known.items()
    assert float(found["difference"]) < 1e-9
    assert 0 < found["parameters_after"] < found["parameters"]
    assert _IDLE not in found["missing"]
    assert ("not refitted" in found["missing"]) == (name == "blocks.experts")


def test_networks_of_which_nothing_may_go_and_that_cannot_be_traced() -> None:
    found = _row("nets", "topologies.softmax")
    assert found["outcome"] == "nothing"
    assert "aten.softmax.int" in found["missing"]

    class Sorts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    found = rows.measured(Made(Sorts(4, 4).eval(), [(torch.randn(2, 4),), (torch.randn(3, 4),)]))
    assert found["outcome"] == "not_traced"
    assert found["missing"].startswith("TraceError")


def test_the_comparison_finds_what_the_proof_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model that computes something else is a failure, whatever the proof says."""
    honest = rows.shrunk

    def wrong(*given: Any) -> Any:
        found = honest(*given)
        with torch.no_grad():
            next(found[0].parameters()).mul_(1.01)
        return found

    monkeypatch.setattr(rows, "shrunk", wrong)
    found = _row("nets", "networks.small-net")
    assert found["outcome"] == "failed"
    assert "away from the masked one" in found["missing"]


# ---- transformers ------------------------------------------------------------------------


def test_every_family_with_a_head_is_listed_once() -> None:
    families = shrunken.families()
    assert {"llama", "bert", "t5", "vit", "mixtral"} <= set(families)
    assert families["llama"] == "LlamaForCausalLM"
    assert families["bert"] == "BertForMaskedLM"
    assert len(set(families.values())) == len(families)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["deepseek_v3", "bart", "mamba2", "gemma2", "segformer"])
def test_a_family_is_built_small_by_rule(family: str) -> None:
    made = shrunken.make(family)
    assert made.variant == type(made.model).__name__
    assert sum(p.numel() for p in made.model.parameters()) < 2_000_000
    assert len(made.inputs) == 2


def test_one_layer_of_each_kind_is_kept() -> None:
    config = hf.Gemma2Config(**shrunken.smaller(hf.Gemma2Config(), shrunken.Way(2)))
    assert config.num_hidden_layers == 2
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_attention_heads % config.num_key_value_heads == 0
    nested = shrunken.smaller(hf.Gemma3Config(), shrunken.Way(2))["text_config"]
    assert set(nested.layer_types) == {"sliding_attention", "full_attention"}


def test_what_never_runs_is_not_built() -> None:
    with pytest.raises(NotBuilt, match="RuntimeError"):
        first_that_runs(nn.Linear(3, 4), [[(torch.randn(2, 5),)]])
    silent = nn.Linear(3, 4)
    with torch.no_grad():
        silent.weight.fill_(float("nan"))
    with pytest.raises(NotBuilt, match="no finite number"):
        first_that_runs(silent, [[(torch.randn(2, 3),)]])


_SLOW = {
    "torchvision": [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "resnet18"),
        *("inception_v3", "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf"),
        *("shufflenet_v2_x0_5", "vgg11_bn", "vit_b_32", "lraspp_mobilenet_v3_large"),
        "ssdlite320_mobilenet_v3_large.backbone",
    ],
    "timm": ["repghostnet_050", "resnet10t", "efficientnet_b0"],
    "transformers": ["big_bird", "ctrl", "deepseek_v32", "dinov2_with_registers", "fnet"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listed", "name"), [(listed, name) for listed, names in _SLOW.items() for name in names]
)
def test_a_model_of_a_library_is_shrunk_and_compared(listed: str, name: str) -> None:
    if listed != "transformers":
        pytest.importorskip(listed)
    found = _row(listed, name)
    assert found["outcome"] == "whole", found
    assert _IDLE not in found["missing"]
