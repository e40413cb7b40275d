"""One number has one value: what pages show is what the file of results has."""

import re

import pytest

from benchmarks.page import DENSE, OURS
from benchmarks.quality import PAPER, table
from benchmarks.results import FILE, cell, put
from tests.docs.pages import PAGES, ROOT

RESULTS = FILE.read_text(encoding="utf-8")
CITED = re.compile(r"([\d.,]*\d)[^\d|<]*<!-- (.+?) / (.+?) / (.+?) -->")
PERPLEXITY = re.compile(r"(?<![\d.,])\d\d\.\d\d(?![\d.])(?! ?[%x])")
OF_THEIR_OWN = ("docs/results.md", "docs/tried.md", "docs/peers.md", "CHANGELOG.md")
"""Pages with measurements of other settings and versions."""


@pytest.mark.parametrize("page", PAGES)
def test_a_number_that_names_its_cell_is_the_one_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    cited = CITED.findall(text)
    assert page in OF_THEIR_OWN or len(cited) == len(re.findall("<!-- [^>]+ / ", text))
    for number, *names in cited:
        assert re.findall(r"[\d.,]*\d", cell(RESULTS, *names))[:1] == [number], names


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_THEIR_OWN])
def test_a_perplexity_names_its_cell(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|^ {4}.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert PERPLEXITY.findall(CITED.sub("", text)) == []


def test_what_a_benchmark_prints_goes_into_the_cells_of_its_names():
    row = {"setting": "half", "samples": 64, "steps": 0}
    rows = [
        {**row, "method": DENSE, "quality": {"perplexity": 20.0}},
        {**row, "method": OURS, "quality": {"perplexity": 30.0}, "seconds": 7.2},
        {**row, "method": OURS, "quality": {"perplexity": 31.0}, "seconds": 8.2},
        {**row, "method": PAPER, "failed": "MemoryError"},
        {**row, "method": OURS, "steps": 16, "quality": {"perplexity": 25.0}, "seconds": 9.0},
    ]
    printed = "\n".join(["progress", *table(rows), ""])
    old = f"| kept or removed | {DENSE} | {OURS} | {PAPER} | greedy (ZipLM's) | wanda | magnitude |"
    page = f"# Text\n\n{old}\n| --- |\n| half, 64 samples | 1 | 2 | 3 | | | |\n\nBelow.\n"
    page = put(page, "Text", printed)
    assert cell(page, "Text", "half, 64 samples", DENSE) == "20.00"
    assert cell(page, "Text", "half, 64 samples", OURS) == "30.50 (30.00 to 31.00)"
    assert cell(page, "Text", "half, 64 samples", PAPER) == "3"
    assert cell(page, "Text", "half, 64 samples, 16 steps", OURS) == "25.00"
    assert cell(page, "Text", "seconds: half, 64 samples", OURS) == "8"
    assert page.startswith("# Text\n\n| kept or")
    assert page.endswith("\n\nBelow.\n")
    assert put(page, "Text", printed) == page
    with pytest.raises(ValueError, match="values to unpack"):
        cell(page, "Text", "half, 64 samples", "wanda")
