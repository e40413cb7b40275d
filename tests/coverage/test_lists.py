"""What the page is made of: models built by rule, shrunk, and compared by code of its own."""

from __future__ import annotations

import pytest

from benchmarks.coverage import row as rows
from benchmarks.coverage.lists import LISTS, SHEET
from benchmarks.coverage.page import put_table, sheet
from tests.zoo import shrunken

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


def test_the_page_counts_the_rows_of_the_sheet() -> None:
    page = SHEET.with_name("results.md").read_text(encoding="utf-8")
    assert put_table(page, SHEET.read_text(encoding="utf-8")) == page
    frozen = {"list": "nets", "model": "of a gate", "outcome": "nothing"}  # none was shrunk
    table = put_table("<!-- coverage --><!-- end of coverage -->", sheet([frozen]))
    assert "| **all** | 1 | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 0 of 0 |" in table


# ---- transformers ------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["deepseek_v3", "bart", "mamba2", "gemma2", "segformer"])
def test_a_family_is_built_small_by_rule(family: str) -> None:
    made = shrunken.make(family)
    assert made.variant == type(made.model).__name__
    assert sum(p.numel() for p in made.model.parameters()) < 2_000_000
    assert len(made.inputs) == 2


_SLOW = {
    "torchvision": [
        *("efficientnet_b0", "googlenet", "regnet_x_400mf", "shufflenet_v2_x0_5"),
        "ssdlite320_mobilenet_v3_large.backbone",
    ],
    "timm": ["repghostnet_050"],
    "transformers": ["big_bird", "deepseek_v32", "fnet"],
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
