"""The page that lists what is covered knows every architecture that is tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from .zoo import FAMILIES, torchvision_names

_PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_every_architecture_has_a_row(library: str) -> None:
    if library == "torchvision":
        pytest.importorskip("torchvision")
    names = torchvision_names() if library == "torchvision" else FAMILIES
    rows = {line.split("`")[1] for line in _PAGE.read_text().splitlines() if line[:3] == "| `"}
    assert set(names) <= rows
