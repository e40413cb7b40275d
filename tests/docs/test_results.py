"""One number has one value: what pages show is what the file of results has."""

import re

import pytest

from benchmarks.results import FILE, cell
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
