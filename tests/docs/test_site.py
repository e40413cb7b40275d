"""The site lists every page, and its reference every public name."""

import re

import pytest

import docs_hooks
import graph
import osscar
import solvers
from osscar.cli.commands import app
from tests.docs.pages import PAGES, ROOT


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {page for page in PAGES if page.startswith("docs/") and page.endswith(".md")}
    assert {f"docs/{page}" for page in listed} == pages  # notebooks are linked


@pytest.mark.parametrize("package", [osscar, solvers, graph])
def test_the_reference_has_every_public_name_once(package):
    name = package.__name__
    text = (ROOT / "docs" / "api" / f"{name}.md").read_text()
    described = re.findall(rf"^(?:::: |### ){name}\.(\w+)$", text, re.MULTILINE)
    assert sorted(described) == sorted(package.__all__)


def test_the_page_of_commands_has_every_command_and_option():
    text = docs_hooks.on_page_markdown((ROOT / "docs/api/commands.md").read_text())
    for name in ("demo", "prune", "recover", "sweep", "eval", "inspect", "export", "gap", "solve"):
        _, _, section = text.partition(f"\n## osscar {name}\n")
        section = section.partition("\n## ")[0]
        arguments = app.parse_commands([name])[1][-1].assemble_argument_collection()
        options = {one.name for one in arguments if one.show and one.name.startswith("--")}
        assert options <= set(re.findall(r"`(--[\w-]+)", section))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target
